"""A server's response as a turn: what was aborted with its last token written is whole, and all else can go on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams, check_request
from megatron_fipo.rollout.servers.api import Completion
from megatron_fipo.rollout.servers.completions import turn_of

STOP = 1
REQUEST = GenerationRequest("sample", 0, 0, (5, 6), SamplingParams(max_tokens=4), seed=0)


def aborted(*token_ids: int) -> Completion:
    spans = [("7", 0, len(token_ids))] if token_ids else []
    return Completion(token_ids, [-0.5] * len(token_ids), "abort", spans)


def go_on(request: GenerationRequest, completion: Completion) -> None:
    """What an engine does with the rest of a response."""
    check_request(replace(request, prefix=(*request.prefix, *completion.token_ids)), 10, {STOP})


@pytest.mark.parametrize(
    ("prefix", "token_ids", "expected"),
    [
        ((), (8, STOP), "stop"),
        ((), (8, 9, 8, STOP), "stop"),
        ((), (8, 9, 8, 9), "length"),
        ((2, 3), (8, 9), "length"),
        ((2, 3, 4), (STOP,), "stop"),
    ],
)
def test_what_was_aborted_with_its_last_token_is_whole(
    prefix: tuple[int, ...], token_ids: tuple[int, ...], expected: str
) -> None:
    request, completion = replace(REQUEST, prefix=prefix), aborted(*token_ids)
    turn = turn_of(request, completion, {STOP})
    assert turn.finish_reason == expected
    assert turn.response_ids.tolist() == list(token_ids)
    assert turn.policy_versions == [(7, len(prefix), len(prefix) + len(token_ids))]
    with pytest.raises(ValueError, match=r"there is nothing to continue|leaves nothing after a prefix of 4"):
        go_on(request, completion)  # the control: as an aborted one it would be refused


@pytest.mark.parametrize(("prefix", "token_ids"), [((), ()), ((), (8,)), ((2, 3, 4), ()), ((2,), (8, 9))])
def test_what_was_aborted_before_can_go_on(prefix: tuple[int, ...], token_ids: tuple[int, ...]) -> None:
    request, completion = replace(REQUEST, prefix=prefix), aborted(*token_ids)
    assert turn_of(request, completion, {STOP}).finish_reason == "abort"
    go_on(request, completion)


def test_nothing_else_is_changed() -> None:
    for reason in ("stop", "length"):
        assert turn_of(REQUEST, replace(aborted(8, 9), finish_reason=reason), {STOP}).finish_reason == reason
