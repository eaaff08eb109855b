"""What one step costs: prompts, tokens, floating-point operations, and seconds under stated assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_fipo.config import Config, num_groups_ahead, num_groups_to_begin, updates_per_step
from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.preflight.communication import layer_waits, links_of
from megatron_fipo.preflight.hardware import Gpu
from megatron_fipo.preflight.memory import WEIGHT_BYTES, recomputes_mlp
from megatron_fipo.preflight.parameters import layer_matrices, matmul_parameters, whole_parameters
from megatron_fipo.preflight.rollout_plan import RolloutPlan
from megatron_fipo.preflight.server_memory import ServerMemory


@dataclass(frozen=True)
class Assumptions:
    """Assumptions that no configuration states; None takes the default of `resolve`.

    Attributes:
        training_efficiency: share of the GPU's peak that training's kernels reach while they wait for no other GPU:
            matrix products reach two thirds on an H100, and everything else takes time besides.
        link_efficiency: share of the bandwidth within a node that collectives reach.
        network_bytes_per_s: bandwidth of each GPU to other nodes; 45 GB/s is nine tenths of 400 Gbit/s.
        mfu: share of the peak that training reaches, waiting included, instead of the estimate by these three.
        rollout_efficiency: share of the memory's bandwidth, or of the peak, that decoding reaches.
        rollout_tokens_per_s: tokens that each GPU generates per second, instead of the estimate by bandwidth.
        response_tokens: mean length of a response.
        prompt_tokens: mean length of a prompt.
        kept_share: share of the groups that dynamic sampling keeps.
    """

    training_efficiency: float = 0.5
    link_efficiency: float = 0.78
    network_bytes_per_s: float = 45e9
    mfu: float | None = None
    rollout_efficiency: float = 0.5
    rollout_tokens_per_s: float | None = None
    response_tokens: float | None = None
    prompt_tokens: float | None = None
    kept_share: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError for what is no share or no number above 0."""
        for name in ("training_efficiency", "link_efficiency", "mfu", "rollout_efficiency", "kept_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value}: must be above 0 and at most 1.")
        for name in ("network_bytes_per_s", "rollout_tokens_per_s", "response_tokens", "prompt_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be above 0 and finite.")

    def resolve(self, config: Config) -> tuple[float, float]:
        """(mean prompt, mean response) tokens: by default a quarter and half of what they may at most be."""
        rollout = config.rollout
        prompt = self.prompt_tokens or max(rollout.max_prompt_tokens / 4, 1)
        response = self.response_tokens or max(rollout.max_response_tokens / 2, 1)
        return min(prompt, rollout.max_prompt_tokens), min(response, rollout.max_response_tokens)


@dataclass(frozen=True)
class BatchPlan:
    """How a step's batch is cut up.

    Attributes:
        prompts_needed: prompts until the batch is expected to be full.
        prompts_generated: prompts of all rounds, those that dynamic sampling drops or discards included. With
            sampling.streaming those that are begun; what is not needed in the end is aborted or discarded. With
            rollout.max_staleness_steps what is begun and not needed goes on in the next step: as many as are needed.
        prompts_ahead: with rollout.max_staleness_steps, prompts that may be begun or finished at a time, from the first
            one that no step has used; else 0.
        rounds: rounds of generation; 1 with sampling.streaming.
        samples: samples that a step trains on; samples_generated are more.
        updates: optimizer updates in a step.
        samples_per_update: samples of one update, over all ranks.
        data_ranks: number of data-parallel ranks.
        microbatches: of one data-parallel rank in one update, if sequences packed without loss.
        bubble: share of an update's time in which pipeline stages wait.
    """

    prompts_needed: int
    prompts_generated: int
    prompts_ahead: int
    rounds: int
    samples: int
    samples_generated: int
    updates: int
    samples_per_update: int
    data_ranks: int
    microbatches: int
    bubble: float


def batch_plan(config: Config, world_size: int, assumptions: Assumptions) -> BatchPlan:
    """The batch arithmetic of one step."""
    rollout, parallel, train = config.rollout, config.parallel, config.train
    kept = assumptions.kept_share if config.sampling.dynamic else 1.0
    needed = math.ceil(rollout.num_prompts / kept)
    begun, ahead = num_groups_to_begin(rollout.num_prompts, kept), 0
    if rollout.max_staleness_steps:
        ahead = max(begun, num_groups_ahead(rollout.num_prompts, kept, rollout.max_staleness_steps))
        generated, rounds = needed, 1
    elif config.sampling.streaming:
        generated, rounds = begun, 1
    elif rollout.num_prompts_per_round:
        rounds = math.ceil(needed / rollout.num_prompts_per_round)
        generated = rounds * rollout.num_prompts_per_round
    else:  # the batch's own number first, then twice what is still missing
        generated, rounds = rollout.num_prompts, 1
        while (missing := rollout.num_prompts - generated * kept) > 0.5 and rounds < 100:
            generated, rounds = generated + 2 * math.ceil(missing), rounds + 1
    data_ranks = world_size // (parallel.tp * parallel.pp * parallel.cp)
    samples = rollout.num_prompts * rollout.num_samples_per_prompt
    prompt, response = assumptions.resolve(config)
    per_update = samples // train.num_minibatches
    tokens = per_update / data_ranks * (prompt + response)
    microbatches = max(math.ceil(tokens / config.batch.max_tokens_per_microbatch), 1)
    chunks = microbatches * (parallel.virtual_pp or 1)
    return BatchPlan(
        prompts_needed=needed,
        prompts_generated=generated,
        prompts_ahead=ahead,
        rounds=rounds,
        samples=samples,
        samples_generated=generated * rollout.num_samples_per_prompt,
        updates=updates_per_step(config),
        samples_per_update=per_update,
        data_ranks=data_ranks,
        microbatches=microbatches,
        bubble=(parallel.pp - 1) / (chunks + parallel.pp - 1),
    )


