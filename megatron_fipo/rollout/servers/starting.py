"""Brings servers up: starts their processes or attaches to them, and waits until each can be used."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import aiohttp

from megatron_fipo.config import ServersSection
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.rollout.servers.api import InferenceServer, LaunchPlan, LaunchSpec, ServerAdapter
from megatron_fipo.rollout.servers.http import ServerConnection, ServerError, ServerRefusedError, ServerUnreachableError
from megatron_fipo.rollout.servers.process import ServerProcess, is_free
from megatron_fipo.rollout.servers.server import Server, State

T = TypeVar("T")

StartProcess = Callable[[LaunchPlan, Path], ServerProcess]
"""Starts a process from a plan; its output goes to the file."""

POLL_S = 0.25
"""Pause between two probes of something that is starting."""
PROBE_TIMEOUT_S = 10.0
"""Time-out of one such probe, and of one health probe of a server that is up."""


class Starter:
    """Starts servers of one kind, or attaches to them.

    Args:
        adapter: the kind of server.
        settings: how long a start may take.
        session: the connections to all servers.
        start_process: starts a process; tests replace it.
    """

    def __init__(
        self,
        adapter: ServerAdapter,
        settings: ServersSection,
        session: aiohttp.ClientSession,
        start_process: StartProcess = ServerProcess,
    ) -> None:
        self.session, self.start_process = session, start_process
        self._adapter, self._settings = adapter, settings

    def server(self, index: int, spec: LaunchSpec, log_folder: Path | None) -> Server:
        """A server that has not been started.

        Args:
            index: its number, which becomes part of its name.
            log_folder: where its log goes; None for a server that somebody else started.
        """
        name = f"{self._adapter.name}-{index}"
        log = None if log_folder is None else log_folder / f"{name}.log"
        return Server(name, spec, self._connect(spec), log)

    async def newcomer(self, name: str, spec: LaunchSpec, is_announced: Callable[[], bool]) -> Server:
        """A server that has come while the run goes on, which answers and generates nothing yet.

        Raises:
            ServerUnreachableError: if it does not answer.
            ServerError: if it refuses.
        """
        server = Server(name, spec, self._connect(spec), None)
        server.is_announced, server.is_proven = is_announced, False
        try:
            await asyncio.wait_for(server.client.info(), PROBE_TIMEOUT_S)
        except TimeoutError:
            raise ServerUnreachableError(f"{server.client.url} did not answer within {PROBE_TIMEOUT_S:g} s") from None
        server.state, server.reason = State.STALE, "it has just come; the next update of the weights is its first"
        return server

    async def bring_up(self, server: Server) -> None:
        """Start a server, or attach to it, and return when it takes weights and requests.

        Raises:
            ServerError: if it does not come up, or is not the server that was meant.
        """
        server.incarnation += 1
        if server.log is None:
            # It need not generate yet: a run that was killed in an update has left it paused, with the update open. The
            # update that comes before any response closes that one, and proves its own.
            info = await self._wait_until_up(server, server.client.info)
            _expect_same_shape(server, info.model_path)
            return
        spec = server.spec
        if not is_free(spec.host, spec.port):
            raise ServerError(
                f"port {spec.port} of {spec.host}, where {server.name} should listen, is taken. End what listens "
                "there, or set servers.base_port to another one (null takes ports that are free)."
            )
        await self.launch(server, spec)
        info = await server.client.info()
        if info.weight_version != spec.weight_version:
            raise ServerError(
                f"{server.name} reports weight version {info.weight_version!r} and was started with "
                f"{spec.weight_version!r}: another server answers at {server.client.url}"
            )
        await self._expect_guarded(server)

    async def launch(self, server: Server, spec: LaunchSpec) -> None:
        """Start a server's process and return when it generates."""
        assert server.log is not None, "servers of others are not started here"
        server.process = self.start_process(self._adapter.launch_plan(spec), server.log)
        await self.wait_until_healthy(server)

    async def wait_until_healthy(self, server: Server) -> None:
        """Return when a server generates.

        Raises:
            ServerError: if it ends, or does not within servers.start_timeout_s.
        """
        await self._wait_until_up(server, lambda: server.client.health(PROBE_TIMEOUT_S))

    def exit_report(self, server: Server) -> str:
        """How a server's process ended, and what its log says about why."""
        assert server.process is not None, "only what was started here has a process"
        status = server.process.exit_status
        how = f"was ended by signal {status - 128}" if status is not None and status > 128 else f"exited with {status}"
        reason = self._adapter.reason_of_exit(server.process.log_tail())
        return f"{server.name} {how} (log: {server.log}). It reported:\n{reason}"

    def _connect(self, spec: LaunchSpec, *, shows_key: bool = True) -> InferenceServer:
        url = f"http://{spec.host}:{spec.port}"
        return self._adapter.connect(ServerConnection(self.session, url, key=spec.key if shows_key else ""), spec)

    async def _expect_guarded(self, server: Server) -> None:
        """A server that was started here must answer nobody without its key.

        Raises:
            ServerError: if it does: another version of the engine, or servers.extra_args, may lead past the guard.
        """
        try:
            await self._connect(server.spec, shows_key=False).health(PROBE_TIMEOUT_S)
        except ServerRefusedError as error:
            if error.status == 401:
                return
            raise
        raise ServerError(
            f"{server.name} answers requests without the run's key, so that everybody on this host could change its "
            "weights or run code in it. Take the version of tools/engines, and look through servers.extra_args."
        )

    async def _wait_until_up(self, server: Server, ask: Callable[[], Awaitable[T]]) -> T:
        place = "one of servers.urls" if server.log is None else f"its log is {server.log}"

        def report() -> str:
            return self.exit_report(server) if server.has_ended else ""

        return await wait_until_up(f"{server.name}", ask, report, self._settings.start_timeout_s, place)


async def wait_until_up(
    name: str, ask: Callable[[], Awaitable[T]], exit_report: Callable[[], str], timeout_s: float, place: str
) -> T:
    """Ask something that is coming up until it answers, and return the answer.

    Args:
        name: name of what is starting, for the message.
        ask: one probe, with a time-out of its own.
        exit_report: how its process ended; "" while it runs.
        timeout_s: longest wait; servers.start_timeout_s.
        place: where to look for more, for the message.

    Raises:
        ServerError: if its process ends, or no answer comes in time.
    """
    now = asyncio.get_running_loop().time
    deadline = now() + timeout_s
    while True:
        if report := exit_report():
            raise ServerError(report)
        try:
            answer = await ask()
        except ServerError as error:
            if now() > deadline:
                raise ServerError(
                    f"{name} was not ready after {timeout_s:g} s (servers.start_timeout_s): {error} ({place})"
                ) from error
            await asyncio.sleep(POLL_S)
        else:
            # Anybody who listens at the port may have answered, so the process must still be there.
            if report := exit_report():
                raise ServerError(report)
            return answer


def _expect_same_shape(server: Server, folder: str) -> None:
    """Refuse a server of another model before anything is written to it: SGLang crashes on other sizes.

    Where the folder cannot be read from here (another host's, or gone), the checksums of the first update decide.

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
