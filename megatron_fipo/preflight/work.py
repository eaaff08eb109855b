"""What one step costs: prompts, tokens, floating-point operations, and seconds under stated assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_fipo.config import Config, updates_per_step
from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.preflight.hardware import Gpu
from megatron_fipo.preflight.memory import WEIGHT_BYTES, ServerMemory
from megatron_fipo.preflight.parameters import matmul_parameters, whole_parameters


@dataclass(frozen=True)
class Assumptions:
    """What no configuration says; None takes the default that `resolve` gives.

    Attributes:
        mfu: share of the GPU's peak that training reaches.
        rollout_efficiency: share of the memory's bandwidth, or of the peak, that decoding reaches.
        rollout_tokens_per_s: of each GPU, instead of the estimate by bandwidth.
        response_tokens: mean length of a response.
        prompt_tokens: mean length of a prompt.
        kept_share: share of the groups that dynamic sampling keeps.
    """

    mfu: float = 0.35
    rollout_efficiency: float = 0.5
    rollout_tokens_per_s: float | None = None
    response_tokens: float | None = None
    prompt_tokens: float | None = None
    kept_share: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError for what is no share or no number above 0."""
        for name in ("mfu", "rollout_efficiency", "kept_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0 and at most 1.")
        for name in ("rollout_tokens_per_s", "response_tokens", "prompt_tokens"):
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
        prompts_generated: over all rounds, those that dynamic sampling drops or discards included.
        rounds: of generation.
        samples: trained on in a step; samples_generated are more.
        updates: optimizer steps in a step.
        samples_per_update: over all ranks.
        data_ranks: data-parallel ranks.
        microbatches: of one data-parallel rank in one update, if sequences packed without loss.
        bubble: share of an update's time in which pipeline stages wait.
    """

    prompts_generated: int
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
    if rollout.num_prompts_per_round:
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
        prompts_generated=generated,
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
    """Of one sequence: 2 a parameter and token, and causal attention's 2 * 2 * heads * width * length^2 / 2 a layer."""
    attention = 2 * shape.num_layers * shape.num_attention_heads * shape.head_dim * length * length
    return 2 * matmul_parameters(shape) * length + attention


@dataclass(frozen=True)
class StepCost:
    """Of one step over all GPUs, and its time.

    Attributes:
        tokens_generated, tokens_trained: prompts left out, and counted; the latter once for each epoch.
        flops: by phase: generation, old log-probs, reference log-probs, updates, recompute.
        seconds: by phase: generation, log-probs, updates.
        rollout_tokens_per_s: of each GPU.
        rollout_limit: what bounds it: "given", "memory bandwidth", "arithmetic" or "the longest response".
    """

    tokens_generated: float
    tokens_trained: float
    flops: dict[str, float]
    seconds: dict[str, float]
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
    plan: BatchPlan,
    assumptions: Assumptions,
    server: ServerMemory,
    server_tp: int,
    rollout_gpus: int,
) -> StepCost:
    """Estimate one step.

    Lengths enter by their mean, which leaves out that attention grows with the mean square; the time of a phase is its
    operations over all GPUs' peak times the assumed share, lengthened by the pipeline's bubble.

    Args:
        server: memory of a rollout server; server_tp: its GPUs. rollout_gpus: all that generate.
    """
    prompt, response = assumptions.resolve(config)
    sequence = forward_flops(shape, prompt + response)
    epochs = config.train.num_epochs
    flops = {
        "generation": plan.samples_generated * sequence,
        "old log-probs": plan.samples * sequence if config.objective.old_log_probs == "actor" else 0.0,
        "reference log-probs": plan.samples * sequence if config.objective.kl_coefficient else 0.0,
        "updates": 3 * plan.samples * epochs * sequence,
        "recompute": _recomputed(config, shape, prompt + response) * plan.samples * epochs,
    }
    # A dedicated server's GPUs do not train; world_size counts those that do.
    rate = world_size * gpu.peak_flops * assumptions.mfu * (1 - plan.bubble)
    per_gpu, limit = _rollout_rate(config, shape, gpu, plan, assumptions, server, server_tp, rollout_gpus)
    fp8 = _fp8_time(config, shape, gpu, prompt + response)
    recompute_fp8 = fp8 if config.model.recompute == "full" else 1.0
    tokens_generated = plan.samples_generated * response
    generation = tokens_generated / (per_gpu * rollout_gpus)
    slowest = (
        plan.rounds
        * config.rollout.max_response_tokens
        * _decode_seconds(
            shape, gpu, assumptions, server, server_tp, 1, prompt + config.rollout.max_response_tokens / 2, config
        )
    )
    if slowest > generation:
        generation, limit = slowest, "the longest response"
    return StepCost(
        tokens_generated=tokens_generated,
        tokens_trained=plan.samples * epochs * (prompt + response),
        flops=flops,
        seconds={
            "generation": generation,
            "log-probs": (flops["old log-probs"] + flops["reference log-probs"]) * fp8 / rate,
            "updates": (flops["updates"] * fp8 + flops["recompute"] * recompute_fp8) / rate,
        },
        rollout_tokens_per_s=per_gpu,
        rollout_limit=limit,
    )