def forward_flops(shape: ModelShape, length: float) -> float:
    """Operations of one sequence.

    They are 2 for each parameter and token, and causal attention's 2 * 2 * heads * width * length^2 / 2 for each layer.
    """
    attention = 2 * shape.num_layers * shape.num_attention_heads * shape.head_dim * length * length
    return 2 * matmul_parameters(shape) * length + attention


@dataclass(frozen=True)
class StepCost:
    """Operations of one step over all GPUs, and its time.

    Attributes:
        tokens_generated: tokens of the responses, without prompts.
        tokens_trained: tokens trained on, prompts included, once for each epoch.
        flops: operations by phase: generation, old log-probs, reference log-probs, updates, recompute.
        seconds: time by phase: generation, log-probs, updates.
        waiting_seconds: time in log-probs and updates spent waiting for other GPUs of the same copy; 0 where mfu is
            given.
        mfu: share of the peak that log-probs and updates reach; what is recomputed does not count as work.
        rollout_tokens_per_s: tokens that each GPU generates per second.
        rollout_limit: what bounds it: "given", "memory bandwidth", "arithmetic" or "the longest response".
    """

    tokens_generated: float
    tokens_trained: float
    flops: dict[str, float]
    seconds: dict[str, float]
    waiting_seconds: float
    mfu: float
    rollout_tokens_per_s: float
    rollout_limit: str

    @property
    def step_seconds(self) -> float:
        """One phase after the other."""
        return sum(self.seconds.values())


def step_cost(
    config: Config,
    shape: ModelShape,
    gpu: Gpu,
    world_size: int,
    gpus_per_node: int,
    plan: BatchPlan,
    assumptions: Assumptions,
    server: ServerMemory,
    rollout: RolloutPlan,
) -> StepCost:
    """Estimate one step.

    Lengths enter by their mean, which leaves out that attention grows with the mean square; the time of a phase is its
    operations over all GPUs' peak times the share that kernels reach, with what they wait for other GPUs, lengthened by
    the pipeline's bubble.
    """
    prompt, response = assumptions.resolve(config)
    length = prompt + response
    sequence = forward_flops(shape, length)
    trained = plan.samples * config.train.num_epochs
    flops = {
        "generation": plan.samples_generated * sequence,
        "old log-probs": plan.samples * sequence if config.objective.old_log_probs == "actor" else 0.0,
        "reference log-probs": plan.samples * sequence if config.objective.kl_coefficient else 0.0,
        "updates": 3 * trained * sequence,
        "recompute": _recomputed_parts(config, shape, length).total * trained,
    }
    seconds, waiting = _training_seconds(config, shape, gpu, world_size, gpus_per_node, plan, assumptions, flops)
    tokens_generated = plan.samples_generated * response
    per_gpu, limit = _rollout_rate(config, shape, gpu, plan, assumptions, server, rollout)
    generation = tokens_generated / (per_gpu * rollout.num_gpus)
    middle = prompt + config.rollout.max_response_tokens / 2
    alone = _decode_seconds(config, shape, gpu, assumptions, server, rollout.tp, concurrency=1, context=middle)
    # What is carried over may take as many steps more as its bound says.
    num_phases = plan.rounds / (1 + config.rollout.max_staleness_steps)
    slowest = num_phases * config.rollout.max_response_tokens * alone
    if slowest > generation:
        generation, limit = slowest, "the longest response"
    work = flops["old log-probs"] + flops["reference log-probs"] + flops["updates"]
    return StepCost(
        tokens_generated=tokens_generated,
        tokens_trained=trained * length,
        flops=flops,
        seconds={"generation": generation, **seconds},
        waiting_seconds=waiting,
        mfu=work / (sum(seconds.values()) * world_size * gpu.peak_flops),
        rollout_tokens_per_s=per_gpu,
        rollout_limit=limit,
    )


