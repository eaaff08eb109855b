"""Responses, and a server that decodes many of them at a time."""

from __future__ import annotations

import heapq
import math
import sys
from collections import deque
from dataclasses import dataclass, field

from megatron_fipo.preflight.schedules.decoding import DECAY_STEPS, FIRST_SHARE, LEAST_SHARE, Decoding


@dataclass(eq=False, slots=True)
class Group:
    """A prompt's responses.

    Attributes:
        prompt: its number in the order of prompts.
        mixed: whether dynamic sampling keeps it, once it is judged.
        version: of the weights when its first response was handed out.
        unfinished: responses that are not done yet.
    """

    prompt: int
    mixed: bool
    version: int
    responses: list[Response]
    unfinished: int

    @property
    def tokens(self) -> int:
        """Tokens that its responses have so far."""
        return sum(response.made for response in self.responses)


@dataclass(eq=False, slots=True)
class Response:
    """One response.

    Attributes:
        length: tokens that it will have. Nobody knows but the simulation.
        made: tokens that were settled when it last left a server or the weights last changed.
        spans: (version of the weights, tokens written by them), in order.
        entered: steps that its server had made when it entered, or when the weights last changed.
        is_finished: whether the books know that it is.
    """

    group: Group
    length: int
    made: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    entered: int = 0
    is_finished: bool = False


def make_group(prompt: int, lengths: list[int], mixed: bool, version: int) -> Group:
    """Return a group of which nothing is generated yet."""
    group = Group(prompt, mixed, version, [], len(lengths))
    group.responses.extend(Response(group, length) for length in lengths)
    return group


class Server:
    """One server; `clock` is the end of the last decoding step that is accounted for.

    Everything happens between two steps: who comes in the middle of one waits for its end, and what is aborted keeps
    the token of the step that was under way.
    """

    def __init__(self, decoding: Decoding, number: int, prompt: int, longest: int, claims: int) -> None:
        """
        Args:
            prompt: tokens of every prompt.
            longest: tokens that a response may have.
            claims: responses that it takes at a time where it may choose.
        """
        if prompt + longest > decoding.pool:
            raise ValueError(
                f"a response may take {prompt + longest:,} tokens, and a server has room for {decoding.pool:,}: give "
                "it more GPUs or memory."
            )
        self.decoding, self.number, self.version = decoding, number, 0
        self.clock = self.busy = 0.0
        self.tokens = self.prefilled = self.retracted = 0
        self.running: dict[Response, int] = {}
        self.waiting: deque[Response] = deque()
        self.stamp = 0
        self._prompt, self._longest, self._claims = prompt, longest, claims
        self._steps = self._cached = 0
        self._ends: list[tuple[int, int, Response]] = []
        self._arrivals = 0
        self._share = FIRST_SHARE

    @property
    def load(self) -> int:
        """Responses that it has, the waiting ones included."""
        return len(self.running) + len(self.waiting)

    def next_event(self) -> float:
        """When a response is finished or the cache is full; infinite if nothing runs."""
        if not self.running:
            return math.inf
        return self.clock + self.decoding.seconds(len(self.running), self._cached, self._steps_to_event())

    def advance(self, now: float) -> None:
        """Account for the steps until `now`, which must not lie behind the next event."""
        if not self.running:
            self.clock = max(self.clock, now)
        elif now > self.clock:
            until = self.decoding.steps_until(len(self.running), self._cached, now - self.clock)
            self._pass(min(until, self._steps_to_event()))

    def finish(self) -> list[Response]:
        """Go to the next event; returns who is finished. A full cache puts those who came last back to wait.

        vLLM does so; SGLang puts out those with the fewest tokens, which are nearly always the same.
        """
        self._pass(self._steps_to_event())
        done = []
        while self._first_end() <= self._steps:
            response = heapq.heappop(self._ends)[2]
            self._leave(response)
            done.append(response)
        if self._is_full:
            written = self._cached / len(self.running) - self._prompt
            self._share = max(min(written / self._longest, 1.0), LEAST_SHARE)
        while self._is_full:
            last = next(reversed(self.running))
            self._leave(last)
            self.waiting.appendleft(last)
            self.retracted += 1
        return done

    def fits(self, response: Response) -> bool:
        """Whether the server takes it, which it does not while others wait."""
        return not self.waiting and self.load < self._claims and self._has_room(response)

    def admit(self) -> None:
        """Let in whoever waits, in order, as long as there is room."""
        while self.waiting and self._has_room(self.waiting[0]):
            self.enter(self.waiting.popleft())

    def enter(self, response: Response) -> None:
        """Begin or go on with a response: keys and values of what is there are computed, and all others wait for it."""
        context = self._prompt + response.made
        response.entered = self._steps
        self._push(response)
        self._cached += context
        self._prefill(context)

    def abort(self) -> list[Response]:
        """Put everything out, in the order in which it came; what has been written stays written."""
        out = list(self.running)
        for response in out:
            self._leave(response)
        self._ends.clear()
        out += self.waiting
        self.waiting.clear()
        return out

    def take_weights(self, version: int, seconds: float, keeps_cache: bool) -> None:
        """New weights come in while requests are in flight, which takes a time, and perhaps the cache anew."""
        self._ends.clear()
        for response in list(self.running):
            self._settle(response)
            response.entered = self._steps
            self._push(response)
        self.version = version
        self.clock += seconds
        if not keeps_cache:
            self._prefill(self._cached)

    @property
    def _is_full(self) -> bool:
        """Whether the next step's tokens have no room."""
        return len(self.running) > 1 and self._cached + len(self.running) > self.decoding.pool

    def _has_room(self, response: Response) -> bool:
        context, still = self._prompt + response.made, self._longest - response.made
        return self.decoding.has_room(len(self.running), self._cached, context, still, self._share)

    def _steps_to_event(self) -> int:
        running = len(self.running)
        to_end = self._first_end() - self._steps
        if running > 1:
            to_end = min(to_end, (self.decoding.pool - self._cached) // running)
        return max(to_end, 0)

    def _first_end(self) -> int:
        """Number of the step after which the next response is finished; beyond all steps if none runs."""
        while self._ends and self.running.get(self._ends[0][2]) != self._ends[0][1]:
            heapq.heappop(self._ends)  # of one that has been put out since
        return self._ends[0][0] if self._ends else sys.maxsize

    def _pass(self, steps: int) -> None:
        if steps:
            running = len(self.running)
            seconds = self.decoding.seconds(running, self._cached, steps)
            self.clock += seconds
            self.busy += seconds
            self._steps += steps
            self._share = max(self._share - steps * (FIRST_SHARE - LEAST_SHARE) / DECAY_STEPS, LEAST_SHARE)
            self._cached += running * steps
            self.tokens += running * steps

    def _prefill(self, tokens: int) -> None:
        seconds = tokens * self.decoding.prefilled_token
        self.clock += seconds
        self.busy += seconds
        self.prefilled += tokens

    def _push(self, response: Response) -> None:
        self._arrivals += 1
        self.running[response] = self._arrivals
        heapq.heappush(self._ends, (self._steps + response.length - response.made, self._arrivals, response))

    def _settle(self, response: Response) -> None:
        new = self._steps - response.entered
        if new:
            response.spans.append((self.version, new))
            response.made += new

    def _leave(self, response: Response) -> None:
        self._settle(response)
        del self.running[response]
        self._cached -= self._prompt + response.made
