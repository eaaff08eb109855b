"""What the loss made of single tokens of chosen trajectories, from the ranks that hold them to rank 0.

Each rank notes its rows of the chosen sequences while an update computes its losses; `at_rank_0` brings them together
afterwards. Nothing else of the update is noted or moved.

Shapes: n response tokens of a trajectory, m of them that a rank holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_fipo.config import FipoConfig
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.objective import LossOutput, future_kl_terms, log_prob_shift
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.token_values import TokenValues

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(eq=False)
class TracedTokens:
    """The response tokens of a trajectory, or those of them that a rank holds, in the order of their positions."""

    positions: NDArray[np.int32]
    """Of the predicting tokens in the sequence: the last prompt token's for the first response token."""
    old_log_probs: Floats
    log_probs: Floats
    log_prob_shifts: Floats
    future_kl: Floats
    """NaN without Future-KL."""
    influence_weights: Floats
    token_losses: Floats
    correction_weights: Floats
    """1 without a correction."""
    entropies: Floats
    participates: Flags
    """Whether the token's shift enters Future-KL."""
    response_mask: Flags
    final_mask: Flags
    passes_filter: Flags
    """Whether the sequence filter keeps its response."""


class TokenTracer:
    """Notes the chosen sequences' tokens of one update, as a `Watch` of the objective."""

    def __init__(self, places: Mapping[int, tuple[int, int]], config: FipoConfig, *, notes: bool) -> None:
        """
        Args:
            places: for each chosen sequence, by its index into the step's batch, the position of the token that
                predicts its first response token, and how many response tokens follow.
            notes: whether this rank's rows count; see `ParallelGroups.reports_loss`.
        """
        self._places, self._config, self._notes = places, config, notes
        self.noted: dict[int, TracedTokens] = {}
        """This rank's tokens, by index into the step's batch."""

    def __call__(self, batch: PackedBatch, tokens: TokenValues, loss: LossOutput) -> None:
        """Note a microbatch. Waits for its device where it holds a chosen sequence; no communication."""
        chosen = [(place, one) for place, one in enumerate(batch.sample_indices) if one in self._places]
        if not self._notes or not chosen:
            return
        tokens = tokens.raised()
        shift = log_prob_shift(tokens.log_probs, tokens.old_log_probs).detach()
        enters = torch.zeros_like(tokens.response_mask)
        if loss.future_kl is not None:
            enters = future_kl_terms(shift, tokens, self._config)[1]
        floats = (
            tokens.old_log_probs,
            tokens.log_probs.detach(),
            shift,
            torch.full_like(shift, torch.nan) if loss.future_kl is None else loss.future_kl,
            loss.influence_weights,
            loss.token_loss,
            torch.ones_like(shift) if loss.correction_weights is None else loss.correction_weights,
            torch.full_like(shift, torch.nan) if tokens.entropy is None else tokens.entropy.detach(),
        )
        for place, index in chosen:
            rows = batch.layout.rows_of(place)
            flags = (enters[rows], batch.response_mask[rows], loss.final_mask[rows])
            passes = loss.passes_filter[place].expand(rows.stop - rows.start)
            self.noted[index] = self._response_rows(index, batch.position_ids[rows], floats, rows, (*flags, passes))

    def _response_rows(
        self, index: int, positions: Tensor, floats: tuple[Tensor, ...], rows: slice, flags: tuple[Tensor, ...]
    ) -> TracedTokens:
        first, count = self._places[index]
        at = positions.cpu().numpy().astype(np.int32)
        order = np.argsort(at)
        order = order[(at[order] >= first) & (at[order] < first + count)]
        values = torch.stack([one[rows].float() for one in floats]).cpu().numpy()[:, order]
        bools = torch.stack(flags).cpu().numpy()[:, order]
        return TracedTokens(at[order], *values, *bools)


def joined(parts: list[TracedTokens]) -> TracedTokens:
    """One trajectory of what several ranks hold of it, in the order of positions."""
    order = np.argsort(np.concatenate([part.positions for part in parts]))
    names = [field.name for field in fields(TracedTokens)]
    return TracedTokens(*(np.concatenate([getattr(part, name) for part in parts])[order] for name in names))


class TraceRoute:
    """The way of traced tokens to rank 0. Making it, and `at_rank_0`, are collective over all ranks."""

    def __init__(self, ranks: ParallelGroups) -> None:
        self._world, self._rank = ranks.world, ranks.rank
        own = ranks.dp.rank() if ranks.reports_loss else None
        self._dp_rank_by_rank = exchange.all_gather_objects(own, ranks.world)

    def at_rank_0(self, tracer: TokenTracer, dp_ranks: Collection[int]) -> dict[int, TracedTokens]:
        """What all ranks have noted of the chosen trajectories, whole, by index, on rank 0; {} elsewhere.

        Args:
            dp_ranks: the data-parallel ranks whose microbatches hold chosen trajectories; the same on every rank.
        """
        sources = [rank for rank, dp_rank in enumerate(self._dp_rank_by_rank) if dp_rank in dp_ranks]
        parts = {0: tracer.noted} if self._rank in sources else {}
        received = exchange.send_objects(parts, sources if self._rank == 0 else [], self._world)
        found: dict[int, list[TracedTokens]] = {}
        for noted in received.values():
            for index, part in noted.items():
                found.setdefault(index, []).append(part)
        return {index: joined(of_one) for index, of_one in sorted(found.items())}
