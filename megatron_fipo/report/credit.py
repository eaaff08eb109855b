"""Credit per token: the traces of a run as the page reads them.

Of each response there is a head, and apart from it its tokens: texts, and arrays as base64 of little-endian numbers, in
an element of the page that is parsed only when the response is opened. The page's size is bounded by a number of
tokens: groups of the newest step and of the earliest come first, then of those towards the middle, one of each step at
a time, until the next one would be too much.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_fipo.traces.files import read_trace, trace_files
from megatron_fipo.traces.schema import ENVIRONMENT, IN_LOSS, TOO_STALE, TRUNCATED, TracedResponse

OUTSIDE_THE_SUM = (ENVIRONMENT, TRUNCATED, TOO_STALE)
"""Reasons for which a token's response_mask is false, so that its shift does not enter Future-KL. What the sequence
filter and the rollout correction leave out of the loss enters it."""
MAX_PROMPT_CHARACTERS = 20_000


@dataclass
class Credit:
    """What a page shows of a run's traces.

    Attributes:
        groups: responses of one prompt in one update, as JSON objects.
        tokens: of each response that has them, by the id that its head names.
        num_responses: responses in all traces, counted in every update that saw them.
        num_shown: those among the groups.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_responses: int = 0
    num_shown: int = 0

    @property
    def num_left_out(self) -> int:
        return self.num_responses - self.num_shown


def read_credit(folder: Path, max_tokens: int, name: str) -> Credit:
    """Read traces until there are enough tokens.

    A first group that alone is too large is shown with the tokens of as many of its responses as fit.

    Args:
        folder: traces/ of a run; one that is not there has none.
        max_tokens: tokens to show, at most.
        name: what tells the run from others; goes into the ids of tokens.

    Raises:
        ValueError: if a file is damaged, or of a later version.
    """
    files = trace_files(folder)
    credit = Credit(num_responses=sum(_num_rows(path) for path in files.values()))
    rest = max_tokens
    for group in _in_turn(files):
        size = sum(response.num_tokens for response in group)
        if size > rest and credit.groups:
            break
        rest -= _add(credit, group, rest, name)
    credit.groups.sort(key=lambda group: (group["step"], group["update"]))
    return credit


def _in_turn(files: dict[tuple[int, int], Path]) -> Iterator[list[TracedResponse]]:
    """Groups: one of each step in turn, steps from both ends, the last update of a step first."""
    of_steps: dict[int, list[Path]] = {}
    for (step, _), path in sorted(files.items(), reverse=True):
        of_steps.setdefault(step, []).append(path)
    newest_first = list(of_steps)
    order = [newest_first[place // 2 if place % 2 == 0 else -1 - place // 2] for place in range(len(newest_first))]
    waiting = [_groups(of_steps[step]) for step in order]
    while waiting:
        still = []
        for groups in waiting:
            group = next(groups, None)
            if group is not None:
                yield group
                still.append(groups)
        waiting = still


def _groups(paths: Iterable[Path]) -> Iterator[list[TracedResponse]]:
    for path in paths:
        groups: dict[tuple[str, int], list[TracedResponse]] = {}
        for response in read_trace(path).responses:
            groups.setdefault((response.source, response.prompt_id), []).append(response)
        yield from groups.values()


def _num_rows(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no trace, or is damaged: {error}. Delete it to read the others.") from error


def _add(credit: Credit, group: Sequence[TracedResponse], rest: int, name: str) -> int:
    """Add a group with the tokens of the responses that fit. Returns the number of their tokens."""
    first = group[0]
    responses, used = [], 0
    for response in sorted(group, key=lambda one: one.sample_index):
        key = None
        if response.num_tokens <= rest - used:
            key = _key(response, name)
            credit.tokens[key] = token_data(response)
            used += response.num_tokens
        responses.append(_head(response, key))
    credit.groups.append(
        {
            "step": first.step,
            "update": first.update,
            "num_updates": first.num_updates,
            "source": first.source,
            "prompt_id": first.prompt_id,
            "prompt": first.prompt[:MAX_PROMPT_CHARACTERS],
            "reference": first.reference,
            "responses": responses,
        }
    )
    credit.num_shown += len(group)
    return used


def _key(response: TracedResponse, name: str) -> str:
    """An id that a page made anew gives to the same tokens."""
    place = (name, response.step, response.update, response.source, response.prompt_id, response.sample_index)
    return "t" + hashlib.blake2b(repr(place).encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def _head(response: TracedResponse, tokens: str | None) -> dict[str, Any]:
    counted = np.array([reason == IN_LOSS for reason in response.left_out_tokens], dtype=bool)
    deviations = np.abs(response.influence_weights[counted].astype(np.float64) - 1.0)
    return {
        "sample_index": response.sample_index,
        "is_right": response.is_right,
        "score": response.score,
        "reward": response.reward,
        "advantage": response.advantage,
        "answer": response.answer,
        "finish_reason": response.finish_reason,
        "error": response.error,
        "left_out": response.left_out,
        "num_tokens": response.num_tokens,
        "num_left_out": int((~counted).sum()),
        "mean_weight_deviation": float(deviations.mean()) if deviations.size else None,
        "tokens": tokens,
    }


def token_data(response: TracedResponse) -> dict[str, Any]:
    """A response's tokens as a JSON object."""
    in_sum = np.array([reason not in OUTSIDE_THE_SUM for reason in response.left_out_tokens], dtype=np.uint8)
    return {
        "texts": response.texts,
        "left_out": {str(place): reason for place, reason in enumerate(response.left_out_tokens) if reason != IN_LOSS},
        "segments": response.segments.tolist(),
        "arrays": {
            "shift": _encoded(response.log_prob_shifts, "<f4"),
            "participates": _encoded(response.participates, "u1"),
            "in_suffix_sum": _encoded(in_sum, "u1"),
            "future_kl": _encoded(response.future_kl, "<f4"),
            "influence_weight": _encoded(response.influence_weights, "<f4"),
            "token_loss": _encoded(response.token_losses, "<f4"),
            "entropy": _encoded(response.entropies, "<f4"),
            "rollout_log_prob": _encoded(response.rollout_log_probs, "<f4"),
            "old_log_prob": _encoded(response.old_log_probs, "<f4"),
            "log_prob": _encoded(response.log_probs, "<f4"),
            "policy_version": _encoded(response.policy_versions, "<i4"),
        },
    }


def _encoded(values: NDArray[Any], kind: str) -> str:
    return base64.b64encode(values.astype(kind).tobytes()).decode("ascii")
