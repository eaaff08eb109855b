"""Builds a `ServerEngine` from the configuration: which rank owns which servers, and how weights reach them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch

from megatron_fipo.config import Config, server_device_problems
from megatron_fipo.convert.dtypes import MODEL_DTYPES
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.agreement import decided_by_leader
from megatron_fipo.parallel.announcements import Announcements
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.nodes import node_of, own_local_rank
from megatron_fipo.rollout.engine import Share
from megatron_fipo.rollout.servers.announced import AnnouncedServers
from megatron_fipo.rollout.servers.api import LaunchSpec, ServerAdapter
from megatron_fipo.rollout.servers.cache_proof import CACHE_CANARY_TOKENS
from megatron_fipo.rollout.servers.engine import EngineSettings, OwnedServers, ServerEngine
from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.joining import Joining, why_none_may_join
from megatron_fipo.rollout.servers.nccl_version import check_same_nccl
from megatron_fipo.rollout.servers.node_layout import TrainerGpu, node_group, own_gpu, packers_of_node
from megatron_fipo.rollout.servers.packers import NodeGroup, Packers
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.proof import DEFAULT_TOLERANCE
from megatron_fipo.rollout.servers.sending import Sender
from megatron_fipo.rollout.servers.sglang.launch import SglangAdapter, router_plan
from megatron_fipo.rollout.servers.snapshots import SnapshotFollower, Snapshots, SnapshotWriter
from megatron_fipo.rollout.servers.specs import Device, device_of, launch_specs, read_vocab_size
from megatron_fipo.rollout.servers.sync import WeightSync
from megatron_fipo.rollout.servers.transfers import Method, make_transfer
from megatron_fipo.rollout.servers.vllm.launch import VllmAdapter

ADAPTERS: dict[str, type[ServerAdapter]] = {"sglang": SglangAdapter, "vllm": VllmAdapter}
"""Adapters by the value of rollout.engine."""

_MIB = 2**20
_CANARY_TOKENS = 64


@dataclass(frozen=True)
class _Ownership:
    """Who owns servers, as one rank sees it.

    Attributes:
        rank: this rank.
        owners: all ranks that own servers, ascending.
        specs: specifications of this rank's servers; none where it owns none.
        node: the ranks that pack weights for this rank's node, where it is one of them.
    """

    rank: int
    owners: Sequence[int]
    specs: Sequence[LaunchSpec]
    node: NodeGroup | None

    @property
    def is_owner(self) -> bool:
        return self.rank in self.owners

    @property
    def share(self) -> Share | None:
        """This rank's share of the prompts; None where it owns no servers."""
        return _share(self.rank, self.owners)


def share_of_servers(config: Config, ranks: ParallelGroups) -> Share | None:
    """This rank's share of the prompts: of those that the servers of its node generate. Collective over all ranks.

    None where it owns no servers.
    """
    local_ranks = exchange.all_gather_objects(own_local_rank(), ranks.world)
    return _share(ranks.rank, _owners(config, local_ranks))


def _owners(config: Config, local_ranks: Sequence[int]) -> list[int]:
    """The ranks that own servers, ascending: the first of each node."""
    owners = [rank for rank, local_rank in enumerate(local_ranks) if local_rank == 0]
    # With fewer servers than nodes, the other nodes' ranks wait for those that have one.
    return owners[: len(config.servers.urls)] if config.servers.urls else owners


def _share(rank: int, owners: Sequence[int]) -> Share | None:
    return Share(owners.index(rank), len(owners)) if rank in owners else None


def build_server_engine(
    config: Config,
    ranks: ParallelGroups,
    stop_token_ids: Collection[int],
    folder: Path,
    gpu: TrainerGpu | None = None,
    *,
    may_be_joined: bool = False,
) -> ServerEngine:
    """The engine of rollout.engine=sglang or vllm; its servers are started by its `start()`. Collective over all ranks.

    The rank with LOCAL_RANK 0 of each node owns that node's servers.

    Args:
        config: validated.
        stop_token_ids: tokens that end a response.
        folder: folder of the servers' logs, and of snapshots where servers.snapshot_dir does not say otherwise.
        gpu: the GPU that this rank trains on; None looks.
        may_be_joined: whether servers may join while the engine is in use, where the configuration allows it.

    Raises:
        ValueError: on every rank, if the model is too short for the responses, the devices do not suffice, or a server
            is to be handed weights on a GPU that no rank is on.
    """
    section, device = config.servers, device_of(config)
    vocab_size = read_vocab_size(config)
    if problems := list(server_device_problems(config, device)):
        raise ValueError("\n".join(problems))
    ownership = _ownership(config, device, ranks, own_gpu() if gpu is None else gpu)
    packers = Packers(
        section.bucket_mib * _MIB,
        MODEL_DTYPES[config.model.dtype],
        None if device == "cuda" and section.weight_sync != "disk" else torch.device("cpu"),
        ownership.node,
    )
    return ServerEngine(
        _own(config, ownership, packers, folder) if ownership.is_owner else None,
        _settings(config, vocab_size, stop_token_ids),
        agree=lambda problem: exchange.all_gather_objects(problem, ranks.world),
        share=ownership.share,
        packers=packers if ownership.node is not None and not ownership.is_owner else None,
        check_before_start=partial(_check_nccl, config, device),
        joining=_joining(config, ownership, ranks, folder) if may_be_joined and not why_none_may_join(config) else None,
    )


