"""What is known of judged responses without their tokens: 32 bytes each. On these a step's batch is decided."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fipo.rl.trajectory import Group, Trajectory

RESPONSE = np.dtype(
    [
        ("score", "<f8"),  # the verifier's, in [0, 1]; 1 is right
        ("prompt_id", "<u4"),
        ("num_tokens", "<i4"),  # of the response
        ("num_prompt_tokens", "<i4"),
        ("oldest_version", "<i4"),  # of the weights that wrote on it; -1 where none was recorded
        ("leader", "<i2"),  # which of the generating ranks holds its tokens, counted among these
        ("sample_index", "<i2"),
        ("is_truncated", "?"),
        ("has_failed", "?"),  # it could not be judged
        ("unused", "<u2"),
    ]
)
"""One judged response."""
NO_VERSION = -1


@dataclass(eq=False)
class JudgedGroup:
    """All responses to one prompt, without prompt, tokens and text."""

    source: str
    """Name of the data source."""
    verifier: str
    """Name of the verifier that judged them."""
    created_at_step: int
    rows: NDArray[Any]
    """RESPONSE [n], by sample_index."""
    errors: dict[int, str] = field(default_factory=dict)
    """Why a response could not be judged, by sample_index, ascending."""
    parts: dict[int, dict[str, float]] = field(default_factory=dict)
    """Further numbers of a verdict, such as the scores of several verifiers, by sample_index, where there are any."""
    rewards: NDArray[np.float64] | None = None
    """float64 [n], after shaping; set by `assign_rewards`."""
    advantages: NDArray[np.float64] | None = None
    """float64 [n]; set by `assign_advantages`."""

    @classmethod
    def of(cls, group: Group, leader: int = 0) -> JudgedGroup:
        """What is known of a group that a rank holds.

        Args:
            leader: that rank, counted among those that generate.
        """
        rows = np.array([_row(sample, leader) for sample in group.samples], dtype=RESPONSE)
        errors = {sample.sample_index: sample.error for sample in group.samples if sample.error}
        parts = {sample.sample_index: sample.parts for sample in group.samples if sample.parts}
        return cls(group.prompt.source, group.prompt.verifier, group.created_at_step, rows, errors, parts)

    @property
    def prompt_id(self) -> int:
        """Position of the prompt in the order of the training data."""
        return int(self.rows["prompt_id"][0])

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """bool [n]: whether the verifier accepted the answer in full."""
        return np.asarray(self.rows["score"] == 1.0)

    @property
    def judged(self) -> NDArray[np.bool_]:
        """bool [n]: whether the verifier could judge it."""
        return np.asarray(~self.rows["has_failed"])


def _row(sample: Trajectory, leader: int) -> tuple[Any, ...]:
    versions = [version for version, _, _ in sample.policy_versions]
    return (
        sample.accuracy,
        sample.prompt_id,
        sample.num_response_tokens,
        len(sample.prompt_ids),
        min(versions, default=NO_VERSION),
        leader,
        sample.sample_index,
        sample.truncated,
        bool(sample.error),
        0,
    )


def joined(parts: Sequence[JudgedGroup]) -> JudgedGroup:
    """One group of the responses to one prompt that several ranks have, by sample_index."""
    first = parts[0]
    rows = np.concatenate([part.rows for part in parts])
    return JudgedGroup(
        first.source,
        first.verifier,
        first.created_at_step,
        rows[np.argsort(rows["sample_index"])],
        dict(sorted((index, error) for part in parts for index, error in part.errors.items())),
        dict(sorted((index, numbers) for part in parts for index, numbers in part.parts.items())),
    )


Wire = tuple[bytes, Sequence[tuple[str, str, int, int]], Mapping[int, tuple[Any, Any]]]
"""Groups on their way to another rank: all rows, (source, verifier, step, number of rows) of each group, and (errors,
parts) of those that have any."""


def to_wire(groups: Sequence[JudgedGroup]) -> Wire:
    """The groups in a form whose pickle is little more than 32 bytes a response."""
    rows = np.concatenate([np.empty(0, RESPONSE), *(group.rows for group in groups)])
    heads = [(group.source, group.verifier, group.created_at_step, len(group.rows)) for group in groups]
    more = {place: (group.errors, group.parts) for place, group in enumerate(groups) if group.errors or group.parts}
    return rows.tobytes(), heads, more


def from_wire(wires: Sequence[Wire]) -> list[JudgedGroup]:
    """The groups of several ranks, by prompt and source; where ranks have parts of one, the whole of these."""
    parts: dict[tuple[int, str], list[JudgedGroup]] = {}
    for content, heads, more in wires:
        rows, end = np.frombuffer(bytearray(content), RESPONSE), 0
        for place, (source, verifier, step, count) in enumerate(heads):
            first, end = end, end + count
            group = JudgedGroup(source, verifier, step, rows[first:end], *more.get(place, ({}, {})))
            parts.setdefault((group.prompt_id, source), []).append(group)
    return [joined(of_prompt) if len(of_prompt) > 1 else of_prompt[0] for _, of_prompt in sorted(parts.items())]


def to_bytes(groups: Sequence[JudgedGroup]) -> bytes:
    """`to_wire` as bytes that can be read without trusting who wrote them: JSON, a line feed, and the rows."""
    rows, heads, more = to_wire(groups)
    listed = [[place, list(errors.items()), list(parts.items())] for place, (errors, parts) in more.items()]
    return json.dumps([heads, listed]).encode() + b"\n" + rows


def from_bytes(words: Sequence[bytes]) -> list[JudgedGroup]:
    """`from_wire` of what `to_bytes` gave.

    Raises:
        ValueError: if it is something else.
    """
    wires: list[Wire] = []
    for word in words:
        head, _, rows = word.partition(b"\n")
        heads, listed = json.loads(head)
        more = {place: (dict(map(tuple, errors)), dict(map(tuple, parts))) for place, errors, parts in listed}
        wires.append((rows, heads, more))
    return from_wire(wires)


PLANNED = np.dtype(
    [
        ("prompt_id", "<u4"),
        ("num_tokens", "<i4"),  # of prompt and response
        ("advantage", "<f4"),
        ("leader", "<i2"),
        ("sample_index", "<i2"),
    ]
)
"""One response that a step trains on: 16 bytes."""


def plan_of(groups: Sequence[JudgedGroup]) -> NDArray[Any]:
    """What a step trains on, in the order of its batch: PLANNED [all responses of all groups]."""
    plan = np.empty(sum(len(group.rows) for group in groups), PLANNED)
    end = 0
    for group in groups:
        first, end = end, end + len(group.rows)
        for name in ("prompt_id", "leader", "sample_index"):
            plan[name][first:end] = group.rows[name]
        plan["num_tokens"][first:end] = group.rows["num_tokens"] + group.rows["num_prompt_tokens"]
        plan["advantage"][first:end] = group.advantages
    return plan
