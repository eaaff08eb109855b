"""What a re-check did to the value that it looked at again: in chains and in text, by hand."""

from __future__ import annotations

import pytest

from megatron_fipo.analysis.arithmetic import value_of
from megatron_fipo.analysis.candidates import answers_in, is_same
from megatron_fipo.analysis.patterns import find_marks, lowered
from megatron_fipo.analysis.rechecks import chain_rechecks, text_rechecks


def outcomes(text: str, reference: str = "", is_right: bool | None = None) -> list[str]:
    lower = lowered(text)
    return [one.outcome for one in text_rechecks(lower, find_marks(lower), reference, is_right)]


# --- chains -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ("3+9=12;12-5=7;#7", []),
        ("12-5=8?7;#7", ["wrong_to_right"]),
        ("12-5=7?8;#8", ["right_to_wrong"]),
        ("12-5=7?7;#7", ["unchanged"]),
        ("12-5=8?8;#8", ["unchanged"]),
        ("12-5=8?9;#9", ["changed"]),
        ("12-5=8?9?7;#7", ["changed", "wrong_to_right"]),
        ("12-5=8?7?8;#8", ["wrong_to_right", "right_to_wrong"]),
        ("12-5=8??7;#7", ["untold", "wrong_to_right"]),
        ("3-5=0?1;#1", ["right_to_wrong"]),  # values end at 0, as the task's solutions do
        ("98+5=99?3;#3", ["right_to_wrong"]),
        ("6-1=5?-1=10;#10", ["untold"]),
        ("=04?44", ["changed"]),
        ("12-5=?7;#7", ["untold"]),
        ("9-8=1?1;4+4=8;8+7=16?15;#15", ["unchanged", "wrong_to_right"]),
    ],
)
def test_chains(chain: str, expected: list[str]) -> None:
    found = chain_rechecks(chain)
    assert [one.outcome for one in found] == expected
    assert all(chain[one.start : one.end] == "?" for one in found)


def test_a_long_chain_takes_linear_time() -> None:
    """Each digit would be tried as the beginning of a number up to the end, were numbers not bounded."""
    assert chain_rechecks("1" * 1_000_000) == []
    assert len(chain_rechecks("1+1=2?2;" * 1000)) == 1000


# --- text: equations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("17 * 3 = 41. Wait, 17 * 3 = 51.", ["wrong_to_right"]),
        ("17 * 3 = 51. Wait, 17 * 3 = 41.", ["right_to_wrong"]),
        ("17 * 3 = 51. Wait, 17 × 3 = 51.", ["unchanged"]),
        ("17 * 3 = 41. Wait, 17 * 3 = 42.", ["changed"]),
        ("17 * 3 = 41. Wait, 17 * 3 is 51.", ["wrong_to_right"]),
        ("17 * 23 = 340 + 41 = 381. Wait, 17 * 23 = 340 + 51 = 391.", ["wrong_to_right"]),
        ("640 / 8 = 80. Let me double-check: 64 + 16 = 80.", ["unchanged"]),
        ("640 / 8 = 80. Let me double-check:\n64 + 16 = 80.", ["unchanged"]),
        ("640 / 8 = 80. Let me double-check: 64 + 17 = 81.", ["untold"]),
        ("640 / 8 = 80. Let me double-check. It fits.\n\nWe also need 70 + 10 = 80.", ["untold"]),
        ("It is odd. Wait, is it even?", ["untold"]),
        ("17 * 3 = 41. So 41. " + "Then we go on. " * 40 + "Wait, 17 * 3 = 51.", ["untold"]),
        ("17 * 3 = 41. Wait, is it even?\nLet me recalculate: 17 * 3 = 51.", ["untold", "wrong_to_right"]),
        ("17 * 3 = 41. Wait, 17 * 3 = 51.\nHmm, 17 * 3 = 41.", ["wrong_to_right", "right_to_wrong"]),
        ("1,000 * 3 = 3,100. Hmm, wait: 1,000 * 3 = 3,000.", ["wrong_to_right"]),
        ("7 + 3 = 11。等等，7 + 3 = 10，我算错了。", ["wrong_to_right"]),
        ("5 * 180 = 800. I made a mistake: 5 * 180 = 900.", ["wrong_to_right"]),
    ],
)
def test_equations(text: str, expected: list[str]) -> None:
    assert outcomes(text) == expected