def _training_seconds(
    config: Config,
    shape: ModelShape,
    gpu: Gpu,
    world_size: int,
    gpus_per_node: int,
    plan: BatchPlan,
    assumptions: Assumptions,
    flops: dict[str, float],
) -> tuple[dict[str, float], float]:
    """(seconds of log-probs and of updates, seconds that they wait for other GPUs)."""
    length = sum(assumptions.resolve(config))
    fp8 = _fp8_time(config, gpu, _forward_parts(shape, length))
    fp8_recompute = _fp8_time(config, gpu, _recomputed_parts(config, shape, length))
    log_probs = (flops["old log-probs"] + flops["reference log-probs"]) * fp8
    updates = flops["updates"] * fp8 + flops["recompute"] * fp8_recompute
    # A dedicated server's GPUs do not train; world_size counts those that do.
    rate = world_size * gpu.peak_flops * (assumptions.mfu or assumptions.training_efficiency)
    log_prob_wait = update_wait = 0.0
    if assumptions.mfu is None:
        links = links_of(
            config,
            gpu,
            gpus_per_node,
            assumptions.link_efficiency,
            assumptions.network_bytes_per_s,
            assumptions.training_efficiency,
        )
        waits = layer_waits(config, shape, links, length)
        layers = shape.num_layers / config.parallel.pp
        passing = plan.samples * length / plan.data_ranks / config.parallel.cp * layers
        passes = (flops["old log-probs"] > 0) + (flops["reference log-probs"] > 0)
        log_prob_wait = passes * passing * waits.forward
        update_wait = config.train.num_epochs * passing * (waits.forward + waits.backward + waits.recompute)
    busy = 1 - plan.bubble
    seconds = {"log-probs": (log_probs / rate + log_prob_wait) / busy, "updates": (updates / rate + update_wait) / busy}
    return seconds, (log_prob_wait + update_wait) / busy


@dataclass(frozen=True)
class _Parts:
    """FLOPs of one sequence: the layers' matrix products, which model.fp8 takes in FP8, and all else."""

    products: float
    rest: float

    @property
    def total(self) -> float:
        return self.products + self.rest


def _forward_parts(shape: ModelShape, length: float) -> _Parts:
    products = 2 * shape.num_layers * sum(layer_matrices(shape)) * length
    return _Parts(products, forward_flops(shape, length) - products)


def _recomputed_parts(config: Config, shape: ModelShape, length: float) -> _Parts:
    """Operations of forward that backward repeats. Logits are always recomputed, from the kept hidden states."""
    logits = 2 * shape.vocab_size * shape.hidden_size * length
    if config.model.recompute == "full":
        return _forward_parts(shape, length)
    if recomputes_mlp(config):
        _, mlp = layer_matrices(shape)
        return _Parts(2 * shape.num_layers * mlp * length, logits)
    if config.model.recompute == "selective":
        return _Parts(0.0, logits + 2 * shape.num_layers * shape.num_attention_heads * shape.head_dim * length**2)
    return _Parts(0.0, logits)


def _fp8_time(config: Config, gpu: Gpu, parts: _Parts) -> float:
    """Time of these operations as a multiple of bfloat16's, at the same share of either peak."""
    if config.model.fp8 == "none" or not gpu.fp8_flops:
        return 1.0
    return 1 - parts.products / parts.total * (1 - gpu.peak_flops / gpu.fp8_flops)


def _decode_seconds(
    config: Config,
    shape: ModelShape,
    gpu: Gpu,
    assumptions: Assumptions,
    server: ServerMemory,
    server_tp: int,
    *,
    concurrency: float,
    context: float,
) -> float:
    """Return the seconds of one decoding step: a server reads all weights, keys and values, and multiplies."""
    size = WEIGHT_BYTES[config.model.dtype]
    read = whole_parameters(shape) * size / server_tp + concurrency * context * server.bytes_per_token
    operations = 2 * matmul_parameters(shape) * concurrency / server_tp
    return max(read / gpu.bandwidth, operations / gpu.peak_flops) / assumptions.rollout_efficiency


def _rollout_rate(
    config: Config,
    shape: ModelShape,
    gpu: Gpu,
    plan: BatchPlan,
    assumptions: Assumptions,
    server: ServerMemory,
    rollout: RolloutPlan,
) -> tuple[float, str]:
    """(tokens a second of each GPU, what bounds it), with as many responses at a time as fit or as there are."""
    if assumptions.rollout_tokens_per_s:
        return assumptions.rollout_tokens_per_s, "given"
    prompt, response = assumptions.resolve(config)
    context = prompt + response / 2
    num_servers = max(rollout.num_gpus // rollout.tp, 1)
    ahead = plan.prompts_ahead * config.rollout.num_samples_per_prompt
    waiting = (ahead or plan.samples_generated / plan.rounds) / num_servers
    fitting = max(server.pool_tokens / context, 1)
    in_process = config.rollout.engine == "in_process"
    fitting = min(fitting, config.rollout.max_batch_size if in_process else config.servers.max_concurrent_requests)
    concurrency = max(min(waiting, fitting), 1)
    seconds = _decode_seconds(
        config, shape, gpu, assumptions, server, rollout.tp, concurrency=concurrency, context=context
    )
    operations = 2 * matmul_parameters(shape) * concurrency / rollout.tp / gpu.peak_flops
    limit = "arithmetic" if operations / assumptions.rollout_efficiency >= seconds else "memory bandwidth"
    return concurrency / seconds / rollout.tp, limit
