"""Inference servers that are played, on a clock that is scripted.

A `World` has servers behind the `InferenceServer` protocol: they boot, hold weights, draw tokens, pause, lend memory,
hang and die, and note what no server may be asked to do (`breaches`). Its clock jumps to the next time-out as soon as
everything waits, so that minutes take milliseconds; where everything waits and nothing will ever happen, it raises
`HangError` instead of waiting for ever.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import itertools
import json
import selectors
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fipo.parallel.external_group import ExternalGroup
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams
from megatron_fipo.rollout.event_loop import EventLoopThread
from megatron_fipo.rollout.packers import Packers
from megatron_fipo.rollout.server_api import (
    Bucket,
    Completion,
    GroupAddress,
    LaunchPlan,
    LaunchSpec,
    ServerInfo,
    TensorSpec,
)
from megatron_fipo.rollout.server_engine import ServerEngine
from megatron_fipo.rollout.server_http import ServerConnection, ServerRefusedError, ServerUnreachableError
from megatron_fipo.rollout.server_process import ServerProcess, free_port
from megatron_fipo.rollout.servers import ServerPool, WatchSettings
from megatron_fipo.rollout.snapshots import SnapshotWriter
from megatron_fipo.rollout.weight_sync import Method, WeightSync

T = TypeVar("T")

BOOT_S = 5.0
TOKEN_S = 1.0
BUCKET_S = 2.0
_TRIP_S = 0.001
"""From a question to its answer, where nothing takes longer."""
_THREAD_S = 0.5
"""What was given to another thread takes so long."""
_CONTROL_TIMEOUT_S = 60.0
VOCAB = 1000
NAMES = ("a", "b", "c")
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


# --- the clock --------------------------------------------------------------------------------------------------------


class HangError(Exception):
    """Everything waits, and nothing will end it."""


class _JumpingSelector(selectors.SelectSelector):
    now = 1000.0
    horizon = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        if timeout is None:
            raise HangError("everything waits, and there is no time-out")
        self.now += timeout
        if self.now > self.horizon:
            raise HangError("everything has waited for hours")
        return []


class ScriptedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when everything that runs on it waits."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)
        # Tests look at what comes of tasks; and Python 3.11 fails if one error is formatted while another one is.
        self.set_exception_handler(lambda loop, context: None)

    def time(self) -> float:
        return self._clock.now

    def drive(self, awaitable: Awaitable[T], within_s: float = 3600.0) -> T:
        """Run until something is there, however much time that takes on this clock."""
        self._clock.horizon = self._clock.now + within_s
        return self.run_until_complete(awaitable)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """What another thread would do, a while later; like there it is done even where nobody waits any more."""
        future = self.create_future()

        def finish() -> None:
            try:
                result = func(*args)
            except (OSError, RuntimeError, AssertionError) as error:
                if not future.done():
                    future.set_exception(error)
                return
            if not future.done():
                future.set_result(result)

        self.call_later(_THREAD_S, finish)
        return future


class _Driven(concurrent.futures.Future[T]):
    """Waiting for it drives the loop."""

    def __init__(self, loop: ScriptedLoop, task: asyncio.Task[T]) -> None:
        super().__init__()
        self._loop, self._task = loop, task

    def done(self) -> bool:
        return self._task.done()

    def result(self, timeout: float | None = None) -> T:
        if not self._task.done():
            self._loop.drive(asyncio.wait([self._task]))
        return self._task.result()


class DrivenLoop(EventLoopThread):
    """The scripted loop in the place of a thread's: whoever waits for it drives it."""

    def __init__(self, loop: ScriptedLoop) -> None:
        self.loop = loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return _Driven(self.loop, self.loop.create_task(coroutine))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.submit(coroutine).result()

    async def run_here(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await self.loop.create_task(coroutine)

    def call_soon(self, function: Callable[[], object]) -> None:
        self.loop.call_soon(function)

    def stop(self) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.drive(asyncio.gather(*tasks, return_exceptions=True) if tasks else asyncio.sleep(0))


# --- servers ----------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A request that a server works on."""

    request: GenerationRequest
    answer: asyncio.Future[Completion]
    versions: list[str] = field(default_factory=list)
    """For each token that has been drawn."""
    num_cached: int = 0


@dataclass(frozen=True)
class Asked:
    """One question that a server was asked."""

    server: int
    """Its number."""
    route: str
    request_id: str = ""
    seed: int = 0
    group: int = -1
    through_router: bool = False


class Machine:
    """One life of one server: from its launch to its end."""

    def __init__(self, world: World, number: int, url: str, folder: Path, version: str, boot_s: float) -> None:
        self.world, self.number, self.url, self.folder, self.version = world, number, url, folder, version
        self.ready_at = world.loop.time() + boot_s
        self.exit_status: int | None = None
        self.words: list[str] = []
        self.is_hanging = False
        self.is_cut_off = False
        """Whoever waits for an answer hears nothing of its end: its host, or what lies between, is gone as well."""
        self.gone = asyncio.Event()
        self.going_on = asyncio.Event()
        self.going_on.set()
        self.running: dict[str, Running] = {}
        self.weights = world.read_folder(folder)
        self.is_open = False
        self.memory = {"weights": True, "cache": True}
        self.num_probes = 0
        self.known_prompts: set[tuple[int, ...]] = set()
        self.groups: set[str] = set()
        self.answers_strangers = False
        self.skew = 0.0
        """Added to what it scores."""

    def end(self, status: int, words: str = "") -> None:
        """The process ends; every connection breaks."""
        if self.exit_status is None:
            self.exit_status = status
            self.words.append(words)
            if self.is_cut_off:
                return
            self.gone.set()
            for running in self.running.values():
                if not running.answer.done():
                    running.answer.set_exception(ServerUnreachableError(f"{self.url} broke off"))
            self.running.clear()

    @property
    def is_up(self) -> bool:
        return self.exit_status is None and self.world.loop.time() >= self.ready_at

    def breach(self, what: str) -> None:
        """It was asked to do what servers die of, or what makes responses worthless."""
        self.world.breaches.append(f"server {self.number} {what}")
        self.end(139, "Fatal Python error: Segmentation fault")

    async def decode(self, request_id: str) -> None:
        """Draw one token after the other, of the request's own random numbers."""
        running = self.running[request_id]
        request = running.request
        if request.prompt_ids in self.known_prompts:
            running.num_cached = len(request.prompt_ids)
        self.known_prompts.add(request.prompt_ids)
        for _ in range(request.sampling.max_tokens - len(request.prefix)):
            await asyncio.sleep(TOKEN_S)
            while not self.going_on.is_set() and not self.gone.is_set():
                await asyncio.wait([asyncio.ensure_future(self.going_on.wait())])
            if request_id not in self.running or self.exit_status is not None:
                return
            while self.is_hanging and not self.gone.is_set():
                await self.gone.wait()
                return
            if self.is_open or self.weights != self.world.whole.get(self.version):
                self.breach(f"drew a token with weights that are not whole (it says {self.version})")
                return
            if not all(self.memory.values()):
                self.breach("drew a token in memory that is not there")
                return
            running.versions.append(self.version)
        self.finish(request_id, "length")

    def finish(self, request_id: str, reason: Literal["stop", "length", "abort"]) -> None:
        running = self.running.pop(request_id, None)
        if running is None or running.answer.done():
            return
        start, tokens = len(running.request.prefix), len(running.versions)
        spans = []
        for version, places in itertools.groupby(range(tokens), key=running.versions.__getitem__):
            first, *_ = group = list(places)
            spans.append((version, first, group[-1] + 1))
        drawn = [token(running.request.seed, start + position) for position in range(tokens)]
        running.answer.set_result(Completion(drawn, [-0.5] * tokens, reason, spans, running.num_cached))


def token(seed: int, position: int) -> int:
    """What every server draws for a request's seed at a position."""
    return 2 + (seed * 31 + position * 7) % (VOCAB - 2)


class FakeProcess(ServerProcess):
    """The process of a `Machine`, or of the router."""

    def __init__(self, machine: Machine | Router) -> None:
        self.machine = machine
        self.pid = 4242
        self.has_been_waited_for = False

    @property
    def exit_status(self) -> int | None:
        return self.machine.exit_status

    def log_tail(self) -> str:
        return "\n".join(self.machine.words)

    def ask_to_end(self) -> None:
        self.machine.end(128 + 15)

    def kill(self) -> None:
        self.machine.end(128 + 9)
        self.wait()

    def wait(self) -> None:
        assert self.machine.exit_status is not None, "waited for a process that nobody asked to end"
        self.has_been_waited_for = True


class Router:
    """A router before all servers: requests go to each in turn."""

    def __init__(self, world: World, url: str) -> None:
        self.world, self.url = world, url
        self.exit_status: int | None = None
        self.words: list[str] = []
        self.turns = itertools.count()
        self.ready_at = world.loop.time() + 1.0
        self.is_broken = False
        """It lives, and answers every request with an error."""

    def end(self, status: int, words: str = "") -> None:
        if self.exit_status is None:
            self.exit_status = status
            self.words.append(words)

    @property
    def is_up(self) -> bool:
        return self.exit_status is None and self.world.loop.time() >= self.ready_at

    def choose(self) -> int:
        if not self.is_up:
            raise ServerUnreachableError(f"{self.url}/generate could not be asked: connection refused")
        if self.is_broken:
            raise ServerUnreachableError(f"{self.url}/generate answered 502: no worker")
        return next(self.turns) % self.world.num_servers


class FakeLedger:
    """What `Machine.weights` must be."""

    def __init__(self) -> None:
        self._expected: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self._expected[name] = digest(tensor)

    def expected(self) -> dict[str, str]:
        if missing := [name for name in NAMES if name not in self._expected]:
            raise ValueError(f"the stream of weights lacks {', '.join(missing)}")
        return dict(self._expected)


class FakeServer:
    """An `InferenceServer` that speaks to whichever life of its machine there is."""

    def __init__(self, world: World, url: str, *, shows_key: bool) -> None:
        self.world, self.url, self._shows_key = world, url, shows_key
        self.number = world.urls.index(url)

    async def health(self, timeout_s: float) -> None:
        if not self._shows_key and not self._machine("health").answers_strangers:
            raise ServerRefusedError(f"{self.url}/health answered 401: no key", 401)
        machine = await self._ask("health", timeout_s)
        machine.num_probes += 1
        try:
            await self._within(machine, machine.going_on.wait(), timeout_s, "health")
            await asyncio.sleep(_TRIP_S)
            if not all(machine.memory.values()):
                machine.breach("was asked after its health while its memory was lent")
            if machine.exit_status is not None:
                raise ServerUnreachableError(f"{self.url}/health: connection reset")
        finally:
            machine.num_probes -= 1

    async def info(self) -> ServerInfo:
        machine = await self._ask("info")
        return ServerInfo(str(machine.folder), machine.version)

    async def generate(
        self,
        request: GenerationRequest,
        request_id: str,
        stop_token_ids: Sequence[int],
        timeout_s: float,
        connection: ServerConnection | None = None,
    ) -> Completion:
        if connection is not None:
            other = self.world.clients[self.world.routers[connection.url].choose()]
            return await other._generate(request, request_id, timeout_s, through_router=True)
        return await self._generate(request, request_id, timeout_s, through_router=False)

    async def _generate(
        self, request: GenerationRequest, request_id: str, timeout_s: float, *, through_router: bool
    ) -> Completion:
        asked = Asked(self.number, "generate", request_id, request.seed, request.group_id, through_router)
        machine = await self._ask("generate", timeout_s, asked)
        running = Running(request, machine.world.loop.create_future())
        machine.running[request_id] = running
        self.world.spawn(machine.decode(request_id))
        return await self._within(machine, asyncio.shield(running.answer), timeout_s, "generate")

    async def cancel(self, request_id: str) -> None:
        machine = await self._ask("cancel", asked=Asked(self.number, "cancel", request_id))
        machine.finish(request_id, "abort")

    async def abort_all(self) -> None:
        machine = await self._ask("abort_all")
        for request_id in list(machine.running):
            machine.finish(request_id, "abort")

    async def score(self, sequences: Sequence[Sequence[int]], timeout_s: float) -> list[list[float]]:
        machine = await self._ask("score", timeout_s)
        return [[-1.0 + machine.skew] * (len(sequence) - 1) for sequence in sequences]

    async def pause(self) -> None:
        (await self._ask("pause")).going_on.clear()

    async def resume(self) -> None:
        machine = await self._ask("resume")
        if not all(machine.memory.values()):
            machine.breach("was to go on before its memory was back")
            raise ServerUnreachableError(f"{self.url}/resume: connection reset")
        machine.going_on.set()

    async def flush_cache(self) -> None:
        (await self._ask("flush_cache")).known_prompts.clear()

    async def begin_update(self) -> None:
        machine = await self._ask("begin_update")
        if machine.going_on.is_set():
            machine.breach("was to be written while it generates")
        machine.is_open = True

    async def load_bucket(self, bucket: Bucket, timeout_s: float) -> None:
        machine = await self._ask("load_bucket", timeout_s)
        await asyncio.sleep(BUCKET_S)
        self._write(machine, {name: digest(tensor) for name, tensor in bucket.tensors()})

    async def join_group(self, address: GroupAddress, timeout_s: float) -> None:
        machine = await self._ask("join_group", timeout_s)
        meeting = self.world.meetings[address.name]
        self.world.joined.append((self.number, address))
        meeting.members.append(machine)
        machine.groups.add(address.name)
        await self._within(machine, meeting.is_whole.wait(), timeout_s, "join_group")

    async def receive_bucket(self, specs: Sequence[TensorSpec], group_name: str, timeout_s: float) -> None:
        machine = await self._ask("receive_bucket", timeout_s)
        if group_name not in machine.groups:
            raise ServerRefusedError(f"{self.url}/receive_bucket answered 400: no group {group_name}", 400)
        mail: asyncio.Future[Tensor] = self.world.loop.create_future()
        self.world.meetings[group_name].waiting[self.number] = mail
        flat = await self._within(machine, mail, timeout_s, "receive_bucket")
        bucket = Bucket(flat, tuple(specs))
        self._write(machine, {name: digest(tensor) for name, tensor in bucket.tensors()})

    async def leave_group(self, group_name: str) -> None:
        (await self._ask("leave_group")).groups.discard(group_name)

    async def load_folder(self, folder: Path, timeout_s: float) -> None:
        machine = await self._ask("load_folder", timeout_s)
        await asyncio.sleep(BUCKET_S)
        self._write(machine, self.world.read_folder(folder))

    def _write(self, machine: Machine, found: dict[str, str]) -> None:
        if machine.exit_status is not None:
            raise ServerUnreachableError(f"{self.url}: connection reset")
        if not machine.memory["weights"]:
            machine.breach("was written while the memory of its weights was lent")
            raise ServerUnreachableError(f"{self.url}: connection reset")
        if not machine.is_open:
            machine.breach("was written outside of an update")
        machine.weights |= found

    async def end_update(self, version: str) -> None:
        machine = await self._ask("end_update")
        if not machine.is_open:
            raise ServerRefusedError(f"{self.url}/end_update answered 400: no update is open", 400)
        machine.is_open, machine.version = False, version
        machine.known_prompts.clear()
        if self.world.next_fault(self.number, "end_update, answered"):
            raise ServerUnreachableError(f"{self.url}/end_update: the answer was cut short")

    def ledger(self) -> FakeLedger:
        return FakeLedger()

    async def checksums(self, timeout_s: float) -> dict[str, str]:
        return dict((await self._ask("checksums", timeout_s)).weights)

    async def release_memory(self) -> None:
        machine = await self._ask("release_memory")
        if machine.going_on.is_set() or machine.num_probes:
            machine.breach("was asked for its memory while it works")
            raise ServerUnreachableError(f"{self.url}/release_memory: connection reset")
        machine.memory = {"weights": False, "cache": False}
        machine.weights = {}

    async def resume_memory(self, part: Literal["weights", "cache"]) -> None:
        machine = await self._ask(f"resume_memory {part}")
        if machine.going_on.is_set():
            machine.breach("took memory while it works")
        machine.memory[part] = True
        if part == "weights":
            machine.weights = dict.fromkeys(NAMES, "whatever lay there")

    async def _ask(self, route: str, timeout_s: float = _CONTROL_TIMEOUT_S, asked: Asked | None = None) -> Machine:
        self.world.asked.append(asked or Asked(self.number, route))
        await asyncio.sleep(self.world.trips[self.number, route])
        machine = self._machine(route)
        if fault := self.world.next_fault(self.number, route):
            fault(machine)
        if machine.exit_status is not None:
            raise ServerUnreachableError(f"{self.url}/{route}: connection reset")
        if machine.is_hanging:
            await self._within(machine, machine.gone.wait(), timeout_s, route)
        return machine

    def _machine(self, route: str) -> Machine:
        machine = self.world.machines.get(self.number)
        if machine is None or not machine.is_up:
            raise ServerUnreachableError(f"{self.url}/{route} could not be asked: connection refused")
        return machine

    async def _within(self, machine: Machine, awaitable: Awaitable[T], timeout_s: float, route: str) -> T:
        """What a caller gets: the answer, or that the server went away, or that it took too long."""
        wanted = asyncio.ensure_future(awaitable)
        gone = asyncio.ensure_future(machine.gone.wait())
        try:
            await asyncio.wait([wanted, gone], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if machine.gone.is_set() and (machine.is_hanging or not wanted.done()):
                raise ServerUnreachableError(f"{self.url}/{route}: connection reset")
            if not wanted.done():
                raise ServerUnreachableError(f"{self.url}/{route} did not answer within {timeout_s:g} s")
            return wanted.result()
        finally:
            gone.cancel()
            if wanted.done() and not wanted.cancelled():
                wanted.exception()  # it has been seen
            wanted.cancel()


def refuse(words: str, status: int = 500) -> Fault:
    """The server answers that it will not."""

    def fault(machine: Machine) -> None:
        raise ServerRefusedError(f"{machine.url} answered {status}: {words}", status)

    return fault


def die(words: str = "RuntimeError: it fell over", status: int = 1) -> Fault:
    """The server's process ends."""
    return lambda machine: machine.end(status, words)


def hang() -> Fault:
    """The server answers nothing from here on."""
    return lambda machine: setattr(machine, "is_hanging", True)


def unavailable() -> Fault:
    """A server that lives could not be reached: its connection breaks, or a 503 is answered."""

    def fault(machine: Machine) -> None:
        raise ServerUnreachableError(f"{machine.url} answered 503: later")

    return fault


def cut_off() -> Fault:
    """The connections of all requests break; the server lives, and goes on working on them."""

    def fault(machine: Machine) -> None:
        for running in machine.running.values():
            running.answer.set_exception(ServerUnreachableError(f"{machine.url}/generate: the answer was cut short"))

    return fault


def drop_requests() -> Fault:
    """The server ends all requests by itself, as one does that shuts down or has no memory for them."""

    def fault(machine: Machine) -> None:
        for request_id in list(machine.running):
            machine.finish(request_id, "abort")

    return fault


Fault = Callable[[Machine], None]


class FakeAdapter:
    """A `ServerAdapter`."""

    name = "fake"
    has_router = True

    def __init__(self, world: World) -> None:
        self.world = world

    def launch_plan(self, spec: LaunchSpec) -> LaunchPlan:
        self.world.launched.append(spec)
        return LaunchPlan(("server", str(len(self.world.launched) - 1)))

    def connect(self, connection: ServerConnection, spec: LaunchSpec) -> FakeServer:
        shows_key = "Authorization" in connection._headers or not spec.key
        client = FakeServer(self.world, connection.url, shows_key=shows_key)
        if shows_key:
            self.world.clients[client.number] = client
        return client

    def reason_of_exit(self, log: str) -> str:
        return log.strip()


# --- a process group --------------------------------------------------------------------------------------------------


class Meeting:
    """A process group of the sender and the servers that have joined it."""

    def __init__(self, num_others: int) -> None:
        self.num_others = num_others
        self.members: list[Machine] = []
        self.is_whole = asyncio.Event()
        self.waiting: dict[int, asyncio.Future[Tensor]] = {}
        self.has_been_left = False


# --- all of it --------------------------------------------------------------------------------------------------------


def digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


class World:
    """Servers, their processes, a router, and the clock.

    Attributes:
        asked: every question in order, of all servers.
        breaches: what no server may be asked to do, and was.
        launched: the specification of each process that was started.
        whole: what a server holds that has a version wholly.
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
        self.boot_s = BOOT_S
        self.trips: dict[tuple[int, str], float] = defaultdict(lambda: _TRIP_S)
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

    def pool(self, *, attached: bool = False, router: bool = False, key: str = "a key", **settings: Any) -> ServerPool:
        """A pool of all servers, not started."""
        spec = LaunchSpec("python", self.base, self.host, 0, "float32", "0", key=key)
        return ServerPool(
            FakeAdapter(self),
            [replace(spec, port=port) for port in self.ports],
            log_folder=None if attached else self.folder / "logs",
            settings=WatchSettings(**settings),
            router=(lambda urls, port: LaunchPlan(("router", f"http://127.0.0.1:{port}"))) if router else None,
            start_process=self.start_process,
        )

    def sync(self, pool: ServerPool, method: Method = "tensor", *, keeps_snapshot: bool = True) -> WeightSync:
        """An update takes three buckets."""
        return WeightSync(
            pool,
            self.thread,
            method=method,
            packers=Packers(16, torch.float32, torch.device("cpu")),
            timeout_s=100.0,
            snapshots=SnapshotWriter(self.folder / "snapshots", self.base) if keeps_snapshot else None,
        )

    def engine(self, pool: ServerPool, sync: WeightSync | None = None, **options: Any) -> ServerEngine:
        values: dict[str, Any] = {
            "agree": lambda problem: [problem],
            "stop_token_ids": [1],
            "vocab_size": VOCAB,
            "max_concurrent_requests": 64,
            "request_timeout_s": 500.0,
            "canary_tolerance": 0.1,
        }
        return ServerEngine(pool, self.thread, sync or self.sync(pool), **(values | options))

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
        await asyncio.sleep(_TRIP_S)
        router = world.routers[connection.url]
        if not router.is_up:
            raise ServerUnreachableError(f"{connection.url}{route} could not be asked: connection refused")

    monkeypatch.setattr(ServerConnection, "get", get)


def play_groups(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have broadcasts arrive at played servers."""

    def begin(group: Any, host: str, name: str, backend: str, world_size: int, timeout_s: float) -> None:
        group.port, group.played = 29500, Meeting(world_size - 1)
        group.timeout_s = timeout_s
        world.meetings[name] = group.played

    def meet(group: Any) -> None:
        meeting: Meeting = group.played
        deadline = world.loop.time() + group.timeout_s
        while len(meeting.members) < meeting.num_others:
            world.advance(0.1)
            if world.loop.time() > deadline:
                raise RuntimeError("not all members came")
        meeting.is_whole.set()

    def broadcast(group: Any, tensor: Tensor, check: Callable[[], object]) -> None:
        meeting: Meeting = group.played
        deadline = world.loop.time() + group.timeout_s
        while len(meeting.waiting) < meeting.num_others:
            check()
            world.advance(0.1)
            if world.loop.time() > deadline:
                raise RuntimeError("a member did not receive")
        for mail in meeting.waiting.values():
            if not mail.done():
                mail.set_result(tensor.clone())
        meeting.waiting.clear()

    def leave(group: Any) -> None:
        group.played.has_been_left = True

    for function, name in ((begin, "__init__"), (meet, "meet"), (broadcast, "broadcast"), (leave, "leave")):
        monkeypatch.setattr(ExternalGroup, name, function)