# --- text: answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 5. Wait, I forgot the carry. The answer is 6.", ["wrong_to_right"]),
        (r"\boxed{6}. Hmm, wait. \boxed{5}", ["right_to_wrong"]),
        ("The answer is 4. Wait, no. The answer is 5.", ["changed"]),
        ("The answer is 6. Let me check this. #### 6.0", ["unchanged"]),
        ("The answer is 6. Let me check this. It fits.", ["untold"]),
        ("Let me check this. The answer is 6.", ["untold"]),
        (
            "The answer is 5. Wait, no. The answer is 6.\nLet me double-check this.\nThe answer is 6.",
            ["wrong_to_right", "unchanged"],
        ),
        (
            "The answer is 5. Wait, no. The answer is 6.\nLet me double-check this.\nThe answer is 7.",
            ["wrong_to_right", "right_to_wrong"],
        ),
    ],
)
def test_answers_by_the_reference(text: str, expected: list[str]) -> None:
    assert outcomes(text, reference="6") == expected


def test_the_verifier_has_the_last_word_on_the_last_answer() -> None:
    """A reference may be a text that says the same in another way, or no answer at all."""
    text = "The answer is 5. Wait, no. The answer is 1/2."
    assert outcomes(text, reference="0.5") == ["wrong_to_right"]
    assert outcomes(text, reference="one half") == ["changed"]
    assert outcomes(text, reference="one half", is_right=True) == ["wrong_to_right"]
    assert outcomes(text, reference="5", is_right=False) == ["right_to_wrong"]


def test_marks_close_together_are_one_recheck() -> None:
    assert len(outcomes("It is 5. Wait, that's not right. Let me recalculate.")) == 1
    assert len(outcomes("It is 5. Wait, is it?\nLet me recalculate.")) == 2, "on another line"
    assert len(outcomes("Wait, is it? " + "So we add them up again with care. " * 4 + "Let me recalculate.")) == 2
    assert outcomes("Let's start over.") == [], "a restart is none"


# --- parts of it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (r"\boxed{\frac{1}{2}} and \boxed{3}", [r"\frac{1}{2}", "3"]),
        ("**Answer:** $34$", ["34"]),
        ("the final answer is 1,234.5 kg", ["1,234.5"]),
        ("#### -7", ["-7"]),
        (r"\boxed{\(5\)} and \boxed{$6$}", ["5", "6"]),
        ("Antwort: 75\n答案：50", ["75", "50"]),
        ("the answer should be blue, I think", ["blue"]),
        ("we answer questions. results vary. \\boxed{", []),
        ("The result is 12 and the answer: 13", ["12", "13"]),
    ],
)
def test_answers_are_found(text: str, answers: list[str]) -> None:
    assert [one.value for one in answers_in(lowered(text))] == answers


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("6", "6.0", True),
        ("1,000", "1000", True),
        ("$6$", "6", True),
        ("1/2", "0.5", True),
        ("6", "7", False),
        ("Blue", "blue", True),
        ("", "6", False),
        ("1/0", "2/0", False),
        ("9" * 200, "9" * 201, False),
    ],
)
def test_the_same_answers(one: str, other: str, same: bool) -> None:
    assert is_same(one, other) is same


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("17*3", 51),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("2^3^2", 512),
        ("-3+5", 2),
        ("2*-3", -6),
        ("10-2-3", 5),
        ("1/4", 0.25),
        ("1,000*3", 3000),
        ("1/0", None),
        ("2^9999", None),
        ("9^64^2", None),
        ("(2+3", None),
        ("2+", None),
        ("x+1", None),
        ("", None),
        ("(-8)^0.5", None),
        ("(" * 40 + "1" + ")" * 40, None),
        ("1+" * 60 + "1", None),
    ],
)
def test_values(text: str, value: float | None) -> None:
    assert value_of(text) == value
