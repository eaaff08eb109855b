"""Traces as a page reads them: the numbers are the objective's, and there are not too many."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_fipo.config import FipoConfig
from megatron_fipo.report.credit import read_credit, token_data
from megatron_fipo.traces.files import path_of, write_trace
from megatron_fipo.traces.schema import TracedResponse
from tests.losses import packed_loss


def traced(num_tokens: int = 3, **changes: Any) -> TracedResponse:
    """A response whose numbers are all 0 and whose weights are 1."""
    floats = ("rollout_log_probs", "old_log_probs", "log_probs", "log_prob_shifts", "future_kl", "token_losses")
    zeros = np.zeros(num_tokens, np.float32)
    values: dict[str, Any] = {
        **dict.fromkeys((*floats, "entropies"), zeros),
        **{name: np.ones(num_tokens, np.float32) for name in ("influence_weights", "correction_weights")},
        **dict.fromkeys(("prompt", "response", "reference", "answer", "error", "left_out"), ""),
        **{"step": 0, "update": 1, "num_updates": 2, "source": "chains", "prompt_id": 7, "sample_index": 0},
        **{"created_at_step": 0, "score": 1.0, "reward": 1.0, "advantage": 0.5, "finish_reason": "stop"},
        "token_ids": np.arange(num_tokens, dtype=np.int32),
        "texts": [f"{place};" for place in range(num_tokens)],
        "segments": np.zeros(num_tokens, np.int16),
        "policy_versions": np.zeros(num_tokens, np.int32),
        "participates": np.ones(num_tokens, bool),
        "left_out_tokens": [""] * num_tokens,
    }
    return TracedResponse(**(values | changes))


def decoded(data: dict[str, Any], name: str) -> NDArray[Any]:
    kinds = {"participates": "u1", "in_suffix_sum": "u1", "policy_version": "<i4"}
    return np.frombuffer(base64.b64decode(data["arrays"][name]), kinds.get(name, "<f4"))


# --- tokens -----------------------------------------------------------------------------------------------------------


def page_recurrence(data: dict[str, Any], advantage: float, objective: FipoConfig) -> tuple[list[float], list[float]]:
    """F and f as the page computes them from a response's arrays, in doubles."""
    shifts = decoded(data, "shift").astype(np.float64)
    counts = (decoded(data, "in_suffix_sum") & decoded(data, "participates")).astype(bool)
    future_kl, total = [], 0.0
    for shift, is_counted in zip(shifts[::-1], counts[::-1], strict=True):
        total = (shift if is_counted else 0.0) + 2 ** (-1 / objective.half_life_tokens) * total
        future_kl.insert(0, total)
    weights = [min(max(math.exp(value), objective.influence_min), objective.influence_max) for value in future_kl]
    for place, shift in enumerate(shifts):
        if advantage < 0 and math.exp(shift) > objective.safety_ratio:
            weights[place] = min(max(weights[place], 0.8), 1.0)
    return future_kl, weights


@pytest.mark.parametrize("advantage", [0.7, -0.7])
def test_the_pages_recurrence_gives_what_was_trained_with(advantage: float) -> None:
    """With an environment's tokens, a ratio above the dual clip, unsafe ones, and a token that a correction masked."""
    objective = FipoConfig(half_life_tokens=8.0, influence_min=0.8, influence_max=1.2, safety_ratio=3.0)
    generator = torch.Generator().manual_seed(3)
    shift = torch.randn(64, generator=generator) * 0.05
    shift[10], shift[20], shift[21] = 2.5, 1.2, 1.5  # exp(2.5) > 10; exp(1.2), exp(1.5) > 3
    old = -torch.rand(64, generator=generator)
    mask = torch.ones(64, dtype=torch.bool)
    mask[30:40] = False
    output = packed_loss(
        torch.tensor([0, 64], dtype=torch.int32),
        objective,
        log_probs=(old + shift).requires_grad_(),
        old_log_probs=old,
        advantages=torch.full((64,), advantage),
        response_mask=mask,
    )
    assert output.future_kl is not None
    reasons = ["" if one else "environment" for one in mask.tolist()]
    reasons[5] = "rollout_correction"
    response = traced(
        64,
        advantage=advantage,
        log_prob_shifts=((old + shift) - old).numpy(),
        participates=(((old + shift) - old).exp() <= 10).numpy(),
        future_kl=output.future_kl.numpy(),
        influence_weights=output.influence_weights.numpy(),
        left_out_tokens=reasons,
    )
    data = token_data(response)
    future_kl, weights = page_recurrence(data, advantage, objective)
    np.testing.assert_allclose(future_kl, decoded(data, "future_kl"), atol=1e-6)
    np.testing.assert_allclose(weights, decoded(data, "influence_weight"), atol=1e-6)
    assert (decoded(data, "participates") == 0).sum() == 1
    other, _ = page_recurrence(data, advantage, FipoConfig(half_life_tokens=9.0))
    assert np.abs(np.array(other) - decoded(data, "future_kl")).max() > 1e-3, "another half-life shows"


def test_only_what_has_no_mask_stays_out_of_the_sum() -> None:
    reasons = ["", "environment", "truncated", "too_stale", "sequence_filter", "rollout_correction"]
    data = token_data(traced(6, left_out_tokens=reasons, policy_versions=np.array([3, -1, 3, 2, 3, 3], np.int32)))
    assert decoded(data, "in_suffix_sum").tolist() == [1, 0, 0, 0, 1, 1]
    assert decoded(data, "policy_version").tolist() == [3, -1, 3, 2, 3, 3]
    assert data["left_out"] == {str(place): reasons[place] for place in range(1, 6)}


