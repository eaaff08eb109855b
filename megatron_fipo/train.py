"""The training loop.

    torchrun --nproc-per-node 2 -m megatron_fipo.train examples/quickstart/fipo.yaml train.num_steps=5

Every rank runs this program. A step generates responses, has them judged, keeps the groups that carry a signal, turns
rewards into advantages, packs, and takes one optimizer step on each minibatch; then the rollout engine gets the new
weights.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.actor.actor import Actor, NonFiniteError, UpdateResult
from megatron_fipo.actor.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from megatron_fipo.actor.model import DTYPES
from megatron_fipo.config import (
    Config,
    load_config,
    read_model_config,
    validate,
    validate_model_layout,
    warnings_for,
)
from megatron_fipo.convert.stream import export_folder
from megatron_fipo.data.prompts import PromptStream, evaluation_sets
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.evaluation import EVALUATION_STEP, ProblemResult, evaluate_problems, write_problems
from megatron_fipo.interrupt import Interrupt
from megatron_fipo.metrics.console import Console, PhaseProgress, ShownSample
from megatron_fipo.metrics.reductions import Last, Metrics, Sum, merge, scalars
from megatron_fipo.metrics.sinks import open_sinks
from megatron_fipo.parallel import cp_layout, cp_suffix_sum, cpu, exchange
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.batch import build_minibatches
from megatron_fipo.rl.advantages import assign_advantages, assign_rewards
from megatron_fipo.rl.diagnostics import advantage_metrics, noise_floor, rollout_metrics
from megatron_fipo.rl.objective import LossOutput, policy_loss
from megatron_fipo.rl.sampling import BatchNotFilledError, DynamicSampler
from megatron_fipo.rl.types import Group, PackedBatch, Prompt
from megatron_fipo.rl.verifiers.pool import VerifierPool
from megatron_fipo.rl.verifiers.verdict import Verdict, VerifierJob
from megatron_fipo.rollout.collect import generate_groups
from megatron_fipo.rollout.engine import SamplingParams
from megatron_fipo.rollout.in_process import InProcessEngine
from megatron_fipo.run_folder import RunFolder, prepare

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3


class Interrupted(Exception):  # noqa: N818 - no error: it is what was asked for  # noqa: N818 - no error: it is what was asked for
    """The run was asked to stop, and its state is saved."""


class Trainer:
    """A run: its actor, rollout engine, prompts and verifiers, and the loop over them."""

    def __init__(self, config: Config, ranks: parallel_groups.ParallelGroups, console: Console) -> None:
        """Build everything. Collective over all ranks.

        Raises:
            ValueError: if the model, the data or the layout cannot be used; the message says why.
        """
        self.config, self.ranks, self.console = config, ranks, console
        self.is_leader = ranks.rank == 0
        self.tokenizer = load_tokenizer(config.model.path)
        self.prompts = PromptStream.from_config(config, self.tokenizer)
        self.evaluation_sets = evaluation_sets(config, self.tokenizer)
        self.actor = Actor(config, ranks)
        self.engine = InProcessEngine(
            config.model.path,
            dtype=DTYPES[config.model.dtype],
            max_batch_size=config.rollout.max_batch_size,
            device=parallel_groups.device(),
            tokenizer=self.tokenizer,
        )
        self.verifiers = VerifierPool(config.verifier.num_workers, config.verifier.timeout_s)
        self.sampler = DynamicSampler(config.rollout.num_prompts, config.sampling)
        self.folder = self._prepare_folder()
        self.next_step = 0
        self._seconds: dict[str, float] = {}

    def run(self) -> None:
        """Resume where there is something to resume, train, evaluate before and after, save and export.

        Raises:
            Interrupted: after a signal, with everything saved.
        """
        config = self.config
        if config.train.resume:
            self._resume()
        self._sync_weights()
        sinks = open_sinks(config, self.folder.root, resumed_step=self.next_step, enabled=self.is_leader)
        with sinks, Interrupt(self.engine.abort) as self.interrupt:
            before = self._evaluate("before")
            sinks.write(self.next_step, before)
            for step in range(self.next_step, config.train.num_steps):
                metrics = self.train_step(step)
                self.next_step = step + 1
                if config.evaluation.every_num_steps and self.next_step % config.evaluation.every_num_steps == 0:
                    metrics |= self._evaluate(f"step_{self.next_step:06d}", announce=False)
                sinks.write(step, metrics)
                self.console.step_line(step, metrics)
                if config.checkpoint.every_num_steps and self.next_step % config.checkpoint.every_num_steps == 0:
                    self._save(self._loop_state(self.next_step))
            after = self._evaluate("after", before)
            sinks.write(self.next_step, after)
            self._save(self._loop_state(self.next_step))
        self._export()
        self._say_where_things_lie()

    def train_step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and its updates. Collective over all ranks.

        Returns:
            The step's metrics, the same on every rank.

        Raises:
            BatchNotFilledError: if dynamic sampling found too few groups; the state before the step is saved.
            NonFiniteError: if a loss or gradient is not finite.
            Interrupted: after a signal; saved is the state before the step, or after the last whole update.
        """
        started, self._seconds = time.perf_counter(), {}
        with self._timed("rollout"):
            groups, generated = self._collect_groups(step)
        assign_advantages(groups, self.config.advantages.estimator)
        minibatches = build_minibatches(groups, self.config, self.ranks, self._pad_token_id)
        with self._timed("old_log_probs"):
            self._set_old_log_probs(minibatches)
        with self._timed("update"):
            updates = self._update(step, minibatches)
        with self._timed("weight_sync"):
            self._sync_weights()
        self._seconds["step"] = time.perf_counter() - started
        return self._step_metrics(groups, generated, minibatches, updates)

    # --- rollouts ---------------------------------------------------------------------------------------------------

    def _collect_groups(self, step: int) -> tuple[list[Group], list[Group]]:
        """(groups to train on, all that were generated), the same on every rank; rewards assigned."""
        rollout = self.config.rollout
        state_before = self._loop_state(step)
        generated: list[Group] = []
        sampling = SamplingParams(rollout.max_response_tokens, rollout.temperature, rollout.top_p)
        self.sampler.start_step(step)
        while self.sampler.needs_round:
            size = rollout.num_prompts_per_round or self._next_round_size(is_first=not generated)
            prompts = self.prompts.take(size)
            total = len(self._own_share(prompts)) * rollout.num_samples_per_prompt
            with self.console.rollout_progress(step, total) as progress:
                groups = self._generate(prompts, rollout.num_samples_per_prompt, sampling, step, progress)
            self._leave_if_asked(lambda: state_before)
            assign_rewards(groups, self.config.reward, rollout.max_response_tokens)
            self.sampler.add_round(groups)
            generated += groups
        for error in self.sampler.errors:
            self.console.warning(f"step {step}: dropped a group that could not be judged: {error}")
        try:
            return self.sampler.take(), generated
        except BatchNotFilledError:
            self._save(state_before)
            raise

    def _next_round_size(self, is_first: bool) -> int:
        return self.config.rollout.num_prompts if is_first else 2 * self.sampler.num_missing

    def _own_share(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """In-process engines are everywhere, so every rank generates, whatever model-parallel group it is in."""
        return list(prompts[self.ranks.rank :: self.ranks.world.size()])

    def _generate(
        self, prompts: Sequence[Prompt], num_samples: int, sampling: SamplingParams, step: int, progress: PhaseProgress
    ) -> list[Group]:
        """Judged groups of all prompts, in prompt order, the same on every rank. Collective."""
        own = asyncio.run(
            generate_groups(
                self.engine,
                self._own_share(prompts),
                self._judge,
                decode=lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True),
                num_samples=num_samples,
                sampling=sampling,
                run_seed=self.config.run.seed,
                step=step,
                on_sample=lambda sample: progress.advance(),
            )
        )
        by_id = {
            group.prompt.prompt_id: group
            for share in exchange.all_gather_objects(own, self.ranks.world)
            for group in share
        }
        return [by_id[prompt.prompt_id] for prompt in prompts]

    async def _judge(self, prompt: Prompt, response_text: str, finish_reason: str) -> Verdict:
        return await self.verifiers.judge(VerifierJob(prompt.verifier, response_text, prompt.reference, finish_reason))

    # --- updates ----------------------------------------------------------------------------------------------------

    def _set_old_log_probs(self, minibatches: Sequence[Sequence[PackedBatch]]) -> None:
        """Fill in the log-probs of the old policy and, where there is a KL penalty, of the reference."""
        objective = self.config.objective
        for microbatches in minibatches:
            if objective.old_log_probs == "rollout":
                for batch in microbatches:
                    batch.old_log_probs = batch.rollout_log_probs
            else:
                for batch, log_probs in zip(microbatches, self.actor.log_probs(microbatches), strict=False):
                    batch.old_log_probs = log_probs
            if objective.kl_coefficient:
                reference = self.actor.log_probs(microbatches, reference=True)
                for batch, log_probs in zip(microbatches, reference, strict=False):
                    batch.reference_log_probs = log_probs

    def _update(self, step: int, minibatches: Sequence[Sequence[PackedBatch]]) -> list[UpdateResult]:
        """One optimizer step on each minibatch, num_epochs times over."""
        results = []
        order = [batch for _ in range(self.config.train.num_epochs) for batch in minibatches]
        with self.console.update_progress(step, len(order)) as progress:
            for microbatches in order:
                results.append(self.actor.update(microbatches, self._loss, step))
                progress.advance()
                self._leave_if_asked(lambda: self._loop_state(step + 1))
        return results

    def _loss(self, log_probs: torch.Tensor, entropy: torch.Tensor, batch: PackedBatch) -> LossOutput:
        cp = self.ranks.cp
        assert batch.old_log_probs is not None
        return policy_loss(
            log_probs,
            batch.old_log_probs,
            batch.advantages,
            batch.response_mask,
            batch.cu_seqlens_padded,
            self.config.objective,
            cp_suffix_sum.sharded_suffix_sum(self.config.objective.half_life_tokens, cp),
            sequence_ids=cp_layout.local_sequence_ids(batch.cu_seqlens_padded, cp.size()),
            response_token_counts=batch.response_token_counts,
            counts_sequences=cp.rank() == 0,
            reference_log_probs=batch.reference_log_probs,
            entropy=entropy,
        )

    def _sync_weights(self) -> None:
        """Hand the actor's weights to the rollout engine."""
        self.engine.update_weights(self.actor.weights(), policy_version=self.next_step)

    # --- metrics ----------------------------------------------------------------------------------------------------

    def _step_metrics(
        self,
        groups: Sequence[Group],
        generated: Sequence[Group],
        minibatches: Sequence[Sequence[PackedBatch]],
        updates: Sequence[UpdateResult],
    ) -> dict[str, float]:
        """The step's numbers. Collective."""
        reports = self.ranks.reports_loss
        first = exchange.merge_metrics(updates[0].metrics if reports else None, self.ranks.world)
        later = exchange.merge_metrics(merge([r.metrics for r in updates[1:]]) if reports else None, self.ranks.world)
        noise = noise_floor(scalars(first), scalars(later))
        if noise.warning:
            self.console.warning(noise.warning)
        num_tokens = sum(sample.num_tokens for group in groups for sample in group.samples)
        num_sequences = sum(len(batch.sample_indices) for batches in minibatches for batch in batches)
        num_epochs = self.config.train.num_epochs
        norms = [result.grad_norm for result in updates]
        metrics: Metrics = {
            **merge([first, later]),
            **rollout_metrics(generated, self.config.rollout.max_response_tokens),
            **advantage_metrics(groups),
            **self.sampler.metrics(),
            **noise.metrics,
            "optim/grad_norm": Last(sum(norms) / len(norms)),
            "optim/grad_norm/max": Last(max(norms)),
            "optim/learning_rate": Last(updates[-1].learning_rate),
            "optim/updates": Last(len(updates)),
            "perf/tokens": Sum(num_tokens),
            "perf/tokens_per_s": Last(num_tokens / self._seconds["step"]),
            **{f"time_s/{phase}": Last(seconds) for phase, seconds in self._seconds.items()},
        }
        if self.config.objective.future_kl:
            received = cp_suffix_sum.exchanged_bytes(num_sequences, self.ranks.cp.size()) * num_epochs
            metrics["perf/suffix_sum_exchange_bytes"] = Last(received)
        numbers = scalars(metrics)
        if "fipo/influence_weight/std" in later:
            numbers["fipo/influence_weight/std_after_first_update"] = scalars(later)["fipo/influence_weight/std"]
        return numbers

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[phase] = time.perf_counter() - started

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self, when: str, before: dict[str, float] | None = None, *, announce: bool = True) -> dict[str, float]:
        """Scores on every evaluation source, shown and written down. Collective."""
        section, rollout = self.config.evaluation, self.config.rollout
        sampling = SamplingParams(
            section.max_response_tokens or rollout.max_response_tokens, section.temperature, section.top_p
        )
        metrics: dict[str, float] = {}
        for prompts in self.evaluation_sets.values():
            total = len(self._own_share(prompts)) * section.num_samples_per_prompt
            with self.console.evaluation_progress(total) as progress:
                groups = self._generate(prompts, section.num_samples_per_prompt, sampling, EVALUATION_STEP, progress)
            self._leave_if_asked(lambda: self._loop_state(self.next_step))
            problems = [ProblemResult.from_group(group) for group in groups]
            for result in evaluate_problems(problems).values():
                metrics |= result.metrics
            if self.is_leader:
                write_problems(self.folder.evaluation / f"{when}_{groups[0].prompt.source}.jsonl", problems)
            if announce:
                self._show_samples(when, groups)
        if metrics and announce:
            self.console.evaluation_table(
                "Held-out" if before is None else "Held-out, before and after",
                _headline(before or metrics),
                None if before is None else _headline(metrics),
            )
        return metrics

    def _show_samples(self, when: str, groups: Sequence[Group]) -> None:
        shown = groups[: self.config.run.num_sample_prints]
        self.console.samples(
            f"Responses {when} training: {groups[0].prompt.source}",
            [
                ShownSample(
                    prompt=group.prompt.text,
                    response=group.samples[0].response_text,
                    reference=_reference_text(group.prompt.reference),
                    answer=group.samples[0].answer,
                    accuracy=group.samples[0].accuracy,
                    num_tokens=len(group.samples[0].response_ids),
                    truncated=group.samples[0].truncated,
                )
                for group in shown
            ],
        )

    # --- saving -----------------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> RunFolder:
        note, folder = "", RunFolder(Path(self.config.run.output_dir))
        if self.is_leader:
            folder, note = prepare(self.config)
        exchange.barrier(self.ranks.world)
        if note:
            self.console.info(note)
        return folder

    def _loop_state(self, next_step: int) -> dict[str, Any]:
        """What the loop goes on from, besides the actor."""
        return {
            "next_step": next_step,
            "prompts": self.prompts.state_dict(),
            "sampler": self.sampler.state_dict(),
        }

    def _resume(self) -> None:
        checkpoint = latest_checkpoint(self.folder.checkpoints)
        if checkpoint is None:
            return
        state = load_checkpoint(self.actor, checkpoint)
        self.next_step = state["next_step"]
        self.prompts.load_state_dict(state["prompts"])
        self.sampler.load_state_dict(state["sampler"])
        self.console.info(f"resumed from {checkpoint}: {self.next_step} steps are done")

    def _save(self, loop_state: dict[str, Any]) -> None:
        path = save_checkpoint(
            self.actor,
            self.folder.checkpoints,
            loop_state["next_step"],
            loop_state,
            keep_last=self.config.checkpoint.keep_last,
        )
        self.console.info(f"saved {path}")

    def _leave_if_asked(self, loop_state: Callable[[], dict[str, Any]]) -> None:
        """Save and leave if any rank has received a signal. Collective."""
        if exchange.any_rank(self.interrupt.received is not None, self.ranks.world):
            self._save(loop_state())
            raise Interrupted

    def _export(self) -> None:
        if self.config.checkpoint.export_huggingface:
            export_folder(
                self.actor.weights(),
                self.config.model.path,
                self.folder.huggingface,
                is_writer=self.is_leader,
                dtype=DTYPES[self.config.model.dtype],
            )
            exchange.barrier(self.ranks.world)

    def _say_where_things_lie(self) -> None:
        places = {"checkpoint": str(self.folder.checkpoints)}
        if self.config.metrics.jsonl:
            places["metrics"] = str(self.folder.metrics)
        if self.config.metrics.tensorboard:
            places["TensorBoard"] = f"tensorboard --logdir {self.folder.root / 'tensorboard'}"
        command = None
        if self.config.checkpoint.export_huggingface:
            places["model"] = f"{self.folder.huggingface} (Hugging Face format)"
            command = f"{_console_script()} chat {self.folder.huggingface}"
        self.console.closing(places, command)

    @property
    def _pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def close(self) -> None:
        """Release processes and memory."""
        self.verifiers.close()
        self.engine.close()


