"""What a trace tells of a trajectory and of each of its tokens, and the parquet schema that holds it.

A file has a row for each trajectory. Columns of lists have an entry for each token of the response, in order; what an
environment wrote is among them. The file's metadata hold the objective's settings, as they were in the run.

Shapes: n tokens of a response.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

FORMAT = 1
"""Version of the schema, in the file's metadata. A reader refuses a later one."""

IN_LOSS = ""
ENVIRONMENT = "environment"
TRUNCATED = "truncated"
TOO_STALE = "too_stale"
SEQUENCE_FILTER = "sequence_filter"
ROLLOUT_CORRECTION = "rollout_correction"
REASONS = (IN_LOSS, ENVIRONMENT, TRUNCATED, TOO_STALE, SEQUENCE_FILTER, ROLLOUT_CORRECTION)
"""Why a token, or a whole response, is not in the loss; empty where it is. An environment wrote it; the response was
cut at its longest and reward.mask_truncated is set; older weights than rollout.max_staleness_steps allows wrote it; the
objective's sequence filter or rollout_correction left it out."""
NO_VERSION = -1


def _column(kind: pa.DataType, meaning: str) -> dict[str, Any]:
    return {"kind": kind, "meaning": meaning}


def _tokens(kind: pa.DataType, meaning: str) -> dict[str, Any]:
    return _column(pa.list_(pa.field("item", kind)), meaning)


@dataclass(eq=False, kw_only=True)
class TracedResponse:
    """One response as one update of a step saw it."""

    step: int = field(metadata=_column(pa.int32(), "the training step"))
    update: int = field(
        metadata=_column(
            pa.int32(), "which of the step's updates saw it, from 0; in the first one every shift is noise"
        )
    )
    num_updates: int = field(metadata=_column(pa.int32(), "updates of the step"))
    source: str = field(metadata=_column(pa.string(), "name of the data source"))
    prompt_id: int = field(metadata=_column(pa.int64(), "position of the prompt in the order of the training data"))
    sample_index: int = field(metadata=_column(pa.int32(), "which of the group's responses"))
    created_at_step: int = field(metadata=_column(pa.int32(), "the step that generated the group"))
    prompt: str = field(metadata=_column(pa.string(), "the prompt with its template"))
    response: str = field(metadata=_column(pa.string(), "the response as the verifier saw it"))
    reference: str = field(metadata=_column(pa.string(), "the right answer; cut where it is long"))
    answer: str = field(metadata=_column(pa.string(), "what the verifier took the response to answer"))
    score: float = field(metadata=_column(pa.float64(), "the verifier's; 1 is right"))
    reward: float = field(metadata=_column(pa.float64(), "after shaping"))
    advantage: float = field(metadata=_column(pa.float32(), "A, of each of its tokens"))
    finish_reason: str = field(metadata=_column(pa.string(), "stop or length"))
    error: str = field(metadata=_column(pa.string(), "why it could not be judged"))
    left_out: str = field(metadata=_column(pa.string(), "why the whole response is not in the loss; empty where it is"))
    token_ids: NDArray[np.int32] = field(metadata=_tokens(pa.int32(), "the tokens"))
    texts: list[str] = field(
        metadata=_tokens(
            pa.string(),
            "the tokens' texts, which join to the whole; a token within a character has none, its last one all",
        )
    )
    segments: NDArray[np.int16] = field(
        metadata=_tokens(pa.int16(), "which segment of the trajectory the token belongs to, from 0")
    )
    policy_versions: NDArray[np.int32] = field(
        metadata=_tokens(pa.int32(), "version of the weights that wrote it; -1: none, or untold")
    )
    rollout_log_probs: NDArray[np.float32] = field(
        metadata=_tokens(pa.float32(), "under the weights that wrote it, by the engine")
    )
    old_log_probs: NDArray[np.float32] = field(
        metadata=_tokens(pa.float32(), "under the policy at the start of the step")
    )
    log_probs: NDArray[np.float32] = field(metadata=_tokens(pa.float32(), "under the policy before this update"))
    log_prob_shifts: NDArray[np.float32] = field(
        metadata=_tokens(pa.float32(), "s = log_probs - old_log_probs, within ± 20")
    )
    participates: NDArray[np.bool_] = field(metadata=_tokens(pa.bool_(), "whether its shift enters Future-KL"))
    future_kl: NDArray[np.float32] = field(metadata=_tokens(pa.float32(), "F; NaN without objective.future_kl"))
    influence_weights: NDArray[np.float32] = field(metadata=_tokens(pa.float32(), "f; 1 without objective.future_kl"))
    token_losses: NDArray[np.float32] = field(
        metadata=_tokens(pa.float32(), "the token's loss; it counts where left_out_tokens is empty")
    )
    correction_weights: NDArray[np.float32] = field(
        metadata=_tokens(pa.float32(), "factor of the loss by objective.rollout_correction")
    )
    entropies: NDArray[np.float32] = field(
        metadata=_tokens(pa.float32(), "entropy of the policy's next token there, nats")
    )
    left_out_tokens: list[str] = field(
        metadata=_tokens(pa.string(), "why the token is not in the loss; empty where it is")
    )

    @property
    def num_tokens(self) -> int:
        """n."""
        return len(self.token_ids)

    @property
    def is_right(self) -> bool:
        """Whether the verifier accepted it in full."""
        return self.score >= 1 and not self.error


def columns() -> Iterator[tuple[str, pa.DataType, str]]:
    """(name, type, meaning) of each column, in order."""
    for one in fields(TracedResponse):
        yield one.name, one.metadata["kind"], one.metadata["meaning"]


def arrow_schema(metadata: dict[str, str]) -> pa.Schema:
    """The schema of a file, each column's meaning with it."""
    return pa.schema(
        [pa.field(name, kind, nullable=False, metadata={"description": meaning}) for name, kind, meaning in columns()],
        metadata=metadata,
    )


TOKEN_COLUMNS = tuple(name for name, kind, _ in columns() if pa.types.is_list(kind))
"""Columns with an entry for each token."""
FLOAT_COLUMNS = tuple(name for name, kind, _ in columns() if pa.types.is_list(kind) and kind.value_type == pa.float32())
"""Those of them that hold real numbers."""
