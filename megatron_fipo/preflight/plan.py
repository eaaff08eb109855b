"""Everything that is known of a run before it is submitted, computed once, for the tables and for the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fipo.config import Config, longest_sequence_tokens, server_device_problems
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
from megatron_fipo.preflight.host_memory import HostMemory, host_memory
from megatron_fipo.preflight.memory import StageMemory, training_memory
from megatron_fipo.preflight.peaks import Peak, peaks, start_problems
from megatron_fipo.preflight.rollout_plan import RolloutPlan, placement_problems, rollout_plan
from megatron_fipo.preflight.server_memory import ServerMemory, server_memory
from megatron_fipo.preflight.work import Assumptions, BatchPlan, StepCost, batch_plan, step_cost

TIGHT = 0.92
"""From this share of the GPU's memory on, a plan that fits is called tight."""


@dataclass(frozen=True)
class Plan:
    """A run as preflight sees it.

    Attributes:
        stages: memory at the peak of an update. peaks: of a GPU, when it is fullest, in the run's order.
        host: what the run keeps in a node's own memory.
        rollout: where responses are generated. server: memory of one server's GPU.
    """

    config: Config
    shape: ModelShape
    gpu: Gpu
    world_size: int
    assumptions: Assumptions
    stages: list[StageMemory]
    peaks: list[Peak]
    host: HostMemory
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
    stages = training_memory(config, shape, world_size, gpu)
    rollout = rollout_plan(config, world_size, gpus_per_node)
    server = server_memory(config, shape, gpu, rollout, max(stage.lasting for stage in stages))
    moments = peaks(config, shape, stages, rollout, server)
    host = host_memory(config, shape, stages, rollout, min(gpus_per_node, world_size))
    batch = batch_plan(config, world_size, assumptions)
    cost = step_cost(config, shape, gpu, world_size, gpus_per_node, batch, assumptions, server, rollout)
    findings = [
        *_memory_findings(config, shape, gpu, stages, server, rollout),
        *_peak_findings(gpu, moments),
        *(Finding(FAILS, text) for text in start_problems(config, gpu, rollout)),
        *(Finding(FAILS, text) for text in server_device_problems(config, "cuda") if config.servers.device != "cpu"),
        *(Finding(WARNS, text) for text in placement_problems(config, rollout, world_size, gpus_per_node)),
        *batch_findings(config, batch),
        *objective_findings(config, model_config),
        *(file_findings(config) if check_files else ()),
    ]
    return Plan(
        config, shape, gpu, world_size, assumptions, stages, moments, host, rollout, server, batch, cost, findings
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
    longest = longest_sequence_tokens(config)
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


def _peak_findings(gpu: Gpu, moments: list[Peak]) -> Iterator[Finding]:
    """Other moments than an update at which a GPU would be too full."""
    for peak in moments:
        if peak.remedy and peak.total > gpu.memory_gib:
            parts = {
                "of the actor": peak.actor,
                "of the server's weights": peak.server_weights,
                "of keys and values": peak.pool,
                "on the way": peak.on_the_way,
                "of contexts, buffers and workspace": peak.rest,
            }
            listed = ", ".join(f"{value:.1f} {name}" for name, value in parts.items() if value)
            yield Finding(
                FAILS,
                f"when {peak.moment} each GPU holds {peak.total:.1f} GiB, and {gpu.name} has {gpu.memory_gib:.1f}: "
                f"{listed}. {peak.remedy}",
            )


def _largest_part(stage: StageMemory) -> str:
    """A sentence about the largest part of a stage's memory, and about how to make it smaller."""
    remedies = {
        "weights": "raise parallel.tp or pp",
        "gradients": "raise parallel.tp or pp",
        "optimizer": "set optimizer.distributed=true, or use more data-parallel ranks",
        "activations": "raise parallel.cp, set parallel.sequence_parallel=true or model.recompute=selective or full, "
        "or lower batch.max_tokens_per_microbatch",
        "fp8_weights": "set model.recompute=selective or full, or raise parallel.tp or pp",
        "log_probs": "lower model.log_prob_chunk_mib",
        "rollout_engine": "generate with servers (rollout.engine)",
    }
    name = max(remedies, key=lambda part: float(getattr(stage, part)))
    return f"Most of it, {getattr(stage, name):.1f} GiB, are {name.replace('_', ' ')}: {remedies[name]}."
