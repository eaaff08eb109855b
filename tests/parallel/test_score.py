"""The actor's log-probs of any sequences are those of transformers, the same on every rank of every layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import token_values
from tests.models import load
from tests.parallel.layouts import Case, config_of, layout, save_models
from tests.parallel.ranks import run_ranks

P = ParallelSection
LAYOUTS = {
    2: [P(cp=2), P(tp=2, sequence_parallel=True), P(pp=2), P()],
    4: [P(pp=2, virtual_pp=2), P(tp=2, pp=2)],
}
TEMPERATURES = (1.0, 0.5)
"""Training samples at neither."""


def _sequences() -> list[list[int]]:
    """Of 1 … 40 tokens, more than one microbatch of 64 holds."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 20, (length,), generator=generator).tolist() for length in (13, 1, 40, 2, 25, 40, 7)]


Scores = list[list[float]]


def _scores(folder: str, layouts: Sequence[ParallelSection]) -> dict[str, list[Scores]]:
    """At each temperature in each layout; and with a mistake where ranks hold parts of a sequence."""
    found: dict[str, list[Scores]] = {"right": [], "unsorted": []}
    for parallel in layouts:
        config = config_of(Case("any", parallel=parallel, max_tokens=64), folder)
        with layout(parallel) as ranks:
            actor = Actor(config, ranks)
            found["right"] += [actor.score(_sequences(), temperature) for temperature in TEMPERATURES]
            with mock.patch.object(token_values.Tensor, "argsort", lambda positions: torch.arange(len(positions))):
                found["unsorted"].append(actor.score(_sequences()))
            assert actor.score([]) == []
            with pytest.raises(ValueError, match="sequence 1 of 2 has no token"):
                actor.score([[2, 3], []])
            with pytest.raises(ValueError, match=r"but a microbatch holds at most batch.max_tokens_per_microbatch=64"):
                actor.score([[2] * 65])
    return found


def _by_transformers(folder: str, temperature: float) -> Scores:
    reference, found = load(Path(folder)), []
    with torch.no_grad():
        for sequence in _sequences():
            tokens = torch.tensor(sequence)
            log_p = torch.log_softmax(reference(tokens[None]).logits[0, :-1] / temperature, -1)
            found.append(log_p.gather(-1, tokens[1:, None]).squeeze(-1).tolist())
    return found


def _is_close(found: Scores, expected: Scores) -> bool:
    assert [len(scores) for scores in found] == [len(scores) for scores in expected]
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return all(abs(ours - theirs) <= 1e-5 for ours, theirs in pairs)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_scores_are_those_of_transformers_on_every_rank(tmp_path: Path, world_size: int) -> None:
    folder, layouts = save_models(tmp_path)["qwen2"], LAYOUTS[world_size]
    expected = [_by_transformers(folder, temperature) for temperature in TEMPERATURES]
    assert not _is_close(expected[0], expected[1]), "the temperature would not show"
    for of_rank in run_ranks(_scores, world_size, folder, layouts, timeout_s=200):
        for found, want in zip(of_rank["right"], expected * len(layouts), strict=True):
            assert _is_close(found, want)
        for parallel, unsorted in zip(layouts, of_rank["unsorted"], strict=True):
            assert _is_close(unsorted, expected[0]) is (parallel.cp == 1), "tokens in a wrong order would not show"
