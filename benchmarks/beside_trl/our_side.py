"""This project's training, a rank of it, with a stopwatch: `benchmarks/trl_step.py` starts it by torchrun."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.train import Trainer, run_rank  # isort: skip - before all that imports torch

from benchmarks.beside_trl.stopwatch import Stopwatch
from megatron_fipo.actor.trained import UpdateResult
from megatron_fipo.console.console import Console
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rollout.source import StepRollouts
from megatron_fipo.run.named_on_hub import NamedRun

FOLDER = Path(sys.argv[1])


class TimedTrainer(Trainer):
    """The training loop; its times go into FOLDER."""

    def __init__(self, named: NamedRun, ranks: ParallelGroups, console: Console) -> None:
        super().__init__(named, ranks, console)
        self.watch = Stopwatch()

    def run(self) -> None:
        super().run()
        self.watch.write(FOLDER, self.ranks.rank)

    def train_step(self, step: int) -> dict[str, float]:
        self.watch.begin_step()
        return super().train_step(step)

    def _collect(self, step: int, *, only_recorded: bool) -> StepRollouts:
        with self.watch.rollout():
            rollouts = super()._collect(step, only_recorded=only_recorded)
        if self.ranks.rank == 0:  # every rank holds the whole batch
            samples = [sample for group in rollouts.groups for sample in group.samples]
            self.watch.count(
                responses=len(samples),
                prompt_tokens=sum(len(sample.prompt_ids) for sample in samples),
                response_tokens=sum(sample.num_response_tokens for sample in samples),
                trained_tokens=sum(sample.num_policy_tokens for sample in samples),
            )
        return rollouts

    def _update(self, step: int, minibatches: list[list[PackedBatch]]) -> Sequence[UpdateResult]:
        updates = super()._update(step, minibatches)
        if self.ranks.rank == 0:
            self.watch.count(updates=len(updates))
        return updates


if __name__ == "__main__":
    sys.exit(run_rank(sys.argv[2:], TimedTrainer))
