"""`megatron-fipo init`: write an example into a folder, and say what to type next."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

SHIPPED = Path(__file__).parent
"""Where the examples lie; the quick-start is copied here when a wheel is built, see setup.py."""
QUICKSTART_OF_CLONE = SHIPPED.parents[1] / "examples" / "quickstart"

BASE_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""The quick-start's base model."""


@dataclass(frozen=True)
class Starter:
    """An example.

    Attributes:
        about: one line about it.
        folder: where it is written unless the user names another.
        run: name of its run.
        files: names of the files in its folder here.
        has_base: whether the quick-start's base model goes with it.
        before: commands that fetch what it reads; {folder} is where it was written.
        prompt: something to ask the trained model.
    """

    about: str
    folder: str
    run: str
    files: tuple[str, ...]
    has_base: bool = True
    before: tuple[str, ...] = ()
    prompt: str = "3+9-5="


STARTERS = {
    "quickstart": Starter(
        about="the demonstration: a small model learns to work out sums, in minutes on two CPU cores",
        folder="quickstart",
        run="quickstart",
        files=("fipo.yaml",),
    ),
    "own-data": Starter(
        about="data and a verifier of your own: JSONL files, judges.py, and a model that can read them",
        folder="own_data",
        run="own_data",
        files=("fipo.yaml", "judges.py", "train.jsonl", "held_out.jsonl"),
    ),
    "gsm8k": Starter(
        about="Qwen2.5-0.5B on GSM8K, on one GPU of 24 GB or more",
        folder="gsm8k",
        run="gsm8k",
        files=("fipo.yaml",),
        has_base=False,
        before=(
            "hf download Qwen/Qwen2.5-0.5B --local-dir {folder}/Qwen2.5-0.5B",
            "megatron-fipo prepare gsm8k --output {folder}/gsm8k.parquet",
            "megatron-fipo prepare gsm8k_test --output {folder}/gsm8k_test.parquet",
            "megatron-fipo preflight {folder}/fipo.yaml --world-size 1 --gpus-per-node 1 --gpu a100-80gb",
        ),
        prompt="A pen costs 3 dollars. What do 12 pens cost?",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Write an example into a folder and say what to type next. Nothing is ever overwritten. "
        + " ".join(f"{name}: {starter.about}." for name, starter in STARTERS.items())
    )
    parser.add_argument(
        "example", nargs="?", default="quickstart", choices=tuple(STARTERS), help="(default: quickstart)"
    )
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="by default the example's name, in the current one")


def run(arguments: argparse.Namespace) -> int:
    """Write the example. Returns the exit status."""
    write_starter(arguments.example, arguments.folder)
    return 0


def write_starter(name: str, folder: str | None) -> None:
    """Write an example, and say what was written and what to type next.

    Args:
        name: a key of `STARTERS`.
        folder: where to write it; None takes the example's own name, in the current folder.

    Raises:
        ValueError: if something is in the way, naming it, or the folder cannot be written to. Nothing is written then.
    """
    starter = STARTERS[name]
    target = Path(folder or starter.folder)
    sources = _sources(name, starter)
    _refuse_what_is_in_the_way(target, sources)
    try:
        for file, source in sources.items():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            with (target / file).open("xb") as out:
                out.write(source.read_bytes())
    except OSError as error:
        raise ValueError(f"{target} cannot be written to: {error.strerror or error}.") from error
    print(f"{target}: {starter.about}")
    for file in sources:
        print(f"  {target / file}")
    print("\nWhat to type next:")
    for command in next_commands(starter, target):
        print(f"  {command}")


def next_commands(starter: Starter, target: Path) -> list[str]:
    """Commands that fetch what is missing, train, look at the outcome, and talk to the model."""
    run = f"outputs/{starter.run}"
    return [
        *(shlex.join(word.format(folder=target) for word in command.split()) for command in starter.before),
        shlex.join(["megatron-fipo", "train", f"{target}/fipo.yaml"]),
        f"megatron-fipo samples {run}",
        shlex.join(["megatron-fipo", "evaluate", f"{target}/fipo.yaml", "--model", f"{run}/huggingface"]),
        shlex.join(["megatron-fipo", "chat", f"{run}/huggingface", "--prompt", starter.prompt]),
    ]


def _sources(name: str, starter: Starter) -> dict[str, Path]:
    """Files to copy by their names in the target."""
    quickstart = SHIPPED / "quickstart"
    if not quickstart.is_dir():
        quickstart = QUICKSTART_OF_CLONE
    folder = quickstart if name == "quickstart" else SHIPPED / name.replace("-", "_")
    sources = {file: folder / file for file in starter.files}
    if starter.has_base:
        sources |= {f"base/{file}": quickstart / "base" / file for file in BASE_FILES}
    return sources


def _refuse_what_is_in_the_way(target: Path, sources: dict[str, Path]) -> None:
    folders = dict.fromkeys([target, *((target / file).parent for file in sources)])
    taken = [path for path in folders if path.exists() and not path.is_dir()]
    taken = taken or [target / file for file in sources if (target / file).exists() or (target / file).is_symlink()]
    if taken:
        raise ValueError(
            f"in the way {'is' if len(taken) == 1 else 'are'} {', '.join(map(str, taken))}. Nothing is ever "
            "overwritten: name another folder, or move what is there."
        )