def _headline(metrics: dict[str, float]) -> dict[str, float]:
    """What is shown of an evaluation; the rest is in the metrics."""
    names = ("avg@", "cons@", "pass@", "response_tokens/mean")
    shown = {name.removeprefix("evaluation/"): value for name, value in metrics.items()}
    return {
        name: value
        for name, value in shown.items()
        if name.split("/", 1)[1].startswith(names) and not name.endswith("_ci95")
    }


def _reference_text(reference: Any) -> str:
    if isinstance(reference, dict) and "entry" in reference:
        return str(reference["entry"].get("answer", ""))
    return str(reference)


def _console_script() -> str:
    """How this environment's `megatron-fipo` is called from here."""
    script = Path(sys.executable).with_name("megatron-fipo")
    here = Path.cwd()
    return str(script.relative_to(here)) if script.is_relative_to(here) else "megatron-fipo"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as a configuration says; the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_fipo.train", description="Train a model.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.num_steps=5")
    arguments = parser.parse_args(argv)
    is_leader = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(arguments.config, arguments.overrides)
        validate(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        model_config = read_model_config(config.model.path)
        validate_model_layout(config, model_config)
        return _train(config, warnings_for(config, model_config))
    except ValueError as error:
        # What the user gave cannot be used; every rank comes to the same conclusion, one says it.
        if is_leader:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _train(config: Config, warnings: Sequence[str]) -> int:
    cpu.install()
    ranks = parallel_groups.initialize(config.parallel, config.run.seed)
    console = Console(config, enabled=ranks.rank == 0 and config.metrics.console)
    trainer = None
    try:
        trainer = Trainer(config, ranks, console)
        console.banner(ranks.world.size(), {"parameters": f"{trainer.actor.num_parameters / 1e6:.2f} M on each rank"})
        for warning in warnings:
            console.warning(warning)
        trainer.run()
    except Interrupted:
        console.info("stopped by a signal; the same command goes on from the checkpoint")
        return EXIT_STOPPED
    except (BatchNotFilledError, NonFiniteError) as error:
        if ranks.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_STOPPED
    finally:
        if trainer is not None:
            trainer.close()
        parallel_groups.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
