"""The servers of one update: what is done with all of them at the same time, and which of them do not survive it."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable, Sequence

from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.http import ServerError, ServerUnreachableError
from megatron_fipo.rollout.servers.proof import CanaryError
from megatron_fipo.rollout.servers.server import Server


class UpdateSession:
    """The servers of one update. One that dies leaves it; the update goes on while one is left.

    Its methods are called by the thread that updates. What they begin runs on the pool's event loop, which alone
    changes the lists. The servers are held meanwhile, so nobody else changes them.

    Args:
        loop: where the pool lives.
        servers: all that are held.
    """

    def __init__(self, loop: EventLoopThread, servers: Sequence[Server]) -> None:
        self._loop = loop
        self.all = tuple(servers)
        self.servers = list(servers)
        """The servers that are left."""
        self.died: list[tuple[Server, str]] = []
        """The servers that did not answer, and why."""
        self.refusals: list[ServerError | CanaryError] = []
        """Errors with which servers refused. Like `died`, filled at once, while other servers are still at work."""

    def each(self, action: Callable[[Server], Awaitable[object]]) -> None:
        """Do something with every server at the same time, and wait for all of them.

        Raises:
            ServerError: what a server refused with, or that the last server has died.
            CanaryError: if a server has failed to prove something.
        """
        self.start(action).result()

    def start(self, action: Callable[[Server], Awaitable[object]]) -> concurrent.futures.Future[None]:
        """Begin to do something with every server. The future raises what `each` raises."""
        return self._loop.submit(self._each(action))

    def expect_whole(self) -> None:
        """Require that every server still takes part: in a process group each needs all others.

        Raises:
            ServerError: with the reason of a server that does not.
        """
        if self.refusals:
            raise self.refusals[0]
        if self.died:
            raise ServerError(
                "a member of the weight update's process group died: " + "; ".join(reason for _, reason in self.died)
            )

    async def _each(self, action: Callable[[Server], Awaitable[object]]) -> None:
        async def act(server: Server) -> None:
            try:
                await action(server)
            except ServerUnreachableError as error:
                self.servers.remove(server)
                self.died.append((server, str(error)))
            except (ServerError, CanaryError) as error:
                self.refusals.append(error)

        await asyncio.gather(*(act(server) for server in list(self.servers)))
        if self.refusals:
            raise self.refusals[0]
        if not self.servers:
            raise ServerError("no server survived the update: " + "; ".join(reason for _, reason in self.died))