def _fp8_time(config: Config, shape: ModelShape, gpu: Gpu, length: float) -> float:
    """Time of a forward pass as a multiple of bfloat16's, at the same share of either peak."""
    if config.model.fp8 == "none" or not gpu.fp8_flops:
        return 1.0
    output = 2 * shape.vocab_size * shape.hidden_size * length
    attention = 2 * shape.num_layers * shape.num_attention_heads * shape.head_dim * length * length
    share = 1 - (output + attention) / forward_flops(shape, length)  # of the layers' matrix products
    return 1 - share * (1 - gpu.peak_flops / gpu.fp8_flops)


def _recomputed(config: Config, shape: ModelShape, length: float) -> float:
    """FLOPs that backward spends on recomputing forward, of one sequence; the output layer's logits always are."""
    output = 2 * shape.vocab_size * shape.hidden_size * length
    attention = 2 * shape.num_layers * shape.num_attention_heads * shape.head_dim * length * length
    if config.model.recompute == "full":
        return forward_flops(shape, length)
    return output + (attention if config.model.recompute == "selective" else 0.0)


def _decode_seconds(
    shape: ModelShape,
    gpu: Gpu,
    assumptions: Assumptions,
    server: ServerMemory,
    server_tp: int,
    concurrency: float,
    context: float,
    config: Config,
) -> float:
    """Of one decoding step of a server: it reads all weights and all keys and values, and multiplies."""
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
    server_tp: int,
    rollout_gpus: int,
) -> tuple[float, str]:
    """(tokens a second of each GPU, what bounds it), with as many responses at a time as fit or as there are."""
    if assumptions.rollout_tokens_per_s:
        return assumptions.rollout_tokens_per_s, "given"
    prompt, response = assumptions.resolve(config)
    context = prompt + response / 2
    num_servers = max(rollout_gpus // server_tp, 1)
    waiting = plan.samples_generated / plan.rounds / num_servers
    fitting = max(server.pool_tokens / context, 1)
    in_process = config.rollout.engine == "in_process"
    fitting = min(fitting, config.rollout.max_batch_size if in_process else config.servers.max_concurrent_requests)
    concurrency = max(min(waiting, fitting), 1)
    seconds = _decode_seconds(shape, gpu, assumptions, server, server_tp, concurrency, context, config)
    operations = 2 * matmul_parameters(shape) * concurrency / server_tp / gpu.peak_flops
    limit = "arithmetic" if operations / assumptions.rollout_efficiency >= seconds else "memory bandwidth"
    return concurrency / seconds / server_tp, limit
