"""Servers under one clock: which of them is next, and who gets the next response."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from megatron_fipo.preflight.schedules.decoding import Decoding
from megatron_fipo.preflight.schedules.server import Response, Server
from megatron_fipo.preflight.schedules.workload import Lengths


class Cluster:
    """All servers of a run. `now` is the time of the last event."""

    def __init__(self, decoding: Decoding, num_servers: int, lengths: Lengths, claims: int) -> None:
        if num_servers < 1:
            raise ValueError(f"num_servers={num_servers}: must be at least 1.")
        self.servers = [
            Server(decoding, number, lengths.prompt, lengths.longest, claims) for number in range(num_servers)
        ]
        self.now = 0.0
        self._events: list[tuple[float, int, int]] = []
        self._loads: list[tuple[int, int]] = [(0, number) for number in range(num_servers)]

    @property
    def busy(self) -> float:
        """Seconds in which servers had something to do, all added up."""
        return sum(server.busy for server in self.servers)

    @property
    def tokens(self) -> int:
        """Tokens that were generated, whatever became of them."""
        return sum(server.tokens for server in self.servers)

    @property
    def is_running(self) -> bool:
        """Whether anything is left to happen."""
        return self.next_time() < math.inf

    def next_time(self) -> float:
        """When the next event is; infinite if nothing runs."""
        while self._events and self.servers[self._events[0][1]].stamp != self._events[0][2]:
            heapq.heappop(self._events)
        return self._events[0][0] if self._events else math.inf

    def next(self) -> tuple[Server, list[Response]]:
        """Go to the next event. Returns its server, who waits there let in, and the responses that are finished."""
        self.now = max(self.now, self.next_time())
        server = self.servers[heapq.heappop(self._events)[1]]
        done = server.finish()
        server.admit()
        self._changed(server)
        return server, done

    def hand_out(self, peek: Callable[[], Response | None], take: Callable[[], Response]) -> None:
        """Give responses in order to the server with the least in flight, as long as that one has room.

        Args:
            peek: the next response, or None if none may be started. take: the same, which is then gone.
        """
        touched: set[int] = set()
        while (response := peek()) is not None:
            server = self.least_loaded()
            if not server.waiting:
                server.advance(self.now)
            if not server.fits(response):
                break
            server.enter(take())
            touched.add(server.number)
            heapq.heappush(self._loads, (server.load, server.number))
        for number in sorted(touched):
            self._changed(self.servers[number])

    def fill(self, server: Server, peek: Callable[[], Response | None], take: Callable[[], Response]) -> None:
        """Give one server, at its event, what fits: it has just got room, others have not."""
        changed = False
        while (response := peek()) is not None and server.fits(response):
            server.enter(take())
            changed = True
        if changed:
            self._changed(server)

    def send(self, server: Server, responses: list[Response]) -> None:
        """Give responses to a certain server, which lets them wait if it must."""
        server.advance(self.now)
        server.waiting.extend(responses)
        server.admit()
        self._changed(server)

    def abort(self) -> list[Response]:
        """Stop everything, once the steps under way are over. Returns what was in flight, server by server."""
        out = []
        for server in self.servers:
            server.advance(self.now)
            out += server.abort()
            self._changed(server)
        self.now = max(server.clock for server in self.servers)
        return out

    def start_at(self, seconds: float, version: int) -> None:
        """Let idle servers go on at a later time, with weights of this version."""
        self.now = seconds
        for server in self.servers:
            server.clock, server.version = seconds, version

    def take_weights(self, version: int, seconds: float, keeps_cache: bool) -> None:
        """Give all servers new weights while they generate."""
        for server in self.servers:
            server.advance(self.now)
            server.take_weights(version, seconds, keeps_cache)
            self._changed(server)

    def least_loaded(self) -> Server:
        """The server with the least in flight, the first of those that have as little."""
        while True:
            load, number = self._loads[0]
            if self.servers[number].load == load:
                return self.servers[number]
            heapq.heappop(self._loads)

    def _changed(self, server: Server) -> None:
        server.stamp += 1
        heapq.heappush(self._loads, (server.load, server.number))
        time = server.next_event()
        if time < math.inf:
            heapq.heappush(self._events, (time, server.number, server.stamp))
