"""What every rollout engine offers, whatever generates behind it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_fipo.rl.trajectory import Sample


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
        prefix: response tokens that exist already (a partial sample to be continued); empty for a fresh one. The sample
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
    key = f"{run_seed}/{step}/{prompt_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def check_request(request: GenerationRequest, vocab_size: int, stop_token_ids: Collection[int]) -> None:
    """Refuse what no engine could generate; a server might die of it.

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


class RolloutEngine(Protocol):
    """Generates responses with the policy that it was last given."""

    policy_version: int
    repeatable: bool
    """Whether the same requests, made together, give the same samples again bit for bit."""

    async def generate(self, request: GenerationRequest) -> Sample:
        """Generate one response. Cancelling the awaiting task frees what the request holds.

        `abort()` makes pending calls return what they have, with finish_reason "abort".
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Take over new weights under their Hugging Face names. Collective: every rank drains the stream."""
        ...

    def health(self) -> None:
        """Raise RuntimeError with the reason if the engine cannot generate."""
        ...

    def abort(self) -> None:
        """End every request in flight."""
        ...

    def close(self) -> None:
        """Release what the engine holds; further calls raise RuntimeError."""
        ...
