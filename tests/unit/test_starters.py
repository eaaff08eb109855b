"""What `megatron-fipo init` writes: complete, right, and never over something that is there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo import cli
from megatron_fipo.config import load_config, validate
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.starters import command
from megatron_fipo.starters.command import SHIPPED, STARTERS
from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.registry import FOLDERS_VARIABLE
from megatron_fipo.verifiers.verdict import VerifierJob

ROOT = Path(__file__).parents[2]
ALL = tuple(STARTERS)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is an empty one."""
    monkeypatch.chdir(tmp_path)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ALL)
def test_an_example_is_valid_where_it_was_written(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", name, "my folder"]) == 0
    said = capsys.readouterr().out
    fetched = ["--files-elsewhere"] if STARTERS[name].before else []
    assert cli.main(["validate", "my folder/fipo.yaml", *fetched]) == 0
    assert "is valid" in capsys.readouterr().err
    config = load_config("my folder/fipo.yaml")
    assert config.run.output_dir == f"outputs/{STARTERS[name].run}"
    validate(config, world_size=config.parallel.cp)
    commands = [shlex.split(line) for line in said.split("What to type next:\n")[1].splitlines()]
    assert ["megatron-fipo", "train", "my folder/fipo.yaml"] in commands
    for words in commands:
        if words[0] == "megatron-fipo":
            cli.parse(words[1:])
    assert {"samples", "evaluate", "chat"} <= {words[1] for words in commands}


def test_every_file_of_the_gsm8k_example_is_fetched_by_a_printed_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "gsm8k"]) == 0
    fetched = re.findall(r"^  (?:hf|megatron-fipo prepare) .* (\S+)$", capsys.readouterr().out, re.MULTILINE)
    config = load_config("gsm8k/fipo.yaml")
    sources = (*config.data.train.values(), *config.data.evaluation.values())
    assert set(fetched) == {f"gsm8k/{path}" for path in (config.model.path, *(source.path for source in sources))}


QWEN2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
"""Its published config.json."""


def test_the_gsm8k_example_fits_the_gpu_that_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "gsm8k"]) == 0
    Path("config.json").write_text(json.dumps(QWEN2_5_0_5B))
    one_gpu = ["--world-size", "1", "--gpus-per-node", "1", "--gpu", "a100-80gb"]
    capsys.readouterr()
    sizes = ["--sizes-only", "--model-config", "config.json"]
    assert cli.main(["preflight", "gsm8k/fipo.yaml", *one_gpu, *sizes]) == 0
    said = capsys.readouterr().out
    (row,) = (line for line in said.splitlines() if line.startswith("│ an update "))
    total = float(row.split("│")[-3])
    text = Path("gsm8k/fipo.yaml").read_text()
    assert f"{total:.0f} GiB at the fullest" in text
    assert "one GPU of 24 GB or more" in text
    assert total * 2**30 < 24e9 * 0.95


def test_the_default_is_the_quickstart_and_a_file_equals_the_clones() -> None:
    assert cli.main(["init"]) == 0
    written = files_below(Path("quickstart"))
    assert written == {
        name: data for name, data in files_below(ROOT / "examples/quickstart").items() if not name.endswith(".py")
    }


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_overwritten(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(STARTERS[name].folder)
    folder.mkdir()
    (folder / "fipo.yaml").write_text("mine")
    assert cli.main(["init", name]) == 2
    assert str(folder / "fipo.yaml") in capsys.readouterr().err
    assert files_below(folder) == {"fipo.yaml": b"mine"}, "and nothing is written beside it"
    (folder / "fipo.yaml").rename(folder / "mine.yaml")
    assert cli.main(["init", name]) == 0, "what is not in the way may stay"
    assert (folder / "mine.yaml").read_text() == "mine"


def test_a_file_where_the_folder_would_be_is_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    Path("here").write_text("mine")
    assert cli.main(["init", "own-data", "here"]) == 2
    assert "in the way is here" in capsys.readouterr().err
    assert Path("here").read_text() == "mine"


def test_the_rows_of_own_data_are_right_readable_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["init", "own-data", "mine"]) == 0
    tokenizer = load_tokenizer("mine/base")
    problems: dict[str, list[str]] = {}
    for name in ("train", "held_out"):
        rows = [json.loads(line) for line in Path(f"mine/{name}.jsonl").read_text().splitlines()]
        problems[name] = [row["problem"] for row in rows]
        for row in rows:
            right = eval(row["problem"], {"__builtins__": {}})  # digits and signs of the project's own file
            assert row["solution"]["final"] == str(right), row
            assert tokenizer.unk_token_id not in tokenizer(row["problem"] + "=")["input_ids"]
    assert len(problems["train"]) == 400
    assert len(problems["held_out"]) == 64
    assert len({*problems["train"], *problems["held_out"]}) == 464, "no problem twice, and none in both"


def test_the_verifier_of_own_data_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDERS_VARIABLE, str(SHIPPED / "own_data"))
    texts = ("3+9=12;12-5=7;#7", "3+9=12;12-5=7;#8", "7", "#7#", "", "12-5=7;# 7 ")
    with VerifierPool(verifiers=["judges:verify"]) as pool:
        verdicts = pool.judge_all([VerifierJob("judges:verify", text, "7") for text in texts])
    assert [verdict.score for verdict in verdicts[:5]] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert verdicts[5].answer == "7"
    assert not any(verdict.error for verdict in verdicts)


def test_a_wheel_holds_every_example(tmp_path: Path) -> None:
    source, built = tmp_path / "source", tmp_path / "built"
    for name in ("setup.py", "README.md", "MANIFEST.in", "pyproject.toml"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "megatron_fipo", source / "megatron_fipo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples/quickstart", source / "examples/quickstart")
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)]
    made = subprocess.run(build, cwd=source, capture_output=True, text=True, check=False, timeout=240)
    assert made.returncode == 0, made.stderr
    shipped = built / "megatron_fipo/starters"
    for name in ALL:
        for starter in (STARTERS[name],):
            folder = shipped / name.replace("-", "_")
            expected = {*starter.files, *(f"base/{file}" for file in command.BASE_FILES if name == "quickstart")}
            assert expected <= files_below(folder).keys(), name
    clone = files_below(ROOT / "examples/quickstart")
    assert all(clone[name] == data for name, data in files_below(shipped / "quickstart").items())
