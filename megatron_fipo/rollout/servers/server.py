"""One inference server as the pool sees it: its process, its client, what it is asked, and whether it may generate."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from megatron_fipo.rollout.servers.api import InferenceServer, LaunchSpec
from megatron_fipo.rollout.servers.http import ServerUnreachableError
from megatron_fipo.rollout.servers.process import ServerProcess

T = TypeVar("T")


class State(enum.Enum):
    """Whether a server may generate, and if not, what would let it."""

    READY = "ready"
    """It may generate."""
    JOINING = "joining"
    """It has come while the run goes on and holds the right weights; it may generate once it has proven its log-probs.
    """
    HELD = "held"
    """It lives and is kept out of use while its weights or its memory change."""
    RESTARTING = "restarting"
    """It did not answer, and is looked after: asked for its health, started anew if need be, and checked."""
    AWAITING_MEMORY = "awaiting memory"
    """It was lost while the actor had the GPU's memory, and is started anew when that memory is back."""
    STALE = "stale"
    """It lives, but its weights are not proven to be the right ones; a whole update makes it sound."""
    LOST = "lost"
    """It was given up."""


class Server:
    """One server. Its attributes belong to the event loop on which its pool lives."""

    def __init__(self, name: str, spec: LaunchSpec, client: InferenceServer, log: Path | None) -> None:
        self.name, self.spec, self.client = name, spec, client
        self.log = log
        """The file that its output goes to; None for a server that somebody else started."""
        self.process: ServerProcess | None = None
        """Its process; None for a server that somebody else started, and before the start."""
        self.state = State.RESTARTING
        self.reason = "it has not been started"
        """Why it is not READY."""
        self.incarnation = 0
        """Counts its starts and returns. A process group that an earlier incarnation had joined is gone."""
        self.num_restarts = 0
        self.is_announced: Callable[[], bool] | None = None
        """For a server that has come while the run goes on: whether it is still announced. None for the run's own."""
        self.is_proven = True
        """Whether it has shown, since it came, that it computes what the actor does."""
        self.probe: asyncio.Task[None] | None = None
        """The health probe that is under way. The engine may treat it as a real request."""
        self._asked: set[asyncio.Task[Any]] = set()

    @property
    def num_in_flight(self) -> int:
        """How many requests wait for its answer."""
        return len(self._asked)

    @property
    def may_leave(self) -> bool:
        """Whether it may go away as it came: the run does not wait for its return."""
        return self.is_announced is not None

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone; False for a server that somebody else started, which only its answers show."""
        return self.process is not None and self.process.exit_status is not None

    async def ask(self, question: Coroutine[Any, Any, T]) -> T:
        """Await a request to this server, which fails at once when the server goes away.

        The request counts as in flight before anything else on the event loop has its turn.

        Raises:
            ServerUnreachableError: if the server died, was killed or was given up meanwhile.
        """
        task = asyncio.ensure_future(question)
        self._asked.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise ServerUnreachableError(f"{self.name} went away: {self.reason}") from None
        finally:
            self._asked.discard(task)

    def drop_requests(self) -> None:
        """Let everybody who waits for an answer of this server know that none will come."""
        for task in list(self._asked):
            task.cancel()
