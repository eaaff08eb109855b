"""A world of played servers: their processes, a router, process groups, and what a test does with all of it."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fipo.config import ServersSection
from megatron_fipo.parallel.external_group import ExternalGroup
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams
from megatron_fipo.rollout.servers.api import GroupAddress, LaunchPlan, LaunchSpec
from megatron_fipo.rollout.servers.engine import EngineSettings, OwnedServers, ServerEngine
from megatron_fipo.rollout.servers.http import ServerConnection, ServerUnreachableError
from megatron_fipo.rollout.servers.packers import Packers
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.process import free_port
from megatron_fipo.rollout.servers.sending import Sender
from megatron_fipo.rollout.servers.snapshots import SnapshotWriter
from megatron_fipo.rollout.servers.sync import WeightSync
from megatron_fipo.rollout.servers.transfers import DistributedTransfer, Method, make_transfer
from tests.unit.fake_servers import (
    NAMES,
    TRIP_S,
    VOCAB,
    Asked,
    FakeAdapter,
    FakeProcess,
    FakeServer,
    Fault,
    Machine,
    Router,
    digest,
    token,
)
from tests.unit.scripted_clock import DrivenLoop, ScriptedLoop

T = TypeVar("T")

BOOT_S = 5.0
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


class Meeting:
    """A process group of the sender and the servers that have joined it."""

    def __init__(self, num_others: int) -> None:
        self.num_others = num_others
        self.members: list[Machine] = []
        self.is_whole = asyncio.Event()
        self.waiting: dict[int, asyncio.Future[Tensor]] = {}
        self.has_been_left = False


class PlayedGroup(ExternalGroup):
    """An `ExternalGroup` whose broadcasts arrive at played servers."""

    def __init__(self, world: World, name: str, world_size: int, timeout_s: float) -> None:
        self.port, self._world, self._timeout_s = 29500, world, timeout_s
        self._meeting = world.meetings[name] = Meeting(world_size - 1)

    def meet(self, check: Callable[[], object]) -> None:
        self._wait_for(lambda: len(self._meeting.members), check)
        self._meeting.is_whole.set()

    def broadcast(self, tensor: Tensor, check: Callable[[], object]) -> None:
        self._wait_for(lambda: len(self._meeting.waiting), check)
        for mail in self._meeting.waiting.values():
            if not mail.done():
                mail.set_result(tensor.clone())
        self._meeting.waiting.clear()

    def leave(self) -> None:
        self._meeting.has_been_left = True
        self._meeting.is_whole.set()  # whoever waits for it hears that the store is gone
        for mail in self._meeting.waiting.values():
            if not mail.done():
                mail.cancel()

    def _wait_for(self, count: Callable[[], int], check: Callable[[], object]) -> None:
        """Until all others are there."""
        deadline = self._world.loop.time() + self._timeout_s
        while count() < self._meeting.num_others:
            check()
            self._world.advance(0.1)
            if self._world.loop.time() > deadline:
                raise RuntimeError("not all members came")


class PlayedThread(Executor):
    """A thread whose work is done at once, or while the test holds it, not before the test lets it go on."""

    def __init__(self) -> None:
        self.is_held = False
        self._waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, partial(function, *arguments, **keywords)))
        if not self.is_held:
            self.go_on()
        return future

    def go_on(self) -> None:
        self.is_held = False
        while self._waiting:
            future, work = self._waiting.pop(0)
            future.set_result(work())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.go_on()


class World:
    """Servers, their processes, a router, and the clock.

    Attributes:
        asked: every question in order, of all servers.
        breaches: what no server may be asked to do, and was.
        launched: the specification of each process that was started.
        whole: what a server holds that has a version wholly.
        disk: writes snapshots.
    """

    def __init__(self, folder: Path, num_servers: int = 2) -> None:
        self.loop = ScriptedLoop()
        self.thread = DrivenLoop(self.loop)
        self.folder, self.num_servers = folder, num_servers
        self.host = "127.77.0.1"  # whose ports nobody else takes meanwhile
        self.ports = [free_port(self.host) for _ in range(num_servers)]
        self.urls = [f"http://{self.host}:{port}" for port in self.ports]
        self.machines: dict[int, Machine] = {}
        self.clients: dict[int, FakeServer] = {}
        self.routers: dict[str, Router] = {}
        self.processes: list[FakeProcess] = []
        self.meetings: dict[str, Meeting] = {}
        self.asked: list[Asked] = []
        self.breaches: list[str] = []
        self.launched: list[LaunchSpec] = []
        self.joined: list[tuple[int, GroupAddress]] = []
        """Which server joined which group, as what."""
        self.boots: dict[int, list[Fault | None]] = defaultdict(list)
        """What befalls each server's next lives two seconds after their launch."""
        self.disk = PlayedThread()
        self.boot_s = BOOT_S
        self.launch_problem = ""
        """Why a server of what is asked for cannot be started."""
        self.trips: dict[tuple[int, str], float] = defaultdict(lambda: TRIP_S)
        """How long a server's questions of a kind are on their way."""
        self._faults: dict[tuple[int, str], list[Fault | None]] = defaultdict(list)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.base = folder / "base"
        self.base.mkdir(parents=True)
        (self.base / "config.json").write_text(json.dumps(CONFIG))
        save_file(dict(self.weights(0)), self.base / "model.safetensors")
        self.whole = {"0": {name: digest(tensor) for name, tensor in self.weights(0)}}

    # what is played

    def fault(self, server: int, route: str, *faults: Fault | None) -> None:
        """What befalls a server at its next questions of a kind; None for nothing."""
        self._faults[server, route] += faults

    def next_fault(self, server: int, route: str) -> Fault | None:
        queue = self._faults[server, route]
        return queue.pop(0) if queue else None

    def weights(self, version: int) -> list[tuple[str, Tensor]]:
        """The weights of a version: three tensors."""
        return [(name, torch.full((4,), 10.0 * version + place)) for place, name in enumerate(NAMES)]

    def new_weights(self, version: int) -> list[tuple[str, Tensor]]:
        """The same, from here on known as whole."""
        self.whole[str(version)] = {name: digest(tensor) for name, tensor in self.weights(version)}
        return self.weights(version)

    def read_folder(self, folder: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found |= {name: digest(tensor) for name, tensor in load_file(file).items()}
        return found

    def start_process(self, plan: LaunchPlan, log: Path) -> FakeProcess:
        """In the place of `ServerProcess`."""
        kind, argument = plan.command
        subject: Machine | Router
        if kind == "router":
            subject = self.routers[argument] = Router(self, argument)
        else:
            spec = self.launched[int(argument)]
            number = self.ports.index(spec.port)
            subject = Machine(self, number, self.urls[number], spec.model_path, spec.weight_version, boot_s=self.boot_s)
            self.machines[number] = subject
            if self.boots[number] and (fault := self.boots[number].pop(0)):
                self.loop.call_later(2.0, fault, subject)
        self.processes.append(FakeProcess(subject))
        return self.processes[-1]

    def others_server(self, number: int, **changes: Any) -> Machine:
        """A server that somebody else has started."""
        values: dict[str, Any] = {"folder": self.base, "version": "0", "boot_s": 0.0} | changes
        self.machines[number] = Machine(self, number, self.urls[number], **values)
        return self.machines[number]

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # what is tested

    def pool(
        self,
        *,
        attached: bool = False,
        router: bool = False,
        key: str = "a key",
        num_own: int | None = None,
        **settings: Any,
    ) -> ServerPool:
        """A pool of all servers, or of the first ones, not started."""
        spec = LaunchSpec("python", self.base, self.host, 0, "float32", "0", key=key)
        return ServerPool(
            FakeAdapter(self),
            [replace(spec, port=port) for port in self.ports[:num_own]],
            ServersSection(**settings),
            log_folder=None if attached else self.folder / "logs",
            router=(lambda urls, port: LaunchPlan(("router", f"http://127.0.0.1:{port}"))) if router else None,
            start_process=self.start_process,
        )

    def sync(self, pool: ServerPool, method: Method = "tensor", *, keeps_snapshot: bool = True) -> WeightSync:
        """An update takes three buckets."""
        timeout_s = 100.0
        played = DistributedTransfer(timeout_s, self.make_group)
        return WeightSync(
            pool,
            self.thread,
            played if method == "distributed" else make_transfer(method, timeout_s),
            Packers(16, torch.float32, torch.device("cpu")),
            timeout_s,
            SnapshotWriter(self.folder / "snapshots", self.base, executor=self.disk) if keeps_snapshot else None,
        )

    def engine(
        self,
        pool: ServerPool,
        sync: WeightSync | None = None,
        *,
        max_concurrent_requests: int = 64,
        request_timeout_s: float = 500.0,
        colocated: bool = False,
        num_canaries: int = 0,
        **options: Any,
    ) -> ServerEngine:
        settings = EngineSettings(
            vocab_size=VOCAB,
            stop_token_ids=frozenset({1}),
            score_timeout_s=request_timeout_s,
            canary_tolerance=0.1,
            num_canaries=num_canaries,
            canary_tokens=4,
            cache_canary_tokens=16,
            colocated=colocated,
        )
        sender = Sender(pool, max_concurrent_requests, request_timeout_s)
        owned = OwnedServers(pool, self.thread, sender, sync or self.sync(pool))
        return ServerEngine(owned, settings, **({"agree": lambda problem: [problem]} | options))

    def make_group(
        self, host: str, name: str, backend: Literal["gloo", "nccl"], world_size: int, timeout_s: float
    ) -> PlayedGroup:
        """In the place of `ExternalGroup`."""
        return PlayedGroup(self, name, world_size, timeout_s)

    # what a test does with time

    def run(self, awaitable: Awaitable[T], within_s: float = 3600.0) -> T:
        """Await something, however long it takes on this clock; at most `within_s`."""
        return self.loop.drive(awaitable, within_s)

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin something; it goes on while time passes."""
        return self.loop.create_task(coroutine)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.loop.drive(asyncio.sleep(seconds), seconds + 1.0)

    def call(self, function: Callable[[], T]) -> T:
        """Call something as code on the loop does."""

        async def call() -> T:
            return function()

        return self.run(call())

    def until(self, holds: Callable[[], object], within_s: float = 600.0) -> float:
        """Let time pass until something holds; how much has passed."""
        start = self.loop.time()

        async def wait() -> None:
            while not holds():
                await asyncio.sleep(0.01)

        self.loop.drive(wait(), within_s)
        return self.loop.time() - start

    def routes(self, server: int, *, but: Iterable[str] = ("health", "info")) -> list[str]:
        """What one server was asked, in order."""
        return [asked.route for asked in self.asked if asked.server == server and asked.route not in but]

    def generated_at(self) -> list[int]:
        """Which servers were given requests, in order."""
        return [asked.server for asked in self.asked if asked.route == "generate"]

    # its end

    def expect_sound(self) -> None:
        """No server was asked for what it may not be asked, and none that was started is left."""
        assert self.breaches == []
        assert [process for process in self.processes if process.exit_status is None] == []
        assert all(process.has_been_waited_for for process in self.processes)

    def close(self) -> None:
        self.thread.stop()
        self.loop.close()


class PlayedPolicy:
    """A `Policy` that notes what is asked of it, between what servers are asked."""

    vocab_size = 50

    def __init__(self, world: World) -> None:
        self.world, self.version, self.notes = world, 0, list[str]()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        self._note("weights")
        yield from self.world.new_weights(self.version)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self._note("score")
        return [[-1.0] * (len(sequence) - 1) for sequence in sequences]

    def offload(self) -> None:
        self._note("offload")

    def onload(self) -> None:
        self._note("onload")

    def _note(self, what: str) -> None:
        self.notes += [*self.world.routes(0), f"policy {what}"]
        self.world.asked.clear()

    def taken(self) -> list[str]:
        """What has been asked since this was last called."""
        self._note("looked at")
        notes, self.notes = self.notes[:-1], []
        return notes


def request(sample: int = 0, *, group: int = 0, num_tokens: int = 4, **options: Any) -> GenerationRequest:
    """A request of a group; its seed is a function of both."""
    values: dict[str, Any] = {"seed": 100 * group + sample, "prompt_ids": (5, 6 + group)} | options
    return GenerationRequest(f"{group}/{sample}", group, sample, sampling=SamplingParams(num_tokens), **values)


def tokens_of(asked: GenerationRequest) -> list[int]:
    """What any server answers to a request."""
    return [token(asked.seed, position) for position in range(asked.sampling.max_tokens)]


def play_routers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a router's own address answered."""

    async def get(connection: ServerConnection, route: str, *, timeout_s: float) -> None:
        await asyncio.sleep(TRIP_S)
        router = world.routers[connection.url]
        if not router.is_up:
            raise ServerUnreachableError(f"{connection.url}{route} could not be asked: connection refused")

    monkeypatch.setattr(ServerConnection, "get", get)
