"""The servers of one pool and the state that each is in; whoever waits for a state is woken by every change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from megatron_fipo.rollout.servers.server import Server, State


class Roster:
    """All servers of a pool: its own in the order of their specifications, then others as they came.

    It belongs to the pool's event loop.
    """

    def __init__(self) -> None:
        self.servers: list[Server] = []
        self._changed = asyncio.Condition()

    def in_state(self, *states: State) -> list[Server]:
        """The servers that are in one of these states, in order."""
        return [server for server in self.servers if server.state in states]

    async def set_state(self, server: Server, state: State, reason: str = "") -> None:
        """Put a server into a state, and wake everybody who waits.

        Args:
            reason: why it is not READY.
        """
        async with self._changed:
            server.state, server.reason = state, reason
            self._changed.notify_all()

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Return as soon as something holds; it is looked at again after every change of a state and every `wake`."""
        async with self._changed:
            await self._changed.wait_for(holds)

    async def wake(self) -> None:
        """Have everybody who waits look again."""
        async with self._changed:
            self._changed.notify_all()

    def reasons(self) -> str:
        """Which servers are not READY, and why."""
        return "; ".join(
            f"{server.name} ({server.client.url}): {server.reason}"
            for server in self.servers
            if server.state is not State.READY
        )
