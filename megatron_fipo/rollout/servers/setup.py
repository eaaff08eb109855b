"""From the configuration to a rollout engine over servers: who owns which, where they run, how they are written."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch

from megatron_fipo.config import Config, server_device_problems
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.announcements import Announcements
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rollout.engine import Share
from megatron_fipo.rollout.servers.api import LaunchSpec, ServerAdapter
from megatron_fipo.rollout.servers.canary import DEFAULT_TOLERANCE
from megatron_fipo.rollout.servers.engine import ServerEngine
from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.nccl_version import check_same_nccl
from megatron_fipo.rollout.servers.node_layout import (
    TrainerGpu,
    node_group,
    node_of,
    own_gpu,
    packers_of_node,
    visible_gpus,
)
from megatron_fipo.rollout.servers.packers import NodeGroup, Packers
from megatron_fipo.rollout.servers.pool import ServerPool, WatchSettings
from megatron_fipo.rollout.servers.process import free_port
from megatron_fipo.rollout.servers.sglang.server import SglangAdapter, router_plan
from megatron_fipo.rollout.servers.snapshots import SnapshotFollower, Snapshots, SnapshotWriter
from megatron_fipo.rollout.servers.vllm.server import VllmAdapter
from megatron_fipo.rollout.servers.weight_sync import Method, WeightSync

ADAPTERS: dict[str, type[ServerAdapter]] = {"sglang": SglangAdapter, "vllm": VllmAdapter}
"""By rollout.engine."""

_MIB = 2**20
_CANARY_TOKENS = 64
_CPU_CACHE_TOKENS = 2**18
"""Most tokens that a server on the CPU keeps in its cache if the configuration does not say."""


def build_server_engine(
    config: Config,
    ranks: ParallelGroups,
    stop_token_ids: Collection[int],
    folder: Path,
    gpu: TrainerGpu | None = None,
) -> ServerEngine:
    """The engine of rollout.engine=sglang or vllm; its servers are started by its `start()`. Collective over all ranks.

    The rank with LOCAL_RANK 0 of each node owns that node's servers.

    Args:
        config: validated.
        stop_token_ids: tokens that end a response.
        folder: for the servers' logs, and for snapshots where servers.snapshot_dir does not say otherwise.
        gpu: that this rank trains on; None looks.

    Raises:
        ValueError: on every rank, if the model is shorter than the responses, the devices do not suffice, or no rank is
            on a GPU that a server is to be handed weights on.
    """
    section, device = config.servers, _device(config)
    gpu = own_gpu() if gpu is None else gpu
    model = _read_model(config)
    if problems := list(server_device_problems(config, device)):
        raise ValueError("\n".join(problems))
    places = exchange.all_gather_objects((int(os.environ.get("LOCAL_RANK", "0")), gpu.name), ranks.world)
    owners = [rank for rank, (local_rank, _) in enumerate(places) if local_rank == 0]
    if section.urls:  # with fewer servers than nodes, the other nodes' ranks wait for those that have one
        owners = owners[: len(section.urls)]
    is_owner = ranks.rank in owners
    specs, server_gpus = _specs_of_all(config, device, owners, ranks)
    node = None
    if gpu.name and device == "cuda" and section.weight_sync == "tensor":
        node = _node_group(config, owners, places, server_gpus, ranks.rank, gpu)
    packers = Packers(
        section.bucket_mib * _MIB,
        getattr(torch, config.model.dtype),
        None if device == "cuda" and section.weight_sync != "disk" else torch.device("cpu"),
        node,
    )
    pool = loop = sync = None
    if is_owner:
        loop = EventLoopThread()
        pool = _build_pool(config, specs, None if section.urls else folder / f"rank-{ranks.rank}")
        sync = WeightSync(
            pool,
            loop,
            method=_method(section.weight_sync),
            packers=packers,
            timeout_s=section.sync_timeout_s,
            snapshots=_snapshots(config, folder, owners, ranks.rank) if section.keep_snapshot else None,
            host=_own_address(specs),
        )
    tolerance = section.canary_tolerance
    if tolerance is None:
        tolerance = DEFAULT_TOLERANCE[config.model.dtype if config.model.fp8 == "none" else "fp8"]
    return ServerEngine(
        pool,
        loop,
        sync,
        agree=lambda problem: exchange.all_gather_objects(problem, ranks.world),
        share=Share(owners.index(ranks.rank), len(owners)) if is_owner else None,
        stop_token_ids=stop_token_ids,
        vocab_size=model["vocab_size"],
        max_concurrent_requests=max(1, section.max_concurrent_requests * len(specs)),
        request_timeout_s=section.request_timeout_s,
        canary_tolerance=tolerance,
        num_canaries=section.canary_sequences,
        canary_tokens=min(_CANARY_TOKENS, config.rollout.max_prompt_tokens + config.rollout.max_response_tokens),
        colocated=section.placement == "colocated",
        packers=packers if node is not None and not is_owner else None,
        check_before_start=partial(_check_nccl, config, device),
    )


def _specs_of_all(
    config: Config, device: Literal["cpu", "cuda"], owners: Sequence[int], ranks: ParallelGroups
) -> tuple[list[LaunchSpec], dict[int, list[tuple[str, ...]]]]:
    """(servers that this rank owns, GPUs of each server by its owner). Collective; an error is raised on every rank."""
    specs: list[LaunchSpec] = []
    problem = ""
    if ranks.rank in owners:
        try:
            specs = _launch_specs(config, device, config.servers.urls[owners.index(ranks.rank) :: len(owners)])
        except ValueError as error:
            problem = str(error)
    shared = exchange.all_gather_objects((problem, [spec.gpus for spec in specs]), ranks.world)
    if problems := [text for text, _ in shared if text]:
        raise ValueError(problems[0])
    return specs, {owner: shared[owner][1] for owner in owners}


def _node_group(
    config: Config,
    owners: Sequence[int],
    places: Sequence[tuple[int, str]],
    server_gpus: Mapping[int, Sequence[Sequence[str]]],
    rank: int,
    gpu: TrainerGpu,
) -> NodeGroup | None:
    """The ranks that pack for this rank's node, where it is one of them.

    Raises:
        ValueError: on every rank, if a server of any node is on a GPU that no rank is on.
    """
    local_ranks, gpu_of = [local for local, _ in places], [name for _, name in places]
    nodes = [packers_of_node(node_of(owner, local_ranks), gpu_of, server_gpus[owner]) for owner in owners]
    own = next((packers for packers in nodes if rank in packers), None)
    timeout_s = config.parallel.timeout_s + config.servers.sync_timeout_s
    return None if own is None else node_group(own, rank, gpu, timeout_s)


def _build_pool(config: Config, specs: Sequence[LaunchSpec], log_folder: Path | None) -> ServerPool:
    section = config.servers
    return ServerPool(
        ADAPTERS[config.rollout.engine](),
        specs,
        log_folder=log_folder,
        settings=WatchSettings(
            section.start_timeout_s, section.health_interval_s, section.health_timeout_s, section.max_restarts
        ),
        router=partial(router_plan, specs[0]) if section.router else None,
    )


def _snapshots(config: Config, folder: Path, owners: Sequence[int], rank: int) -> Snapshots:
    """Written by the first owner, for the servers of all."""
    announcements = Announcements("snapshot of the weights") if len(owners) > 1 else None
    if rank == owners[0]:
        place = Path(config.servers.snapshot_dir or folder) / "snapshots"
        # Servers that are started here run as this user; those of others may run as somebody else.
        return SnapshotWriter(place.resolve(), config.model.path, announcements, private=not config.servers.urls)
    assert announcements is not None, "there is another owner"
    return SnapshotFollower(announcements, config.parallel.timeout_s)


def _check_nccl(config: Config, device: str) -> None:
    """Of servers that are started here: those attached to cannot be asked."""
    section = config.servers
    if device == "cuda" and section.weight_sync == "distributed" and not section.urls:
        check_same_nccl(sys.executable, section.python or sys.executable)


def _read_model(config: Config) -> dict[str, int]:
    """Sizes from the model's config.json."""
    rollout = config.rollout
    model = json.loads((Path(config.model.path) / "config.json").read_text(encoding="utf-8"))
    longest, positions = _longest(config), model.get("max_position_embeddings")
    if positions is not None and longest >= positions:
        raise ValueError(
            f"rollout.engine={rollout.engine} serves sequences below the model's max_position_embeddings={positions} "
            f"and would cut responses short; rollout.max_prompt_tokens={rollout.max_prompt_tokens} + the longest "
            f"response are {longest}. Lower them, or raise max_position_embeddings in {config.model.path}/config.json."
        )
    return dict(model)


