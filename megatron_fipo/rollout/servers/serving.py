"""Servers for a run that another process trains: they are started here, announced in its folder, and watched."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from megatron_fipo.config import ServersSection
from megatron_fipo.rollout.servers.announced import Announced, AnnouncedServers
from megatron_fipo.rollout.servers.api import LaunchSpec, ServerAdapter
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.process import ServerProcess, free_port
from megatron_fipo.rollout.servers.server import Server
from megatron_fipo.rollout.servers.starting import Starter, StartProcess

LOOKS_EVERY_S = 1.0
"""Time between two looks at processes and the run's folder."""


@dataclass
class _Place:
    """A place for one server; one after the other may fill it.

    Attributes:
        spec: of all of them, but for port and key, which each has of its own: nobody takes one for another.
        server: the present one; None while none runs.
        num_restarts: how many were before it.
    """

    number: int
    spec: LaunchSpec
    server: Server | None = None
    num_restarts: int = 0


class Serving:
    """Keeps servers at a run's disposal until the run is finished, or somebody says stop.

    A server whose process ends, or that the run gives up, is started anew under another name, servers.max_restarts
    times. None is asked for its health here: while its weights are changed a server need not answer, and the run, which
    knows when that is, watches it.

    Args:
        adapter: the kind of server.
        specs: one for each server, host filled in. With a port the first server of a place takes that.
        settings: time-outs and restarts.
        serves: what the run compares with its own servers, see `joining.what_is_served`.
        announced: the run's folder of announcements.
        log_folder: where the servers' logs go.
        say: shows a line.
        start_process: starts a process; tests replace it.
    """

    def __init__(
        self,
        adapter: ServerAdapter,
        specs: Sequence[LaunchSpec],
        settings: ServersSection,
        serves: dict[str, Any],
        announced: AnnouncedServers,
        log_folder: Path,
        say: Callable[[str], None],
        start_process: StartProcess = ServerProcess,
    ) -> None:
        self._adapter, self._settings, self._serves = adapter, settings, serves
        self._announced, self._log_folder, self._say = announced, log_folder, say
        self._start_process = start_process
        self._places = [_Place(number, spec) for number, spec in enumerate(specs)]
        self._is_told_to_stop = asyncio.Event()

    async def run(self) -> None:
        """Serve. What is announced is taken back before servers end.

        Raises:
            ServerError: if a server does not come up, ends too often, or is of no use to the run.
            DiskError: if the run's folder cannot be written to.
        """
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
            starter = Starter(self._adapter, self._settings, session, self._start_process)
            keeping = [asyncio.ensure_future(self._keep(place, starter)) for place in self._places]
            stopping = asyncio.ensure_future(self._is_told_to_stop.wait())
            try:
                await asyncio.wait([*keeping, stopping], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (*keeping, stopping):
                    task.cancel()
                outcomes = await asyncio.gather(*keeping, return_exceptions=True)
                await asyncio.gather(*(self._end(place) for place in self._places))
        if failures := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            raise failures[0]

    def stop(self) -> None:
        """Let the servers leave the run, and end them."""
        self._is_told_to_stop.set()

    async def _keep(self, place: _Place, starter: Starter) -> None:
        """Keep one place filled until the run is finished."""
        await self._fill(place, starter)
        while True:
            await asyncio.sleep(LOOKS_EVERY_S)
            assert place.server is not None, "it was filled"
            name = place.server.name
            given_up = self._announced.given_up(name)
            if self._announced.is_finished:
                self._say("the run is finished")
                return
            if place.server.has_ended or given_up is not None:
                reason = starter.exit_report(place.server) if given_up is None else given_up.reason
                if given_up is not None and given_up.for_good:
                    raise ServerError(f"the run has no use for {name}: {reason}")
                await self._end(place)
                if place.num_restarts >= self._settings.max_restarts:
                    raise ServerError(f"{reason}\n(restarted {place.num_restarts} times: servers.max_restarts)")
                place.num_restarts += 1
                self._say(f"{name} is started anew, with another name: {reason}")
                await self._fill(place, starter)
            elif not self._announced.is_announced(name):  # somebody has moved the run's folder away
                self._announce(place.server)

    async def _fill(self, place: _Place, starter: Starter) -> None:
        host, port = place.spec.host, place.spec.port
        spec = replace(place.spec, port=port or free_port(host), key=secrets.token_hex(32))
        server = starter.server(place.number, spec, self._log_folder)
        server.name = f"{server.name}-joined-{secrets.token_hex(4)}"
        place.server = server
        await starter.bring_up(server)
        self._announce(server)
        self._say(f"{server.name} serves at {server.client.url}, and joins the run at its next handover of weights")

    def _announce(self, server: Server) -> None:
        spec = server.spec
        self._announced.announce(Announced(server.name, spec.host, spec.port, self._serves, spec.key))

    async def _end(self, place: _Place) -> None:
        """End a place's server; the run hears first that it leaves."""
        server, place.server = place.server, None
        if server is None:
            return
        self._announced.withdraw(server.name)
        if server.process is not None:
            server.process.ask_to_end()
            await asyncio.to_thread(server.process.wait)
