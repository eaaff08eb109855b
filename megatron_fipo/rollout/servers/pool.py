"""The inference servers of one node: start or attach, wait until ready, watch, restart with the current weights, end.

Everything here runs on one event loop. A server that may generate is READY; whoever changes weights or memory HOLDs it
meanwhile. One that died or hangs is brought back (RESTARTING) with the weights that were last proven to have arrived,
while the others go on. What is STALE needs a full update before it may generate again; what is LOST stays away.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.rollout.servers.api import InferenceServer, LaunchPlan, LaunchSpec, ServerAdapter
from megatron_fipo.rollout.servers.http import (
    ServerConnection,
    ServerError,
    ServerRefusedError,
    ServerUnreachableError,
)
from megatron_fipo.rollout.servers.process import ServerProcess, free_port, is_free

T = TypeVar("T")

logger = logging.getLogger(__name__)

_POLL_S = 0.25
"""Between two looks at a process that starts."""
_PROBE_TIMEOUT_S = 10.0
"""Longest answer to a health request while a server starts; until then it refuses connections anyway."""
_NO_VERSION = "never synced"
"""What a restarted server reports that holds the starting model although training has moved on."""


class State(enum.Enum):
    """Whether a server may generate."""

    READY = "ready"
    HELD = "held"
    RESTARTING = "restarting"
    STALE = "stale"
    LOST = "lost"


@dataclass(frozen=True)
class WatchSettings:
    """How long things may take."""

    start_timeout_s: float = 600.0
    """From launch to the first generated token."""
    health_interval_s: float = 10.0
    """Between two questions after a server's health."""
    health_timeout_s: float = 60.0
    """A server whose health does not come back within this hangs, and is killed."""
    max_restarts: int = 3
    """Of each server, over the whole run."""


@dataclass(frozen=True)
class ArrivedWeights:
    """The weights that servers hold, proven to be there.

    Attributes:
        version: as servers report it.
        folder: the same on disk, in Hugging Face format; None if no snapshot is kept.
        checksums: what every server must answer.
    """

    version: str
    folder: Path | None
    checksums: dict[str, str] | None


class Server:
    """One server as the pool sees it."""

    def __init__(self, name: str, spec: LaunchSpec, client: InferenceServer, log: Path | None) -> None:
        self.name, self.spec, self.client = name, spec, client
        self.log = log
        """None for a server that somebody else started."""
        self.process: ServerProcess | None = None
        self.state = State.RESTARTING
        self.reason = "it has not been started"
        """Why it is not READY."""
        self.incarnation = 0
        """Counts its processes; a group that an earlier one had joined is gone."""
        self.num_restarts = 0
        self.in_flight: set[asyncio.Task[Any]] = set()
        self.probe: asyncio.Task[None] | None = None
        """A question after its health that is under way; it may be a real request."""

    @property
    def is_ours(self) -> bool:
        """Whether we start and end it."""
        return self.log is not None