def _longest(config: Config) -> int:
    responses = (config.rollout.max_response_tokens, config.evaluation.max_response_tokens or 0)
    return config.rollout.max_prompt_tokens + max(responses)


def _device(config: Config) -> Literal["cpu", "cuda"]:
    if config.servers.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if config.servers.device == "cpu" else "cuda"


def _method(name: str) -> Method:
    assert name in ("tensor", "distributed", "disk"), "validated"
    return name  # type: ignore[return-value]


def _launch_specs(config: Config, device: Literal["cpu", "cuda"], urls: Sequence[str]) -> list[LaunchSpec]:
    """One for each server that this rank owns."""
    section, colocated = config.servers, config.servers.placement == "colocated"
    num_servers = len(urls) or section.num_per_node
    # Where a server that somebody else started runs is known only if servers.gpus says so.
    needs_gpus = device == "cuda" and (section.gpus or not urls)
    gpus = _gpus(config, num_servers * section.tp) if needs_gpus else []
    cores = _cores(num_servers * section.tp)
    key = _key(config)
    max_total_tokens = section.max_total_tokens
    if max_total_tokens is None and device == "cpu":
        longest = _longest(config)
        max_total_tokens = max(2 * longest, min(section.max_concurrent_requests * longest, _CPU_CACHE_TOKENS))
    specs = []
    for index in range(num_servers):
        host, port = "127.0.0.1", 0
        if urls:
            address = urlsplit(urls[index])
            host, port = address.hostname or host, address.port or port
        elif section.base_port is not None:
            port = section.base_port + index
        else:
            port = free_port()
        own = slice(index * section.tp, (index + 1) * section.tp)
        specs.append(
            LaunchSpec(
                python=section.python or sys.executable,
                model_path=Path(config.model.path).resolve(),
                host=host,
                port=port,
                dtype=config.model.dtype,
                weight_version="0",
                tp=section.tp,
                device=device,
                gpus=tuple(gpus[own]),
                cpu_cores=tuple(cores[own]) if device == "cpu" else (),
                memory_fraction=section.memory_fraction,
                max_total_tokens=max_total_tokens,
                max_running_requests=section.max_concurrent_requests,
                releases_memory=colocated,
                reproducible=section.reproducible,
                seed=config.run.seed,
                extra_args=tuple(section.extra_args),
                key=key,
            )
        )
    return specs


