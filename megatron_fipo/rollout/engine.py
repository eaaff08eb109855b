"""The interface of rollout engines, and the requests and answers that pass through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.rl.trajectory import OfSegments, Segment
from megatron_fipo.system.digests import hashed_seed


@dataclass(frozen=True)
class SamplingParams:
    """How one response is sampled."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """One response to generate.

    Attributes:
        sample_id: unique among the requests in flight.
        group_id: requests with the same group_id share their prompt.
        sample_index: position within the group.
        prompt_ids: prompt tokens.
        prefix: response tokens that exist already (a partial response to be continued); empty for a fresh one. The turn
            then holds only what follows; max_tokens and the stream of random numbers still count from the response's
            start.
        sampling: how to sample.
        seed: key of this sample's randomness, a function of (run seed, step, prompt, sample), never of the rank.
    """

    sample_id: str
    group_id: int
    sample_index: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    prefix: tuple[int, ...] = ()


def sample_seed(run_seed: int, step: int, prompt_id: int, sample_index: int) -> int:
    """Seed of one sample: the same on every rank, machine and Python, in 0 … 2**63 - 1."""
    return hashed_seed(run_seed, step, prompt_id, sample_index)


def check_request(request: GenerationRequest, vocab_size: int, stop_token_ids: Collection[int]) -> None:
    """Refuse a request that no engine could serve; a server might crash on it.

    Raises:
        ValueError: naming the sample and the rule.
    """
    sampling, what = request.sampling, f"sample {request.sample_id!r}"
    if not request.prompt_ids:
        raise ValueError(f"{what}: the prompt is empty; the engine needs at least one token to go on from")
    for name, ids in (("prompt_ids", request.prompt_ids), ("prefix", request.prefix)):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            raise ValueError(
                f"{what}: {name} reach from {min(ids)} to {max(ids)}; the model has tokens 0 … {vocab_size - 1}"
            )
    if not 0 <= sampling.temperature < math.inf:
        raise ValueError(f"{what}: temperature must be at least 0, and finite; got {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"{what}: top_p must lie in (0, 1]; got {sampling.top_p}")
    if len(request.prefix) >= sampling.max_tokens:
        raise ValueError(
            f"{what}: max_tokens={sampling.max_tokens} leaves nothing after a prefix of {len(request.prefix)}"
        )
    if request.prefix and request.prefix[-1] in stop_token_ids:
        raise ValueError(f"{what}: its prefix ends in stop token {request.prefix[-1]}; there is nothing to continue")


class NotFiniteError(RuntimeError):
    """The policy gives numbers that are not finite, so that nothing can be sampled from it."""


@dataclass
class Turn(OfSegments):
    """The policy's answer to one request: one segment for each version of its weights that wrote on it."""

    request: GenerationRequest
    segments: list[Segment]
    finish_reason: str
    """stop, length or abort."""

    @property
    def start(self) -> int:
        """Position of the first token in the response, after the request's prefix."""
        return len(self.request.prefix)

    @property
    def prompt_ids(self) -> Tensor:
        """The request's prompt tokens, int64 [P]."""
        return torch.tensor(self.request.prompt_ids, dtype=torch.int64)

    @property
    def prompt_id(self) -> int:
        """The request's group_id."""
        return self.request.group_id

    @property
    def sample_index(self) -> int:
        """The request's sample_index."""
        return self.request.sample_index


class Share(NamedTuple):
    """Which of the prompts a rank generates for: every stride-th one from the first on, which counts from 0."""

    first: int
    stride: int

    @property
    def places(self) -> slice:
        """Where its prompts are among those of all ranks."""
        return slice(self.first, None, self.stride)


ALL_PROMPTS = Share(0, 1)
NO_PLACES = slice(0, 0)
"""Where the prompts of a rank without a share are."""


class Policy(Protocol):
    """What an engine needs of the model that is trained. All methods but `offload` and `onload` are collective."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, which are 0 … vocab_size - 1."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole weights under Hugging Face names, on every rank, which must drain it."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs at temperature 1 of each sequence's tokens from the second on, the same on every rank."""
        ...

    def offload(self) -> None:
        """Lend the GPU memory of weights, gradients and optimizer; nothing else may be called before `onload`."""
        ...

    def onload(self) -> None:
        """Take that memory back."""
        ...


class RolloutEngine(Protocol):
    """Generates with the policy that it was last given, in this process or on servers.

    Order: `start`, then `give`, generation and `take_back` in turns, then `close`.
    """

    share: Share | None
    """Which prompts this rank generates for; None if it generates for none."""
    repeatable: bool
    """Whether the same requests, made together, give the same turns again bit for bit."""

    @property
    def capacity(self) -> int:
        """Requests that are worth having in flight here at a time: one more would only wait."""
        ...

    def start(self, policy: Policy | None) -> None:
        """Make everything ready but the weights. Collective over all ranks.

        Args:
            policy: the policy that is trained beside the engine; None if none is.

        Raises:
            ServerError: on every rank, in a server's words, if one does not come up.
        """
        ...

    def give(self, policy: Policy, version: int) -> None:
        """Bring the policy's weights to the engine, unless it has this version of them. Collective over all ranks.

        The engine can generate when this returns. It may have the policy's memory then, until `take_back`.

        Args:
            version: version of the policy; written into segments.

        Raises:
            ServerError: on every rank, if weights did not arrive, or not these.
        """
        ...

    def take_back(self, policy: Policy) -> None:
        """Give the policy the memory back that it lent; it can compute and be saved then. Collective over all ranks.

        No request may be in flight. If the policy had lent memory, `give` must come before the next generation.
        """
        ...

    async def generate(self, request: GenerationRequest) -> Turn:
        """Generate one response, or the rest of one. Cancelling the awaiting task frees what the request holds.

        `abort()` makes pending calls return what they have, with finish_reason "abort".
        """
        ...

    def abort(self) -> None:
        """End every request in flight. Safe in a signal handler."""
        ...

    def forget_load(self) -> None:
        """Leave out of `metrics` what was generated since it was last called: it was no part of a step."""
        ...

    def metrics(self) -> Metrics:
        """What generation and the last `give` took since this was last called; to be merged over ranks."""
        ...

    def close(self) -> None:
        """Release what the engine holds; further calls raise RuntimeError."""
        ...


@runtime_checkable
class StoppableEngine(Protocol):
    """What an engine has besides, if it can stop at a given decoding step, whatever time anything takes."""

    def allow(self, num_steps: int | None, on_rest: Callable[[], None] = lambda: None) -> None:
        """Take so many decoding steps from now on, and then rest with all that is in flight; None: never rest.

        A step is taken where something is in flight. What is aborted returns from a resting engine, too.

        Args:
            on_rest: called when it comes to rest.
        """
        ...

    @property
    def is_at_rest(self) -> bool:
        """Whether it has taken all the steps that it may."""
        ...
