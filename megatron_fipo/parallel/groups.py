"""The process groups of a run, and the one place that reads Megatron's global parallel state."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from megatron_fipo.config import ParallelSection
from megatron_fipo.system.open_files import make_room_for


@dataclass(frozen=True)
class ParallelGroups:
    """Every process group that this rank belongs to.

    Attributes:
        tp: tensor parallel. pp: pipeline parallel. cp: context parallel. dp: data parallel, without cp.
        dp_cp: data and context parallel together: the ranks that hold the same parameters.
        world: all ranks.
    """

    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup
    world: ProcessGroup

    @property
    def rank(self) -> int:
        """Rank among all."""
        return self.world.rank()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the end of the pipeline, where log-probs and losses are computed."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def reports_loss(self) -> bool:
        """Whether this rank's loss metrics count: true once for each data- and context-parallel rank."""
        return self.is_last_stage and self.tp.rank() == 0


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def initialize(parallel: ParallelSection, seed: int) -> ParallelGroups:
    """Start torch.distributed where it is not yet up (from torchrun's environment, or alone) and build the groups.

    Collective over all ranks. Calling it again after `destroy_model_parallel` builds another layout.

    Raises:
        ValueError: if the world size is no multiple of tp * pp * cp.
    """
    if not dist.is_initialized():
        _start_distributed(parallel.timeout_s)
    model_size = parallel.tp * parallel.pp * parallel.cp
    if dist.get_world_size() % model_size:
        raise ValueError(
            f"{dist.get_world_size()} processes cannot be split into layouts of parallel.tp={parallel.tp} x "
            f"parallel.pp={parallel.pp} x parallel.cp={parallel.cp} = {model_size}. Start a multiple of {model_size} "
            "processes (--nproc), or lower a size."
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.virtual_pp,
        context_parallel_size=parallel.cp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(parallel.timeout_s / 60)),
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    world = dist.group.WORLD
    assert world is not None, "torch.distributed was started above"
    return ParallelGroups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        world=world,
    )


def _start_distributed(timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        rank, size = os.environ["RANK"], os.environ.get("WORLD_SIZE", "")
        if rank.isdigit() and size.isdigit() and int(rank) >= int(size):  # nobody would ever answer it
            raise ValueError(
                f"RANK={rank} with WORLD_SIZE={size}: ranks count from 0 to WORLD_SIZE - 1. torchrun sets both; unset "
                "what is left over from elsewhere."
            )
        if size.isdigit():
            make_room_for(int(size))
        # Else every rank connects to every other one before anything else happens, in each of its groups.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def subgroup(ranks: Sequence[int], timeout_s: float) -> ProcessGroup:
    """A group of some ranks for Python objects and CPU tensors, beside Megatron's. Collective over these ranks alone.

    Args:
        ranks: ascending, the caller's among them; the same on each.
        timeout_s: longest wait inside one collective.
    """
    group = dist.new_group(
        list(ranks), timeout=timedelta(seconds=timeout_s), backend="gloo", use_local_synchronization=True
    )
    assert isinstance(group, ProcessGroup), "the caller is one of its ranks"
    return group


def destroy_model_parallel() -> None:
    """Forget Megatron's groups so that another layout can be built; torch.distributed stays up."""
    parallel_state.destroy_model_parallel()


def shut_down() -> None:
    """Forget all groups and leave torch.distributed."""
    with contextlib.suppress(AssertionError):  # raised where the model-parallel groups were never built
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_stage_edge(ranks: ParallelGroups, virtual_stage: int, num_virtual_stages: int) -> tuple[bool, bool]:
    """(whether this rank's chunk begins the model, whether it ends it)."""
    first = ranks.pp.rank() == 0 and virtual_stage == 0
    last = ranks.is_last_stage and virtual_stage == num_virtual_stages - 1
    return first, last