def test_arrays_are_what_was_traced() -> None:
    names = {
        "shift": "log_prob_shifts",
        "future_kl": "future_kl",
        "influence_weight": "influence_weights",
        "token_loss": "token_losses",
        "entropy": "entropies",
        "rollout_log_prob": "rollout_log_probs",
        "old_log_prob": "old_log_probs",
        "log_prob": "log_probs",
    }
    values = {name: np.array([place, -0.5, np.nan], np.float32) for place, name in enumerate(names.values())}
    data = token_data(traced(3, **values))
    assert data["texts"] == ["0;", "1;", "2;"]
    assert data["segments"] == [0, 0, 0]
    for array, name in names.items():
        np.testing.assert_array_equal(decoded(data, array), values[name])
    assert set(data["arrays"]) == {*names, "participates", "in_suffix_sum", "policy_version"}


# --- groups and their number ------------------------------------------------------------------------------------------


def write(folder: Path, step: int, update: int, prompts: Sequence[int] = (1,), num_tokens: int = 5) -> None:
    """Groups of two responses each."""
    rows = [
        traced(num_tokens, step=step, update=update, prompt_id=prompt, sample_index=1 - index, score=float(index))
        for prompt in prompts
        for index in range(2)
    ]
    write_trace(folder, rows, {})


def shown(folder: Path, max_tokens: int) -> list[tuple[int, int, int]]:
    groups = read_credit(folder, max_tokens, "r0").groups
    return [(group["step"], group["update"], group["prompt_id"]) for group in groups]


def test_a_group_has_its_responses_in_order(tmp_path: Path) -> None:
    reasons = ["", "truncated", ""]
    weights = np.array([1.1, 5.0, 0.8], np.float32)
    rows = [
        traced(3, sample_index=1, score=0.0, left_out_tokens=reasons, influence_weights=weights, answer="7"),
        traced(2, sample_index=0, left_out="sequence_filter", left_out_tokens=["sequence_filter"] * 2),
    ]
    write_trace(tmp_path, rows, {})
    credit = read_credit(tmp_path, 100, "r0")
    (group,) = credit.groups
    first, second = group.pop("responses")
    assert group == {
        **{"step": 0, "update": 1, "num_updates": 2, "source": "chains", "prompt_id": 7, "prompt": "", "reference": ""}
    }
    assert (first["sample_index"], first["is_right"], first["left_out"]) == (0, True, "sequence_filter")
    assert (first["num_left_out"], first["mean_weight_deviation"]) == (2, None)
    assert (second["sample_index"], second["is_right"], second["num_tokens"], second["answer"]) == (1, False, 3, "7")
    assert second["num_left_out"] == 1
    assert second["mean_weight_deviation"] == pytest.approx(0.15)
    assert credit.tokens[first["tokens"]]["texts"] == ["0;", "1;"]
    assert (credit.num_responses, credit.num_shown, credit.num_left_out) == (2, 2, 0)


def test_the_newest_and_the_earliest_steps_come_first(tmp_path: Path) -> None:
    for step in (0, 10, 20, 30, 40):
        for update in (1, 3):
            write(tmp_path, step, update, prompts=(1, 2))
    # A group has 10 tokens; one of each step in turn, of the step's last update.
    assert shown(tmp_path, 10) == [(40, 3, 1)]
    assert shown(tmp_path, 20) == [(0, 3, 1), (40, 3, 1)]
    assert shown(tmp_path, 39) == [(0, 3, 1), (30, 3, 1), (40, 3, 1)]
    assert shown(tmp_path, 60) == [*((step, 3, 1) for step in (0, 10, 20, 30)), (40, 3, 1), (40, 3, 2)]
    everything = read_credit(tmp_path, 200, "r0")
    assert len(everything.groups) == 20
    assert everything.num_left_out == 0
    some = read_credit(tmp_path, 39, "r0")
    assert (some.num_responses, some.num_shown, some.num_left_out) == (40, 6, 34)
    assert sum(len(tokens["texts"]) for tokens in some.tokens.values()) == 30


def test_groups_are_whole_but_for_one_that_alone_is_too_large(tmp_path: Path) -> None:
    write(tmp_path, 3, 0, num_tokens=8)
    credit = read_credit(tmp_path, 10, "r0")
    first, second = credit.groups[0]["responses"]
    assert first["tokens"] is not None
    assert second["tokens"] is None
    assert len(credit.tokens) == 1
    write(tmp_path, 2, 0, num_tokens=2)
    assert shown(tmp_path, 10) == [(3, 0, 1)], "what follows is not broken up"


def test_tokens_keep_their_ids_and_share_none(tmp_path: Path) -> None:
    write(tmp_path, 3, 0, prompts=(1, 2))
    write(tmp_path, 4, 0, prompts=(1, 2))
    first = read_credit(tmp_path, 100, "r0").tokens
    assert len(first) == 8
    assert first.keys() == read_credit(tmp_path, 100, "r0").tokens.keys()
    assert not first.keys() & read_credit(tmp_path, 100, "r1").tokens.keys()


def test_without_traces_there_is_nothing(tmp_path: Path) -> None:
    assert read_credit(tmp_path / "traces", 100, "r0").groups == []


def test_a_damaged_trace_is_named(tmp_path: Path) -> None:
    write(tmp_path, 3, 0)
    path_of(tmp_path, 2, 0).write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"step_000002_update_000\.parquet is no trace"):
        read_credit(tmp_path, 100, "r0")
