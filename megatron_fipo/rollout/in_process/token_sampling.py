"""Sampling tokens from logits, with randomness that belongs to the request.

Token k of a response is drawn by inverse CDF from the k-th number of a stream that the request's seed alone keys. So a
response depends neither on the rank that generates it nor on what else is in the batch, and a continued one goes on
with the numbers that it would have had.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_SEED = 2**63 - 1

_NUCLEUS_TOKENS = 256
"""Tokens that are sorted at first; eight times as many again while some row's nucleus is larger."""


def request_uniforms(seed: int, start: int, stop: int) -> np.ndarray:
    """Numbers start … stop - 1 of a request's stream, uniform in [0, 1).

    Args:
        seed: 0 … 2**63 - 1; key of a Philox counter-based generator.
        start: position in the response of the first token to be drawn, the length of its prefix.
        stop: one past the last position.

    Returns:
        float64 [stop - start]; number k is the same for every start and stop.

    Raises:
        ValueError: for a seed outside its range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(
            f"a request's seed must lie in 0 … 2**63 - 1; got {seed}. Take it from rollout.engine.sample_seed."
        )
    generator = np.random.Generator(np.random.Philox(key=seed))
    return generator.random(stop)[start:]


def sample_tokens(
    logits: Tensor, temperature: Tensor, uniforms: Tensor, top_p: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row.

    Args:
        logits: [N, V], any floating dtype; -inf excludes a token.
        temperature: float32 [N]; 0 takes the most likely token.
        uniforms: float64 [N] in [0, 1). The token is the first, in vocabulary order, at which the cumulative
            probability exceeds this number.
        top_p: float32 [N] in (0, 1], or None for 1 everywhere: draw from the fewest most likely tokens whose
            probabilities reach top_p, equally likely ones taken in vocabulary order.

    Returns:
        tokens: int64 [N].
        log_probs: float32 [N], of log_softmax(logits / temperature), before top-p, so that they compare with the
            actor's. At temperature 0 they are those of temperature 1. NaN where the logits hold a NaN.
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    log_probs = torch.log_softmax(scaled, dim=-1)
    # float64: in float32 the cumulative sum over 150,000 tokens is off by more than the tail tokens' probabilities.
    weights = log_probs.double().exp_()
    if top_p is not None:
        weights = _nucleus(weights, top_p)
    cumulative = weights.cumsum(dim=-1)
    # The product stays below the last entry for every uniform number up to 1 - 2**-53, so the index stays inside.
    targets = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    # NaN compares false with everything and would end one past the vocabulary.
    tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy, log_probs.argmax(dim=-1), tokens)
    return tokens, log_probs.gather(1, tokens[:, None]).squeeze(1)


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Set to zero every probability outside the nucleus. weights float64 [N, V], top_p float32 [N]."""
    top_p = top_p[:, None].double()
    everything = top_p >= 1  # whatever rounding leaves in the sum
    num_tokens = weights.shape[-1]
    num_ordered = min(num_tokens, _NUCLEUS_TOKENS)
    while True:
        ordered = weights.topk(num_ordered, dim=-1).values
        cumulative = ordered.cumsum(dim=-1)
        if num_ordered == num_tokens or bool(((cumulative[:, -1:] >= top_p) | everything).all()):
            break
        num_ordered = min(num_tokens, 8 * num_ordered)
    # A token is in where those before it do not reach top_p yet; the most likely one always is.
    size = (cumulative - ordered < top_p).sum(dim=-1, keepdim=True)
    smallest = ordered.gather(1, size - 1)
    above, equal = weights > smallest, weights == smallest
    num_equal = size - above.sum(dim=-1, keepdim=True)
    keep = above | (equal & (equal.cumsum(dim=-1) <= num_equal)) | everything
    return torch.where(keep, weights, 0.0)
