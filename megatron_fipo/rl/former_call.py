"""The call of `policy_loss` before there were `TokenValues` and `Sequences`: a dozen tensors, one after the other.

It still works, with a warning. The first argument tells which of the two a call is: a tensor, or `TokenValues`.

Shapes: T packed tokens of this rank, S whole sequences.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor

from megatron_fipo.config import FipoConfig
from megatron_fipo.rl.future_kl import future_kl
from megatron_fipo.rl.sequences import Sequences, count_per_sequence, sequence_ids_of
from megatron_fipo.rl.token_values import TokenValues

SuffixSum = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""suffix_sum(x [T], flags [T] bool, cu_seqlens [S + 1]) -> (future_kl [T], flags of each sequence [S] int64)."""
Loss = TypeVar("Loss", bound=Callable[..., Any])

WARNING = (
    "policy_loss(log_probs, old_log_probs, advantages, response_mask, cu_seqlens, config) is deprecated. Write "
    "policy_loss(TokenValues(log_probs, old_log_probs, advantages, response_mask), WholeSequences(cu_seqlens, "
    "log_probs.device), config), or ShardedSequences on a context-parallel rank."
)


def takes_former_call(policy_loss: Loss) -> Loss:
    """`policy_loss(tokens, sequences, config)`, which also understands the former call."""

    @wraps(policy_loss)
    def either(*args: Any, **keywords: Any) -> Any:
        if "log_probs" in keywords or (args and isinstance(args[0], Tensor)):
            warnings.warn(WARNING, DeprecationWarning, stacklevel=2)
            return policy_loss(*translated(*args, **keywords))
        return policy_loss(*args, **keywords)

    return cast(Loss, either)


def translated(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    config: FipoConfig,
    suffix_sum: SuffixSum | None = None,
    *,
    sequence_ids: Tensor | None = None,
    response_token_counts: Tensor | None = None,
    counts_sequences: bool = True,
    reference_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    sum_over_shards: Callable[[Tensor], Tensor] | None = None,
) -> tuple[TokenValues, Sequences, FipoConfig]:
    """The arguments of today's call from those of the former one, whose names and places these are."""
    tokens = TokenValues(
        log_probs, old_log_probs, advantages, response_mask, reference_log_probs, entropy, rollout_log_probs
    )
    sequences = _FormerSequences(
        log_probs, cu_seqlens, suffix_sum, sequence_ids, response_token_counts, counts_sequences, sum_over_shards
    )
    if config.loss_aggregation != "token_mean" and sequence_ids is not None and response_token_counts is None:
        raise ValueError(
            f"objective.loss_aggregation={config.loss_aggregation} with sequence_ids needs response_token_counts: "
            "this process may hold only parts of the sequences."
        )
    return tokens, sequences, config


class _FormerSequences:
    """`Sequences` of what the former call was told about them."""

    def __init__(
        self,
        log_probs: Tensor,
        cu_seqlens: Tensor,
        suffix_sum: SuffixSum | None,
        sequence_ids: Tensor | None,
        response_token_counts: Tensor | None,
        counts_sequences: bool,
        sum_over_shards: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.num = len(cu_seqlens) - 1
        self.response_tokens = response_token_counts
        self.counts_here = counts_sequences
        self._cu_seqlens, self._suffix_sum, self._sum_over_shards = cu_seqlens, suffix_sum, sum_over_shards
        if sequence_ids is None:
            sequence_ids = sequence_ids_of(cu_seqlens, len(log_probs), log_probs.device)
        self.ids = sequence_ids

    def suffix_sum(self, x: Tensor, flags: Tensor, half_life_tokens: float) -> tuple[Tensor, Tensor]:
        if self._suffix_sum is not None:
            return self._suffix_sum(x, flags, self._cu_seqlens)
        ids = sequence_ids_of(self._cu_seqlens, len(x), x.device)
        return future_kl(x, self._cu_seqlens, half_life_tokens), count_per_sequence(flags, ids, self.num)

    def suffix_sums(self, x: Sequence[Tensor], half_lives: Sequence[float]) -> list[Tensor]:
        if self._suffix_sum is not None:
            raise ValueError(
                "objective.shadow needs sums of other half-lives than suffix_sum has. Pass TokenValues and Sequences."
            )
        return [future_kl(each, self._cu_seqlens, half_life) for each, half_life in zip(x, half_lives, strict=True)]

    def total(self, per_sequence: Tensor) -> Tensor:
        return per_sequence if self._sum_over_shards is None else self._sum_over_shards(per_sequence)
