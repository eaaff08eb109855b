"""What a step of rollouts consists of: prompts, trajectories in segments, and the groups that they form.

A trajectory is one response to a prompt. The policy writes it in one segment; in several where its weights changed
meanwhile or where it was resumed; and where an environment answers, such as a tool, segments of the environment's lie
between. Shapes: P prompt tokens, R tokens of the whole response, n tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_fipo.verifiers.verdict import Verdict


@dataclass(frozen=True)
class Prompt:
    """A question, ready for the rollout engine."""

    prompt_id: int
    """Position in the endless, deterministic order of the training data; unique within a run."""
    source: str
    """Name of the data source."""
    text: str
    """The text that was tokenized."""
    token_ids: tuple[int, ...]
    """Prompt tokens, template included."""
    verifier: str
    """Name of the verifier that judges its responses."""
    reference: Any
    """What the verifier compares with: an answer string, or a task entry; must be picklable."""
    row: dict[str, Any] | None = None
    """The data's row, on its way to a verifier that asks for it; None for all others, and once it is judged."""


class SampleKey(NamedTuple):
    """Which trajectory of a step it is."""

    source: str
    """Name of the data source."""
    prompt_id: int
    sample_index: int
    """Position within the group, 0 … num_samples_per_prompt - 1."""


@dataclass
class Segment:
    """A stretch of a response that one author wrote.

    Raises:
        ValueError: if the policy's segment lacks its tokens' log-probs, or an environment's has some.
    """

    token_ids: Tensor
    """int64 [n]."""
    author: Literal["policy", "environment"] = "policy"
    log_probs: Tensor | None = None
    """float32 [n] under the policy that wrote it, at its temperature and before top-p; None for an environment's."""
    policy_version: int | None = None
    """Version of the weights that wrote it; None for an environment's segment, and where no version was recorded."""

    def __post_init__(self) -> None:
        if self.author == "environment":
            if self.log_probs is not None:
                raise ValueError("an environment's segment has log-probs; only what the policy wrote may have them")
        elif self.log_probs is None or len(self.log_probs) != len(self.token_ids):
            num_log_probs = "none" if self.log_probs is None else len(self.log_probs)
            raise ValueError(f"a policy's segment of {len(self.token_ids)} tokens has {num_log_probs} log-probs")


def policy_segments(
    token_ids: Tensor, log_probs: Tensor, policy_versions: Sequence[tuple[int, int, int]] = (), start: int = 0
) -> list[Segment]:
    """Cut what the policy wrote in one go at the tokens where its weights changed.

    Args:
        token_ids: int64 [n].
        log_probs: float32 [n].
        policy_versions: (version, first token, one past the last), which cover the tokens in order; none where nobody
            recorded them.
        start: position of the first token in the response, from which the spans count.

    Raises:
        ValueError: if the spans do not cover the tokens.
    """
    if not policy_versions:
        return [Segment(token_ids, "policy", log_probs)] if len(token_ids) else []
    segments, end = [], start
    for version, first, stop in policy_versions:
        if first != end or stop < first:
            break
        place, end = slice(first - start, stop - start), stop
        segments.append(Segment(token_ids[place], "policy", log_probs[place], version))
    if end != start + len(token_ids) or len(segments) != len(policy_versions):
        raise ValueError(
            f"spans of policy versions must cover the {len(token_ids)} tokens from {start} on; these are "
            f"{list(policy_versions)}"
        )
    return segments


class OfSegments:
    """Properties that are derived from the segments of a response, or of a part of one."""

    segments: list[Segment]

    @property
    def start(self) -> int:
        """Position of the first segment's first token in the response."""
        return 0

    @property
    def response_ids(self) -> Tensor:
        """int64 [R], the end-of-sequence token included where it was sampled."""
        return _joined([segment.token_ids for segment in self.segments], torch.int64)

    @property
    def rollout_log_probs(self) -> Tensor:
        """float32 [R], 0 where an environment wrote."""
        return _joined(
            [
                torch.zeros(len(segment.token_ids)) if segment.log_probs is None else segment.log_probs
                for segment in self.segments
            ],
            torch.float32,
        )

    @property
    def policy_mask(self) -> Tensor:
        """bool [R], True where the policy wrote."""
        return _joined(
            [torch.full((len(segment.token_ids),), segment.author == "policy") for segment in self.segments], torch.bool
        )

    @property
    def policy_versions(self) -> list[tuple[int, int, int]]:
        """(policy_version, first token, one past the last) of each of the policy's segments, where it was recorded."""
        spans, end = [], self.start
        for segment in self.segments:
            first, end = end, end + len(segment.token_ids)
            if segment.policy_version is not None:
                spans.append((segment.policy_version, first, end))
        return spans


