"""What is left of a run that streamed: the responses in its ledger, and whether each of them is accounted for."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fipo.rollout.ledger_lines import read_lines

NUM_PROMPTS, NUM_SAMPLES = 4, 8
"""Groups of a batch, and responses of a group."""
BOUND = 1
"""rollout.max_staleness_steps, where it is on."""

Place = tuple[int, int]
"""(prompt_id, sample_index)"""


def records(folder: Path, step: int) -> list[dict[str, Any]]:
    """Every response that a step has had judged, with the rank that generated it, in order of rank and time."""
    return _responses(folder, step, "rank")


def last_recorded_step(folder: Path) -> int:
    """The last step that has had any response judged."""
    steps = [int(path.name.removeprefix("step_")) for path in (folder / "rollouts").glob("step_*")]
    return max(step for step in steps if records(folder, step))


def carried(folder: Path, step: int) -> list[dict[str, Any]]:
    """Every response that a step took over, with the rank that did."""
    return _responses(folder, step, "carried")


def _responses(folder: Path, step: int, kind: str) -> list[dict[str, Any]]:
    return [
        record | {"rank": int(file.stem[-3:])}
        for file in sorted(_folder(folder, step).glob(f"{kind}_*.jsonl"))
        for record in read_lines(file)
        if "prompt_id" in record
    ]


def plan(folder: Path, step: int) -> tuple[list[int], int] | None:
    """Prompts that a step trains on, and the next step's first one, as the ledger has them."""
    path = _folder(folder, step) / "plan.json"
    if not path.exists():
        return None
    (found,) = read_lines(path)
    return found["prompt_ids"], found["next_prompt"]


def _folder(folder: Path, step: int) -> Path:
    return folder / "rollouts" / f"step_{step:06d}"


def place_of(record: dict[str, Any]) -> Place:
    """Whose response it is."""
    return record["prompt_id"], record["sample_index"]


def token_ids(record: dict[str, Any]) -> list[int]:
    """The response's tokens."""
    return _numbers(record["response_ids"], "<i4").tolist()


def log_probs(record: dict[str, Any]) -> NDArray[np.float32]:
    """The log-probs with which they were drawn."""
    return _numbers(record["rollout_log_probs"], "<f4")


def _numbers(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype)


def first_with_a_signal(recorded: Sequence[dict[str, Any]], first_prompt: int) -> tuple[list[int], int]:
    """What a step must train on: the first groups of right and wrong responses, in the order of prompts."""
    by_prompt: dict[int, list[float]] = {}
    for one in recorded:
        by_prompt.setdefault(one["prompt_id"], []).append(one["accuracy"])
    chosen: list[int] = []
    prompt = first_prompt
    while len(chosen) < NUM_PROMPTS:
        scores = by_prompt[prompt]
        assert len(scores) == NUM_SAMPLES, f"prompt {prompt} is used with {len(scores)} responses"
        if len({score == 1.0 for score in scores}) == 2:
            chosen.append(prompt)
        prompt += 1
    return chosen, prompt


@dataclass
class Account:
    """What became of the responses of a run that carries them over, counted.

    Attributes:
        num_used: responses to prompts that a step has used up.
        num_went_on: those that a step has begun and the next one has finished.
        num_carried_tokens: tokens of theirs that were there already.
        num_judged_before: responses that a step took over judged.
        num_dropped: responses that were too stale to be taken over.
        lost: recorded responses that no step used or took over, by step.
    """

    num_used: int = 0
    num_went_on: int = 0
    num_carried_tokens: int = 0
    num_judged_before: int = 0
    num_dropped: int = 0
    lost: dict[int, set[Place]] = field(default_factory=dict)


def account_for(folder: Path, num_steps: int) -> Account:
    """Follow every response of a run from step to step.

    Each prompt is used up in one step, in order, with all of its responses, each of which is there once: generated in
    this step, or taken over. What is taken over judged is not generated again. What is taken over unfinished goes on
    with the tokens, log-probs and versions that it has.

    Raises:
        AssertionError: if anything is used twice, or out of its order, or changed on its way.
    """
    account, first_prompt = Account(), 0
    left: dict[Place, dict[str, Any]] = {}
    for step in range(num_steps):
        taken = carried(folder, step)
        _expect_one_each(taken)
        live = [one for one in taken if step - one["begun_at_step"] <= BOUND]
        account.num_dropped += len(taken) - len(live)
        judged = [one for one in live if one["is_judged"]]
        for one in (one for one in taken if one["is_judged"]):
            assert _content(one) == _content(left.pop(place_of(one)))
        if left:
            account.lost[step - 1] = set(left)
        generated = records(folder, step)
        _expect_one_each([*judged, *generated])
        by_place = {place_of(one): one for one in generated}
        for one in live:
            whole = by_place.get(place_of(one))
            if not one["is_judged"] and whole is not None:
                _expect_to_go_on(one, whole, step)
                account.num_went_on += one["finish_reason"] == "abort"
                account.num_carried_tokens += len(token_ids(one))
        chosen = first_with_a_signal([*judged, *generated], first_prompt)
        assert plan(folder, step) == chosen
        end = chosen[1]
        account.num_used += (end - first_prompt) * NUM_SAMPLES
        account.num_judged_before += len(judged)
        left = {place_of(one): one for one in (*judged, *generated) if one["prompt_id"] >= end}
        first_prompt = end
    return account


def _expect_one_each(responses: Sequence[dict[str, Any]]) -> None:
    places = [place_of(one) for one in responses]
    assert len(places) == len(set(places)), "a response is there twice"


def _content(record: dict[str, Any]) -> tuple[Any, ...]:
    names = ("response_ids", "rollout_log_probs", "segments", "accuracy", "finish_reason")
    return tuple(record[name] for name in names)


def _expect_to_go_on(before: dict[str, Any], whole: dict[str, Any], step: int) -> None:
    """A response begins with all that was there of it, and the rest is the step's own."""
    if before["finish_reason"] != "abort":  # it was written, and waited for its verdict
        assert token_ids(whole) == token_ids(before)
        assert whole["segments"] == before["segments"]
        return
    num_before = len(token_ids(before))
    assert 0 < num_before < len(token_ids(whole))
    assert token_ids(whole)[:num_before] == token_ids(before)
    assert log_probs(whole)[:num_before].tobytes() == log_probs(before).tobytes()
    num_parts = len(before["segments"])
    assert whole["segments"][:num_parts] == before["segments"]
    versions = [version for _, _, version in whole["segments"]]
    assert versions == sorted(versions), "weights only become newer"
    # With overlap a step begins with the weights of the one before.
    assert {*versions[:num_parts]} <= {step - 2, step - 1}
    assert {*versions[num_parts:]} <= {step - 1, step}
    assert sum(count for _, count, _ in whole["segments"]) == len(token_ids(whole))
