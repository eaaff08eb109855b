"""The schedules that a run could have, simulated for its plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_fipo.preflight.memory import WEIGHT_BYTES, training_memory
from megatron_fipo.preflight.parameters import matmul_parameters, whole_parameters
from megatron_fipo.preflight.plan import Plan
from megatron_fipo.preflight.schedules.books import Books
from megatron_fipo.preflight.schedules.colocated import simulate_colocated
from megatron_fipo.preflight.schedules.decoding import Decoding
from megatron_fipo.preflight.schedules.dedicated import DedicatedBooks, simulate_dedicated
from megatron_fipo.preflight.schedules.fill import Fill, filling
from megatron_fipo.preflight.schedules.outcome import Outcome, Setup, Step, summary
from megatron_fipo.preflight.schedules.rounds import simulate_rounds
from megatron_fipo.preflight.schedules.workload import Lengths, Workload
from megatron_fipo.preflight.work import forward_flops

CLAIM_SHARE = 1.1
"""Responses that a server claims, over those that its cache holds on average."""

WARM_UP = 3
"""Steps after which what is carried over has settled, where a step needs more than is in flight; else there are more.
"""


@dataclass(frozen=True)
class ScheduleAssumptions:
    """What the simulation assumes besides preflight's assumptions.

    Attributes:
        between, within: spread of the logarithm of a response's length, between prompts and within one.
        decode_overhead_s: seconds of a decoding step besides reading and multiplying. It is 0 because preflight's
            share of the memory's bandwidth stands for all of a step.
        prefill_efficiency: share of the peak that the computing of keys and values reaches.
        handover_s: seconds in which colocated servers and trainer change places and weights go over; in process it
            is 0.
        dedicated_handover_s: seconds in which dedicated servers stand still for new weights.
        generation_factor, training_factor: what a run took, over what the simulation says without them.
        seed: of the prompts and their lengths.
    """

    between: float = 0.5
    within: float = 0.4
    decode_overhead_s: float = 0.0
    prefill_efficiency: float = 0.5
    handover_s: float = 30.0
    dedicated_handover_s: float = 10.0
    generation_factor: float = 1.0
    training_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        outcomes: of every schedule; today's comes first.
        workload: prompts that all of them had.
        setup: of the colocated ones.
        split: (GPUs that generate, GPUs that train) of the dedicated ones; None where no split fits.
        ideal: seconds of a step that generates what it needs with full caches and then trains, both on all GPUs.
        fill: how stale one must be to fill the colocated servers.
    """

    outcomes: list[Outcome]
    workload: Workload
    setup: Setup
    split: tuple[int, int] | None
    ideal: float
    fill: Fill


def compare(plan: Plan, assumptions: ScheduleAssumptions) -> Comparison:
    """Simulate every schedule.

    Raises:
        ValueError: if a response does not fit a server, or no group could be kept in the share that is assumed.
    """
    workload = workload_of(plan, assumptions)
    setup = colocated_setup(plan, workload, assumptions)
    split = best_split(plan, workload, setup, assumptions)
    generation = _tokens_needed(plan, workload) / _rate(setup.decoding, workload, setup.num_servers)
    return Comparison(
        outcomes=[summary(name, used, steps) for name, used, steps in _runs(plan, workload, setup, split, assumptions)],
        workload=workload,
        setup=setup,
        split=split,
        ideal=generation + _usual_training(workload, setup),
        fill=filling(plan, workload, setup),
    )