def _key(config: Config) -> str:
    """Of this rank's servers: random where the run starts them, else the one that their owner gave them.

    Raises:
        ValueError: if its variable is not set, or holds what no header can.
    """
    name = config.servers.api_key_env
    if not config.servers.urls:
        return secrets.token_hex(32)
    if name is None:
        return ""
    key = os.environ.get(name, "")
    if not re.fullmatch(r"[!-~]+", key):
        what = "holds something else than printable ASCII without spaces" if key else "is not set or empty"
        raise ValueError(
            f"servers.api_key_env={name}: that environment variable {what}, on host {socket.gethostname()}. It must "
            "hold the key of the servers in servers.urls, for every rank with LOCAL_RANK 0."
        )
    return key


def _gpus(config: Config, num_needed: int) -> list[str]:
    """GPUs of this node for servers, by names that a process without CUDA_VISIBLE_DEVICES knows."""
    gpus = [str(gpu) for gpu in config.servers.gpus] or visible_gpus()
    if len(gpus) < num_needed:
        raise ValueError(
            f"servers.num_per_node={config.servers.num_per_node} x servers.tp={config.servers.tp} need {num_needed} "
            f"GPUs; there are {len(gpus)}. Lower one of them, or set servers.gpus."
        )
    return gpus


def _cores(num_ranks: int) -> list[tuple[int, ...]]:
    """This process's cores in equal parts; shared where there are fewer cores than server ranks."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // num_ranks)
    return [tuple(cores[(rank * each + i) % len(cores)] for i in range(each)) for rank in range(num_ranks)]


def _own_address(specs: Sequence[LaunchSpec]) -> str:
    """Where servers reach this process."""
    if all(spec.host in ("127.0.0.1", "localhost") for spec in specs):
        return "127.0.0.1"
    return socket.gethostbyname(socket.gethostname())
