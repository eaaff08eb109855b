"""Inference servers that are played, behind the `InferenceServer` protocol.

They boot, hold weights, draw tokens, pause, lend memory, hang and die, in the time of a scripted clock; and they note
what no server may be asked to do (`World.breaches`).
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from megatron_fipo.rollout.engine import GenerationRequest
from megatron_fipo.rollout.servers.api import (
    Completion,
    GroupAddress,
    LaunchPlan,
    LaunchSpec,
    ScoredEnd,
    ServerInfo,
)
from megatron_fipo.rollout.servers.http import ServerConnection, ServerRefusedError, ServerUnreachableError
from megatron_fipo.rollout.servers.process import ServerProcess
from megatron_fipo.rollout.servers.weight_buckets import Bucket, TensorSpec

if TYPE_CHECKING:
    from tests.unit.server_world import World

T = TypeVar("T")

TOKEN_S = 1.0
BUCKET_S = 2.0
TRIP_S = 0.001
"""From a question to its answer, where nothing takes longer."""
_CONTROL_TIMEOUT_S = 60.0
VOCAB = 1000
NAMES = ("a", "b", "c")
"""Of the tensors that a server's weights consist of."""


def digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


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
        """Whose keys and values are cached."""
        self.keeps_cache = False
        """Leave the cache as it is when weights change."""
        self.counts_cached = True
        """Say how much of a prompt was cached."""
        self.groups: set[str] = set()
        self.answers_strangers = False
        self.skew = 0.0
        """Added to what it scores."""
        self.cache_skew = 0.0
        """Added to what it computes on cached keys and values."""

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


class FakeExpectedChecksums:
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
            await asyncio.sleep(TRIP_S)
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

    async def score_end(self, sequence: Sequence[int], num_tokens: int, timeout_s: float) -> ScoredEnd:
        machine = await self._ask("score_end", timeout_s)
        is_cached = tuple(sequence) in machine.known_prompts
        machine.known_prompts.add(tuple(sequence))
        score = -1.0 + machine.skew + (machine.cache_skew if is_cached else 0.0)
        num_cached = len(sequence) - num_tokens if is_cached and machine.counts_cached else 0
        return ScoredEnd([score] * num_tokens, num_cached)

    async def pause(self) -> None:
        (await self._ask("pause")).going_on.clear()

    async def resume(self) -> None:
        machine = await self._ask("resume")
        if not all(machine.memory.values()):
            machine.breach("was to go on before its memory was back")
            raise ServerUnreachableError(f"{self.url}/resume: connection reset")
        machine.going_on.set()

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
        await self._within(machine, meeting.is_whole.wait(), timeout_s, "join_group")
        if meeting.has_been_left:
            raise ServerRefusedError(f"{self.url}/join_group answered 400: the store is gone", 400)
        machine.groups.add(address.name)

    async def receive_bucket(self, specs: Sequence[TensorSpec], group_name: str, timeout_s: float) -> None:
        machine = await self._ask("receive_bucket", timeout_s)
        if group_name not in machine.groups:
            raise ServerRefusedError(f"{self.url}/receive_bucket answered 400: no group {group_name}", 400)
        mail: asyncio.Future[Tensor] = self.world.loop.create_future()
        meeting = self.world.meetings[group_name]
        meeting.waiting[self.number] = mail
        if meeting.has_been_left:
            mail.cancel()
        try:
            flat = await self._within(machine, mail, timeout_s, "receive_bucket")
        except asyncio.CancelledError:
            if not mail.cancelled():
                raise
            raise ServerRefusedError(
                f"{self.url}/receive_bucket answered 400: connection closed by peer", 400
            ) from None
        bucket = Bucket(flat, tuple(specs))
        self._write(machine, {name: digest(tensor) for name, tensor in bucket.tensors()})

    async def leave_group(self, group_name: str) -> None:
        groups = (await self._ask("leave_group")).groups
        if group_name not in groups:
            raise ServerRefusedError(f"{self.url}/leave_group answered 400: no group {group_name}", 400)
        groups.discard(group_name)

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
        if not machine.keeps_cache:
            machine.known_prompts.clear()
        if self.world.next_fault(self.number, "end_update, answered"):
            raise ServerUnreachableError(f"{self.url}/end_update: the answer was cut short")

    def expected_checksums(self) -> FakeExpectedChecksums:
        return FakeExpectedChecksums()

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

    def __init__(self, world: World) -> None:
        self.world = world

    def launch_plan(self, spec: LaunchSpec) -> LaunchPlan:
        if self.world.launch_problem:
            raise ValueError(self.world.launch_problem)
        self.world.launched.append(spec)
        return LaunchPlan(("server", str(len(self.world.launched) - 1)))

    def connect(self, connection: ServerConnection, spec: LaunchSpec) -> FakeServer:
        shows_key = connection.shows_key or not spec.key
        client = FakeServer(self.world, connection.url, shows_key=shows_key)
        if shows_key:
            self.world.clients[client.number] = client
        return client

    def reason_of_exit(self, log: str) -> str:
        return log.strip()
