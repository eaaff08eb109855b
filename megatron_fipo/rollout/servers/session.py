"""The servers of one update: what is done with all of them at the same time, and which of them do not survive it."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable, Sequence

from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.http import ServerError, ServerUnreachableError
from megatron_fipo.rollout.servers.proof import CanaryError
from megatron_fipo.rollout.servers.server import Server


class SpoiledError(ServerError):
    """What servers do together, such as a broadcast, will not come to its end: one of them does not take part."""


class Attempt:
    """One thing that is done with all servers of an update at the same time.

    Its lists are filled at once, while other servers are still at work.
    """

    def __init__(self) -> None:
        self.died: list[str] = []
        """What was heard of servers that did not answer."""
        self.refusals: list[ServerError | CanaryError] = []
        """Errors with which servers refused."""
        self.ending: concurrent.futures.Future[None]
        """Done when every server has answered, or will not. `UpdateSession.attempt` sets it."""

    def expect_all(self) -> None:
        """Require that nobody has died or refused until now.

        Raises:
            SpoiledError: otherwise.
        """
        if self.died or self.refusals:
            raise SpoiledError("; ".join([*self.died, *map(str, self.refusals)]))


class UpdateSession:
    """The servers of one update. One that dies leaves it, and the update goes on with those that are left.

    It also goes on with none, as long as one of those that died comes back with the weights of this update.

    Its methods are called by the thread that updates. What they begin runs on the pool's event loop, which alone
    changes the lists. The servers are held meanwhile, so nobody else changes them.

    Args:
        loop: where the pool lives.
        servers: all that are held.
        comes_back: whether a server that has died will be started anew with the weights of this update.
    """

    def __init__(
        self, loop: EventLoopThread, servers: Sequence[Server], comes_back: Callable[[Server], bool] = lambda _: False
    ) -> None:
        self._loop, self._comes_back = loop, comes_back
        self.all = tuple(servers)
        self.servers = list(servers)
        """The servers that are left."""
        self.died: list[tuple[Server, str]] = []
        """The servers that did not answer, or have just joined the run and refused, and why."""

    def each(self, action: Callable[[Server], Awaitable[object]]) -> None:
        """Do something with every server at the same time, and wait for all of them.

        Raises:
            ServerError: what a server refused with, or that the last server has died and none comes back.
            CanaryError: if a server has failed to prove something.
        """
        self.start(action).result()

    def start(self, action: Callable[[Server], Awaitable[object]]) -> concurrent.futures.Future[None]:
        """Begin to do something with every server. The future raises what `each` raises."""
        return self._loop.submit(self._each(action))

    def attempt(self, action: Callable[[Server], Awaitable[object]]) -> Attempt:
        """Begin to do something that all servers do together; a refusal may be no more than another one's death."""
        attempt = Attempt()
        attempt.ending = self._loop.submit(self._try(attempt, action))
        return attempt

    def expect_some(self) -> None:
        """Require that a server is left, or that one comes back with the weights of this update.

        Raises:
            ServerError: with the reasons of all.
        """
        if not self.servers and not any(self._comes_back(server) for server, _ in self.died):
            raise ServerError("no server survived the update: " + "; ".join(reason for _, reason in self.died))

    async def _each(self, action: Callable[[Server], Awaitable[object]]) -> None:
        attempt = Attempt()
        await self._try(attempt, action)
        if attempt.refusals:
            raise attempt.refusals[0]
        if attempt.died:
            self.expect_some()

    async def _try(self, attempt: Attempt, action: Callable[[Server], Awaitable[object]]) -> None:
        async def act(server: Server) -> None:
            try:
                await action(server)
            except (ServerError, CanaryError) as error:
                # One that has just joined the run is no reason to stop it.
                if isinstance(error, ServerUnreachableError) or not server.is_proven:
                    self.servers.remove(server)
                    self.died.append((server, str(error)))
                    attempt.died.append(str(error))
                else:
                    attempt.refusals.append(error)

        await asyncio.gather(*(act(server) for server in list(self.servers)))
