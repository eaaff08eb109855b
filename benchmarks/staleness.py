"""What staleness does to FIPO: the quick-start, trained on rollouts of k steps ago, with both forms of Future-KL.

    python benchmarks/staleness.py --out runs.jsonl [--staleness 0 1 2 4] [--seeds 0 1 2] [--steps 20]
    python benchmarks/staleness.py --out runs.jsonl --table

Real training in one process: the in-process engine generates with the actor's weights of exactly k steps ago, which
are kept for that long. Future-KL takes the current policy over the proximal one, or, the naive way, over the one that
wrote the tokens (objective.future_kl_reference); the gap between the two is corrected for by truncated importance
weights or not. Every run is a line of the file, and a run that stands there is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.parallel.local_ranks import run_local_ranks

ROOT = Path(__file__).resolve().parents[1]
REFERENCES, CORRECTIONS = ("proximal", "behaviour"), ("none", "token_truncated")
NUM_UNCOUNTED = 8
"""Steps at the start whose numbers are left out: the learning rate still rises, or no weights are k steps old yet."""
QUANTILES = (0.01, 0.99)
FOLLOWING = ((1, 8), (9, 16), (17, 32), (33, 96))
"""Numbers of tokens that Future-KL sums up, the token's own included: ranges of which the sums are compared."""
SETTINGS = (
    "rollout.num_prompts=8",
    "sampling.max_surplus_age_steps=0",  # surplus groups would be one step older than the others
    "parallel.cp=1",
    "metrics.tensorboard=false",
    "metrics.console=false",
    "checkpoint.export_huggingface=false",
)
"""Overrides of the quick-start's configuration: 128 responses and 16 updates a step, on one process."""


