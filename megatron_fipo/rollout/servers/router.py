"""sglang-router before the servers of a pool: its process, and whether requests can go through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_fipo.rollout.servers.api import LaunchPlan
from megatron_fipo.rollout.servers.http import ServerConnection
from megatron_fipo.rollout.servers.process import ServerProcess, free_port
from megatron_fipo.rollout.servers.starting import PROBE_TIMEOUT_S, Starter, wait_until_up

RouterPlan = Callable[[Sequence[str], int], LaunchPlan]
"""The command line of a router, given the servers' URLs and the port where it should listen."""

_REPORT_CHARACTERS = 2000


class Router:
    """One router. Sending requests again and starting servers anew is left to the pool.

    Args:
        plan: its command line.
        urls: the servers' addresses.
        key: the servers' key; the router asks for it, and shows it to the servers.
        log: the file that its output goes to.
        starter: starts its process, and holds the connections.
    """

    def __init__(self, plan: RouterPlan, urls: Sequence[str], key: str, log: Path, starter: Starter) -> None:
        port = free_port()
        self._log = log
        self.process: ServerProcess = starter.start_process(plan(urls, port), log)
        self.connection = ServerConnection(starter.session, f"http://127.0.0.1:{port}", is_gateway=True, key=key)

    @property
    def url(self) -> str:
        """The address at which it listens."""
        return self.connection.url

    async def wait_until_up(self, timeout_s: float) -> None:
        """Return when it takes requests.

        Raises:
            ServerError: if it ends, or is not ready in time.
        """

        async def ask() -> None:
            await self.connection.get("/readiness", timeout_s=PROBE_TIMEOUT_S)

        await wait_until_up("the router", ask, self.exit_report, timeout_s, f"its log is {self._log}")

    def exit_report(self) -> str:
        """What it reported before it ended; "" while it runs."""
        if self.process.exit_status is None:
            return ""
        return f"the router ended (log: {self._log}). It reported:\n{self.process.log_tail()[-_REPORT_CHARACTERS:]}"
