"""Ranks that generate nothing start no verifiers, keep no ledger and open none; the run is the same."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_fipo.rollout.engine import ALL_PROMPTS
from tests.end_to_end.runs import metric_lines, train

SAME = ("rollout/response_tokens/mean", "rollout/accuracy/mean", "reward/mean", "rollout/generated_groups")


class _Unwanted:
    """What a rank that generates nothing must not make."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        raise AssertionError("a rank that generates nothing has made it")


def _only_the_first_rank_generates() -> None:
    """As where servers belong to one rank of a node."""
    from megatron_fipo.rollout.ledger import RolloutLedger
    from megatron_fipo.run import parts

    is_first = os.environ["RANK"] == "0"
    parts.share_of = lambda config, ranks: ALL_PROMPTS if is_first else None
    if not is_first:
        parts.VerifierPool = _Unwanted  # type: ignore[misc, assignment]
        RolloutLedger._open = _Unwanted  # type: ignore[method-assign, assignment]


def test_ranks_without_a_share_wait(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, "train.num_steps=2", prepare=_only_the_first_rank_generates, expected=0)
    for line, expected in zip(metric_lines(folder)[:3], metric_lines(straight)[:3], strict=True):
        assert {name: line.get(name) for name in SAME} == {name: expected.get(name) for name in SAME}


def test_both_ranks_would_have_made_them(tmp_path: Path) -> None:
    """The control: with shares for both, the second rank is stopped by what it must not make."""
    outcomes = train(tmp_path / "run", "train.num_steps=1", prepare=_both_generate)
    assert outcomes[1].code != 0
    assert "a rank that generates nothing has made it" in outcomes[1].said


def _both_generate() -> None:
    from megatron_fipo.rollout.generation import share_of
    from megatron_fipo.run import parts

    _only_the_first_rank_generates()
    parts.share_of = share_of
