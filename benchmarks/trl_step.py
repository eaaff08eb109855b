"""A training step beside TRL's: the quick-start's model, prompts, verifier and batch, on the same cores, in turns.

    python benchmarks/trl_step.py --trl-python PYTHON [--repeats 5] [--num-steps 6] [--sides dp2,cp2,trl_2x1]

PYTHON is that of an environment with TRL (benchmarks/README.md says how to make it). In each repeat every side trains
once, one after the other, in another order each time; the first and the last step of each training do not count. Both
sides take the same prompts, draw 16 responses of at most 96 tokens to each of 16, judge them with the same function,
and make 8 updates with Adam in float32. TRL has no FIPO, so ours is `algorithm=dapo` unless told otherwise; TRL's loss
is its default, which is DAPO's.

For each side: seconds a step, of them rollouts (with judging) and training (all else), processor seconds of all its
processes, tokens, and the same per token, as medians over the repeats with the least and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, load_config
from megatron_fipo.data.prompts import PromptStream
from megatron_fipo.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples/quickstart/fipo.yaml"
SIDES = ROOT / "benchmarks/beside_trl"
LEARNING_RATE = 1e-6
"""So low that both policies stay the starting one: the sides' responses are then of the same lengths."""
NUM_WARM_UP = 1


@dataclass(frozen=True)
class Side:
    """A way to train.

    Attributes:
        processes, threads: of each process.
        options: of our configuration.
        is_before: ours, from the checkout that --before names.
    """

    is_ours: bool
    processes: int
    threads: int
    options: tuple[str, ...] = ()
    is_before: bool = False


ALL_SIDES = {
    "dp2": Side(True, 2, 1, ("parallel.cp=1",)),
    "cp2": Side(True, 2, 1, ("parallel.cp=2",)),
    "dp2_before": Side(True, 2, 1, ("parallel.cp=1",), is_before=True),
    "cp2_before": Side(True, 2, 1, ("parallel.cp=2",), is_before=True),
    "trl_1x2": Side(False, 1, 2),
    "trl_2x1": Side(False, 2, 1),
}


