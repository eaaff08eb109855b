"""The inference servers of one process: which of them may generate, and which are held back.

A server that may generate is READY; it is HELD while its weights or its memory change. One that died or hangs is
brought back by `revival` with the weights that were last proven to have arrived, while the others go on. A STALE server
needs a whole update before it may generate again; a LOST one stays away.

Everything here runs on one event loop; `ServerEngine` and `WeightSync`, which run in other threads, call it through
that loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

import aiohttp

from megatron_fipo.config import ServersSection
from megatron_fipo.rollout.servers.api import InferenceServer, LaunchSpec, ServerAdapter
from megatron_fipo.rollout.servers.http import ServerConnection, ServerError, ServerUnreachableError
from megatron_fipo.rollout.servers.process import ServerProcess
from megatron_fipo.rollout.servers.revival import ArrivedWeights, Revival
from megatron_fipo.rollout.servers.roster import Roster
from megatron_fipo.rollout.servers.router import Router, RouterPlan
from megatron_fipo.rollout.servers.server import Server, State
from megatron_fipo.rollout.servers.starting import Starter, StartProcess

logger = logging.getLogger(__name__)

_MOST_GROUPS = 4096
"""Largest number of groups whose server is remembered."""


class ServerPool:
    """All servers that one process owns.

    Args:
        adapter: the kind of server.
        specs: one for each server, host and port filled in.
        settings: time-outs and restarts.
        log_folder: where their logs go; None attaches to running servers at the specs' hosts and ports.
        router: how to start a router before them; None for none.
        start_process: starts a process from a launch plan and the path of its log.
    """

    def __init__(
        self,
        adapter: ServerAdapter,
        specs: Sequence[LaunchSpec],
        settings: ServersSection,
        *,
        log_folder: Path | None,
        router: RouterPlan | None = None,
        start_process: StartProcess = ServerProcess,
    ) -> None:
        self.specs, self.settings = specs, settings
        self.router: Router | None = None
        """The router; None before the start, without one, and after it has ended."""
        self.roster = Roster()
        self._adapter, self._start_process = adapter, start_process
        self._log_folder, self._router_plan = log_folder, router
        self._router_process: ServerProcess | None = None
        self._session: aiohttp.ClientSession | None = None
        self._revival: Revival | None = None
        self._starter: Starter | None = None
        self._affinity: OrderedDict[int, Server] = OrderedDict()

    @property
    def servers(self) -> list[Server]:
        """All servers, in the order of their specifications, then those that have joined; none before the start."""
        return self.roster.servers

    @property
    def num_restarts(self) -> int:
        """How often servers were started anew, over all of them and the whole run."""
        return sum(server.num_restarts for server in self.servers)

    @property
    def num_joined(self) -> int:
        """How many have joined and may generate, or will again."""
        joined = (server for server in self.servers if server.may_leave and server.is_proven)
        return sum(server.state is not State.LOST for server in joined)

    @property
    def arrived(self) -> ArrivedWeights | None:
        """The weights that servers are proven to hold; None until the first update has succeeded."""
        return None if self._revival is None else self._revival.arrived

    def comes_back(self, server: Server) -> bool:
        """Whether a server that has died in an update will be started anew with the weights of that update."""
        has_restarts = server.num_restarts < self.settings.max_restarts
        return server.process is not None and self.settings.keep_snapshot and has_restarts

    async def start(self) -> None:
        """Start all servers, or attach, and return when all are ready.

        Raises:
            ServerError: with what the server itself reported, after everything was ended again.
        """
        # `Sender` bounds what is in flight. A connection for each request: servers close idle ones after seconds, and
        # a request sent over one that is just being closed looks like a server that died.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, read_bufsize=2**20, auto_decompress=False)
        starter = self._starter = Starter(self._adapter, self.settings, self._session, self._start_process)
        self._revival = Revival(self.roster, starter, self.settings)
        self.servers.extend(starter.server(index, spec, self._log_folder) for index, spec in enumerate(self.specs))

        async def bring_up(server: Server) -> None:
            await starter.bring_up(server)
            await self.roster.set_state(server, State.READY)

        try:
            await _all(bring_up(server) for server in self.servers)
            if self._router_plan is not None:
                await self._start_router(self._router_plan, starter)
        except BaseException:
            await self.close()
            raise
        self._revival.begin_to_watch()

    async def close(self) -> None:
        """End the servers that were started here, and all connections."""
        # First: as servers end, requests to them fail, and whoever sent one would have its server started anew.
        for server in self.servers:
            server.state, server.reason = State.LOST, "it is closed"
        await self.roster.wake()
        if self._revival is not None:
            await self._revival.stop()
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

    # --- joining and leaving ----------------------------------------------------------------------------------------

    async def join(self, name: str, spec: LaunchSpec, is_announced: Callable[[], bool]) -> None:
        """Take in a server that has come while the run goes on. It is STALE until an update has succeeded.

        Args:
            name: unique in this pool.
            is_announced: whether it is still there, as far as those say who have started it.

        Raises:
            ServerUnreachableError: if it does not answer.
            ServerError: if it refuses.
        """
        assert self._starter is not None, "start() made it"
        self.roster.servers.append(await self._starter.newcomer(name, spec, is_announced))
        await self.roster.wake()

    async def leave(self, server: Server) -> None:
        """Let a server go. Requests to it are lost, and sent to others."""
        await self.roster.set_state(server, State.LOST, "it has left")
        server.drop_requests()
        self.roster.servers.remove(server)

    async def admit(self) -> None:
        """Let those generate that have joined and have proven their log-probs."""
        for server in self.roster.in_state(State.JOINING):
            server.is_proven = True
            await self.roster.set_state(server, State.READY)

    # --- generating -------------------------------------------------------------------------------------------------

    @property
    def usable_router(self) -> ServerConnection | None:
        """The way through the router, while it lives and every server behind it may generate."""
        if self.router is not None and (report := self.router.exit_report()):
            logger.warning("requests go to the servers themselves from here on: %s", report)
            self.router = None
        all_ready = all(server.state is State.READY for server in self.servers)
        return self.router.connection if self.router is not None and all_ready else None

    def choose(self, group_id: int) -> Server | None:
        """The server for a request: its group's, or the one with the least in flight; None while none may generate.

        A group goes on elsewhere when its server is full: there its requests would wait beside idle servers.

        Ask it before the next await: until then nobody else sees that it has one request more, and it may be held.
        """
        ready = self.roster.in_state(State.READY)
        # A group stays together: its prompt is computed once.
        server = self._affinity.get(group_id)
        most = self.settings.max_concurrent_requests
        if ready and (server is None or server not in ready or server.num_in_flight >= most):
            server = min(ready, key=lambda candidate: candidate.num_in_flight)
            self._affinity[group_id] = server
            while len(self._affinity) > _MOST_GROUPS:
                self._affinity.popitem(last=False)
        return server if ready else None

    async def wait_until_one_may_generate(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Return as soon as there is something to choose; this waits while servers restart, or are held.

        Args:
            unless: ends the wait as well; looked at when states change and when the pool's roster is woken.

        Raises:
            ServerError: if no server will, with each one's reason.
        """
        coming = (State.RESTARTING, State.HELD, State.AWAITING_MEMORY, State.JOINING)
        in_state = self.roster.in_state
        await self.roster.wait_until(lambda: bool(unless() or in_state(State.READY) or not in_state(*coming)))
        if not unless() and not in_state(State.READY, *coming):
            raise ServerError(f"no server can generate: {self.roster.reasons()}")

    def suspect(self, server: Server, error: Exception) -> None:
        """Look after a server that did not answer; until it is sound it gets no further requests."""
        if self._revival is not None:
            self._revival.suspect(server, str(error))

    # --- holding ----------------------------------------------------------------------------------------------------

    async def hold(self) -> list[Server]:
        """Take all servers that live out of use, after pending restarts have ended, and return them.

        No health probe is under way when this returns: SGLang crashes on a request during the release of its memory.

        Raises:
            ServerError: if none is alive, and none comes back once there is memory for it.
        """
        await self.roster.wait_until(lambda: not self.roster.in_state(State.RESTARTING))
        for server in self.roster.in_state(State.READY):  # all at once, before one of them can be suspected
            server.state, server.reason = State.HELD, "it is held until its weights or its memory have changed"
        if probes := [server.probe for server in self.servers if server.probe is not None]:
            await asyncio.wait(probes)
        return self._some_held()

    async def on_held(self, action: Callable[[InferenceServer], Awaitable[None]]) -> None:
        """Do something with every held server at the same time.

        One that does not answer is given up for now, see `restart_when_there_is_memory`.

        Raises:
            ServerError: if a server refuses, or none is left and none comes back.
        """
        held = self._held()

        async def act(server: Server) -> None:
            try:
                await action(server.client)
            except ServerUnreachableError as error:
                await self.restart_when_there_is_memory(server, str(error))

        await _all(act(server) for server in held)
        if held:
            self._some_held()

    async def let_go_all(self) -> None:
        """Give what is held back to generation, now that there is memory for all; what is stale stays so."""
        await self.let_go(self.roster.in_state(State.HELD))
        for server in self.roster.in_state(State.AWAITING_MEMORY):
            await self._restart(server, server.reason)

    async def let_go(self, servers: Sequence[Server]) -> None:
        """Give servers that hold sound weights back to generation."""
        for server in servers:
            await self.roster.set_state(server, State.READY)

    async def set_stale(self, server: Server, reason: str) -> None:
        """Keep a server from generating until a whole update has succeeded; requests to it are lost."""
        server.drop_requests()
        await self.roster.set_state(server, State.STALE, reason)

    async def accept(
        self,
        arrived: ArrivedWeights,
        servers: Sequence[Server],
        died: Sequence[tuple[Server, str]] = (),
        *,
        keep_held: bool = False,
    ) -> None:
        """Take note that an update has succeeded.

        Args:
            arrived: the weights that servers hold now, and that a server that comes back must hold.
            servers: those that proved it; stale ones among them are sound now.
            died: those that did not survive it, and why; they are brought back.
            keep_held: leave the servers out of use until `let_go_all`: the actor has the memory of their caches.
        """
        assert self._revival is not None, "start() made it"
        self._revival.arrived = arrived
        for server in servers:
            sound = State.READY if server.is_proven else State.JOINING
            await self.roster.set_state(server, State.HELD if keep_held else sound)
        for server, reason in died:
            if server.may_leave:
                server.drop_requests()
                await self.roster.set_state(server, State.LOST, reason)
            else:
                await (self.restart_when_there_is_memory if keep_held else self._restart)(server, reason)

    async def restart_when_there_is_memory(self, server: Server, reason: str) -> None:
        """Bring a server back that has died or does not answer, but not before `let_go_all`.

        It sizes its cache by the memory that is free when it starts, and until then the actor has that. So one that
        still holds some is killed; nor would it survive a health probe with half its memory gone.
        """
        server.drop_requests()
        await self.roster.set_state(server, State.AWAITING_MEMORY, reason)
        if server.process is not None:
            await asyncio.to_thread(server.process.kill)

    async def _restart(self, server: Server, reason: str) -> None:
        assert self._revival is not None, "start() made it"
        await self._revival.restart(server, reason)

    def _held(self) -> list[Server]:
        return self.roster.in_state(State.HELD, State.STALE)

    def _some_held(self) -> list[Server]:
        held = self._held()
        coming = any(self.comes_back(server) for server in self.roster.in_state(State.AWAITING_MEMORY))
        if not held and not coming:
            raise ServerError(f"no server is left: {self.roster.reasons()}")
        return held

    async def _start_router(self, plan: RouterPlan, starter: Starter) -> None:
        assert self._log_folder is not None, "a router stands in front of servers that were started here"
        urls = [server.client.url for server in self.servers]
        # All servers of a pool have the same key.
        router = Router(plan, urls, self.specs[0].key, self._log_folder / "router.log", starter)
        self._router_process = router.process
        await router.wait_until_up(self.settings.start_timeout_s)
        self.router = router


async def _all(awaitables: Iterable[Awaitable[None]]) -> None:
    """Await all; the first error cancels the others, is raised, and all have ended by then."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
