"""When a GPU is fullest: at the start, in an update, when weights go over, while responses are generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.preflight.hardware import GIB, Gpu
from megatron_fipo.preflight.memory import CONTEXT_GIB, RESIDUE_GIB, SERVER_RESIDUE_GIB, WEIGHT_BYTES, StageMemory
from megatron_fipo.preflight.rollout_plan import RolloutPlan
from megatron_fipo.preflight.server_memory import ServerMemory, free_at_start_gib


@dataclass(frozen=True)
class Peak:
    """One of the moments, with the GiB on the GPU that then holds most.

    Attributes:
        moment: which moment it is, in words.
        remedy: what makes it smaller.
        actor: weights, gradients, optimizer and reference; while they are built, the weights twice.
        passing: what an update needs for a while: activations, FP8 copies of weights, log-probs.
        server_weights, pool: the rollout engine's weights, its keys and values.
        on_the_way: buckets of weights, and the tensor that is being packed.
        rest: contexts, graphs, communication buffers, workspace, and in an update fragmentation.
    """

    moment: str
    remedy: str
    actor: float = 0.0
    passing: float = 0.0
    server_weights: float = 0.0
    pool: float = 0.0
    on_the_way: float = 0.0
    rest: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.actor + self.passing + self.server_weights + self.pool + self.on_the_way + self.rest


def peaks(
    config: Config, shape: ModelShape, stages: Sequence[StageMemory], rollout: RolloutPlan, server: ServerMemory
) -> list[Peak]:
    """Return the peaks of the trainer's GPUs and of a dedicated server's, in the order in which a run reaches them.

    Colocated servers start while the actor's memory is lent, and release theirs before it takes its own again.
    """

    def worst(peak_of: Callable[[StageMemory], Peak]) -> Peak:
        return max(map(peak_of, stages), key=lambda peak: peak.total)

    in_process = config.rollout.engine == "in_process"
    residue = SERVER_RESIDUE_GIB if rollout.is_colocated else 0.0
    on_the_way = on_the_way_gib(config, shape)
    found = [
        worst(
            lambda stage: Peak(
                "the actor is built",
                "Raise parallel.tp or pp.",
                actor=stage.lasting + stage.weights,  # moved into the buffer that the optimizer shards
                rest=RESIDUE_GIB,
            )
        )
    ]
    if rollout.is_colocated:
        found.append(_serving("a server starts", server, CONTEXT_GIB))
    elif not in_process and not config.servers.urls:
        found.append(_serving("a server generates on GPUs of its own", server, 0.0))
    found.append(worst(lambda stage: _update(stage, in_process)))
    if not in_process:
        found.append(
            worst(
                lambda stage: Peak(
                    "weights go over",
                    "Raise servers.tp or parallel.tp, or lower servers.bucket_mib.",
                    actor=stage.lasting,
                    server_weights=server.weights if rollout.is_colocated else 0.0,
                    on_the_way=on_the_way,
                    rest=RESIDUE_GIB + residue,
                )
            )
        )
    if rollout.is_colocated:
        found.append(_serving("responses are generated", server, RESIDUE_GIB))
    return found


def _update(stage: StageMemory, in_process: bool) -> Peak:
    return Peak(
        "an update",
        "",  # what helps depends on its largest part
        actor=stage.lasting,
        passing=stage.activations + stage.fp8_weights + stage.log_probs,
        server_weights=stage.rollout_engine if in_process else 0.0,
        rest=stage.reserve + (0.0 if in_process else stage.rollout_engine),
    )


def _serving(moment: str, server: ServerMemory, trainer: float) -> Peak:
    return Peak(
        moment,
        "Lower servers.memory_fraction.",
        server_weights=server.weights,
        pool=server.pool,
        rest=server.beside + trainer,
    )


def on_the_way_gib(config: Config, shape: ModelShape) -> float:
    """GiB on the way in a handover, on every rank, since each packs for the server on its own GPU.

    They are the largest tensor, whole and in its tensor-parallel parts, and two buckets; one bucket holds only that
    tensor if it is larger than a bucket.
    """
    largest = shape.vocab_size * shape.hidden_size * WEIGHT_BYTES[config.model.dtype] / GIB
    bucket = config.servers.bucket_mib / 1024
    return bucket + max(bucket, largest) + 2 * largest


def start_problems(config: Config, gpu: Gpu, rollout: RolloutPlan) -> Iterator[str]:
    """A server that would not come up, whatever its weights."""
    fraction = config.servers.memory_fraction
    wanted, free = fraction * gpu.memory_gib, free_at_start_gib(gpu, rollout)
    if config.rollout.engine == "vllm" and not config.servers.urls and wanted > free:
        yield (
            f"servers.memory_fraction={fraction}: vLLM does not start unless so much of the GPU is free, and "
            f"{wanted:.1f} of {gpu.memory_gib:.1f} GiB are not: contexts leave {free:.1f}. Lower it to "
            f"{int(100 * free / gpu.memory_gib) / 100:.2f}."
        )
