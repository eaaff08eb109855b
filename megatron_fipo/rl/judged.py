"""What a user should hear about judged groups: which could not be judged, and scores that count for nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.verifiers.registry import shown_name

_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|[0-9]+(?:\.[0-9]+)?")
"""Parts that may differ between errors of one kind: quoted text and numbers."""


@dataclass(frozen=True)
class Failures:
    """Groups that could not be judged, all for one kind of reason. Its text is a sentence.

    Attributes:
        kind: the same for reasons that differ in a number or a quoted text only.
        first: place and reason of the first one.
        count: groups.
    """

    kind: str
    first: str
    count: int

    def __str__(self) -> str:
        if self.count == 1:
            return f"dropped a group that could not be judged: {self.first}"
        return f"dropped {self.count} groups that could not be judged, for one kind of reason; first: {self.first}"

    def told(self) -> str:
        """The reason with the count, for a list."""
        return self.first if self.count == 1 else f"{self.count} groups, first: {self.first}"


def failures_by_kind(groups: Iterable[JudgedGroup]) -> list[Failures]:
    """Groups with an error by the kind of their first one, kinds in order of appearance."""
    found: dict[str, Failures] = {}
    for group in groups:
        error = next(iter(group.errors.values()), "")
        if not error:
            continue
        kind = f"{group.source}: {_VARYING.sub('…', error)}"
        if kind in found:
            found[kind] = Failures(kind, found[kind].first, found[kind].count + 1)
        else:
            found[kind] = Failures(kind, f"{group.source} prompt {group.prompt_id}: {error}", 1)
    return list(found.values())


@dataclass(frozen=True)
class GradedScores:
    """Scores strictly between 0 and 1 of one source's responses. Its text is a sentence.

    Attributes:
        source: the data source's name.
        verifier: the verifier that gave the scores.
        count: how many such scores there are.
        num_responses: how many of the source's responses were judged.
        num_right: how many have the score 1.
        largest: the largest score below 1.
        means: the mean score of each verifier, by name, where there are several.
    """

    source: str
    verifier: str
    count: int
    num_responses: int
    num_right: int
    largest: float
    means: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {mean:.3g}" for name, mean in self.means)
        each = f" Means by verifier: {parts}; a response is right where each that counts gives 1." if parts else ""
        return (
            f"{self.count} of {self.num_responses} responses of source {self.source} were given a score between 0 "
            f"and 1 by verifier {shown_name(self.verifier)}, the largest {self.largest:.3g}; {self.num_right} were "
            f"given 1. Only 1 counts as right: a lower score is rewarded as a wrong answer.{each}"
        )


def graded_scores(groups: Sequence[JudgedGroup]) -> list[GradedScores]:
    """Scores strictly between 0 and 1, by source; sources without any are left out."""
    found = []
    for source in dict.fromkeys(group.source for group in groups):
        members = [group for group in groups if group.source == source]
        scores = np.concatenate([group.rows["score"][group.judged] for group in members])
        graded = scores[(scores > 0.0) & (scores < 1.0)]
        if not len(graded):
            continue
        found.append(
            GradedScores(
                source,
                members[0].verifier,
                len(graded),
                len(scores),
                int((scores == 1.0).sum()),
                float(graded.max()),
                tuple((name, sum(values) / len(values)) for name, values in parts_of(members).items()),
            )
        )
    return found


def parts_of(groups: Iterable[JudgedGroup]) -> dict[str, list[float]]:
    """Every value of each part of the verdicts that were given, by its name, in order of first appearance."""
    values: dict[str, list[float]] = {}
    for group in groups:
        for sample_index, parts in group.parts.items():
            for name, value in parts.items() if sample_index not in group.errors else ():
                values.setdefault(name, []).append(value)
    return values