@dataclass(frozen=True)
class Case:
    """One training."""

    staleness: int
    reference: str
    correction: str
    seed: int
    steps: int

    @property
    def overrides(self) -> list[str]:
        """Of the configuration."""
        return [
            *SETTINGS,
            f"run.seed={self.seed}",
            f"train.num_steps={self.steps}",
            f"objective.future_kl_reference={self.reference}",
            f"objective.rollout_correction={self.correction}",
        ]


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Those that differ: with fresh rollouts behaviour and proximal policy are one, and there is nothing to correct."""
    for seed, staleness in itertools.product(arguments.seeds, arguments.staleness):
        for reference, correction in itertools.product(REFERENCES, CORRECTIONS):
            if staleness or correction == "none":
                yield Case(staleness, reference, correction, seed, arguments.steps)


def train(case: Case, folder: str) -> dict[str, Any]:
    """Train on this process; what was measured."""
    from megatron_fipo.run.command import run_rank
    from megatron_fipo.train import Trainer

    os.chdir(ROOT)
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    watched: dict[str, Any] = {}

    class StaleTrainer(Trainer):
        """The loop, whose engine gets the weights of some steps ago in a step, and the newest for an evaluation."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.kept: dict[int, KeptWeights] = {}
            self.objective = watched["objective"] = Watching(self.objective)  # type: ignore[assignment]

        def train_step(self, step: int) -> dict[str, float]:
            self.kept[step] = KeptWeights(self.parts.actor)
            self.kept.pop(step - case.staleness - 1, None)
            version, give = max(step - case.staleness, 0), self.parts.source.give
            self.parts.source.give = lambda policy, _: give(self.kept[version], version)  # type: ignore[method-assign]
            self.objective.begin(step)  # type: ignore[attr-defined]
            try:
                return super().train_step(step)
            finally:
                self.parts.source.give = give  # type: ignore[method-assign]

    run = Path(folder) / "run"
    arguments = [str(ROOT / "examples/quickstart/fipo.yaml"), *case.overrides, f"run.output_dir={run}"]
    if run_rank(arguments, StaleTrainer):
        raise RuntimeError(f"{case} failed:\n{(Path(folder) / 'log.txt').read_text()[-3000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return summary(lines, watched["objective"])


class KeptWeights:
    """A policy's weights as they are now, for an engine that copies them later."""

    def __init__(self, policy: Any) -> None:
        self._weights = [(name, tensor.clone()) for name, tensor in policy.weights()]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `rollout.engine.Policy`."""
        yield from self._weights


class Watching:
    """An objective that keeps the F of each update's response tokens."""

    def __init__(self, objective: Any) -> None:
        self._objective, self._step, self._microbatches = objective, 0, 0
        self.first: list[Tensor] = []
        """Of the first microbatch of each step: no weight has moved."""
        self.later: list[Tensor] = []
        self.summed: list[Tensor] = []
        """Of each token of `first`, how many tokens its F sums up."""

    def begin(self, step: int) -> None:
        """A step begins."""
        self._step, self._microbatches = step, 0

    def __call__(self, log_probs: Tensor, entropy: Tensor, batch: Any) -> Any:
        output = self._objective(log_probs, entropy, batch)
        if self._step >= NUM_UNCOUNTED:
            into = self.later if self._microbatches else self.first
            into.append(output.future_kl[batch.response_mask].clone())
            if not self._microbatches:
                self.summed.append(tokens_to_the_end(batch))
        self._microbatches += 1
        return output


def tokens_to_the_end(batch: Any) -> Tensor:
    """Of each response token, from it to its response's last one, itself included; responses are of one turn."""
    counts, ids = batch.response_token_counts, batch.sequence_ids[batch.response_mask]
    before = counts.cumsum(0) - counts
    return counts[ids] - (torch.arange(len(ids)) - before[ids])


def summary(lines: Sequence[dict[str, Any]], watched: Watching) -> dict[str, Any]:
    """The numbers of a run over its counted steps."""
    steps = [line for line in lines if "optim/grad_norm" in line]
    counted = steps[NUM_UNCOUNTED:]
    evaluations = [line["evaluation/held_out/avg@4"] for line in lines if "evaluation/held_out/avg@4" in line]
    assert all(line["rollout/group_age_steps/max"] == 0 for line in counted), "surplus groups would be older still"

    def mean(name: str) -> float | None:
        values = [line[name] for line in counted if line.get(name) is not None]
        return sum(values) / len(values) if values else None

    return {
        "first": spread(watched.first),
        "later": spread(watched.later),
        "by_length": by_length(watched),
        "mismatch": mean("mismatch/log_prob_difference/absmean"),
        "mismatch_mean": mean("mismatch/log_prob_difference/mean"),
        "newest": mean("mismatch/newest_version/log_prob_difference/absmean"),
        "older": mean("mismatch/older_versions/log_prob_difference/absmean"),
        "older_share": mean("mismatch/older_versions/share"),
        "truncated_share": mean("mismatch/truncated_share"),
        "response_tokens": mean("rollout/response_tokens/mean"),
        "grad_norm": mean("optim/grad_norm"),
        "rewards": [line["reward/mean"] for line in steps],
        "before": evaluations[0],
        "after": evaluations[-1],
    }


def by_length(watched: Watching) -> list[dict[str, float]]:
    """The F of first updates, apart by how many tokens it sums up."""
    future, summed = torch.cat(watched.first), torch.cat(watched.summed)
    return [
        {"from": least, "to": most, **spread([future[(summed >= least) & (summed <= most)]])}
        for least, most in FOLLOWING
    ]


def spread(parts: Sequence[Tensor]) -> dict[str, float]:
    """Of F: its standard deviation, percentiles and the share whose weight exp(F) is clipped to [0.8, 1.2]."""
    future = torch.cat(list(parts)).double()
    low, high = torch.quantile(future.float()[: 2**24], torch.tensor(QUANTILES)).tolist()
    weights = future.exp()
    return {
        "mean": float(future.mean()),
        "std": float(future.std()),
        "p1": low,
        "p99": high,
        "absmax": float(future.abs().max()),
        "clipped": float(((weights < 0.8) | (weights > 1.2)).double().mean()),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, one row for each case; ± is the standard deviation over seeds."""
    lines = [
        "| k | Future-KL over | correction | mean \\|d\\| | F before any update: std, clipped | F later: std | "
        + "1st, 99th percentile | clipped | reward, last 5 steps | held-out after | seeds |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    keys = dict.fromkeys((run["staleness"], run["reference"], run["correction"]) for run in runs)
    for staleness, reference, correction in sorted(keys, key=lambda key: (key[0], key[1] != "proximal", key[2])):
        same = [
            run
            for run in runs
            if (run["staleness"], run["reference"], run["correction"]) == (staleness, reference, correction)
        ]

        def over_seeds(*path: str, runs: Sequence[dict[str, Any]] = same) -> Tensor:
            values = []
            for run in runs:
                value: Any = run
                for name in path:
                    value = value[name]
                values.append(value)
            return torch.tensor(values, dtype=torch.float64)

        rewards = over_seeds("rewards")[:, -5:].mean(1)
        after = over_seeds("after")
        first, later = (
            {name: float(over_seeds(which, name).mean()) for name in ("std", "p1", "p99", "clipped")}
            for which in ("first", "later")
        )
        cells = (
            *(staleness, reference, correction, f"{float(over_seeds('mismatch').mean()):.2g}"),
            *(f"{first['std']:.3g}, {first['clipped']:.1%}", f"{later['std']:.3f}"),
            *(f"{later['p1']:+.2f}, {later['p99']:+.2f}", f"{later['clipped']:.1%}"),
            *(_with_deviation(rewards), _with_deviation(after), len(same)),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def length_table(runs: Sequence[dict[str, Any]]) -> str:
    """Of the naive form without a correction, before any update: mean of F and share clipped, by the tokens summed."""
    naive = [run for run in runs if (run["reference"], run["correction"]) == ("behaviour", "none")]
    ranges = [f"{least} to {most} tokens" for least, most in FOLLOWING]
    lines = [f"| k | {' | '.join(ranges)} |", f"|---:|{'---:|' * len(ranges)}"]
    for staleness in sorted({run["staleness"] for run in naive}):
        sums = [run["by_length"] for run in naive if run["staleness"] == staleness]
        cells = []
        for of_range in zip(*sums, strict=True):
            mean, clipped = (sum(part[name] for part in of_range) / len(of_range) for name in ("mean", "clipped"))
            cells.append(f"{mean:+.3f}, {clipped:.1%}")
        lines.append(f"| {staleness} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_deviation(values: Tensor) -> str:
    deviation = f" ± {float(values.std()):.3f}" if len(values) > 1 else ""
    return f"{float(values.mean()):.3f}{deviation}"


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of the runs, one a line")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4], help="steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--table", action="store_true", help="only print the table of what is in the file")
    arguments = parser.parse_args()
    done = read(arguments.out)
    if not arguments.table:
        if arguments.steps <= NUM_UNCOUNTED:
            parser.error(f"--steps must be above {NUM_UNCOUNTED}, the steps that are left out")
        made = {tuple(run[name] for name in ("staleness", "reference", "correction", "seed", "steps")) for run in done}
        for case in cases(arguments):
            if tuple(asdict(case).values()) in made:
                continue
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                (found,) = run_local_ranks(train, 1, case, folder, preload=("megatron_fipo.train",))
            with arguments.out.open("a") as file:
                file.write(json.dumps({**asdict(case), **found}) + "\n")
            print(f"{case}: {time.perf_counter() - started:.0f} s", flush=True)
    runs = read(arguments.out)
    print(table(runs), length_table(runs), sep="\n\n")


if __name__ == "__main__":
    main()