def _joining(config: Config, ownership: _Ownership, ranks: ParallelGroups, folder: Path) -> Joining:
    owner = ownership.owners.index(ownership.rank) if ownership.is_owner else None
    decide = partial(decided_by_leader, world=ranks.world)
    return Joining(AnnouncedServers(folder), config, owner, len(ownership.owners), decide)


def _ownership(config: Config, device: Device, ranks: ParallelGroups, gpu: TrainerGpu) -> _Ownership:
    """Who owns servers. Collective; an error is raised on every rank."""
    section = config.servers
    places = exchange.all_gather_objects((own_local_rank(), gpu.name), ranks.world)
    owners = _owners(config, [local_rank for local_rank, _ in places])
    specs: list[LaunchSpec] = []
    problem = ""
    if ranks.rank in owners:
        try:
            specs = launch_specs(config, device, section.urls[owners.index(ranks.rank) :: len(owners)])
        except ValueError as error:
            problem = str(error)
    shared = exchange.all_gather_objects((problem, [spec.gpus for spec in specs]), ranks.world)
    if problems := [text for text, _ in shared if text]:
        raise ValueError(problems[0])
    node = None
    if gpu.name and device == "cuda" and section.weight_sync == "tensor":
        node = _node_group(config, owners, places, {owner: shared[owner][1] for owner in owners}, ranks.rank, gpu)
    return _Ownership(ranks.rank, owners, specs, node)


def _node_group(
    config: Config,
    owners: Sequence[int],
    places: Sequence[tuple[int, str]],
    server_gpus: Mapping[int, Sequence[Sequence[str]]],
    rank: int,
    gpu: TrainerGpu,
) -> NodeGroup | None:
    """The ranks that pack for this rank's node, where it is one of them.

    Args:
        places: (LOCAL_RANK, GPU) of each rank.
        server_gpus: the GPUs of each server, by its owner.

    Raises:
        ValueError: on every rank, if a server of any node is on a GPU that no rank is on.
    """
    local_ranks, gpu_of = [local for local, _ in places], [name for _, name in places]
    nodes = [packers_of_node(node_of(owner, local_ranks), gpu_of, server_gpus[owner]) for owner in owners]
    own = next((packers for packers in nodes if rank in packers), None)
    timeout_s = config.parallel.timeout_s + config.servers.sync_timeout_s
    return None if own is None else node_group(own, rank, gpu, timeout_s)


def _own(config: Config, ownership: _Ownership, packers: Packers, folder: Path) -> OwnedServers:
    """Make the parts of the engine on a rank that owns servers."""
    section, specs = config.servers, ownership.specs
    loop = EventLoopThread()
    pool = ServerPool(
        ADAPTERS[config.rollout.engine](),
        specs,
        section,
        log_folder=None if section.urls else folder / f"rank-{ownership.rank}",
        router=partial(router_plan, specs[0]) if section.router else None,
    )
    sync = WeightSync(
        pool,
        loop,
        make_transfer(cast(Method, section.weight_sync), section.sync_timeout_s),
        packers,
        section.sync_timeout_s,
        _snapshots(config, folder, ownership) if section.keep_snapshot else None,
    )
    max_concurrent_requests = max(1, section.max_concurrent_requests * len(specs))
    sender = Sender(pool, max_concurrent_requests, section.request_timeout_s)
    return OwnedServers(pool, loop, sender, sync)


def _settings(config: Config, vocab_size: int, stop_token_ids: Collection[int]) -> EngineSettings:
    section, rollout = config.servers, config.rollout
    tolerance = section.canary_tolerance
    if tolerance is None:
        tolerance = DEFAULT_TOLERANCE[config.model.dtype if config.model.fp8 == "none" else "fp8"]
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    return EngineSettings(
        vocab_size=vocab_size,
        stop_token_ids=frozenset(stop_token_ids),
        score_timeout_s=section.request_timeout_s,
        canary_tolerance=tolerance,
        num_canaries=section.canary_sequences,
        canary_tokens=min(_CANARY_TOKENS, longest),
        cache_canary_tokens=min(CACHE_CANARY_TOKENS, longest),
        colocated=section.placement == "colocated",
    )


def _snapshots(config: Config, folder: Path, ownership: _Ownership) -> Snapshots:
    """Snapshots of the weights, which the first owner writes for the servers of all."""
    announcements = Announcements("snapshot of the weights") if len(ownership.owners) > 1 else None
    if ownership.rank == ownership.owners[0]:
        place = Path(config.servers.snapshot_dir or folder) / "snapshots"
        # Servers that are started here run as this user; those of others may run as somebody else.
        return SnapshotWriter(place.resolve(), config.model.path, announcements, private=not config.servers.urls)
    assert announcements is not None, "there is another owner"
    return SnapshotFollower(announcements, config.parallel.timeout_s)


def _check_nccl(config: Config, device: str) -> None:
    """Refuse servers with another NCCL than the trainer's. Servers that somebody else started cannot be asked."""
    section = config.servers
    if device == "cuda" and section.weight_sync == "distributed" and not section.urls:
        check_same_nccl(sys.executable, section.python or sys.executable)
