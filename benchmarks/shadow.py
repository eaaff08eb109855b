"""What shadow objectives cost: the same updates of a real actor with and without them, in turns.

    python benchmarks/shadow.py [--size quickstart 135m] [--half-lives 8 32 128 256] [--pairs 20] [--seconds 240]

One process and one thread. An update is the project's own: forward, loss, backward and AdamW of one microbatch, and its
metrics as numbers. In each pair one update has the shadows and one has not, in changing order. The second measurement
is of the loss and its metrics alone, without a model: the difference of the two, over the time of an update, is the
cost where a whole update varies by more than that. Times are CPU seconds of the process, which other work on the
machine disturbs less than a clock's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever the script is called from

from benchmarks.evidence.models import (
    PAD_TOKEN,
    Packing,
    Size,
    build_actor,
    loss_of,
    make_groups,
    write_folder,
)
from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import (
    BatchSection,
    Config,
    FipoConfig,
    ModelSection,
    RolloutSection,
    ShadowConfig,
    TrainSection,
)
from megatron_fipo.metrics.reductions import Metrics, scalars
from megatron_fipo.parallel import cpu
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.batch import build_minibatches
from megatron_fipo.parallel.flat_metrics import on_cpu
from megatron_fipo.rl.packed_batch import PackedBatch

WARM_UP = 2
LOSSES = 100
"""Calls of the loss alone."""
COLUMNS = (
    *("model", "tokens", "pairs", "update, ms", "with shadows", "ratio: median, quartiles"),
    *("loss, ms", "shadows, ms", "of an update"),
)


@dataclass(frozen=True)
class Case:
    """A model and the responses of an update."""

    size: Size
    packing: Packing


CASES = {
    # The shape of examples/quickstart/base; an update there has 32 responses.
    "quickstart": Case(
        Size("quickstart", 128, 384, 4, 4, 2, 19, True, (4,)), Packing("32 of 20 to 96", (20, 45, 70, 96) * 8)
    ),
    "135m": Case(Size("135m", 576, 1536, 30, 9, 3, 49152, True, (30,)), Packing("8 of 128", (128,) * 8)),
}
"""The second has the sizes of SmolLM2-135M, with the biases of Qwen2."""


@dataclass(frozen=True)
class Times:
    """CPU seconds of updates in pairs, and of losses alone."""

    update_without: list[float]
    update_with: list[float]
    loss_without: float
    loss_with: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--half-lives", nargs="+", type=float, default=[8.0, 32.0, 128.0, 256.0])
    parser.add_argument("--pairs", type=int, default=20, help="of updates, at most")
    parser.add_argument("--seconds", type=float, default=240.0, help="no pair of a size begins after them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cpu.install()
    shadow = {f"tau_{half_life:g}": ShadowConfig(half_life_tokens=half_life) for half_life in arguments.half_lives}
    print(f"{len(shadow)} shadows, {os.cpu_count()} cores, {platform.processor() or platform.machine()}, one thread\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in arguments.size:
        print_row(name, CASES[name], measure(CASES[name], shadow, arguments.pairs, arguments.seconds))
    parallel_groups.shut_down()


def measure(case: Case, shadow: dict[str, ShadowConfig], num_pairs: int, seconds: float) -> Times:
    with tempfile.TemporaryDirectory() as folder:
        plain = config_for(
            write_folder(Path(folder) / "model", case.size, case.size.layers, max(case.packing.lengths)), case
        )
        shadowed = replace(plain, objective=replace(plain.objective, shadow=shadow))
        ranks = parallel_groups.initialize(plain.parallel, seed=0)
        actor = build_actor(plain, ranks)
        microbatches = microbatches_of(actor, plain, case.packing)
        steps = itertools.count()

        def update(config: Config) -> Metrics:
            return actor.update(microbatches, loss_of(config, ranks), next(steps)).metrics

        pairs = in_turns(lambda: update(plain), lambda: update(shadowed), num_pairs, seconds)
        (batch,) = microbatches
        log_probs = batch.old_log_probs + batch.rollout_log_probs
        without, with_them = in_turns(
            lambda: loss_of(plain, ranks)(log_probs, torch.zeros_like(log_probs), batch).metrics,
            lambda: loss_of(shadowed, ranks)(log_probs, torch.zeros_like(log_probs), batch).metrics,
            LOSSES,
            seconds,
        )
    parallel_groups.destroy_model_parallel()
    return Times(*pairs, statistics.median(without), statistics.median(with_them))


def config_for(folder: str, case: Case) -> Config:
    longest = max(case.packing.lengths)
    return Config(
        model=ModelSection(path=folder, dtype="float32"),
        rollout=RolloutSection(max_prompt_tokens=longest, max_response_tokens=longest),
        objective=FipoConfig(influence_min=0.8, influence_max=1.2, safety_ratio=3.0),
        train=TrainSection(num_minibatches=1),
        batch=BatchSection(max_tokens_per_microbatch=case.packing.tokens),
    )


def microbatches_of(actor: Actor, config: Config, packing: Packing) -> list[PackedBatch]:
    """The one microbatch of an update, with the log-probs of an old policy near the actor's."""
    groups = make_groups(packing, actor.shape.vocab_size)
    (microbatches,) = build_minibatches(groups, config, actor.ranks, PAD_TOKEN)
    for batch, log_probs in zip(microbatches, actor.log_probs(microbatches), strict=True):
        batch.old_log_probs = log_probs - batch.rollout_log_probs
    return microbatches


def in_turns(
    one: Callable[[], Metrics], other: Callable[[], Metrics], num_pairs: int, seconds: float
) -> tuple[list[float], list[float]]:
    """CPU seconds of both by pair, their metrics brought to numbers included; which one goes first changes."""
    times: tuple[list[float], list[float]] = [], []
    end = time.monotonic() + seconds
    for pair in range(num_pairs + WARM_UP):
        if pair > WARM_UP + 2 and time.monotonic() > end:
            break
        for which in (0, 1) if pair % 2 else (1, 0):
            start = time.process_time()
            scalars(on_cpu((one, other)[which]()))
            times[which].append(time.process_time() - start)
    return times[0][WARM_UP:], times[1][WARM_UP:]


def print_row(name: str, case: Case, times: Times) -> None:
    ratios = [with_them / without for without, with_them in zip(times.update_without, times.update_with, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    update, shadows = statistics.median(times.update_without), times.loss_with - times.loss_without
    cells: list[Any] = [
        name,
        f"{case.packing.tokens:,}",
        len(ratios),
        f"{1e3 * update:,.1f}",
        f"{1e3 * statistics.median(times.update_with):,.1f}",
        f"{statistics.median(ratios):.3f}, {low:.3f} to {high:.3f}",
        f"{1e3 * times.loss_without:.2f}",
        f"{1e3 * shadows:.2f}",
        f"{shadows / update:.2%}",
    ]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
