"""A trainer of several ranks on fake GPUs, whose colocated servers are real processes of the fake SGLang."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fipo.config import Config, ParallelSection, load_config
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.rollout.servers import engine as server_engine
from megatron_fipo.rollout.servers import weight_buckets
from megatron_fipo.rollout.servers.api import InferenceServer
from megatron_fipo.rollout.servers.cuda_handles import DEVICE_ARGUMENT, CudaHandle
from megatron_fipo.rollout.servers.engine import OwnedServers, ServerEngine
from megatron_fipo.rollout.servers.http import ServerRefusedError
from megatron_fipo.rollout.servers.node_layout import TrainerGpu
from megatron_fipo.rollout.servers.packers import Packers
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.server import State
from megatron_fipo.rollout.servers.setup import build_server_engine
from megatron_fipo.rollout.servers.sglang.client import SglangServer
from megatron_fipo.rollout.servers.weight_buckets import Bucket
from tests.colocated.fake_gpus import FakeGpus
from tests.models import load
from tests.parallel.layouts import layout

FAKE_SGLANG = Path(__file__).with_name("fake_sglang")
REPOSITORY = Path(__file__).parents[2]
UUID = "GPU-fake-"
CAPACITY_IN_MODELS = 11.5
"""Of a GPU, in units of the model's bytes, which a server of one GPU holds."""
WEIGHTS, STATE, ACTIVATIONS = 1.0, 3.0, 7.0
"""What the actor holds of a GPU: weights, gradients with optimizer state, what an update leaves in torch's cache."""


@dataclass(frozen=True)
class Case:
    """What a run does, and what of it is broken on purpose."""

    num_ranks: int = 2
    tp: int = 1
    num_servers: int = 2
    first_gpu: int = 0
    """Of the servers'."""
    num_steps: int = 2
    keeps_snapshot: bool = False
    breaks: str = ""
    """What is done wrong: caches, lending, idle, own_gpu, order, together, handle, refuse, settle, restart; "" for
    nothing."""
    environment: Mapping[str, str] = field(default_factory=dict)
    health_interval_s: float = 60.0
    slow_ranks: tuple[int, ...] = ()
    """These take their time to lend their memory."""
    waits_for_probe: bool = False
    """Give the memory back while a server works on a question after its health."""


class FakeActor:
    """A `Policy` whose memory is held on a fake GPU."""

    def __init__(self, folder: Path, gpus: FakeGpus, gpu: str, before_lending: Callable[[int], None]) -> None:
        self.vocab_size = read_model_shape(folder).vocab_size
        self._model = load(folder)
        self._gpus, self._gpu, self._before_lending, self._num_lent = gpus, gpu, before_lending, 0
        self._unit = model_bytes(folder)
        self.onload()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        is_tied = self._model.config.tie_word_embeddings
        for name, tensor in self._model.state_dict().items():
            if not (is_tied and name == "lm_head.weight"):
                yield name, tensor

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise AssertionError("these runs have no canary")

    def train(self) -> None:
        """An update: its activations stay in the allocator's cache."""
        self._hold("activations", ACTIVATIONS)
        for tensor in self._model.state_dict().values():
            tensor.add_(1.0)

    def offload(self) -> None:
        self._before_lending(self._num_lent)
        self._num_lent += 1
        self._hold("weights", 0)
        self._hold("state", 0)
        self._gpus.note(kind="actor lent", gpu=self._gpu)

    def onload(self) -> None:
        self._hold("weights", WEIGHTS)
        self._hold("state", STATE)

    def give_back_caches(self) -> None:
        self._hold("activations", 0)

    def _hold(self, what: str, models: float) -> None:
        self._gpus.hold(self._gpu, f"actor:{what}", int(models * self._unit))


class SharedMemory:
    """torch as `weight_buckets` sees it, its buffers in files that other processes map.

    Who opens such a buffer sees what is in it then, as on a GPU: what was written too early, too.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._files: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert device.type == "cpu"
        file = str(self._folder / f"bucket-{self._rank}-{uuid.uuid4().hex}")
        buffer = torch.from_file(file, shared=True, size=size, dtype=dtype)
        self._files[buffer.data_ptr()] = file
        return buffer

    def file_of(self, flat: Tensor) -> str:
        """Of the buffer that begins there."""
        return self._files[flat.data_ptr()]


def model_bytes(folder: Path) -> int:
    """Of the model's weights."""
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


def config_of(case: Case, folder: Path, python: str) -> Config:
    gpus = ",".join(map(str, range(case.first_gpu, case.first_gpu + case.num_servers * case.tp)))
    return load_config(
        None,
        [
            f"model.path={folder}",
            "data.train.a.kind=chain_arithmetic",
            "data.train.a.verifier=chain_arithmetic",
            "rollout.engine=sglang",
            "rollout.max_prompt_tokens=4",
            "rollout.max_response_tokens=4",
            f"servers.python={python}",
            "servers.device=cuda",
            "servers.placement=colocated",
            f"servers.gpus=[{gpus}]",
            f"servers.num_per_node={case.num_servers}",
            f"servers.tp={case.tp}",
            "servers.canary_sequences=0",
            f"servers.keep_snapshot={str(case.keeps_snapshot).lower()}",
            f"servers.health_interval_s={case.health_interval_s}",
            "servers.start_timeout_s=120",
            "servers.sync_timeout_s=60",
            "servers.bucket_mib=1",
        ],
    )


