"""Users' own verifiers: what a function may take and return, how it is found, and what is refused with a message."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fipo.verifiers import asking, registry
from megatron_fipo.verifiers.inspection import inspect_verifiers
from megatron_fipo.verifiers.judging import judge
from megatron_fipo.verifiers.own_function import OwnFunction, SignatureError
from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.returned import NoVerdictError, as_verdict
from megatron_fipo.verifiers.verdict import NO_VERDICT, RAISED, JobVerifier, Verdict, VerifierJob

JOB = VerifierJob("own", "4", "four", "length", "2+2=", {"level": 3})


def ask(function: Callable[..., Any]) -> Verdict:
    return OwnFunction("judges:own", function).judge(JOB, 10.0)


# ---------------------------------------------------------------------------------------------------- what it returns


@pytest.mark.parametrize(
    ("returned", "score"),
    [
        (1.0, 1.0), (0.25, 0.25), (1, 1.0), (0, 0.0), (True, 1.0), (False, 0.0), (np.float32(0.5), 0.5),
        (np.int64(1), 1.0), (np.bool_(True), 1.0), (np.array(0.5), 0.5), (torch.tensor(0.5), 0.5),
    ],
)  # fmt: skip
def test_a_number_is_the_score(returned: Any, score: float) -> None:
    assert as_verdict(returned) == Verdict(score)
    assert type(as_verdict(returned).score) is float
    assert as_verdict({"score": returned}) == Verdict(score)


def test_a_dict_holds_score_answer_error_and_further_numbers() -> None:
    assert as_verdict({"score": 1, "answer": 42, "length": np.int64(7)}) == Verdict(1.0, "42", "", {"length": 7.0})
    assert as_verdict({"score": 0.5, "answer": None, "error": ""}) == Verdict(0.5)
    assert as_verdict({"error": "no table in it", "answer": "x"}) == Verdict(0.0, "x", "no table in it")
    verdict = Verdict(1.0, "7")
    assert as_verdict(verdict) is verdict


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None. .* Does every path through it end in a return"),
        ([1.0], r"returned a list \(\[1.0\]\). .* one response and not a batch"),
        (np.array([1.0]), "returned a ndarray .* one response and not a batch"),
        ("1.0", "returned a str .* Return the number, not its text"),
        (Decimal(1), "returned a Decimal"),
        (1j, "returned a complex"),
        (-1.0, r"returned the score -1.0; a score lies in \[0, 1\]. Only 1 is right; .* return \(reward \+ 1\) / 2"),
        (1.5, "returned the score 1.5; .* divide by the largest score"),
        (-(10**400), "returned the score -1000.{70,80}; a score"),
        (math.nan, "returned the score nan; .* Return 0"),
        (math.inf, "returned the score inf"),
        ({}, "returned a dict without 'score'; it has nothing"),
        ({"scores": 1.0}, "without 'score'; it has scores. Is 'scores' meant to be 'score'"),
        ({"score": "1"}, "whose 'score' is a str"),
        ({"score": -1}, "returned the score -1; "),
        ({"score": 1, "note": "short"}, "whose 'note' is a str .'short'.. .* hold finite numbers. Leave it out"),
        ({"score": 1, "x": math.nan}, "whose 'x' is a float"),
    ],
)  # fmt: skip
def test_what_is_no_verdict_is_refused_with_value_rule_and_remedy(returned: Any, message: str) -> None:
    with pytest.raises(NoVerdictError, match=message):
        as_verdict(returned)


# ------------------------------------------------------------------------------------------------------ what it takes


def test_arguments_go_by_name() -> None:
    seen: list[Any] = []

    def present(response_text: str, reference: Any, finish_reason: str) -> float:
        seen.append((response_text, reference, finish_reason))
        return 1.0

    def turned_round(finish_reason: str, answer: Any, response: str) -> float:
        return present(response, answer, finish_reason)

    def of_trl(completion: str, *, ground_truth: Any, prompt: str, row: dict[str, Any], strict: bool = True) -> float:
        seen.append((completion, ground_truth, prompt, row, strict))
        return 1.0

    def of_verl(solution_str: str, ground_truth: Any) -> float:
        seen.append((solution_str, ground_truth))
        return 1.0

    for function in (present, turned_round, of_trl, of_verl):
        assert ask(function).correct
    assert seen == [("4", "four", "length")] * 2 + [("4", "four", "2+2=", {"level": 3}, True), ("4", "four")]


def test_keywords_get_everything_else() -> None:
    def takes_all(response: str, **kwargs: Any) -> dict[str, Any]:
        assert "response" not in kwargs
        assert kwargs["completion"] == response == "4"
        return {
            "score": 1,
            "answer": json.dumps([kwargs[name] for name in ("answer", "prompt", "finish_reason", "row")]),
        }

    assert json.loads(ask(takes_all).answer) == ["four", "2+2=", "length", {"level": 3}]


@pytest.mark.parametrize(
    "function",
    [
        lambda text, truth, reason: [text, truth, reason] == ["4", "four", "length"],
        lambda text, truth, reason, more=1: [text, truth, reason, more] == ["4", "four", "length", 1],
        lambda text, reference, finish_reason: [text, reference, finish_reason] == ["4", "four", "length"],
        lambda response_text, reference, finish_reason, /: [response_text, finish_reason] == ["4", "length"],
        lambda *arguments: list(arguments) == ["4", "four", "length"],
        lambda *arguments, **more: [*arguments, more] == ["4", "four", "length", {}],
    ],
)
def test_three_may_go_by_position(function: Callable[..., bool]) -> None:
    assert ask(function).correct


def test_a_coroutine_function_is_awaited() -> None:
    async def asynchronous(response: str) -> bool:
        return response == "4"

    assert ask(asynchronous).correct


def test_only_who_asks_for_rows_is_given_them() -> None:
    assert OwnFunction("judges:f", lambda response, row: 1).wants_row
    assert OwnFunction("judges:f", lambda response, **more: 1).wants_row
    assert not OwnFunction("judges:f", lambda response, prompt: 1).wants_row
    assert not OwnFunction("judges:f", lambda a, b, c: 1).wants_row


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda respones, reference: 1, "takes 'respones', which .* Did you mean 'response.* for"),
        (lambda completions, prompts: 1, "'completion' for 'completions'. Did you mean 'prompt' for 'prompts'"),
        (lambda data_source, solution_str, ground_truth, extra_info=None: 1, "takes 'data_source'"),
        (lambda response, answer, difficulty: 1, "takes 'difficulty'"),
        (lambda response, reference, promt: 1, "takes 'promt', .* Did you mean 'prompt'"),
        (lambda a, b: 1, "takes 'a', 'b', .* response_text or response or completion or solution_str, reference or"),
        (lambda a, b, c, d: 1, "takes 'a', 'b', 'c', 'd'"),
        (lambda a, b, c, *, d: 1, "takes 'a', 'b', 'c', 'd'"),
        (lambda text, reference, /: 1, "Parameters before a '/' are passed by position"),
        (lambda: 1, "takes nothing that could be judged"),
    ],
)  # fmt: skip
def test_a_signature_that_cannot_be_called_is_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(SignatureError, match=message):
        OwnFunction("judges:f", function)


def test_a_slip_in_an_optional_parameter_is_a_doubt() -> None:
    assert (
        "'promt' is never given anything. Did you mean 'prompt'"
        in OwnFunction("j:f", lambda response, promt="": 1).hint
    )
    assert OwnFunction("j:f", lambda response, strict=True: 1).hint == ""


# -------------------------------------------------------------------------------------------------- how it is found

JUDGES = """
import sys
def verify(response, reference): return response == reference
def batches(completions): return 1.0
def raises(response): raise KeyError(response)
def minus(response): return -1.0
class Judge: pass
number = 3
print("a module that prints")
"""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory with a module `judges`, and a configuration's folder with a module `beside`."""
    (tmp_path / "here").mkdir()
    (tmp_path / "configuration").mkdir()
    (tmp_path / "here" / "judges.py").write_text(JUDGES)
    (tmp_path / "here" / "broken.py").write_text("def f(:\n")
    (tmp_path / "here" / "fails.py").write_text("raise OSError('no such GPU')\n")
    (tmp_path / "here" / "leaves.py").write_text("import os\nos._exit(5)\n")
    (tmp_path / "here" / "needs.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "configuration" / "beside.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv(registry.FOLDERS_VARIABLE, "")
    registry.also_look_in(tmp_path / "configuration")
    return tmp_path


def test_own_verifiers_are_inspected_in_words_and_never_here(folders: Path) -> None:
    refused = {
        "judgess:verify": f"no module 'judgess'. It was looked for in {folders / 'here'}",
        "judges:verfy": f"{folders / 'here' / 'judges.py'} has no 'verfy'; it has batches, minus, raises, verify. Did "
        "you mean 'judges:verify'?",
        "judges.sub:verify": "there is no module 'judges.sub'",
        "judges:Judge": "is a class. Name an instance of it",
        "judges:number": "is a int, not a function",
        "judges:batches": "takes 'completions', which a verifier is not given. Did you mean 'completion'",
        "broken:f": "importing its module failed: SyntaxError",
        "fails:f": f"importing its module failed: OSError: no such GPU ({folders / 'here' / 'fails.py'}:1)",
        "needs:f": "its module imports 'no_such_package_at_all', which is not installed",
    }
    sound = ("judges:verify", "beside:verify")
    found = inspect_verifiers([*refused, *sound])
    for name, message in refused.items():
        assert message in found[name].problem
        assert "Traceback" not in found[name].problem
    assert "Did you mean 'judges:verify'?" in found["judgess:verify"].problem
    assert str(folders / "configuration") in found["judgess:verify"].problem
    assert "site-packages" not in found["judgess:verify"].problem
    assert [found[name].problem for name in sound] == ["", ""]
    assert "exit code 5" in inspect_verifiers(["leaves:f"])["leaves:f"].problem
    assert "judges" not in os.sys.modules  # type: ignore[attr-defined]


def test_workers_look_beside_the_configuration_and_faults_say_what_they_are(folders: Path) -> None:
    names = ["beside:verify", "beside:raises", "beside:minus"]
    with VerifierPool(verifiers=names) as pool:
        right, raised, minus = pool.judge_all([VerifierJob(name, "x", "x") for name in names])
    assert right == Verdict(1.0)
    assert (raised.fault, minus.fault) == (RAISED, NO_VERDICT)
    assert "raised KeyError: 'x'" in raised.error
    assert "verifier beside:minus returned the score -1.0; a score lies in [0, 1]." in minus.error


class _Odd(JobVerifier):
    def judge(self, job: VerifierJob, timeout_s: float) -> Verdict:
        return Verdict(1.0, parts={"length": "long"})  # type: ignore[dict-item]


def test_a_verdict_that_holds_what_it_should_not_is_an_error() -> None:
    assert "raised ValueError: could not convert string to float: 'long'" in asking.ask("odd", _Odd(), JOB, 1.0).error


def test_half_a_character_in_a_verdict_is_written_out() -> None:
    verdict = judge(VerifierJob("megatron_fipo.verifiers.exact:verify", "\ud800", "\ud800"), 1.0)
    assert verdict.correct
    verdict.answer.encode()
    assert verdict.answer.endswith("\\ud800")


def test_keys_in_urls_are_not_shown() -> None:
    assert registry.shown_name("https://me:word@host:1/score?key=secret") == "https://host:1/score?…"
    assert registry.shown_name("1.0*math + 0.5*http://host/s?key=secret") == "1*math + 0.5*http://host/s?…"
    assert "secret" not in judge(VerifierJob("http://127.0.0.1:9/s?key=secret", "", object()), 0.1).error


def test_parameters_before_a_slash_go_by_position() -> None:
    def swapped(answer: str, completion: str, /, prompt: str = "") -> bool:
        return (answer, completion, prompt) == ("4", "four", "2 + 2")

    job = VerifierJob("own", "four", "4", prompt_text="2 + 2")
    assert OwnFunction("own", swapped).judge(job, 1.0).correct


def test_what_is_shown_of_a_returned_value_is_short() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    for returned in (nested, ["a" * 10**7] * 10**5):
        with pytest.raises(NoVerdictError, match="returned a list"):
            as_verdict(returned)
