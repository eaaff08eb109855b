"""Trajectories as one flat array of int32, for their way to the ranks that train on them.

Each trajectory is a head, an outline of its segments, and its tokens:

    index, prompt_id, sample_index, finish_reason, P, S     the head
    author, n, policy_version                               for each of S segments
    P prompt tokens, R response tokens, R log-probs         log-probs by their bits, 0 where an environment wrote

That is 8 bytes a response token and 4 a prompt token; verdict and text stay where the response was written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_fipo.rl.trajectory import SampleKey, Segment, Trajectory

_FINISH_REASONS = ("stop", "length", "abort")
_AUTHORS = ("policy", "environment")
_HEAD = 6
_NO_VERSION = -1


def flatten(trajectories: Iterable[tuple[int, Trajectory]]) -> NDArray[np.int32]:
    """Join trajectories, each with an index of the caller's, into an int32 array."""
    parts = [np.empty(0, np.int32)]
    for index, one in trajectories:
        prompt_id = np.uint32(one.prompt_id).view(np.int32)
        finish = _FINISH_REASONS.index(one.finish_reason)
        head = [index, prompt_id, one.sample_index, finish, len(one.prompt_ids), len(one.segments)]
        for segment in one.segments:
            version = _NO_VERSION if segment.policy_version is None else segment.policy_version
            head += [_AUTHORS.index(segment.author), len(segment.token_ids), version]
        log_probs = one.rollout_log_probs.float().numpy().view(np.int32)
        parts += [np.array(head, np.int32), *_ids(one.prompt_ids, one.response_ids), log_probs]
    return np.concatenate(parts)


def _ids(*tensors: torch.Tensor) -> Iterator[NDArray[np.int32]]:
    return (tensor.numpy().astype(np.int32) for tensor in tensors)


def unflatten(flat: NDArray[np.int32], wanted: Collection[int] | None = None) -> Iterator[tuple[int, Trajectory]]:
    """The trajectories of a `flatten`ed array, or of several that were joined, each with its index.

    They come without source, text and verdict.

    Args:
        wanted: indices; what has another one is passed over. None wants all.
    """
    for index, one in _places(flat):
        if wanted is None or index in wanted:
            yield index, _trajectory(flat[one])


def select(flat: NDArray[np.int32], wanted: Collection[int]) -> NDArray[np.int32]:
    """The part of a `flatten`ed array whose trajectories have one of the wanted indices."""
    chosen = [flat[one] for index, one in _places(flat) if index in wanted]
    return np.concatenate([np.empty(0, np.int32), *chosen])


def _places(flat: NDArray[np.int32]) -> Iterator[tuple[int, slice]]:
    """(index, where it is) of each trajectory."""
    place = 0
    while place < len(flat):
        index, _, _, _, num_prompt, num_segments = flat[place : place + _HEAD].tolist()
        outline = place + _HEAD
        tokens = outline + 3 * num_segments
        num_response = int(flat[outline + 1 : tokens : 3].sum())
        start, place = place, tokens + num_prompt + 2 * num_response
        yield index, slice(start, place)


def _trajectory(flat: NDArray[np.int32]) -> Trajectory:
    _, prompt_id, sample_index, finish, num_prompt, num_segments = flat[:_HEAD].tolist()
    tokens = _HEAD + 3 * num_segments
    outline = flat[_HEAD:tokens].reshape(num_segments, 3).tolist()
    num_response = sum(count for _, count, _ in outline)
    prompt_ids, response_ids, bits = np.split(flat[tokens:], [num_prompt, num_prompt + num_response])
    segments = list(_segments(outline, response_ids, bits.view(np.float32)))
    key = SampleKey("", prompt_id & 0xFFFFFFFF, sample_index)
    return Trajectory(key, torch.from_numpy(prompt_ids).long(), segments, _FINISH_REASONS[finish])


def _segments(outline: list[Any], response_ids: NDArray[np.int32], log_probs: NDArray[np.float32]) -> Iterator[Segment]:
    end = 0
    for author, count, version in outline:
        first, end = end, end + count
        token_ids = torch.from_numpy(response_ids[first:end]).long()
        if _AUTHORS[author] == "environment":
            yield Segment(token_ids, "environment")
        else:
            own = torch.from_numpy(log_probs[first:end].copy())
            yield Segment(token_ids, "policy", own, None if version == _NO_VERSION else version)