def run(case: Case, model: str, python: str, folder: str) -> dict[str, Any]:
    """One rank: some steps of generation and training, as the trainer makes them.

    Returns:
        policy versions that this rank's servers report at the end of each rollout, and each server's restarts.
    """
    rank = int(os.environ["RANK"])
    gpus = FakeGpus(Path(folder) / "gpus.json")
    os.environ |= {
        "FAKE_GPUS": str(gpus.path),
        "PYTHONPATH": os.pathsep.join([str(FAKE_SGLANG), str(REPOSITORY)]),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        **case.environment,
    }

    memory = SharedMemory(Path(folder), rank)

    def handle(flat: Tensor) -> CudaHandle:
        gpu = "0" if case.breaks == "own_gpu" else str(rank)
        if case.breaks == "handle" and rank == 1:
            raise RuntimeError("no memory is left")
        gpus.note(kind="handle", of=str(rank))
        arguments: list[Any] = [None] * 15
        arguments[DEVICE_ARGUMENT + 1 : DEVICE_ARGUMENT + 3] = memory.file_of(flat), len(flat)
        return CudaHandle(UUID + gpu, tuple(arguments))

    config = config_of(case, Path(model), python)
    is_slow = rank in case.slow_ranks
    actor = FakeActor(Path(model), gpus, str(rank), partial(_dawdle, case, gpus) if is_slow else _go_on)
    with (
        layout(ParallelSection()) as ranks,
        _broken(case.breaks, actor),
        mock.patch.object(weight_buckets, "torch", memory),
    ):
        engine = build_server_engine(config, ranks, [1], Path(folder) / "servers", TrainerGpu(str(rank), handle))
        try:
            return _steps(case, engine, actor)
        finally:
            engine.close()


def _go_on(num_lent: int) -> None:
    """At once."""


def _dawdle(case: Case, gpus: FakeGpus, num_lent: int) -> None:
    """Lend the memory late: where servers do not wait for it, not before they have sized their caches beside it."""
    awaited = {("together", 0): case.num_servers, ("restart", 1): case.num_servers + 1}.get((case.breaks, num_lent), 0)
    time.sleep(0.5)  # longer than a server takes to start
    while len(gpus.events("sized")) < awaited:
        time.sleep(0.05)


def _steps(case: Case, engine: ServerEngine, actor: FakeActor) -> dict[str, Any]:
    if case.breaks == "lending":
        engine.start()
        engine.release_memory()
    else:
        engine.start(actor)
    versions: list[Sequence[str]] = []
    for step in range(case.num_steps):
        engine.give(actor, step)
        versions.append(_versions(engine.owned))
        while case.waits_for_probe and engine.owned is not None and not _num_running(engine.owned):
            pass
        engine.take_back(actor)
        actor.train()
    restarts = [] if engine.owned is None else [server.num_restarts for server in engine.owned.pool.servers]
    return {"versions": versions, "restarts": restarts}


def _num_running(owned: OwnedServers) -> int:
    """Requests that the servers work on."""
    connections = [server.client._connection for server in owned.pool.servers]  # type: ignore[attr-defined]
    return sum(owned.loop.run(each.get("/model_info", timeout_s=60))["num_running"] for each in connections)


@contextmanager
def _broken(what: str, actor: FakeActor) -> Iterator[None]:
    """The engine with one thing done wrong."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        put(server_engine, "give_back_caches", (lambda: None) if what == "caches" else actor.give_back_caches)
        if what == "idle":
            put(server_engine, "_pause_and_release", lambda client: client.release_memory())
            put(asyncio, "wait", _no_wait)
        if what == "restart":
            put(ServerPool, "restart_when_there_is_memory", ServerPool._restart)
        if what == "settle":
            put(Packers, "buckets", _without_waiting(Packers.buckets))
        if what == "refuse":
            put(SglangServer, "begin_update", _refuse)
        if what == "together":
            put(ServerEngine, "collectively", nullcontext)
        if what == "order":
            put(server_engine, "_resume_cache_and_go_on", _go_on_and_resume_cache)
        yield


def _without_waiting(buckets: Callable[..., Iterator[Bucket]]) -> Callable[..., Iterator[Bucket]]:
    """Buckets that are packed without a look at what servers still read."""
    return lambda packers, stream, settle: buckets(packers, stream, lambda: None)


async def _refuse(server: SglangServer) -> None:
    raise ServerRefusedError(f"{server.url} wants no weights", 400)


async def _no_wait(tasks: object) -> None:
    """In place of waiting for questions after servers' health."""


async def _go_on_and_resume_cache(client: InferenceServer) -> None:
    await client.resume()
    await client.resume_memory("cache")


def _versions(owned: OwnedServers | None) -> Sequence[str]:
    """What the servers that may generate report."""
    if owned is None:
        return []
    return [owned.loop.run(server.client.info()).weight_version for server in owned.pool.roster.in_state(State.READY)]
