"""The training loop, one thing after the other.

    megatron-fipo train examples/quickstart/fipo.yaml --nproc 2 train.num_steps=5

Every rank runs this program, under the project's launcher on one machine and under torchrun on several. What a run is
built of is in `run.parts`; where it stands, is saved and goes on from is `run.place`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_fipo.system import uncollected  # isort: skip - before all that is imported

from megatron_fipo import (
    cuda_start,  # noqa: F401 - before the packages that start CUDA
    quiet,  # noqa: F401 - before the packages that it silences
)

from megatron_fipo.parallel import uncompiled  # isort: skip # noqa: F401 - before Megatron-Core

from megatron_fipo.actor.trained import UpdateResult
from megatron_fipo.console.console import Console
from megatron_fipo.parallel.batch import Division, build_own_minibatches, divide
from megatron_fipo.parallel.cp_suffix_sum import exchange_metrics
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.metric_merge import merge_metrics
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.rl.dynamic_sampling import BatchNotFilledError
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rollout.source import StepRollouts
from megatron_fipo.run.closing import close_run, close_run_again
from megatron_fipo.run.command import run_rank
from megatron_fipo.run.named_on_hub import NamedRun
from megatron_fipo.run.old_log_probs import fill_in_log_probs
from megatron_fipo.run.parts import RunParts
from megatron_fipo.run.place import Place
from megatron_fipo.run.scoring import Scoring
from megatron_fipo.run.step_report import StepClock, step_metrics
from megatron_fipo.run.tracing import StepTrace
from megatron_fipo.system.error_net import EXIT_BAD_INPUT as EXIT_BAD_INPUT
from megatron_fipo.system.error_net import EXIT_STOPPED as EXIT_STOPPED

uncollected.begin_to_collect()


class Trainer:
    """The loop over a run's parts. Everything is collective over all ranks."""

    def __init__(self, named: NamedRun, ranks: ParallelGroups, console: Console) -> None:
        self.parts = RunParts(named, ranks, console, lambda: self.place.leave_if_asked())
        self.place = Place(self.parts)
        self.scoring = Scoring(self.parts, self.place)
        self.objective = Objective(named.local.objective, ranks.cp)
        self.config, self.ranks, self.console = named.local, ranks, console

    def run(self) -> None:
        """Resume where there is something to resume, train, evaluate before and after, save and export.

        Raises:
            Interrupted: after a signal, with everything saved.
        """
        parts, place, scoring = self.parts, self.place, self.scoring
        if parts.verifiers is not None:
            parts.verifiers.wait_until_ready()  # what cannot judge is told before anything is generated
        if self.config.train.resume and place.resume():
            close_run_again(parts, place.at.step)
            return
        with parts.records.open(place.at.step, len(place.at.updates)), parts.interrupt:
            scoring.at_the_start()
            while not place.is_at_its_end:
                step = place.at.step
                metrics = self.train_step(step)
                parts.records.write(step, metrics)
                self.console.step_line(step, metrics)
                parts.ending.note_step(metrics, step + 1)
                place.move_to(step + 1)
                scoring.after_step_if_due()
                place.save_if_due()
            parts.source.stop()  # where the run's rule has ended it, the next step has begun
            scoring.at_the_end()
            place.finish()
        close_run(parts)

    def train_step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and its updates.

        Returns:
            The step's metrics, the same on every rank.

        Raises:
            BatchNotFilledError: if dynamic sampling found too few groups; the state before the step is saved.
            NonFiniteError: if a loss or gradient is not finite.
            Interrupted: after a signal; saved is the state before the step, or, once it has made updates, after the
                last one, from which the rest of them is made when the run goes on.
            CheckpointError: if that could not be saved.
        """
        parts, config, at, clock = self.parts, self.config, self.place.at, StepClock()
        if not at.updates:  # otherwise all that the step trains on is recorded, and these weights wrote none of it
            with clock.phase("weight_sync"):
                parts.source.give(parts.actor, step)
        with clock.phase("rollout"):
            rollouts = self._collect(step, only_recorded=bool(at.updates))
        with clock.phase("handover_to_training"):
            parts.source.take_back(parts.actor)
            if self._overlaps(step):
                parts.source.begin(step + 1)
        parts.records.keep_samples(step, rollouts, parts.plane, parts.decode)
        division = self._division(rollouts)
        minibatches = self._minibatches(rollouts, division, step)
        with clock.phase("trace"):
            trace = parts.tracing.begin(step, rollouts, division)
        with clock.phase("old_log_probs"):
            fill_in_log_probs(minibatches, parts.actor, config.objective, at.old_log_probs)
        with clock.phase("update"):
            updates = self._update(step, minibatches, trace, clock)
        exchanged = merge_metrics(exchange_metrics(minibatches, config, self.ranks), self.ranks.world)
        more = {**parts.source.metrics(), **exchanged}
        numbers, warning = step_metrics(rollouts, updates, clock, more, config, self.ranks)
        if warning:
            self.console.warning(warning, kind="noise")
        return numbers

    def _overlaps(self, step: int) -> bool:
        """Whether the next step is generated while this one trains. Evaluations have the servers to themselves."""
        is_last = step + 1 >= self.config.train.num_steps
        return self.config.rollout.overlap and not is_last and not self.scoring.is_due_after(step)

    def _collect(self, step: int, *, only_recorded: bool) -> StepRollouts:
        try:
            return self.parts.source.batch(step, only_recorded=only_recorded)
        except BatchNotFilledError:
            self.place.save()
            raise

    def _division(self, rollouts: StepRollouts) -> Division:
        lengths = rollouts.plan["num_tokens"].tolist()
        return divide(lengths, rollouts.group_sizes, self.config, self.ranks.dp.size())

    def _minibatches(self, rollouts: StepRollouts, division: Division, version: int) -> list[list[PackedBatch]]:
        """This rank's microbatches, of tokens that the ranks which generated them send here."""
        plan, plane = rollouts.plan, self.parts.plane
        samples = plane.deliver(rollouts.trajectory, plan["leader"], division.wanted)
        for index, sample in samples.items():
            sample.advantage = float(plan["advantage"][index])
        return build_own_minibatches(division, samples, self.config, self.ranks, self.parts.pad_token_id, version)

    def _update(
        self, step: int, minibatches: list[list[PackedBatch]], trace: StepTrace | None, clock: StepClock
    ) -> Sequence[UpdateResult]:
        """One optimizer step on each minibatch, num_epochs times over; those that are done already are left out."""
        place, order = self.place, [batch for _ in range(self.config.train.num_epochs) for batch in minibatches]
        with self.console.update_progress(step, len(order)) as progress:
            progress.advance(len(place.at.updates))
            for update, microbatches in list(enumerate(order))[len(place.at.updates) :]:
                objective = self.objective if trace is None else trace.watching(self.objective, update)
                place.add_update(self.parts.actor.update(microbatches, objective, step), minibatches)
                if trace is not None:
                    with clock.phase("trace"):
                        trace.write(update, len(order))
                progress.advance()
                place.leave_if_asked()
        return place.at.updates


def main(argv: Sequence[str] | None = None) -> int:
    """Train as a configuration says; the process's exit code."""
    return run_rank(argv, Trainer)


if __name__ == "__main__":
    sys.exit(main())
