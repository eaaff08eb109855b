"""Cut a step's groups into minibatches, and pack samples into microbatches of sequences.

Shapes: T packed tokens, padding included; S sequences; R data-parallel ranks.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.packed_layout import PackedLayout, round_up
from megatron_fipo.rl.trajectory import Trajectory

FILLER = -1
"""Sample index of a sequence that only fills a microbatch: no response token, no loss."""


def split_minibatches(num_groups: int, num_minibatches: int) -> list[range]:
    """Cut a step's groups, whole and in order, into minibatches whose sizes differ by one at most.

    A batch of fewer groups than minibatches (sampling.allow_short_batch) gives one minibatch for each group.

    Returns:
        The groups of each minibatch, by their place in the batch.

    Raises:
        ValueError: if there are no groups or fewer than one minibatch is asked for.
    """
    if num_groups < 1 or num_minibatches < 1:
        raise ValueError(
            f"cannot cut {num_groups} groups into {num_minibatches} minibatches; both must be at least 1 "
            "(train.num_minibatches)."
        )
    count = min(num_minibatches, num_groups)
    bounds = [index * num_groups // count for index in range(count + 1)]
    return [range(start, end) for start, end in itertools.pairwise(bounds)]


def pack(
    lengths: Sequence[int], num_ranks: int, max_tokens: int, pad_multiple: int, microbatch_multiple: int = 1
) -> list[list[list[int]]]:
    """Share out sequences over data-parallel ranks and microbatches, balanced in padded tokens. Deterministic.

    Args:
        lengths: tokens of each sequence, > 0.
        num_ranks: R.
        max_tokens: budget of a microbatch, padding included.
        pad_multiple: each sequence is padded to a multiple of this.
        microbatch_multiple: every rank's number of microbatches is a multiple of this (interleaved pipelines).

    Returns:
        [rank][microbatch] indices into `lengths`, ascending. All ranks have the same number of microbatches; a
        microbatch may be empty where there are fewer sequences than places.

    Raises:
        ValueError: if a sequence alone exceeds the budget, or an argument is below 1.
    """
    smallest = min(num_ranks, max_tokens, pad_multiple, microbatch_multiple, *lengths)
    if smallest < 1:
        raise ValueError(
            f"pack: lengths, num_ranks={num_ranks}, max_tokens={max_tokens}, pad_multiple={pad_multiple} and "
            f"microbatch_multiple={microbatch_multiple} must be at least 1; the smallest is {smallest}."
        )
    padded = [round_up(length, pad_multiple) for length in lengths]
    if padded and max(padded) > max_tokens:
        index = padded.index(max(padded))
        raise ValueError(
            f"sequence {index} has {lengths[index]} tokens, {padded[index]} padded to a multiple of {pad_multiple}, "
            f"but a microbatch holds at most batch.max_tokens_per_microbatch={max_tokens}. Raise that to at least "
            f"{padded[index]}, or lower rollout.max_response_tokens."
        )
    by_rank = _balance(range(len(padded)), padded, num_ranks)
    tightest = [_best_fit(indices, padded, max_tokens) for indices in by_rank]
    needed = max(1, *(len(bins) for bins in tightest))
    num_microbatches = round_up(needed, microbatch_multiple)
    ranks = []
    for indices, fitted in zip(by_rank, tightest, strict=True):
        bins = _balance(indices, padded, num_microbatches)
        if any(sum(padded[index] for index in bin_) > max_tokens for bin_ in bins):
            # Near-full microbatches can defeat the balance, but not best fit, which found room with no more of them.
            bins = fitted + [[] for _ in range(num_microbatches - len(fitted))]
        ranks.append([sorted(bin_) for bin_ in bins])
    return ranks


def build_packed_batch(
    samples: Sequence[Trajectory] | Mapping[int, Trajectory],
    indices: Sequence[int],
    pad_multiple: int,
    pad_token_id: int,
    total_tokens: int | None = None,
    mask_truncated: bool = False,
    version: int | None = None,
    max_staleness_steps: int | None = None,
) -> PackedBatch:
    """Pack samples into one microbatch on the CPU, predictor-aligned: row t predicts the token that follows it.

    A sequence's last row has no label (0, masked). Padding rows hold pad_token_id.

    Args:
        samples: the batch's samples, those to pack at least.
        indices: those to pack, in this order; none gives one filler sequence of pad_multiple tokens.
        pad_multiple: each sequence is padded to a multiple of this.
        pad_token_id: input token of padding and filler.
        total_tokens: pad the whole to this length with one more filler sequence, so that all microbatches of a
            pipeline are alike; a multiple of pad_multiple.
        mask_truncated: leave responses that were cut at the length limit out of the loss.
        version: of the policy that trains on them, from which staleness counts; None where there is none to tell.
        max_staleness_steps: leave tokens out of the loss that are staler; None leaves none out.

    Raises:
        ValueError: if the sequences do not fit into total_tokens or a sample lacks a prompt.
    """
    chosen = [samples[index] for index in indices]
    tokens = [torch.cat([sample.prompt_ids, sample.response_ids]) for sample in chosen]
    batch = pack_tokens(tokens, indices, pad_multiple, pad_token_id, total_tokens)
    if version is not None:
        batch.staleness_steps = torch.full_like(batch.labels, -1, dtype=torch.int32)
    for position, (sample, start) in enumerate(zip(chosen, batch.layout.cu_seqlens_padded.tolist(), strict=False)):
        if not len(sample.prompt_ids):
            raise ValueError(
                f"sample {indices[position]} of prompt {sample.prompt_id} has no prompt tokens: nothing "
                "predicts its first response token. Give the prompt at least one token."
            )
        first = start + len(sample.prompt_ids) - 1
        response = slice(first, first + sample.num_response_tokens)
        batch.rollout_log_probs[response] = sample.rollout_log_probs
        if batch.staleness_steps is not None and version is not None:
            for written_by, begin, end in sample.policy_versions:
                batch.staleness_steps[first + begin : first + end] = version - written_by
        if not (mask_truncated and sample.truncated):
            mask = sample.policy_mask
            if max_staleness_steps is not None and batch.staleness_steps is not None:
                mask = mask & (batch.staleness_steps[response] <= max_staleness_steps)
            batch.response_mask[response] = mask
            batch.advantages[response] = sample.advantage
            batch.response_token_counts[position] = int(mask.sum())
    return batch


def pack_tokens(
    sequences: Sequence[Tensor],
    indices: Sequence[int],
    pad_multiple: int,
    pad_token_id: int,
    total_tokens: int | None = None,
) -> PackedBatch:
    """Pack sequences into one microbatch on the CPU, none of whose tokens is a response's; see `build_packed_batch`.

    Args:
        sequences: int64, each of its own length.
        indices: what `sample_indices` says of each sequence.
    """
    layout = _layout([len(tokens) for tokens in sequences], pad_multiple, total_tokens)
    sample_indices = [*indices, *[FILLER] * (layout.num_sequences - len(sequences))]
    cu_padded, num_tokens = layout.cu_seqlens_padded, layout.num_tokens
    input_ids = torch.full((num_tokens,), pad_token_id, dtype=torch.int64)
    labels = torch.zeros(num_tokens, dtype=torch.int64)
    for tokens, start in zip(sequences, cu_padded.tolist(), strict=False):
        input_ids[start : start + len(tokens)] = tokens
        labels[start : start + len(tokens) - 1] = tokens[1:]
    ids = torch.arange(layout.num_sequences)
    sequence_ids = torch.repeat_interleave(ids, cu_padded.diff(), output_size=num_tokens)
    return PackedBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=torch.arange(num_tokens) - cu_padded[sequence_ids],
        response_mask=torch.zeros(num_tokens, dtype=torch.bool),
        advantages=torch.zeros(num_tokens),
        sequence_ids=sequence_ids,
        layout=layout,
        cu_seqlens_padded=cu_padded.int(),
        response_token_counts=torch.zeros(layout.num_sequences, dtype=torch.int64),
        rollout_log_probs=torch.zeros(num_tokens),
        sample_indices=sample_indices,
    )


def _layout(lengths: Sequence[int], pad_multiple: int, total_tokens: int | None) -> PackedLayout:
    """Lay out padded sequences; a filler follows if there are none, or fewer tokens than total_tokens."""
    padded = [round_up(length, pad_multiple) for length in lengths]
    filler = pad_multiple if not lengths else 0
    if total_tokens is not None:
        filler = total_tokens - sum(padded)
        if filler < 0 or filler % pad_multiple:
            raise ValueError(
                f"{sum(padded)} padded tokens do not fit into total_tokens={total_tokens}: make it as large, and a "
                f"multiple of pad_multiple={pad_multiple}."
            )
    fillers = [filler] if filler else []
    return PackedLayout((*lengths, *fillers), (*padded, *fillers))


def _balance(indices: Sequence[int], sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Longest first, each to the emptiest bin: at most 4/3 of the best possible largest load (Graham 1969)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, bin_) for bin_ in range(num_bins)]
    for index in sorted(indices, key=lambda index: (-sizes[index], index)):
        load, bin_ = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], bin_))
        bins[bin_].append(index)
    return bins


def _best_fit(indices: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Longest first, each to the fullest bin with room: at most 11/9 of the fewest possible bins, plus one."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index in sorted(indices, key=lambda index: (-sizes[index], index)):
        place = bisect.bisect_left(rooms, (sizes[index], -1))
        if place < len(rooms):
            room, bin_ = rooms.pop(place)
        else:
            room, bin_ = capacity, len(bins)
            bins.append([])
        bins[bin_].append(index)
        bisect.insort(rooms, (room - sizes[index], bin_))
    return bins
