"""How long a server's decoding steps take, by the number of responses and by what is in its cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

ESTIMATED_TOKENS = 4096
"""Tokens that a server's scheduler expects a response to write still, at most, when it looks for room."""

FIRST_SHARE, LEAST_SHARE, DECAY_STEPS = 0.7, 0.098, 600
"""Of these tokens a share is kept free for each response that runs: it falls from the first to the least in so many
decoding steps, and is set to what responses have written of what they may once the cache was full.

All this is SGLang's scheduler (SGLANG_INIT_NEW_TOKEN_RATIO, SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR,
SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS, SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION).
"""


@dataclass(frozen=True)
class Decoding:
    """One server.

    A decoding step writes one token of each running response. It takes a fixed time, and besides that the longer of
    two: to read the weights and all keys and values in the cache, or to multiply.

    Attributes:
        fixed: seconds of a step that depend on nothing.
        weights: seconds to read the weights.
        cached_token: seconds to read the keys and values of one token.
        response: seconds of arithmetic for one response's token.
        prefilled_token: seconds to compute the keys and values of one token that is given.
        pool: tokens whose keys and values fit.
        slots: responses that may run at a time.
    """

    fixed: float
    weights: float
    cached_token: float
    response: float
    prefilled_token: float
    pool: int
    slots: int

    def __post_init__(self) -> None:
        """Raises ValueError where nothing would ever be generated, or at once."""
        times = (self.fixed, self.weights, self.cached_token, self.response, self.prefilled_token)
        if min(times) < 0 or not 0 < self.fixed + self.weights + self.response < math.inf:
            raise ValueError(f"{self}: times must be at least 0, and a step must take some.")
        if self.pool < 1 or self.slots < 1:
            raise ValueError(f"pool={self.pool}, slots={self.slots}: at least one token and one response must fit.")

    def seconds(self, running: int, cached: int, steps: int) -> float:
        """Time of `steps` steps from now on: each adds one token of each running response to the cache."""
        arithmetic, read = self.response * running, self.weights + self.cached_token * cached
        growth = self.cached_token * running
        bound = 0  # steps at the start in which arithmetic takes longer than reading
        if arithmetic > read:
            bound = steps if growth == 0 else min(math.ceil((arithmetic - read) / growth), steps)
        rest = steps - bound
        reading = rest * read + growth * (bound + steps - 1) * rest / 2
        return steps * self.fixed + bound * arithmetic + reading

    def steps_until(self, running: int, cached: int, seconds: float) -> int:
        """Steps that are over once this time has passed, the one that is then under way included."""
        if seconds <= 0:
            return 0
        low, high = 0, 1
        while self.seconds(running, cached, high) < seconds:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.seconds(running, cached, middle) < seconds else (low, middle)
        return high

    def has_room(self, running: int, cached: int, context: int, still: int, share: float = LEAST_SHARE) -> bool:
        """Whether the scheduler lets another response in.

        Args:
            context: tokens that it brings along.
            still: tokens that it may still write.
            share: of ESTIMATED_TOKENS, kept free for each that runs.
        """
        if running == 0:
            return True
        reserve = share * ESTIMATED_TOKENS * running + min(still, ESTIMATED_TOKENS)
        return running < self.slots and cached + context + reserve <= self.pool

    def saturated(self, context: float) -> int:
        """Responses that run at a time when there are always more, of this many tokens in the cache on average."""
        room = (self.pool - ESTIMATED_TOKENS) / (context + LEAST_SHARE * ESTIMATED_TOKENS)
        return max(min(int(room), self.slots), 1)

    def tokens_per_s(self, context: float) -> float:
        """Tokens a second of a server that is saturated."""
        running = self.saturated(context)
        return running / self.seconds(running, round(running * context), 1)

    def faster(self, factor: float) -> Decoding:
        """The same server with every time divided by `factor`."""
        return replace(
            self,
            fixed=self.fixed / factor,
            weights=self.weights / factor,
            cached_token=self.cached_token / factor,
            response=self.response / factor,
            prefilled_token=self.prefilled_token / factor,
        )
