"""Notices servers that are lost, and brings them back with the weights that were last proven to have arrived."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_fipo.config import ServersSection
from megatron_fipo.parallel.waiting import OtherRankError
from megatron_fipo.rollout.servers.api import LaunchSpec
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.roster import Roster
from megatron_fipo.rollout.servers.server import Server, State
from megatron_fipo.rollout.servers.starting import POLL_S, PROBE_TIMEOUT_S, Starter
from megatron_fipo.system.disk import DiskError

logger = logging.getLogger(__name__)

_NO_VERSION = "never synced"
"""Version that a server reports if it was started anew with the starting model although training has moved on."""


@dataclass(frozen=True)
class ArrivedWeights:
    """The weights that servers hold, proven to be there.

    Attributes:
        version: as servers report it.
        folder: the same weights on disk, in Hugging Face format, as soon as they are there; None if no snapshot is
            kept.
        checksums: what every server must answer.
    """

    version: str
    folder: concurrent.futures.Future[Path] | None
    checksums: dict[str, str] | None


class Revival:
    """Looks after the servers of a pool. It belongs to the pool's event loop.

    Args:
        roster: the servers.
        starter: starts them.
        settings: how often their health is asked for, how long answers may take, how often each may be started anew.
    """

    def __init__(self, roster: Roster, starter: Starter, settings: ServersSection) -> None:
        self._roster, self._starter, self._settings = roster, starter, settings
        self.arrived: ArrivedWeights | None = None
        """The weights that arrived last. None until an update has succeeded: the servers hold the starting model."""
        self._tasks: set[asyncio.Task[None]] = set()

    def begin_to_watch(self) -> None:
        """Ask after every server's health from now on; this also notices servers that die with nothing in flight."""
        self._spawn(self._watch())

    def suspect(self, server: Server, reason: str) -> None:
        """Look after a server that did not answer; until it is sound it gets no further requests."""
        if server.state is State.JOINING:
            server.state, server.reason = State.LOST, reason
        if server.state is State.READY:
            # At once, and without waking anybody: nobody waits for a server to become unusable.
            server.state, server.reason = State.RESTARTING, reason
            self._spawn(self._look_after(server))

    async def restart(self, server: Server, reason: str) -> None:
        """Bring a server back that has died or does not answer. Returns at once."""
        server.incarnation += 1  # whoever answers from here on may be another process, in none of its groups
        await self._roster.set_state(server, State.RESTARTING, reason)
        self._spawn(self._look_after(server))

    async def stop(self) -> None:
        """Stop watching; revivals that are under way are given up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.health_interval_s)
            await asyncio.gather(*(self._look_at(server) for server in self._roster.servers))

    async def _look_at(self, server: Server) -> None:
        if server.state is not State.READY:
            return
        incarnation = server.incarnation
        server.probe = asyncio.ensure_future(server.client.health(PROBE_TIMEOUT_S))
        try:
            await server.probe
        except Exception as error:  # noqa: BLE001 - an answer that breaks the client must not end the watch over all
            if server.incarnation == incarnation:
                self.suspect(server, _in_words(error))
        finally:
            server.probe = None

    async def _look_after(self, server: Server) -> None:
        """Bring a server back to READY with the right weights if that can be done; else it ends STALE or LOST."""
        try:
            await self._bring_back(server)
        except Exception as error:  # noqa: BLE001 - nobody awaits this task, and others wait for what becomes of it
            await self._give_up(server, _in_words(error))

    async def _bring_back(self, server: Server) -> None:
        if not await self._answers(server):
            await self._revive(server)
        problem, obstacle = await self._difference(server), self._obstacle(server)
        if problem and not obstacle:
            # It lives, with other weights than it should have: it missed an update, or was put in another one's place.
            server.reason = problem
            await self._start_anew(server)
            problem, obstacle = await self._difference(server), "it was started anew with them"
        if problem:
            if server.process is None:
                server.incarnation += 1  # its owner may have put another process in its place before anybody noticed
            server.drop_requests()
            reason = f"{problem}; it waits for the next update ({obstacle})"
            logger.warning("%s generates nothing until the next update of the weights: %s", server.name, reason)
            await self._roster.set_state(server, State.STALE, reason)
        else:
            await self._roster.set_state(server, State.READY)

    async def _give_up(self, server: Server, reason: str) -> None:
        server.drop_requests()
        if server.process is not None:
            await asyncio.to_thread(server.process.kill)  # should it live, it has a GPU's memory for nothing
        logger.warning("%s is given up and stays away from here on: %s", server.name, reason)
        await self._roster.set_state(server, State.LOST, reason)

    async def _answers(self, server: Server) -> bool:
        """Whether a server's health comes back within servers.health_timeout_s, before its process ends."""
        now = asyncio.get_running_loop().time
        deadline = now() + self._settings.health_timeout_s
        while now() < deadline and not (server.has_ended or _has_left(server)):
            try:
                await server.client.health(deadline - now())
                return True
            except ServerError as error:
                server.reason = str(error)
                await asyncio.sleep(POLL_S)
        return False

    async def _revive(self, server: Server) -> None:
        """Start a server anew that has died or hangs; wait for one that is not ours to come back, unless it may leave.

        Raises:
            ServerError: if it may leave, has been started anew too often, or does not come up.
            DiskError: if the weights could not be written.
        """
        if server.may_leave:
            raise ServerError(f"it left: {server.reason}" if _has_left(server) else server.reason)
        if server.process is None:
            server.incarnation += 1
            server.drop_requests()
            await self._starter.wait_until_healthy(server)
            return
        if server.has_ended:
            server.reason = self._starter.exit_report(server)
        else:
            server.reason = f"it hung and was killed ({server.reason})"
        await self._start_anew(server)

    async def _start_anew(self, server: Server) -> None:
        """Kill a server and start it with the weights that arrived last, where they are on disk or will be.

        Raises:
            ServerError: if it has been started anew too often, or does not come up.
            DiskError: if the weights could not be written.
        """
        assert server.process is not None, "servers of others are not started here"
        server.incarnation += 1
        await asyncio.to_thread(server.process.kill)
        server.drop_requests()
        if server.num_restarts >= self._settings.max_restarts:
            raise ServerError(f"{server.reason}\n(restarted {server.num_restarts} times: servers.max_restarts)")
        server.num_restarts += 1
        await self._starter.launch(server, await self._with_arrived(server.spec))

    async def _with_arrived(self, spec: LaunchSpec) -> LaunchSpec:
        """The specification of a server that starts with the weights that arrived last, once they are on disk."""
        arrived = self.arrived
        if arrived is None:
            return spec
        if arrived.folder is None:
            return replace(spec, weight_version=_NO_VERSION)
        folder = await asyncio.wrap_future(arrived.folder)
        return replace(spec, model_path=folder, weight_version=arrived.version)

    async def _difference(self, server: Server) -> str:
        """How a server's weights differ from those that arrived last; "" if they do not."""
        arrived = self.arrived
        info = await server.client.info()
        if arrived is None:
            return ""
        if info.weight_version != arrived.version:
            return f"it holds weights {info.weight_version!r}, not {arrived.version!r}"
        if arrived.checksums is not None:
            found = await server.client.checksums(self._settings.sync_timeout_s)
            if found != arrived.checksums:
                return f"its weights are not those of version {arrived.version}"
        return ""

    def _obstacle(self, server: Server) -> str:
        """The reason not to start a living server anew with the weights that arrived last; "" if there is none."""
        if server.process is None:
            return (
                "others have started it"
                if server.may_leave
                else "it is one of servers.urls, which are not started here"
            )
        if self.arrived is None or self.arrived.folder is None:
            return "servers.keep_snapshot=false: no weights to start it with are on disk"
        if server.num_restarts >= self._settings.max_restarts:
            return f"it was restarted {server.num_restarts} times: servers.max_restarts"
        return ""

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _has_left(server: Server) -> bool:
    return server.is_announced is not None and not server.is_announced()


def _in_words(error: Exception) -> str:
    """An error as a reason; one that nobody expected is named by its kind, since its text alone may say nothing."""
    # Adapters raise a ValueError for what they cannot start.
    if isinstance(error, (ServerError, DiskError, OtherRankError, OSError, ValueError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
