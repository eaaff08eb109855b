"""Everything that is known of a run before it is submitted, computed once, for the tables and for the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.convert.hf_config import ModelShape, model_shape
from megatron_fipo.preflight.findings import (
    FAILS,
    WARNS,
    Finding,
    batch_findings,
    file_findings,
    objective_findings,
)
from megatron_fipo.preflight.hardware import Gpu
from megatron_fipo.preflight.memory import (
    SERVER_RESERVE_GIB,
    ServerMemory,
    StageMemory,
    on_the_way_gib,
    server_memory,
    training_memory,
)
from megatron_fipo.preflight.rollout_plan import RolloutPlan, placement_problems, rollout_plan
from megatron_fipo.preflight.work import Assumptions, BatchPlan, StepCost, batch_plan, step_cost

TIGHT = 0.92
"""From this share of the GPU's memory on, a plan that fits is called tight."""


@dataclass(frozen=True)
class Plan:
    """A run as preflight sees it.

    Attributes:
        resident: GiB of the trainer's that stay on the GPU while servers generate.
        host: GiB that colocated servers push out of one node's GPUs into its memory.
        rollout: where responses are generated. server: memory of one server's GPU.
    """

    config: Config
    shape: ModelShape
    gpu: Gpu
    world_size: int
    assumptions: Assumptions
    stages: list[StageMemory]
    resident: float
    host: float
    rollout: RolloutPlan
    server: ServerMemory
    batch: BatchPlan
    cost: StepCost
    findings: list[Finding]

    @property
    def fits(self) -> bool:
        """Whether nothing fails and nothing is missing."""
        return all(finding.level == WARNS for finding in self.findings)


def make_plan(
    config: Config,
    model_config: Mapping[str, Any],
    gpu: Gpu,
    world_size: int,
    assumptions: Assumptions,
    check_files: bool = True,
    gpus_per_node: int = 8,
) -> Plan:
    """Compute everything. The configuration and its layout must have been validated.

    Raises:
        ValueError: if the model is of a kind that is not supported.
    """
    shape = model_shape(dict(model_config), "config.json")
    stages = training_memory(config, shape, world_size)
    rollout = rollout_plan(config, world_size, gpus_per_node)
    # Between updates the actor takes what it holds for good; colocated servers get that too, but for the reserve.
    idle = max(stage.training - stage.activations - stage.log_probs - stage.rollout_engine for stage in stages)
    resident = 0.0 if rollout.is_dedicated else stages[0].reserve if rollout.is_colocated else idle
    available = min(gpu.memory_gib - SERVER_RESERVE_GIB - resident, rollout.memory_fraction * gpu.memory_gib)
    server = server_memory(shape, config.model.dtype, rollout.tp, available)
    # Weights and optimizer state are kept in host memory meanwhile; gradients are dropped.
    kept = max(stage.weights + stage.optimizer + stage.reference for stage in stages)
    host = kept * min(gpus_per_node, world_size) if rollout.is_colocated else 0.0
    batch = batch_plan(config, world_size, assumptions)
    cost = step_cost(config, shape, gpu, world_size, batch, assumptions, server, rollout.tp, rollout.num_gpus)
    findings = [
        *_memory_findings(config, shape, gpu, stages, server, rollout),
        *_handover_findings(config, shape, gpu, idle, server, rollout),
        *(Finding(WARNS, text) for text in placement_problems(config, rollout, world_size, gpus_per_node)),
        *batch_findings(config, batch),
        *objective_findings(config, model_config),
        *(file_findings(config) if check_files else ()),
    ]
    return Plan(
        config, shape, gpu, world_size, assumptions, stages, resident, host, rollout, server, batch, cost, findings
    )


def _memory_findings(
    config: Config,
    shape: ModelShape,
    gpu: Gpu,
    stages: list[StageMemory],
    server: ServerMemory,
    rollout: RolloutPlan,
) -> Iterator[Finding]:
    worst = max(stages, key=lambda stage: stage.training)
    if worst.training > gpu.memory_gib:
        yield Finding(
            FAILS,
            f"training takes {worst.training:.1f} GiB on each GPU of stage {worst.stage}, and {gpu.name} has "
            f"{gpu.memory_gib:.1f}. {_largest_part(worst)}",
        )
    elif worst.training > TIGHT * gpu.memory_gib:
        yield Finding(
            WARNS,
            f"training takes {worst.training:.1f} of {gpu.memory_gib:.1f} GiB on stage {worst.stage}: tight. "
            f"{_largest_part(worst)}",
        )
    if config.model.fp8 not in ("none", *gpu.fp8_recipes):
        known = f"it computes {' and '.join(gpu.fp8_recipes)}" if gpu.fp8_recipes else "it has no FP8"
        yield Finding(FAILS, f"model.fp8={config.model.fp8} is not for {gpu.name}: {known}. Set another, or none.")
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if server.pool_tokens < longest:
        yield Finding(
            FAILS,
            f"generation: beside {server.weights:.1f} GiB of weights there is room for keys and values of "
            f"{server.pool_tokens:,} tokens, and one response may take {longest:,}. Give a server more GPUs or memory, "
            "or shard the actor further.",
        )
    if rollout.tp > shape.num_query_groups:
        yield Finding(
            WARNS,
            f"servers of {rollout.tp} GPUs hold each of the model's {shape.num_query_groups} key-value heads "
            f"{rollout.tp // shape.num_query_groups} times.",
        )


def _handover_findings(
    config: Config, shape: ModelShape, gpu: Gpu, idle: float, server: ServerMemory, rollout: RolloutPlan
) -> Iterator[Finding]:
    """While weights go over, a GPU holds the idle actor, the server's weights, and what is on its way."""
    if not rollout.is_colocated:
        return
    needed = idle + server.weights + SERVER_RESERVE_GIB + on_the_way_gib(config, shape)
    if needed > gpu.memory_gib:
        yield Finding(
            FAILS,
            f"handing weights over takes {needed:.1f} GiB on each GPU, and {gpu.name} has {gpu.memory_gib:.1f}: "
            f"{idle:.1f} of the actor, {server.weights:.1f} of the server's weights, and what is on its way. Raise "
            "servers.tp or parallel.tp, or lower servers.bucket_mib.",
        )


def _largest_part(stage: StageMemory) -> str:
    """What takes most of it, and what makes that smaller."""
    remedies = {
        "weights": "raise parallel.tp or pp",
        "gradients": "raise parallel.tp or pp",
        "optimizer": "set optimizer.distributed=true, or use more data-parallel ranks",
        "activations": "raise parallel.cp, set parallel.sequence_parallel=true or model.recompute=full, or lower "
        "batch.max_tokens_per_microbatch",
        "log_probs": "lower model.log_prob_chunk_mib",
        "rollout_engine": "generate with servers (rollout.engine)",
    }
    name = max(remedies, key=lambda part: float(getattr(stage, part)))
    return f"Most of it, {getattr(stage, name):.1f} GiB, are {name.replace('_', ' ')}: {remedies[name]}."