@dataclass
class Trajectory(OfSegments):
    """One response to a prompt, from its first token to its verdict."""

    key: SampleKey
    prompt_ids: Tensor
    """int64 [P]."""
    segments: list[Segment]
    """The response's segments, in the order in which they were written."""
    finish_reason: str
    """stop, length or abort."""
    response_text: str = ""
    accuracy: float = 0.0
    """Verifier's score in [0, 1]; 1 is correct."""
    answer: str = ""
    """Final answer as the verifier extracted it; empty if none. cons@k votes on it."""
    error: str = ""
    """Why the verifier could not judge it; the whole group is dropped then."""
    parts: dict[str, float] = field(default_factory=dict)
    """Scores of several verifiers, and other numbers of the verdict, by name; metrics show their means."""
    advantage: float | Tensor = 0.0
    """One advantage for all tokens, or float32 [R], one for each."""

    @classmethod
    def of_response(
        cls,
        prompt_id: int,
        sample_index: int,
        prompt_ids: Tensor,
        response_ids: Tensor,
        rollout_log_probs: Tensor,
        finish_reason: str,
        policy_versions: Sequence[tuple[int, int, int]] = (),
        *,
        source: str = "",
        **others: Any,
    ) -> Trajectory:
        """A trajectory that the policy wrote at one go.

        Args:
            policy_versions: see `policy_segments`.
            source: name of the data source.
            others: fields from response_text on.
        """
        segments = policy_segments(response_ids, rollout_log_probs, policy_versions)
        return cls(SampleKey(source, prompt_id, sample_index), prompt_ids, segments, finish_reason, **others)

    @property
    def prompt_id(self) -> int:
        """See `SampleKey`."""
        return self.key.prompt_id

    @property
    def sample_index(self) -> int:
        """See `SampleKey`."""
        return self.key.sample_index

    @property
    def num_response_tokens(self) -> int:
        """R."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def num_policy_tokens(self) -> int:
        """Response tokens that the policy wrote."""
        return sum(len(segment.token_ids) for segment in self.segments if segment.author == "policy")

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt_ids) + self.num_response_tokens

    @property
    def truncated(self) -> bool:
        """Whether the response was cut at the length limit."""
        return self.finish_reason == "length"

    def judged(self, verdict: Verdict) -> None:
        """Take over what a verifier says of it."""
        self.accuracy, self.answer, self.error = verdict.score, verdict.answer, verdict.error
        self.parts = dict(verdict.parts)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for checkpoints."""
        return {
            **{name: getattr(self, name) for name in ("prompt_id", "sample_index", *_PLAIN_FIELDS)},
            "response_ids": self.response_ids,
            "rollout_log_probs": self.rollout_log_probs,
            "segments": outline(self.segments),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], source: str) -> Trajectory:
        """The trajectory whose `state_dict` this is, or that a version without segments saved."""
        return cls(
            key=SampleKey(source, state["prompt_id"], state["sample_index"]),
            segments=segments_from(state, state["response_ids"], state["rollout_log_probs"]),
            **{name: state[name] for name in _PLAIN_FIELDS if name in state},
        )


_PLAIN_FIELDS = tuple(entry.name for entry in fields(Trajectory) if entry.name not in ("key", "segments"))


def outline(segments: Sequence[Segment]) -> list[tuple[str, int, int | None]]:
    """(author, number of tokens, policy version) of each segment."""
    return [(segment.author, len(segment.token_ids), segment.policy_version) for segment in segments]


def segments_from(record: Mapping[str, Any], response_ids: Tensor, rollout_log_probs: Tensor) -> list[Segment]:
    """Segments from what was recorded of them.

    Args:
        record: with the key segments, an `outline`; or, as a version without segments wrote it, policy_versions.
        response_ids: int64 [R], of all segments.
        rollout_log_probs: float32 [R], 0 where an environment wrote.

    Raises:
        LookupError, TypeError, ValueError: if the record does not fit the tokens.
    """
    if "segments" not in record:
        return policy_segments(response_ids, rollout_log_probs, record["policy_versions"])
    segments, end = [], 0
    for author, num_tokens, version in record["segments"]:
        place, end = slice(end, end + num_tokens), end + num_tokens
        log_probs = None if author == "environment" else rollout_log_probs[place]
        segments.append(Segment(response_ids[place], author, log_probs, version))
    if end != len(response_ids):
        raise ValueError(f"segments of {end} tokens in all were recorded with a response of {len(response_ids)} tokens")
    return segments


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=dtype)


@dataclass
class Group:
    """All responses to one prompt, in order of sample_index."""

    prompt: Prompt
    samples: list[Trajectory]
    created_at_step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for checkpoints."""
        return {
            "prompt": asdict(self.prompt),
            "samples": [sample.state_dict() for sample in self.samples],
            "created_at_step": self.created_at_step,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Group:
        """The group whose `state_dict` this is."""
        prompt = Prompt(**state["prompt"])
        samples = [Trajectory.from_state_dict(sample, prompt.source) for sample in state["samples"]]
        return cls(prompt, samples, state["created_at_step"])
