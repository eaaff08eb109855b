"""What a trace costs: bytes on the disk and between ranks, and seconds of a step with 8,192 responses of 10,000 tokens.

    python benchmarks/traces.py [--tokens 10000] [--groups 2] [--samples 16] [--cp 2]

Real ranks over gloo on this machine, the trainer's own code from the choice to the file, with made-up responses and
log-probs in place of a model's. One minibatch holds the traced groups alone; the peer is the same objective on the same
microbatches without a trace. Log-probs are random numbers, which do not compress: a real trace is smaller.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever the script is called from

from megatron_fipo import quiet  # noqa: F401, I001 - before the packages that it silences

from megatron_fipo.config import BatchSection, Config, MetricsSection, ParallelSection, TrainSection
from megatron_fipo.parallel import cpu, exchange, groups
from megatron_fipo.parallel.batch import build_own_minibatches, divide
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.local_ranks import run_local_ranks
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.rl.judged_group import JudgedGroup, plan_of
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory
from megatron_fipo.rollout.held import Held
from megatron_fipo.rollout.source import JudgedStep, StepRollouts
from megatron_fipo.run.tracing import Tracing
from megatron_fipo.traces.files import num_bytes_per_token, read_trace, trace_files
from megatron_fipo.traces.texts import token_texts_with

T = TypeVar("T")

NUM_PROMPT_TOKENS = 200
RECIPE_RESPONSES, RECIPE_TOKENS = 8192, 10_000
RECIPE_STEPS = 500


@dataclass(frozen=True)
class Task:
    """How much is traced.

    Attributes:
        num_tokens: of each response.
        num_groups, num_samples: groups, and responses of each.
        cp: ranks that share each sequence.
    """

    num_tokens: int
    num_groups: int
    num_samples: int
    cp: int

    @property
    def traced_tokens(self) -> int:
        """Response tokens of all groups."""
        return self.num_tokens * self.num_groups * self.num_samples

    @property
    def config(self) -> Config:
        """A microbatch has two sequences."""
        return replace(
            Config(),
            train=TrainSection(num_minibatches=1),
            parallel=ParallelSection(cp=self.cp),
            batch=BatchSection(max_tokens_per_microbatch=2 * (self.num_tokens + NUM_PROMPT_TOKENS + 8)),
            metrics=MetricsSection(num_traced_groups=self.num_groups, max_traced_tokens=self.traced_tokens),
        )


@dataclass(frozen=True)
class Measured:
    """Seconds of a rank, and bytes."""

    begin_s: float
    objective_s: float
    watched_s: float
    write_s: float
    sent_bytes: int


def made_up(task: Task) -> list[Group]:
    """Right and wrong responses of random tokens."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for prompt_id in range(task.num_groups):
        samples = [
            Trajectory.of_response(
                prompt_id=prompt_id,
                sample_index=index,
                prompt_ids=torch.randint(0, 255, (NUM_PROMPT_TOKENS,), generator=generator),
                response_ids=torch.randint(0, 255, (task.num_tokens,), generator=generator),
                rollout_log_probs=-torch.rand(task.num_tokens, generator=generator),
                finish_reason="stop",
                policy_versions=[(0, 0, task.num_tokens)],
                accuracy=float(index % 2),
                advantage=2.0 * (index % 2) - 1,
            )
            for index in range(task.num_samples)
        ]
        made.append(Group(Prompt(prompt_id, "made", "a question", (), "exact", "42"), samples))
    return made


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def run_rank(task: Task, folder: Path) -> Measured:
    """A step's trace."""
    torch.set_num_threads(1)
    cpu.install()
    config = task.config
    ranks = groups.initialize(config.parallel, seed=0)
    whole = made_up(task)
    judged = [JudgedGroup.of(group) for group in whole]
    for one, group in zip(judged, whole, strict=True):
        one.advantages = one.rewards = np.array([sample.advantage for sample in group.samples])
    is_first = ranks.rank == 0
    step = JudgedStep(judged, judged) if is_first else None
    rollouts = StepRollouts(plan_of(judged), [task.num_samples] * len(whole), Held.of(whole if is_first else []), step)
    division = divide(rollouts.plan["num_tokens"].tolist(), rollouts.group_sizes, config, ranks.dp.size())
    samples = dict(enumerate(sample for group in whole for sample in group.samples))
    (microbatches,) = build_own_minibatches(division, samples, config, ranks, pad_token_id=0, version=0)
    tokenizer = byte_tokenizer()
    tracing = Tracing(config, ranks, DataPlane(ranks, is_first), tokenizer.decode, token_texts_with(tokenizer), folder)
    objective = Objective(config.objective, ranks.cp)
    _losses(objective, microbatches)  # the first call makes tables

    begin_s, trace = _timed(ranks, lambda: tracing.begin(0, rollouts, division))
    assert trace is not None
    objective_s, _ = _timed(ranks, lambda: _losses(objective, microbatches))
    watching = trace.watching(objective, 0)
    watched_s, _ = _timed(ranks, lambda: _losses(watching, microbatches))
    noted = watching.watch.noted  # type: ignore[union-attr]
    sent = 0 if is_first else sum(array.nbytes for one in noted.values() for array in vars(one).values())
    write_s, _ = _timed(ranks, lambda: trace.write(0, 1))
    groups.shut_down()
    return Measured(begin_s, objective_s, watched_s, write_s, sent)