def fill_of(plan: Plan, assumptions: ScheduleAssumptions) -> Fill:
    """How stale one must be to fill the servers that the plan has.

    Raises:
        ValueError: if nothing fits a server, or no group could be kept in the share that is assumed.
    """
    workload = workload_of(plan, assumptions)
    setup = colocated_setup(plan, workload, assumptions)
    return filling(plan, workload, replace(setup, num_servers=max(plan.rollout.num_gpus // plan.rollout.tp, 1)))


def _runs(
    plan: Plan,
    workload: Workload,
    setup: Setup,
    split: tuple[int, int] | None,
    assumptions: ScheduleAssumptions,
) -> Iterator[tuple[str, Setup, Sequence[Step]]]:
    """(name, setup, steps that count) of each schedule."""
    yield "rounds", setup, run_rounds(plan, workload, setup)
    yield "rounds, spread", setup, run_rounds(plan, workload, setup, spread=True)
    yield "streaming", setup, run_stream(plan, workload, setup)
    fill = filling(plan, workload, setup)
    useful = {bound for bound in (1, 2, 4) if bound < 2 * fill.bound}  # others fill no server that a smaller one leaves
    for bound in sorted(useful | {plan.config.rollout.max_staleness_steps} - {0}):
        yield f"carry-over {bound}", setup, run_carry_over(plan, workload, setup, bound)
    if split is None:
        return
    waves = _waves(fill.steps)
    apart = split_setup(setup, plan, split, assumptions)
    for bound in (1, 2, 4):
        if bound > 2 and fill.steps < bound / 4:
            continue
        books = DedicatedBooks(workload, setup.batch, bound)
        steps = simulate_dedicated(apart, books, steps=waves * (WARM_UP + 4), keeps_cache=False)
        steps = steps[waves * WARM_UP :]
        yield f"dedicated {bound}", apart, steps


def _waves(full_at: float) -> int:
    """By how much more steps are simulated where what is in flight lasts for several, and comes and goes in waves."""
    return min(math.ceil(full_at), 3)


def run_stream(plan: Plan, workload: Workload, setup: Setup) -> list[Step]:
    """Steps with sampling.streaming, on-policy."""
    adapts = plan.config.rollout.engine != "in_process"
    return simulate_colocated(setup, Books(workload, setup.batch, adapts=adapts), steps=3)


def run_carry_over(plan: Plan, workload: Workload, setup: Setup, bound: int) -> list[Step]:
    """Steps with sampling.streaming and this bound on staleness; those that count."""
    waves = _waves(filling(plan, workload, setup).steps)
    books = Books(workload, setup.batch, bound, drops=plan.config.rollout.too_stale == "drop")
    return simulate_colocated(setup, books, steps=waves * (WARM_UP + 4))[waves * WARM_UP :]


def run_own(plan: Plan, workload: Workload, setup: Setup) -> list[Step]:
    """Steps as the configuration has them."""
    if bound := plan.config.rollout.max_staleness_steps:
        return run_carry_over(plan, workload, setup, bound)
    if plan.config.sampling.streaming:
        return run_stream(plan, workload, setup)
    return run_rounds(plan, workload, setup)


def run_rounds(plan: Plan, workload: Workload, setup: Setup, spread: bool = False) -> list[Step]:
    """Steps in rounds of the configuration's size, as they are now, or with any server taking any response."""
    config = plan.config
    age = config.sampling.max_surplus_age_steps
    per_round = config.rollout.num_prompts_per_round
    steps = simulate_rounds(
        setup, workload, per_round=per_round, spread=spread, surplus_age=age, steps=2 if age == 0 else WARM_UP + 4
    )
    return steps if age == 0 else steps[WARM_UP:]


def workload_of(plan: Plan, assumptions: ScheduleAssumptions) -> Workload:
    """The prompts of the plan's configuration."""
    rollout = plan.config.rollout
    prompt, response = plan.assumptions.resolve(plan.config)
    lengths = Lengths(
        response, rollout.max_response_tokens, round(prompt), between=assumptions.between, within=assumptions.within
    )
    kept = plan.assumptions.kept_share if plan.config.sampling.dynamic else 1.0
    return Workload(lengths, rollout.num_samples_per_prompt, kept, assumptions.seed)


def _tokens_needed(plan: Plan, workload: Workload) -> float:
    """Tokens that have to be generated until a batch is expected to be full."""
    return plan.batch.samples / workload.kept * workload.lengths.mean


def _usual_training(workload: Workload, setup: Setup) -> float:
    """Seconds of training on a batch of usual lengths."""
    groups = [workload.group(prompt)[0] for prompt in range(256)]
    return setup.training_seconds([length for group in groups for length in group]) * setup.batch / len(groups)


def decoding_of(plan: Plan, workload: Workload, assumptions: ScheduleAssumptions) -> Decoding:
    """One server of the plan, as `work` estimates it, or at the rate that is given for a full one."""
    gpu, tp, config = plan.gpu, plan.rollout.tp, plan.config
    read = gpu.bandwidth * plan.assumptions.rollout_efficiency
    operations = 2 * matmul_parameters(plan.shape) / tp / gpu.peak_flops
    in_process = config.rollout.engine == "in_process"
    decoding = Decoding(
        fixed=assumptions.decode_overhead_s,
        weights=whole_parameters(plan.shape) * WEIGHT_BYTES[config.model.dtype] / tp / read,
        cached_token=plan.server.bytes_per_token / read,
        response=operations / plan.assumptions.rollout_efficiency,
        prefilled_token=operations / assumptions.prefill_efficiency,
        pool=plan.server.pool_tokens,
        slots=config.rollout.max_batch_size if in_process else config.servers.max_concurrent_requests,
    )
    factor = 1 / assumptions.generation_factor
    if given := plan.assumptions.rollout_tokens_per_s:
        factor *= given * tp / decoding.tokens_per_s(workload.context)
    return decoding.faster(factor)


def colocated_setup(plan: Plan, workload: Workload, assumptions: ScheduleAssumptions) -> Setup:
    """All GPUs of the run, those of dedicated servers included, generate and train in turn."""
    rollout = plan.rollout
    gpus = plan.world_size + (rollout.num_gpus if rollout.is_dedicated else 0)
    num_servers = max((gpus if rollout.is_dedicated else rollout.num_gpus) // rollout.tp, 1)
    decoding = decoding_of(plan, workload, assumptions)
    in_process = plan.config.rollout.engine == "in_process"
    return Setup(
        decoding=decoding,
        num_servers=num_servers,
        server_gpus=rollout.tp,
        gpus=gpus,
        training_gpus=gpus,
        batch=plan.config.rollout.num_prompts,
        training_seconds=_training_seconds(plan, workload, gpus, assumptions),
        handover=0.0 if in_process else assumptions.handover_s,
        claims=min(math.ceil(CLAIM_SHARE * decoding.saturated(workload.context)), decoding.slots),
        servers_per_node=max(math.ceil(num_servers / rollout.num_nodes), 1),
    )


def split_setup(setup: Setup, plan: Plan, split: tuple[int, int], assumptions: ScheduleAssumptions) -> Setup:
    """The same GPUs, of which some generate and the others train."""
    generating, training = split
    factor = setup.training_gpus / training
    return replace(
        setup,
        num_servers=generating // plan.rollout.tp,
        training_gpus=training,
        training_seconds=lambda lengths: factor * setup.training_seconds(lengths),
        handover=assumptions.dedicated_handover_s,
    )


def best_split(
    plan: Plan, workload: Workload, setup: Setup, assumptions: ScheduleAssumptions
) -> tuple[int, int] | None:
    """The split for which the slower of generation and training, each without a pause, is fastest; None if none fits.

    The trainer has whole copies of the model, and fits its GPUs without servers on them.
    """
    config, tp = plan.config, plan.rollout.tp
    if config.rollout.engine == "in_process":
        return None
    copy = config.parallel.tp * config.parallel.pp * config.parallel.cp
    tokens = _tokens_needed(plan, workload)
    whole = _usual_training(workload, setup) * setup.training_gpus
    best: tuple[float, tuple[int, int]] | None = None
    for training in range(math.lcm(copy, tp), setup.gpus, math.lcm(copy, tp)):
        generating = (setup.gpus - training) // tp * tp
        stages = training_memory(config, plan.shape, training, plan.gpu)
        if generating < tp or max(stage.training for stage in stages) > plan.gpu.memory_gib:
            continue
        generation = tokens / _rate(setup.decoding, workload, generating // tp)
        seconds = max(generation, whole / training + assumptions.dedicated_handover_s)
        if best is None or seconds < best[0]:
            best = (seconds, (generating, training))
    return best and best[1]


def _rate(decoding: Decoding, workload: Workload, num_servers: int) -> float:
    """Tokens a second of servers that are all full."""
    return num_servers * decoding.tokens_per_s(workload.context)


def _training_seconds(
    plan: Plan, workload: Workload, gpus: int, assumptions: ScheduleAssumptions
) -> Callable[[Sequence[int]], float]:
    """Preflight's time of log-probs and updates on so many GPUs, by the operations of the actual lengths."""
    prompt = workload.lengths.prompt
    middle = forward_flops(plan.shape, prompt + workload.lengths.mean)
    seconds = plan.cost.seconds["log-probs"] + plan.cost.seconds["updates"]
    each = seconds * assumptions.training_factor * plan.world_size / gpus / plan.batch.samples / middle
    return lambda lengths: each * sum(forward_flops(plan.shape, prompt + length) for length in lengths)