class ServerPool:
    """All servers that one process owns.

    Args:
        adapter: the kind of server.
        specs: one for each server, host and port filled in.
        log_folder: where their logs go; None attaches to running servers at the specs' hosts and ports.
        settings: time-outs and restarts.
        router: command line of a router in front of them, given their URLs and its port; None for none.
        start_process: starts a process of a plan, given where its log goes.
    """

    def __init__(
        self,
        adapter: ServerAdapter,
        specs: Sequence[LaunchSpec],
        *,
        log_folder: Path | None,
        settings: WatchSettings,
        router: Callable[[Sequence[str], int], LaunchPlan] | None = None,
        start_process: Callable[[LaunchPlan, Path], ServerProcess] = ServerProcess,
    ) -> None:
        self.adapter, self.settings, self._start_process = adapter, settings, start_process
        self._specs, self._log_folder, self._router_plan = specs, log_folder, router
        self.servers: list[Server] = []
        self.arrived: ArrivedWeights | None = None
        """None until the first update succeeded: servers then hold the starting model."""
        self.router: ServerConnection | None = None
        self.num_restarts = 0
        """Over all servers and the whole run."""
        self._router_process: ServerProcess | None = None
        self._session: aiohttp.ClientSession | None = None
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._affinity: OrderedDict[int, Server] = OrderedDict()
        self._waiting_for_memory: list[tuple[Server, str]] = []
        """Died while the actor had the memory, and why."""

    @property
    def usable_router(self) -> ServerConnection | None:
        """The router, while it lives and every server behind it may generate."""
        process = self._router_process
        if self.router is not None and process is not None and process.exit_status is not None:
            logger.warning(
                "the router ended; requests go to the servers themselves from here on. Its last words:\n%s",
                process.log_tail()[-2000:],
            )
            self.router = None
        return self.router if all(server.state is State.READY for server in self.servers) else None

    async def start(self) -> None:
        """Start all servers, or attach, and return when all are ready.

        Raises:
            ServerError: with the server's own last words, after everything was ended again.
        """
        # The engine bounds what is in flight. A connection for each request: servers close idle ones after seconds, and
        # a request sent over one that is just being closed looks like a server that died.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, read_bufsize=2**20, auto_decompress=False)
        for index, spec in enumerate(self._specs):
            name = f"{self.adapter.name}-{index}"
            log = None if self._log_folder is None else self._log_folder / f"{name}.log"
            self.servers.append(Server(name, spec, self._connect(spec), log))
        try:
            await _all(self._bring_up(server, server.spec) for server in self.servers)
            if self._router_plan is not None:
                await self._start_router()
        except BaseException:
            await self.close()
            raise
        self._spawn(self._watch())

    async def close(self) -> None:
        """End the servers that were started here, and all connections."""
        # First: as servers end, requests to them fail, and whoever sent one would have its server started anew.
        for server in self.servers:
            server.state, server.reason = State.LOST, "it is closed"
        for task in self._tasks:
            task.cancel()
        async with self._changed:
            self._changed.notify_all()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        processes = [server.process for server in self.servers] + [self._router_process]
        for process in processes:
            if process is not None:
                process.ask_to_end()
        for process in processes:
            if process is not None:
                await asyncio.to_thread(process.wait)
        for server in self.servers:
            server.process = None
        self._router_process = None
        if self._session is not None:
            await self._session.close()

    # --- generating -------------------------------------------------------------------------------------------------

    def choose(self, group_id: int) -> Server | None:
        """The server for a request: where its group is, or where least is in flight; None while none may generate.

        Ask it before the next await: until then nobody else sees that it has one request more, and it may be held.
        """
        ready = [server for server in self.servers if server.state is State.READY]
        # A group stays together: its prompt is computed once.
        server = self._affinity.get(group_id)
        if ready and server not in ready:
            server = min(ready, key=lambda candidate: len(candidate.in_flight))
            self._affinity[group_id] = server
            while len(self._affinity) > 4096:
                self._affinity.popitem(last=False)
        return server if ready else None

    async def wait_until_one_may_generate(self) -> None:
        """Return as soon as there is something to choose; waits while servers restart or are held.

        Raises:
            ServerError: if none will, with each one's reason.
        """
        async with self._changed:
            while not any(server.state is State.READY for server in self.servers):
                if not any(server.state in (State.RESTARTING, State.HELD) for server in self.servers):
                    raise ServerError(f"no server can generate: {self.reasons()}")
                await self._changed.wait()

    async def ask(self, server: Server, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await a request to a server, which fails at once when the server goes away.

        Raises:
            ServerUnreachableError: if it died, was killed or was given up meanwhile.
        """
        task = asyncio.ensure_future(coroutine)
        server.in_flight.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise ServerUnreachableError(f"{server.name} went away: {server.reason}") from None
        finally:
            server.in_flight.discard(task)

    def suspect(self, server: Server, error: ServerError) -> None:
        """Look after a server that did not answer; until then it gets no further requests."""
        if server.state is State.READY:
            server.state, server.reason = State.RESTARTING, str(error)
            self._spawn(self._look_after(server))

    # --- holding ----------------------------------------------------------------------------------------------------

    async def hold(self) -> list[Server]:
        """Take all servers that live out of use, after pending restarts have ended, and return them.

        Nothing asks after their health any more when this returns: SGLang dies of a request that meets the release of
        its memory.

        Raises:
            ServerError: if none lives.
        """
        async with self._changed:
            while any(server.state is State.RESTARTING for server in self.servers):
                await self._changed.wait()
            for server in self.servers:
                if server.state is State.READY:
                    server.state = State.HELD
        if probes := [server.probe for server in self.servers if server.probe is not None]:
            await asyncio.wait(probes)
        held = self._held()
        if not held:
            raise ServerError(f"no server is left: {self.reasons()}")
        return held

    async def on_held(self, action: Callable[[InferenceServer], Awaitable[None]]) -> None:
        """Do something with every held server at the same time.

        One that does not answer is given up for now, see `restart_when_there_is_memory`, while others are left.

        Raises:
            ServerError: if a server refuses, or none is left.
        """
        held = self._held()

        async def act(server: Server) -> None:
            try:
                await action(server.client)
            except ServerUnreachableError as error:
                await self.restart_when_there_is_memory(server, str(error))

        await _all(act(server) for server in held)
        if held and not self._held():
            raise ServerError(f"no server is left: {self.reasons()}")

    async def let_go_all(self) -> None:
        """Give what is held back to generation, now that there is memory for all; what is stale stays so."""
        await self.let_go([server for server in self.servers if server.state is State.HELD])
        waiting, self._waiting_for_memory = self._waiting_for_memory, []
        for server, reason in waiting:
            await self.restart(server, reason)

    def _held(self) -> list[Server]:
        return [server for server in self.servers if server.state in (State.HELD, State.STALE)]

    async def keep(self, servers: Sequence[Server]) -> None:
        """Keep servers that hold sound weights out of use until `let_go_all`."""
        for server in servers:
            await self._set(server, State.HELD, "")

    async def let_go(self, servers: Sequence[Server]) -> None:
        """Give servers that hold sound weights back to generation."""
        for server in servers:
            await self._set(server, State.READY, "")

    async def set_stale(self, server: Server, reason: str) -> None:
        """Keep a server from generating until a full update has succeeded; requests to it are lost."""
        self._drop_requests(server)
        await self._set(server, State.STALE, reason)

    async def restart(self, server: Server, reason: str) -> None:
        """Bring a server back that has died. Returns at once."""
        await self._set(server, State.RESTARTING, reason)
        self._spawn(self._look_after(server))

    async def restart_when_there_is_memory(self, server: Server, reason: str) -> None:
        """Bring a server back that has died or does not answer, but not before `let_go_all`.

        It sizes its cache by the memory that is free when it starts, and until then the actor has that. So one that
        still holds some is killed; nor would it live through a question after its health with half its memory gone.
        """
        self._drop_requests(server)
        await self._set(server, State.LOST, reason)
        if server.process is not None:
            await asyncio.to_thread(server.process.kill)
        self._waiting_for_memory.append((server, reason))

    def reasons(self) -> str:
        """Why which server is not ready."""
        return "; ".join(
            f"{server.name} ({server.client.url}): {server.reason}"
            for server in self.servers
            if server.state is not State.READY
        )

    # --- bringing up ------------------------------------------------------------------------------------------------

    def _connect(self, spec: LaunchSpec, *, shows_key: bool = True) -> InferenceServer:
        assert self._session is not None, "start() opens it"
        url = f"http://{spec.host}:{spec.port}"
        return self.adapter.connect(ServerConnection(self._session, url, key=spec.key if shows_key else ""), spec)

    async def _bring_up(self, server: Server, spec: LaunchSpec) -> None:
        """Launch with a spec (or attach) and wait until it can take weights and requests."""
        server.incarnation += 1
        if server.log is None:
            await self._attach(server)
            return
        if not is_free(spec.host, spec.port):
            raise ServerError(
                f"port {spec.port} of {spec.host}, where {server.name} was to listen, is taken. End what listens "
                "there, or set servers.base_port to another one (null takes ports that are free)."
            )
        server.process = self._start_process(self.adapter.launch_plan(spec), server.log)
        await self._wait_until_healthy(server)
        info = await server.client.info()
        if info.weight_version != spec.weight_version:
            raise ServerError(
                f"{server.name} reports weight version {info.weight_version!r} and was started with "
                f"{spec.weight_version!r}: another server answers at {server.client.url}"
            )
        await self._expect_guarded(server, spec)
        await self._set(server, State.READY, "")

    async def _expect_guarded(self, server: Server, spec: LaunchSpec) -> None:
        """A server that was started here answers nobody without its key.

        Raises:
            ServerError: if it does: another version of the engine, or servers.extra_args, may lead past the guard.
        """
        try:
            await self._connect(spec, shows_key=False).health(_PROBE_TIMEOUT_S)
        except ServerRefusedError as error:
            if error.status == 401:
                return
            raise
        raise ServerError(
            f"{server.name} answers requests without the run's key, so that everybody on this host could change its "
            "weights or run code in it. Take the version of tools/engines, and look through servers.extra_args."
        )

    async def _attach(self, server: Server) -> None:
        # It need not generate yet: a run that was killed in an update has left it paused, the update open. The update
        # that comes before any response closes that, and proves that this one arrived.
        info = await self._wait_until_up(server, server.client.info)
        _expect_same_shape(server, info.model_path)
        await self._set(server, State.READY, "")

    async def _wait_until_healthy(self, server: Server) -> None:
        await self._wait_until_up(server, lambda: server.client.health(_PROBE_TIMEOUT_S))

    async def _wait_until_up(self, server: Server, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until it answers, and return the answer."""
        deadline = asyncio.get_running_loop().time() + self.settings.start_timeout_s
        while True:
            if server.process is not None and server.process.exit_status is not None:
                raise ServerError(self._obituary(server))
            try:
                answer = await ask()
            except ServerError as error:
                if asyncio.get_running_loop().time() > deadline:
                    place = f"; its log is {server.log}" if server.log else " (one of servers.urls)"
                    raise ServerError(
                        f"{server.name} was not ready after {self.settings.start_timeout_s:g} s "
                        f"(servers.start_timeout_s): {error}{place}"
                    ) from error
                await asyncio.sleep(_POLL_S)
            else:
                # Whoever listens at the port answers; ours must still be there.
                if server.process is not None and server.process.exit_status is not None:
                    raise ServerError(self._obituary(server))
                return answer

    def _obituary(self, server: Server) -> str:
        process = server.process
        assert process is not None, "only what was started here has a log"
        status = process.exit_status
        how = f"was ended by signal {status - 128}" if status is not None and status > 128 else f"exited with {status}"
        return f"{server.name} {how} (log: {server.log}). Its last words:\n{self._last_words(process)}"

    def _last_words(self, process: ServerProcess) -> str:
        return self.adapter.reason_of_exit(process.log_tail())

    async def _start_router(self) -> None:
        assert self._router_plan is not None, "the caller looked"
        assert self._session is not None, "start() opened it"
        assert self._log_folder is not None, "a router stands in front of servers that were started here"
        port = free_port()
        plan = self._router_plan([server.client.url for server in self.servers], port)
        self._router_process = self._start_process(plan, self._log_folder / "router.log")
        key = self._specs[0].key  # the same for all servers of a pool
        self.router = ServerConnection(self._session, f"http://127.0.0.1:{port}", is_gateway=True, key=key)
        deadline = asyncio.get_running_loop().time() + self.settings.start_timeout_s
        while True:
            if self._router_process.exit_status is not None:
                raise ServerError(f"the router ended:\n{self._router_process.log_tail()[-2000:]}")
            try:
                await self.router.get("/readiness", timeout_s=_PROBE_TIMEOUT_S)
                return
            except ServerError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise ServerError(f"the router was not ready in time: {error}") from error
                await asyncio.sleep(_POLL_S)

    # --- watching ---------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Ask after every server's health for ever. Also notices who died with nothing in flight."""
        while True:
            await asyncio.sleep(self.settings.health_interval_s)
            await asyncio.gather(*(self._look_at(server) for server in self.servers))

    async def _look_at(self, server: Server) -> None:
        if server.state is not State.READY:
            return
        incarnation = server.incarnation
        server.probe = asyncio.ensure_future(server.client.health(_PROBE_TIMEOUT_S))
        try:
            await server.probe
        except ServerError as error:
            if server.state is State.READY and server.incarnation == incarnation:
                self.suspect(server, error)
        finally:
            server.probe = None

    async def _look_after(self, server: Server) -> None:
        """Back to READY with the current weights if that can be had; else STALE or LOST."""
        try:
            # Where it answers, a connection broke and no more, unless another server was put in its place.
            if not await self._answers(server):
                await self._revive(server)
            await self._verify(server)
        except (ServerError, OSError, ValueError) as error:  # of the last kind are an adapter's
            self._drop_requests(server)
            await self._set(server, State.LOST, str(error))

    async def _answers(self, server: Server) -> bool:
        """Whether its health comes back within health_timeout_s, before its process ends."""
        now = asyncio.get_running_loop().time
        deadline = now() + self.settings.health_timeout_s
        while now() < deadline and (server.process is None or server.process.exit_status is None):
            try:
                await server.client.health(deadline - now())
                return True
            except ServerError as error:
                server.reason = str(error)
                await asyncio.sleep(_POLL_S)
        return False

    async def _revive(self, server: Server) -> None:
        """Start a dead or hanging server anew; wait for one that is not ours to come back."""
        process = server.process
        server.incarnation += 1
        if process is None:
            self._drop_requests(server)
            await self._wait_until_healthy(server)
            return
        if process.exit_status is not None:
            server.reason = self._obituary(server)
        else:
            server.reason = f"it hung and was killed ({server.reason})"
        await asyncio.to_thread(process.kill)
        self._drop_requests(server)
        if server.num_restarts >= self.settings.max_restarts:
            raise ServerError(f"{server.reason}\n(restarted {server.num_restarts} times: servers.max_restarts)")
        server.num_restarts += 1
        self.num_restarts += 1
        spec = server.spec
        if self.arrived is not None:
            folder = self.arrived.folder
            version = _NO_VERSION if folder is None else self.arrived.version
            spec = replace(spec, model_path=folder or spec.model_path, weight_version=version)
        assert server.log is not None, "it has a process"
        server.process = self._start_process(self.adapter.launch_plan(spec), server.log)
        await self._wait_until_healthy(server)

    async def _verify(self, server: Server) -> None:
        """READY if it holds the weights that it should; STALE if not."""
        arrived = self.arrived
        info = await server.client.info()
        if arrived is not None and info.weight_version != arrived.version:
            await self.set_stale(server, f"it holds weights {info.weight_version!r}, not {arrived.version!r}")
        elif (
            arrived is not None
            and arrived.checksums is not None
            and (await server.client.checksums(self.settings.start_timeout_s) != arrived.checksums)
        ):
            await self.set_stale(server, f"its weights are not those of version {arrived.version}")
        else:
            await self._set(server, State.READY, "")

    def _drop_requests(self, server: Server) -> None:
        """Let everyone who waits for an answer of a server know that none will come."""
        for task in list(server.in_flight):
            task.cancel()

    async def _set(self, server: Server, state: State, reason: str) -> None:
        async with self._changed:
            server.state, server.reason = state, reason
            self._changed.notify_all()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _expect_same_shape(server: Server, folder: str) -> None:
    """Refuse a server of another model before anything is written to it: SGLang dies of weights of other sizes.

    A folder that cannot be read from here (on another host, or removed meanwhile) is left to the checksums.

    Raises:
        ServerError: naming the first difference.
    """
    if not (Path(folder) / "config.json").is_file():
        return
    place = f"{server.name} ({server.client.url}, one of servers.urls) serves {folder}"
    try:
        theirs = asdict(read_model_shape(folder))
    except ValueError as error:
        raise ServerError(f"{place}, which is no model that can be trained here: {error}") from error
    ours = asdict(read_model_shape(server.spec.model_path))
    for key in ours:
        if theirs[key] != ours[key] and key != "max_position_embeddings":
            raise ServerError(
                f"{place}, whose {key} is {theirs[key]}; that of model.path={server.spec.model_path} is {ours[key]}. "
                "Start it with a model of this shape, or take another one."
            )


async def _all(awaitables: Iterable[Awaitable[None]]) -> None:
    """Await all; the first error cancels the others, is raised, and all have ended by then."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