def _timed(ranks: ParallelGroups, action: Callable[[], T]) -> tuple[float, T]:
    exchange.barrier(ranks.world)
    started = time.perf_counter()
    result = action()
    exchange.barrier(ranks.world)
    return time.perf_counter() - started, result


def _losses(objective: Objective, microbatches: list[PackedBatch]) -> None:
    for number, batch in enumerate(microbatches):
        generator = torch.Generator().manual_seed(number)
        shape = batch.labels.shape
        batch.old_log_probs = -torch.rand(shape, generator=generator)
        log_probs = batch.old_log_probs + 0.01 * torch.randn(shape, generator=generator)
        objective(log_probs, torch.rand(shape, generator=generator), batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=RECIPE_TOKENS)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--cp", type=int, default=2)
    args = parser.parse_args()
    task = Task(args.tokens, args.groups, args.samples, args.cp)
    with tempfile.TemporaryDirectory() as folder:
        found: list[Measured] = run_local_ranks(
            run_rank, task.cp, task, Path(folder), preload=("megatron_fipo.certify.preload",)
        )
        (path,) = trace_files(Path(folder)).values()
        size = path.stat().st_size
        started = time.perf_counter()
        assert sum(one.num_tokens for one in read_trace(path).responses) == task.traced_tokens
        read_s = time.perf_counter() - started
    print_found(task, found, size, read_s)


def print_found(task: Task, found: list[Measured], size: int, read_s: float) -> None:
    """Tables of what was measured, and of what it comes to."""
    tokens, first = task.traced_tokens, found[0]
    sent = sum(one.sent_bytes for one in found)
    rows = {
        "choose, tell, texts of tokens, s": first.begin_s,
        "the objective without a trace, s": first.objective_s,
        "the objective with it, s": first.watched_s,
        "bring to rank 0 and write, s": first.write_s,
        "read, s": read_s,
        "into rank 0 from others, MB": sent / 1e6,
        "file, MB": size / 1e6,
        "file, bytes a token": size / tokens,
        "in memory without texts, bytes a token": num_bytes_per_token(),
    }
    print(
        f"{task.num_groups} groups of {task.num_samples} responses of {task.num_tokens:,} tokens: {tokens:,} traced "
        f"tokens, cp {task.cp}, gloo, {os.cpu_count()} cores, torch {torch.__version__}\n\n| | |\n|---|---:|"
    )
    for name, value in rows.items():
        print(f"| {name} | {value:,.2f} |")
    seconds = (first.begin_s + first.watched_s - first.objective_s + first.write_s) / tokens
    every = RECIPE_RESPONSES * RECIPE_TOKENS
    print(
        f"\nA step of {RECIPE_RESPONSES:,} responses of {RECIPE_TOKENS:,} tokens, by these rates:\n\n"
        "| traced | tokens | file, MB | s |\n|---|---:|---:|---:|"
    )
    for name, traced in (("2 groups of 16, the default", 2 * 16 * RECIPE_TOKENS), ("all", every)):
        print(f"| {name} | {traced:,} | {traced * size / tokens / 1e6:,.0f} | {traced * seconds:,.1f} |")
    kept = (RECIPE_STEPS // MetricsSection().trace_every_num_steps + 1) * 2 * 16 * RECIPE_TOKENS * size / tokens
    print(f"\n{RECIPE_STEPS} steps with the defaults: {kept / 1e9:.2f} GB.")


if __name__ == "__main__":
    main()
