"""Prompts as a step meets them: how long each response is, and whether its group carries a signal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

BLOCK = 1024
"""Prompts that are drawn at a time."""


@dataclass(frozen=True)
class Lengths:
    """What the lengths of responses look like.

    Attributes:
        mean: of all responses that are generated, after the longest are cut.
        longest: where a response is cut.
        prompt: length of every prompt.
        between: standard deviation of the logarithm of a length between prompts.
        within: the same within a prompt.
        wrong: wrong responses are longer by this much in the logarithm.
        hardness: correlation of a prompt's hardness with its length.
    """

    mean: float
    longest: int
    prompt: int
    between: float = 0.5
    within: float = 0.4
    wrong: float = 0.25
    hardness: float = 0.7

    def __post_init__(self) -> None:
        """Raises ValueError for lengths that cannot be."""
        if not 1 <= self.mean <= self.longest or self.prompt < 0:
            raise ValueError(
                f"mean={self.mean}, longest={self.longest}, prompt={self.prompt}: the mean response must have at least "
                "one token and at most the longest."
            )
        if min(self.between, self.within) < 0 or not -1 <= self.hardness <= 1:
            raise ValueError(
                f"between={self.between}, within={self.within}, hardness={self.hardness}: deviations must be at least "
                "0, and a correlation lies between -1 and 1."
            )


class Workload:
    """An endless stream of prompts in order. Prompt i is the same for every schedule, whoever asks for it and when.

    Whether a group is mixed follows from its responses: the pass rates of prompts are spread as a symmetric beta
    distribution, whose one parameter gives the wanted share of mixed groups.
    """

    def __init__(self, lengths: Lengths, samples: int, kept: float = 1.0, seed: int = 0) -> None:
        """
        Args:
            samples: responses of each prompt.
            kept: share of the groups that dynamic sampling keeps; 1 keeps all, whatever their responses are.
        """
        if samples < 1 or not 0 < kept <= 1:
            raise ValueError(f"samples={samples}, kept={kept}: at least one response, and a share above 0 and up to 1.")
        self.lengths, self.samples, self.kept = lengths, samples, kept
        self._seed = seed
        self._spread = _beta_of_share(kept, samples) if kept < 1 else 1.0
        self._level = 0.0
        logarithms = np.concatenate([self._draw(-1 - block)[0] for block in range(8)])
        self._level = _level_of_mean(logarithms, lengths.mean, lengths.longest)
        sample = self._cut(logarithms).astype(np.float64)
        self.mean_square = float(np.mean(sample**2))
        """Mean of the squared lengths; over the mean it is the length that a token's response has on average."""
        self._block = lru_cache(maxsize=None)(self._make_block)

    def group(self, prompt: int) -> tuple[list[int], bool]:
        """(tokens of each response of a prompt, whether dynamic sampling keeps the group)."""
        lengths, mixed = self._block(prompt // BLOCK)
        return lengths[prompt % BLOCK], mixed[prompt % BLOCK]

    @property
    def context(self) -> float:
        """Tokens that a running response has on average in its cache: long ones are met more often."""
        return self.lengths.prompt + self.mean_square / self.lengths.mean / 2

    def _make_block(self, block: int) -> tuple[list[list[int]], list[bool]]:
        logarithms, mixed = self._draw(block)
        return self._cut(logarithms).tolist(), mixed.tolist()

    def _cut(self, logarithms: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        return np.clip(np.rint(np.exp(self._level + logarithms)), 1, self.lengths.longest).astype(np.int64)

    def _draw(self, block: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """(logarithms of lengths but for their level, whether mixed) of a block; negative blocks fit the level."""
        lengths = self.lengths
        random = np.random.default_rng([self._seed, block + 2**31])
        hard, other = random.standard_normal((2, BLOCK))
        rates = np.empty(BLOCK)
        rates[np.argsort(hard)] = np.sort(random.beta(self._spread, self._spread, BLOCK))[::-1]
        right = random.random((BLOCK, self.samples)) < rates[:, None]
        prompts = lengths.hardness * hard + math.sqrt(1 - lengths.hardness**2) * other
        each = lengths.within * random.standard_normal((BLOCK, self.samples)) + lengths.wrong * ~right
        mixed = np.full(BLOCK, True)
        if self.kept < 1:
            mixed = np.asarray(right.any(axis=1) & ~right.all(axis=1))
        return lengths.between * prompts[:, None] + each, mixed


def _beta_of_share(kept: float, samples: int) -> float:
    """Parameter a of beta(a, a) for which this share of the groups is neither all right nor all wrong.

    All of n are right with the probability of the product of (a + i) / (2a + i) over i below n.
    """
    most = 1 - 2.0 ** (1 - samples)
    if kept >= most:
        raise ValueError(f"kept={kept}: of groups of {samples} responses at most {most:.3g} can be mixed.")
    low, high = 1e-9, 1e9
    index = np.arange(samples)
    for _ in range(200):
        middle = math.sqrt(low * high)
        share = 1 - 2 * float(np.prod((middle + index) / (2 * middle + index)))
        low, high = (middle, high) if share < kept else (low, middle)
    return low


def _level_of_mean(logarithms: npt.NDArray[np.float64], mean: float, longest: int) -> float:
    """What to add to the logarithms so that the cut lengths have this mean."""
    low, high = -10.0, math.log(longest) + 10
    for _ in range(60):
        middle = (low + high) / 2
        lengths = np.clip(np.exp(middle + logarithms), 1, longest)
        low, high = (middle, high) if lengths.mean() < mean else (low, middle)
    return low