@dataclass(frozen=True)
class Times:
    """A training's mean step, without the first and the last: seconds, and what was done."""

    step_s: float
    rollout_s: float
    cpu_s: float
    response_tokens: float
    trained_tokens: float

    @property
    def training_s(self) -> float:
        """Everything but rollouts."""
        return self.step_s - self.rollout_s

    @property
    def us_per_token(self) -> float:
        """Microseconds of a step for each token of a response."""
        return 1e6 * self.step_s / self.response_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, help="Python of an environment with TRL")
    parser.add_argument(
        "--before", type=Path, help="another checkout of this project, for the sides dp2_before, cp2_before"
    )
    parser.add_argument("--sides", default="dp2,cp2,trl_1x2,trl_2x1", help=f"of {', '.join(ALL_SIDES)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=6, help="of each training, with those that do not count")
    parser.add_argument("--algorithm", default="dapo", help="ours; TRL's loss is DAPO's")
    arguments = parser.parse_args()
    names = arguments.sides.split(",")
    if unknown := [name for name in names if name not in ALL_SIDES]:
        parser.error(f"no side is named {unknown[0]!r}; there are {', '.join(ALL_SIDES)}")
    if any(not ALL_SIDES[name].is_ours for name in names) and arguments.trl_python is None:
        parser.error("TRL's sides need --trl-python PYTHON")
    if any(ALL_SIDES[name].is_before for name in names) and arguments.before is None:
        parser.error("what is to be compared with before needs --before FOLDER")
    config = load_config(QUICKSTART, our_options(arguments.algorithm, arguments.num_steps))
    settings = trl_settings(config)
    times: dict[str, list[Times]] = {name: [] for name in names}
    for repeat in range(arguments.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(train(ALL_SIDES[name], arguments, settings))
            print(f"repeat {repeat}: {name}: {times[name][-1]}", file=sys.stderr, flush=True)
    print(
        f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, ours: algorithm={arguments.algorithm}"
    )
    report(times)


def our_options(algorithm: str, num_steps: int) -> list[str]:
    """What is not as the quick-start has it: one epoch, every group is trained on, nothing is saved or evaluated."""
    return [
        f"algorithm={algorithm}",
        f"train.num_steps={num_steps}",
        "train.num_epochs=1",
        "sampling.dynamic=false",
        f"optimizer.learning_rate={LEARNING_RATE}",
        "optimizer.num_warmup_steps=0",
        "metrics.tensorboard=false",
        "data.evaluation={}",
    ]


def trl_settings(config: Config) -> dict[str, Any]:
    """What TRL's side is told, from our configuration."""
    tokenizer = load_tokenizer(config.model.path)
    prompts = PromptStream.from_config(config, tokenizer).take(config.rollout.num_prompts * config.train.num_steps)
    return {
        "model": str(Path(config.model.path).resolve()),
        "prompts": [{"prompt": prompt.text, "reference": str(prompt.reference)} for prompt in prompts],
        "num_prompts": config.rollout.num_prompts,
        "num_samples": config.rollout.num_samples_per_prompt,
        "num_updates": config.train.num_minibatches,
        "num_steps": config.train.num_steps,
        "max_tokens": config.rollout.max_response_tokens,
        "learning_rate": config.optimizer.learning_rate,
        "adam_beta1": config.optimizer.adam_beta1,
        "adam_beta2": config.optimizer.adam_beta2,
        "adam_epsilon": config.optimizer.adam_epsilon,
        "weight_decay": config.optimizer.weight_decay,
        "max_grad_norm": config.optimizer.gradient_clip,
        "clip_ratio_low": config.objective.clip_ratio_low,
        "clip_ratio_high": config.objective.clip_ratio_high,
        "seed": config.run.seed,
    }


def train(side: Side, arguments: argparse.Namespace, settings: dict[str, Any]) -> Times:
    """Run one training in processes of its own.

    Raises:
        RuntimeError: if it fails, or does other work than it was told.
    """
    with tempfile.TemporaryDirectory() as folder:
        if side.is_ours:
            options = [*side.options, *our_options(arguments.algorithm, arguments.num_steps)]
            options += [f"run.output_dir={folder}/run"]
            command = [sys.executable, *_torchrun(side), f"{SIDES}/our_side.py", folder, str(QUICKSTART), *options]
        else:
            told = {**settings, "processes": side.processes, "threads": side.threads}
            (Path(folder) / "settings.json").write_text(json.dumps(told))
            command = [f"{arguments.trl_python}", *_torchrun(side), f"{SIDES}/trl_side.py"]
            command += [f"{folder}/settings.json", folder]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(side.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        ranks = [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(side.processes)]
    return _mean_step(ranks, settings)


def _torchrun(side: Side) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(side.processes)]


def _mean_step(ranks: Sequence[Sequence[dict[str, float]]], settings: dict[str, Any]) -> Times:
    """Of all ranks: the slowest one's seconds, everyone's processor seconds and tokens."""
    steps = list(zip(*ranks, strict=True))[NUM_WARM_UP:]

    def mean(name: str, over_ranks: Any) -> float:
        return statistics.fmean(over_ranks(rank.get(name, 0) for rank in step) for step in steps)

    for name, wanted in (
        ("responses", settings["num_prompts"] * settings["num_samples"]),
        ("updates", settings["num_updates"]),
    ):
        if mean(name, sum) != wanted:
            raise RuntimeError(f"a step had {mean(name, sum)} {name} in place of {wanted}: the sides do not compare")
    return Times(
        mean("step_s", max),
        mean("rollout_s", max),
        mean("cpu_s", sum),
        mean("response_tokens", sum),
        mean("trained_tokens", sum),
    )


def report(times: dict[str, list[Times]]) -> None:
    """Print the sides, and our times as shares of the faster TRL's."""
    columns = ("step_s", "rollout_s", "training_s", "cpu_s", "response_tokens", "trained_tokens", "us_per_token")
    print(f"| side | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, of_side in times.items():
        print(
            f"| {name} | "
            + " | ".join(_spread([getattr(each, column) for each in of_side]) for column in columns)
            + " |"
        )
    theirs = [name for name in times if not ALL_SIDES[name].is_ours]
    if not theirs:
        return
    best = min(theirs, key=lambda name: statistics.median(each.us_per_token for each in times[name]))
    print(f"\nratios to {best} in the same repeat, per token\n")
    columns = ("step_s", "rollout_s", "training_s", "cpu_s")
    print(f"| side | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name in times:
        ratios = [
            _spread(
                [
                    _per_token(mine, column) / _per_token(peer, column)
                    for mine, peer in zip(times[name], times[best], strict=True)
                ]
            )
            for column in columns
        ]
        print(f"| {name} | {' | '.join(ratios)} |")


def _per_token(times: Times, column: str) -> float:
    return float(getattr(times, column)) / times.response_tokens


def _spread(values: Sequence[float]) -> str:
    digits = 3 if max(values) < 100 else 0
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
