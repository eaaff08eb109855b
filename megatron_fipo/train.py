"""The training loop.

    megatron-fipo train examples/quickstart/fipo.yaml --nproc 2 train.num_steps=5

Every rank runs this program, under the project's launcher on one machine and under torchrun on several. A step
generates responses, has them judged, keeps the groups that carry a signal, turns rewards into advantages, packs, and
takes one optimizer step on each minibatch; then the rollout engine gets the new weights.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.backend import layers_in_use
from megatron_fipo.actor.non_finite import NonFiniteError
from megatron_fipo.actor.trained import UpdateResult
from megatron_fipo.checkpoint.torch_dist import CheckpointError
from megatron_fipo.config import (
    Config,
    StopRule,
    is_hub_name,
    load_config,
    numbers_fingerprint,
    read_model_config,
    require_inputs,
    validate,
    validate_model_layout,
    verifier_weights,
    warnings_for,
)
from megatron_fipo.console.console import Console
from megatron_fipo.convert.weight_files import find_weight_files
from megatron_fipo.data.prompts import PromptStream, evaluation_sets
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.evaluation.during_training import HeldOutEvaluation
from megatron_fipo.metrics.reductions import Last, Metrics
from megatron_fipo.metrics.sinks import SinkGroup, open_sinks
from megatron_fipo.parallel import cpu, exchange
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.batch import build_minibatches
from megatron_fipo.parallel.cp_suffix_sum import exchanged_bytes
from megatron_fipo.parallel.device_memory import prefer_expandable_segments
from megatron_fipo.parallel.launcher import COMMAND, leave_with_the_launcher
from megatron_fipo.parallel.say_once import say_once
from megatron_fipo.parallel.sharded_loss import sharded_policy_loss
from megatron_fipo.parallel.token_values import gather_old_log_probs, set_old_log_probs
from megatron_fipo.parallel.waiting import OtherRankError
from megatron_fipo.rl.advantages import assign_advantages, assign_rewards
from megatron_fipo.rl.dynamic_sampling import BatchNotFilledError, DynamicSampler
from megatron_fipo.rl.judged import failures_by_kind, graded_scores
from megatron_fipo.rl.objective import LossOutput
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.trajectory import Group
from megatron_fipo.rollout.engine import NotFiniteError, SamplingParams
from megatron_fipo.rollout.generation import GroupGenerator, build_engine
from megatron_fipo.rollout.handover import Handover
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.run.best_model import BestModel
from megatron_fipo.run.folder import RunFolder, RunLock, prepare, record_config
from megatron_fipo.run.named_on_hub import NamedRun, resolve_for_run
from megatron_fipo.run.push_to_hub import check_before_run, push_after_run
from megatron_fipo.run.sample_choice import samples_of_step
from megatron_fipo.run.samples import forget_samples, write_samples
from megatron_fipo.run.saved import SavedRun
from megatron_fipo.run.step_report import StepClock, gather_results, restore_results, step_metrics
from megatron_fipo.run.verifier_probes import VerifierProbes, first_prompts
from megatron_fipo.system import (
    cuda_start,  # noqa: F401 - before the packages that start CUDA
    quiet,  # noqa: F401 - before the packages that it silences
)
from megatron_fipo.system.disk import DiskError
from megatron_fipo.system.error_net import EXIT_BAD_INPUT as EXIT_BAD_INPUT
from megatron_fipo.system.error_net import EXIT_STOPPED as EXIT_STOPPED
from megatron_fipo.system.error_net import report
from megatron_fipo.system.interrupt import Interrupt
from megatron_fipo.verifiers.check import Findings, inspect_own
from megatron_fipo.verifiers.isolation import isolation_warnings
from megatron_fipo.verifiers.pool import VerifierPool, WorkerStartError
from megatron_fipo.verifiers.registry import also_look_in


class Interrupted(Exception):  # noqa: N818 - no error: it is what was asked for
    """The run was asked to stop, and its state is saved."""


@dataclass(frozen=True)
class _HalfStep:
    """A step that a signal stopped between its updates.

    Attributes:
        results: of the updates that are done, this rank's.
        old_log_probs: of the step's samples, see `gather_old_log_probs`; the weights that gave them are gone.
    """

    results: list[UpdateResult]
    old_log_probs: Mapping[int, tuple[Tensor, Tensor]]


class Trainer:
    """A run: its actor, rollout engine, prompts and verifiers, and the loop over them."""

    def __init__(self, named: NamedRun, ranks: parallel_groups.ParallelGroups, console: Console) -> None:
        """Build everything. Collective over all ranks.

        Args:
            named: the configuration, with what it names on the hub fetched.

        Raises:
            ValueError: if the model, the data or the layout cannot be used; the message says why.
        """
        config, self._named = named.local, named
        self.config, self.ranks, self.console = config, ranks, console
        self.is_leader = ranks.rank == 0
        tokenizer = load_tokenizer(config.model.path)
        self._tokenizer = tokenizer
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        inspected = self._told_by_leader(lambda: inspect_own(config))
        self.prompts = PromptStream.from_config(config, tokenizer, inspected.row_readers)
        held_out = evaluation_sets(config, tokenizer, inspected.row_readers)
        # Named at the start: an import that came later would count as its first response's time.
        sources = (*config.data.train.values(), *config.data.evaluation.values())
        in_use = {name for source in sources for name in verifier_weights(source)}
        verifier = config.verifier
        self.verifiers = VerifierPool(
            verifier.num_workers, verifier.timeout_s, verifiers=sorted(in_use), trusted=verifier.trusted
        )
        try:
            probes = VerifierProbes(self.verifiers, first_prompts(self.prompts, held_out))
            self.actor = Actor(config, ranks)  # while verifiers are imported and answer
            self.warnings = [
                *inspected.warnings,
                *isolation_warnings(in_use, verifier.trusted),
                *self._told_by_all(probes.findings()),
            ]
        except BaseException:
            self.verifiers.close()
            raise
        self.folder, self._lock = self._prepare_folder()  # nothing is written for what cannot run
        self.engine, share = build_engine(config, ranks, tokenizer, self.folder.servers)
        self.handover = Handover(config, self.actor, self.engine)
        try:
            self.handover.start()
        except BaseException:
            self.engine.close()
            raise
        self.interrupt = Interrupt(self.engine.abort)
        self.ledger = RolloutLedger(
            self.folder.rollouts,
            ranks.rank,
            numbers_fingerprint(named.recorded),
            decode=self._decode,
        )
        self.generator = GroupGenerator(
            self.engine, self.verifiers, tokenizer, ranks, config.run.seed, self.ledger, share, self._leave_if_asked
        )
        self.sampler = DynamicSampler(config.rollout.num_prompts, config.sampling)
        self.saved = SavedRun(config, self.actor, self.folder, self.ledger, console, named.recorded)
        stop_when = config.train.stop_when
        self._stop_rule = StopRule.parse(stop_when) if stop_when else None
        self._ended_by = ""
        self.best = BestModel(
            config.checkpoint.keep_best, self.folder.best, self.saved.export, is_writer=self.is_leader
        )
        evaluation_folder = self.folder.evaluation if self.is_leader else None
        self.evaluation = HeldOutEvaluation(config, held_out, self.generator, console, evaluation_folder)
        self.next_step = 0
        self._half_step: _HalfStep | None = None
        self._evaluation_is_due = False
        self._state_to_go_on_from: Callable[[], dict[str, Any]] = lambda: self._loop_state(self.next_step)

    def run(self) -> None:
        """Resume where there is something to resume, train, evaluate before and after, save and export.

        Raises:
            Interrupted: after a signal, with everything saved.
        """
        config = self.config
        self.verifiers.wait_until_ready()  # what cannot judge is told before anything is generated
        if config.train.resume and self._resume():
            self._finish_again()
            return
        self._on_leader(lambda: record_config(self._named.recorded, self.folder, self._named.origins))
        self._on_leader(lambda: forget_samples(self.folder.samples, self.next_step))
        sinks = self._open_sinks()
        with sinks, self.interrupt:
            if self.next_step == 0:
                self._state_to_go_on_from = lambda: self._loop_state(0)
                # A first step that was stopped half-way has been evaluated before, and its weights have moved since.
                is_untouched = self._half_step is None
                before = self._evaluate("before") if is_untouched else self._scores_before()
                self.best.note(0, before)
                self._record(sinks, 0, before)
            if self._evaluation_is_due:
                self._evaluate_step(sinks)
            while self.next_step < config.train.num_steps and not self._ended_by:
                step = self.next_step
                metrics = self.train_step(step)
                self.next_step = step + 1
                self._record(sinks, step, metrics)
                self.console.step_line(step, metrics)
                self._end_if_met(metrics)
                if _is_due(self.next_step, config.evaluation.every_num_steps):
                    self._evaluate_step(sinks)
                self._save_if_due()
            self._state_to_go_on_from = lambda: self._loop_state(self.next_step)
            after = self._evaluate("after", compare=True)
            self._keep_if_best(after)
            self._record(sinks, self.next_step, after)
            self._save({**self._loop_state(self.next_step), "finished": True})
        if config.checkpoint.export_huggingface:
            self.saved.export(self.folder.huggingface)
        self._push_and_say_where_things_lie()

    def train_step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and its updates. Collective over all ranks.

        Returns:
            The step's metrics, the same on every rank.

        Raises:
            BatchNotFilledError: if dynamic sampling found too few groups; the state before the step is saved.
            NonFiniteError: if a loss or gradient is not finite.
            Interrupted: after a signal; saved is the state before the step, or, once it has made updates, after the
                last one, from which the rest of them is made when the run goes on.
            CheckpointError: if that could not be saved.
        """
        clock = StepClock()
        if self._half_step is None:  # otherwise all that it trains on is recorded, and these weights wrote none of it
            with clock.phase("weight_sync"):
                self.handover.to_rollout(step)
        with clock.phase("rollout"):
            groups, generated = self._collect_groups(step)
        state_before = self._state_to_go_on_from()
        with clock.phase("handover_to_training"):
            self.handover.to_training()
        assign_advantages(groups, self.config.advantages.estimator)
        self._keep_samples(step, groups, generated)
        minibatches = build_minibatches(groups, self.config, self.ranks, self.pad_token_id)
        with clock.phase("old_log_probs"):
            self._set_old_log_probs(minibatches)
        with clock.phase("update"):
            updates = self._update(step, minibatches, state_before)
        engine_metrics = exchange.merge_metrics(self.handover.metrics, self.ranks.world)
        more = {**self.sampler.metrics(), **self._exchange_metrics(minibatches), **engine_metrics}
        max_response_tokens = self.config.rollout.max_response_tokens
        numbers, warning = step_metrics(groups, generated, updates, clock, more, max_response_tokens, self.ranks)
        if warning:
            self.console.warning(warning, kind="noise")
        return numbers

    # --- rollouts ---------------------------------------------------------------------------------------------------

    def _collect_groups(self, step: int) -> tuple[list[Group], list[Group]]:
        """(groups to train on, all that were generated), the same on every rank; rewards assigned."""
        rollout = self.config.rollout
        state_before = self._loop_state(step)
        self._state_to_go_on_from = lambda: state_before
        generated: list[Group] = []
        sampling = SamplingParams(rollout.max_response_tokens, rollout.temperature, rollout.top_p)
        self.sampler.start_step(step)
        while self.sampler.needs_round:
            round_index = self.sampler.num_rounds
            prompts = self.prompts.take(self._round_size(is_first=round_index == 0))
            total = len(self.generator.own_share(prompts)) * rollout.num_samples_per_prompt
            with self.console.rollout_progress(step, total) as progress:
                groups = self.generator.generate(
                    prompts,
                    rollout.num_samples_per_prompt,
                    sampling,
                    step,
                    on_sample=lambda sample: progress.advance(),
                    round_index=round_index,
                    only_recorded=self._half_step is not None,
                )
            assign_rewards(groups, self.config.reward, rollout.max_response_tokens)
            self.sampler.add_round(groups)
            for failure in failures_by_kind(groups):
                self.console.warning(f"step {step}: {failure}", kind=failure.kind)
            generated += groups
        for scores in graded_scores(generated):
            self.console.warning(f"step {step}: {scores}", kind=f"graded scores of {scores.source}")
        try:
            return self.sampler.take(), generated
        except BatchNotFilledError:
            self._save(state_before)
            raise

    def _keep_samples(self, step: int, groups: Sequence[Group], generated: Sequence[Group]) -> None:
        """Write some of the step's responses down for people to read."""
        count = self.config.metrics.num_samples_per_step
        if not count:
            return

        def write() -> None:
            samples = samples_of_step(step, groups, generated, count, self.config.sampling, self._decode)
            write_samples(self.folder.samples, step, samples)

        self._on_leader(write)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def _round_size(self, is_first: bool) -> int:
        rollout = self.config.rollout
        return rollout.num_prompts_per_round or (rollout.num_prompts if is_first else 2 * self.sampler.num_missing)

    # --- updates ----------------------------------------------------------------------------------------------------

    def _set_old_log_probs(self, minibatches: Sequence[Sequence[PackedBatch]]) -> None:
        """Fill in the log-probs of the old policy and, where there is a KL penalty, of the reference."""
        objective = self.config.objective
        if self._half_step is not None:
            set_old_log_probs(minibatches, self._half_step.old_log_probs)
        elif objective.old_log_probs == "rollout":
            for batch in (batch for microbatches in minibatches for batch in microbatches):
                batch.old_log_probs = batch.rollout_log_probs
        else:  # nothing comes back where the pipeline does not end, and nothing is needed there
            for microbatches in minibatches:
                for batch, log_probs in zip(microbatches, self.actor.log_probs(microbatches), strict=False):
                    batch.old_log_probs = log_probs
        if objective.kl_coefficient:
            for microbatches in minibatches:
                reference = self.actor.log_probs(microbatches, reference=True)
                for batch, log_probs in zip(microbatches, reference, strict=False):
                    batch.reference_log_probs = log_probs

    def _update(
        self, step: int, minibatches: Sequence[Sequence[PackedBatch]], state_before: Mapping[str, Any]
    ) -> list[UpdateResult]:
        """One optimizer step on each minibatch, num_epochs times over; those that are done already are left out."""
        results = [] if self._half_step is None else list(self._half_step.results)
        self._half_step = None
        order = [batch for _ in range(self.config.train.num_epochs) for batch in minibatches]
        self._state_to_go_on_from = lambda: self._half_step_state(state_before, minibatches, results, len(order))
        with self.console.update_progress(step, len(order)) as progress:
            progress.advance(len(results))
            for microbatches in order[len(results) :]:
                results.append(self.actor.update(microbatches, self._loss, step))
                progress.advance()
                self._leave_if_asked()
        self._state_to_go_on_from = lambda: self._loop_state(step + 1)
        return results

    def _half_step_state(
        self,
        state_before: Mapping[str, Any],
        minibatches: Sequence[Sequence[PackedBatch]],
        results: list[UpdateResult],
        num_updates: int,
    ) -> dict[str, Any]:
        """What the loop goes on from between the updates of a step, besides the actor and the ledger. Collective."""
        return {
            **state_before,
            "num_updates": len(results),
            "old_log_probs": gather_old_log_probs(minibatches, self.ranks),
            "results": gather_results(results, self.ranks),
        }

    def _loss(self, log_probs: Tensor, entropy: Tensor, batch: PackedBatch) -> LossOutput:
        return sharded_policy_loss(log_probs, entropy, batch, self.config.objective, self.ranks.cp)

    def _exchange_metrics(self, minibatches: Sequence[Sequence[PackedBatch]]) -> Metrics:
        if not self.config.objective.future_kl:
            return {}
        num_sequences = sum(len(batch.sample_indices) for batches in minibatches for batch in batches)
        received = exchanged_bytes(num_sequences, self.ranks.cp.size()) * self.config.train.num_epochs
        return {"perf/suffix_sum_exchange_bytes": Last(received)}

    def _evaluate(self, when: str, **options: bool) -> dict[str, float]:
        """Evaluate the policy as it is now."""
        self.handover.to_rollout(self.next_step)
        self._check_folder()
        metrics: dict[str, float] = {}
        self._on_every_rank(lambda: metrics.update(self.evaluation.run(when, **options)))
        return metrics

    def _scores_before(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        self._on_leader(lambda: metrics.update(self.evaluation.scores_before()))
        return metrics

    def _evaluate_step(self, sinks: SinkGroup) -> None:
        """Evaluate after a step; a run that is stopped in it evaluates again when it goes on."""
        self._state_to_go_on_from = lambda: {**self._loop_state(self.next_step), "evaluation_is_due": True}
        scores = self._evaluate(f"step_{self.next_step:06d}", announce=False)
        self._keep_if_best(scores)
        if self._stop_rule is not None and self._stop_rule.metric in scores:
            self._end_if_met(scores)
        self._record(sinks, self.next_step - 1, scores)
        self._evaluation_is_due = False

    def _keep_if_best(self, scores: Mapping[str, float]) -> None:
        """Keep the model where it is the best so far."""
        if not self.config.checkpoint.keep_best:
            return
        self.handover.to_training()  # its weights may be lent out
        said: list[str] = []
        self._on_every_rank(lambda: said.append(self.best.note(self.next_step, scores)))
        if said[0]:
            self.console.info(said[0])

    def _end_if_met(self, metrics: Mapping[str, float]) -> None:
        """Make this step the last one where `train.stop_when` says so."""
        rule = self._stop_rule
        if rule is None or self._ended_by:
            return
        if rule.metric not in metrics and not rule.metric.startswith("evaluation/"):
            nearest = difflib.get_close_matches(rule.metric, metrics, n=3, cutoff=0.4)
            raise ValueError(
                f"train.stop_when={self.config.train.stop_when}: a step of this run has no metric {rule.metric}. "
                f"Its metrics are in {self.folder.metrics}" + f"; near are {', '.join(nearest)}." * bool(nearest)
            )
        if not rule.is_met(metrics):
            return
        self._ended_by = self.config.train.stop_when
        self.console.info(
            f"train.stop_when={self._ended_by}: {rule.metric} is {metrics[rule.metric]:g} after {self.next_step} "
            "steps, and the run ends here"
        )

    # --- before the start -------------------------------------------------------------------------------------------

    def _told_by_leader(self, look: Callable[[], Findings]) -> Findings:
        """What the leader finds, on every rank. Collective; a problem that it finds is raised everywhere."""
        findings = look() if self.is_leader else Findings()
        findings = exchange.all_gather_objects(findings, self.ranks.world)[0]
        findings.raise_problems()
        return findings

    def _told_by_all(self, own: Findings) -> tuple[str, ...]:
        """The warnings of all ranks, each once. Collective; a problem that one of them finds is raised everywhere."""
        found = exchange.all_gather_objects(own, self.ranks.world)
        for findings in found:
            findings.raise_problems()
        return tuple(dict.fromkeys(warning for findings in found for warning in findings.warnings))

    # --- saving -----------------------------------------------------------------------------------------------------

    def _on_every_rank(self, action: Callable[[], object]) -> None:
        """Do what one rank's disk or files may fail at; the error of any is raised on all. Collective."""
        failed: tuple[type[DiskError] | type[ValueError], str] | None = None
        try:
            action()
        except DiskError as error:
            failed = DiskError, str(error)
        except ValueError as error:
            failed = ValueError, str(error)
        for found in exchange.all_gather_objects(failed, self.ranks.world):
            if found:
                kind, message = found
                raise kind(message)

    def _on_leader(self, action: Callable[[], object]) -> None:
        self._on_every_rank(action if self.is_leader else lambda: None)

    def _open_sinks(self) -> SinkGroup:
        opened: list[SinkGroup] = []
        enabled, first = self.is_leader, self.next_step
        self._on_every_rank(
            lambda: opened.append(
                open_sinks(self._named.recorded, self.folder.root, resumed_step=first, enabled=enabled)
            )
        )
        return opened[0]

    def _record(self, sinks: SinkGroup, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics down. Collective."""
        self._check_folder()
        self._on_every_rank(lambda: sinks.write(step, metrics))

    def _check_folder(self) -> None:
        """See that nobody has taken the run's folder away, before more is written into it. Collective."""
        self._on_every_rank(lambda: self._lock.check() if self._lock is not None else None)

    def _finish_again(self) -> None:
        """A run that was finished before has nothing to do but to export what is not there, and to push it.

        The hub takes what it has already for no change, so a push that failed, or that a kill came before, is made up.
        """
        self.console.info(
            f"the run is finished: its {self.next_step} steps are done and saved, and nothing is done again. "
            f"{f'Change train.stop_when={self._ended_by}' if self._ended_by else 'Raise train.num_steps'} to go on, or "
            "set train.resume=false to start over (this run is renamed)"
        )
        if self.config.checkpoint.export_huggingface and not self.folder.huggingface.is_dir():
            self.saved.export(self.folder.huggingface)
        self._push_and_say_where_things_lie()

    def _prepare_folder(self) -> tuple[RunFolder, RunLock | None]:
        """The run's folder, and on the leader its lock. Collective; an error of the leader is raised everywhere."""
        folder, lock, note, problem = RunFolder(Path(self.config.run.output_dir)), None, "", ""
        if self.is_leader:
            try:
                folder, lock, note = prepare(self.config)
            except ValueError as error:
                problem = str(error)
        problem = exchange.all_gather_objects(problem, self.ranks.world)[0]
        if problem:
            raise ValueError(problem)
        if note:
            self.console.info(note)
        return folder, lock

    def _loop_state(self, next_step: int) -> dict[str, Any]:
        """What the loop goes on from at the beginning of a step, besides the actor."""
        return {
            "next_step": next_step,
            "prompts": self.prompts.state_dict(),
            "sampler": self.sampler.state_dict(),
            "best": self.best.state_dict(),
            "ended_by": self._ended_by,
        }

    def _save_if_due(self) -> None:
        """Between steps: the last one is followed by a checkpoint in any case."""
        self.saved.poll()
        is_last = self.next_step >= self.config.train.num_steps or bool(self._ended_by)
        if not is_last and _is_due(self.next_step, self.config.checkpoint.every_num_steps):
            self._save(self._loop_state(self.next_step), in_background=True)

    def _save(self, state: Mapping[str, Any], *, in_background: bool = False) -> None:
        self._check_folder()
        self.handover.to_training()  # the actor's weights may be lent out
        self.saved.save(state, in_background=in_background)

    def _resume(self) -> bool:
        """Take up what was saved, if anything; whether the run was finished."""
        state = self.saved.restore()
        if state is None:
            return False
        self.next_step = state["next_step"]
        self.prompts.load_state_dict(state["prompts"])
        self.sampler.load_state_dict(state["sampler"])
        self._evaluation_is_due = state.get("evaluation_is_due", False)
        if "best" in state:  # not in checkpoints from before there was one
            self.best.load_state_dict(state["best"])
        # Another rule, or none, lets a run that had ended go on.
        self._ended_by = self.config.train.stop_when if state.get("ended_by") == self.config.train.stop_when else ""
        if state.get("num_updates"):
            self._half_step = _HalfStep(restore_results(state["results"], self.ranks), state["old_log_probs"])
        is_at_its_end = self.next_step >= self.config.train.num_steps or bool(self._ended_by)
        return bool(state.get("finished")) and is_at_its_end

    def _leave_if_asked(self) -> None:
        """Save and leave if any rank has received a signal: after every update, around every generation. Collective."""
        if exchange.any_rank(self.interrupt.received is not None, self.ranks.world):
            self._save(self._state_to_go_on_from())
            raise Interrupted

    def _push_and_say_where_things_lie(self) -> None:
        pushed = push_after_run(self._named, self.folder, self.ranks.world, self.console)
        places = {"checkpoint": str(self.folder.checkpoints)}
        if self.best.step:
            places["best model"] = f"{self.folder.best} (after {self.best.step} steps)"
        if self.config.metrics.jsonl:
            places["metrics"] = str(self.folder.metrics)
        if self.config.metrics.tensorboard:
            places["TensorBoard"] = f"tensorboard --logdir {self.folder.root / 'tensorboard'}"
        command = None
        if self.config.checkpoint.export_huggingface:
            places["model"] = f"{self.folder.huggingface} (Hugging Face format)"
            command = f"{_console_script()} chat {self.folder.huggingface}"
        if pushed:
            places["on the hub"] = pushed
        self.console.closing(places, command, self.evaluation.prompts_to_try())

    def close(self) -> None:
        """Release processes and memory."""
        self.verifiers.close()
        self.engine.close()
        self.ledger.close()
        if self._lock is not None:
            self._lock.release()


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _console_script() -> str:
    """How this environment's `megatron-fipo` is called from here."""
    script = Path(sys.executable).with_name("megatron-fipo")
    here = Path.cwd()
    return str(script.relative_to(here)) if script.is_relative_to(here) else "megatron-fipo"


def _command_that_goes_on(config: Config, arguments: Sequence[str]) -> str:
    """What to type to resume: the command that was typed, with train.resume=true where it says otherwise."""
    typed = os.environ.get(COMMAND)
    if typed is None:
        launcher = (
            f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
            if "LOCAL_WORLD_SIZE" in os.environ
            else "python"
        )
        typed = f"{launcher} -m megatron_fipo.train {shlex.join(arguments)}"
    return typed if config.train.resume else f"{typed} train.resume=true"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as a configuration says; the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_fipo.train", description="Train a model.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.num_steps=5")
    arguments = parser.parse_args(argv)
    leave_with_the_launcher()
    try:
        config = load_config(arguments.config, arguments.overrides)
        also_look_in(Path(arguments.config).parent)
        validate(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        require_inputs(config, arguments.config)
        if not is_hub_name(config.model.path):  # a model that is here is looked at before ranks wait for each other
            _warnings_of_model(config)
        return _train(config, [arguments.config, *arguments.overrides])
    except Exception as error:  # noqa: BLE001 - every error ends in words and an exit code
        return report(error, say_once)


def _warnings_of_model(config: Config) -> list[str]:
    """Refuse a layout into which the model does not divide; what else there is to say."""
    model_config = read_model_config(config.model.path)
    validate_model_layout(config, model_config)
    left_over = find_weight_files(config.model.path).warning()
    return [*warnings_for(config, model_config), *[left_over] * bool(left_over)]


def _train(config: Config, arguments: Sequence[str]) -> int:
    cpu.install()
    prefer_expandable_segments()
    ranks = parallel_groups.initialize(config.parallel, config.run.seed)
    if ranks.rank != 0:  # every rank reads the same data, and one tells of it
        logging.getLogger("megatron_fipo.data").setLevel(logging.ERROR)
    console = Console(config, enabled=ranks.rank == 0 and config.metrics.console)
    trainer = None
    try:
        check_before_run(config, ranks.world)
        named = resolve_for_run(config, ranks.world, console.info)
        config = named.local
        warnings = [*named.notes, *_warnings_of_model(config)]
        trainer = Trainer(named, ranks, console)
        facts = {"parameters": f"{trainer.actor.num_parameters / 1e6:.2f} M on each rank"}
        facts["layers"] = layers_in_use(config.model, trainer.actor.shape.head_dim)
        console.banner(ranks.world.size(), facts)
        for warning in (*warnings, *trainer.warnings):
            console.warning(warning)
        trainer.run()
    except Interrupted:
        command = _command_that_goes_on(config, arguments)
        console.command("stopped by a signal, and saved; this goes on from the checkpoint:", command)
        return EXIT_STOPPED
    except (
        *(BatchNotFilledError, NonFiniteError, NotFiniteError, CheckpointError, DiskError),
        *(ServerError, OtherRankError, WorkerStartError),
    ) as error:
        say_once(f"error: {error}")
        return EXIT_STOPPED
    except Exception as error:  # noqa: BLE001 - told before the groups go, at whose end other ranks would speak up
        return report(error, say_once)
    finally:
        if trainer is not None:
            trainer.close()
        parallel_groups.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
