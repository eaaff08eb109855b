"""Mathematics: tricky answers labelled by hand, where answers stand, which are equal, and hostile answers."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.verifiers import mathematics
from megatron_fipo.verifiers import pool as pool_module
from megatron_fipo.verifiers.answer_markers import MAX_SEARCHED_CHARACTERS, last_answer_tag, last_boxed, last_line
from megatron_fipo.verifiers.answers import algebra, units
from megatron_fipo.verifiers.answers.size_limit import TooLargeError, size_limit
from megatron_fipo.verifiers.cpu_limit import CpuLimitError, cpu_limit
from megatron_fipo.verifiers.math_text import cleaned, is_computable
from megatron_fipo.verifiers.plain_numbers import read_plain_number
from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.registry import load_verifier
from megatron_fipo.verifiers.verdict import JobVerifier, Verdict, VerifierFunction, VerifierJob

pytestmark = pytest.mark.slow

TABLE = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "tricky_answers.jsonl").read_text(encoding="utf-8").splitlines()
]
TEN_MEGABYTES = 10**7


def function(name: str) -> VerifierFunction:
    verifier = load_verifier(name)
    assert not isinstance(verifier, JobVerifier)
    return verifier


# ------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("row", TABLE, ids=[f"{number}-{row['topic']}" for number, row in enumerate(TABLE, start=1)])
def test_tricky_answers(row: dict[str, Any]) -> None:
    verdict = function(row["verifier"])(row["response"], row["reference"], "stop")
    assert verdict.correct is row["correct"], row
    assert not verdict.error


def test_the_table_can_tell_judges_apart() -> None:
    """Negative control: comparing texts, comparing the last number, and a constant verdict all fail the table."""

    def as_text(response: str, reference: str) -> bool:
        return response.rpartition("Answer: ")[2] == reference or f"boxed{{{reference}}}" in response

    def last_number(response: str, reference: str) -> bool:
        return re.findall(r"-?[\d.]+", response)[-1:] == re.findall(r"-?[\d.]+", reference)[-1:]

    assert len(TABLE) >= 100
    for judge in (as_text, last_number, lambda response, reference: True, lambda response, reference: False):
        wrong = sum(judge(row["response"], row["reference"]) is not row["correct"] for row in TABLE)
        assert wrong > 25, judge


# --------------------------------------------------------------------------------------------------- conventions


@pytest.mark.parametrize(
    ("response", "any_marker", "answer_line", "boxed"),
    [
        (r"Answer: 1 and \boxed{2}", "2", "{1, 2}", "2"),
        (r"\boxed{2}" + "\nAnswer: 1", "1", "1", "2"),
        ("Answer: 1" + "\n" + " so" * 100, "1", "", ""),
        ("Answer: 1" + "\n" + " so" * 90, "1", "1", ""),
        ("It is 1", "", "", ""),
    ],
)
def test_conventions_look_where_they_say(response: str, any_marker: str, answer_line: str, boxed: str) -> None:
    found = [function(name)(response, "0", "stop").answer for name in ("math", "math_answer", "math_boxed")]
    assert found == [any_marker, answer_line, boxed]


def test_scores_are_one_and_zero_and_truncated_responses_are_judged() -> None:
    assert mathematics.verify("Answer: 4", "4", "length") == Verdict(1.0, "4")
    assert mathematics.verify("Answer: 5", "4", "stop") == Verdict(0.0, "5")


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1,234.5", Fraction(2469, 2), ""),
        (".5", Fraction(1, 2), ""),
        ("-3/4", Fraction(-3, 4), ""),
        (r"2\frac{1}{4}", Fraction(9, 4), ""),
        (r"-1.5 \times 10^{-2}", Fraction(-3, 200), ""),
        ("5 apples", Fraction(5), "apple"),
        (r"5\text{ cm}^2", Fraction(5), "cm^2"),
        ("3 thousand", Fraction(3000), ""),
        (r"90^\circ", Fraction(90), "degree"),
    ],
)
def test_plain_numbers(text: str, value: Fraction, unit: str) -> None:
    number = read_plain_number(cleaned(text))
    assert number is not None
    assert (number.value, str(number.unit)) == (value, unit)


@pytest.mark.parametrize(
    "text", ["", "-", "1/0", "12,34", "2 3", "1 3/2", "2 pi", "x", "1e9999", "1" * 201, "5 x", "1.2.3"]
)
def test_what_is_no_plain_number(text: str) -> None:
    assert read_plain_number(cleaned(text)) is None


# --------------------------------------------------------------------------------------- the rules of docs/verifiers.md

RULES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "equality_rules.jsonl").read_text(encoding="utf-8").splitlines()
]
"""By kind: a reference, answers that equal it, and answers that do not, in both directions."""

each_rule = pytest.mark.parametrize("rule", RULES, ids=[f"{rule['kind']}: {rule['reference']}" for rule in RULES])


def judged(answer: str, reference: str) -> Verdict:
    return mathematics.verify_boxed(rf"So it is $\boxed{{{answer}}}$.", reference, "stop")


@each_rule
def test_rules_of_equality_hold_both_ways(rule: dict[str, Any]) -> None:
    reference = rule["reference"]
    for expected, answers in ((True, [reference, *rule["equal"]]), (False, rule["different"])):
        for answer in answers:
            assert judged(answer, reference).correct is expected, (answer, reference)
            assert judged(reference, answer).correct is expected, (reference, answer)


@each_rule
def test_right_answers_are_one_vote_and_wrong_ones_another(rule: dict[str, Any]) -> None:
    reference = rule["reference"]
    votes = {judged(answer, reference).answer for answer in [reference, *rule["equal"]]}
    assert len(votes) == 1
    assert votes.isdisjoint(judged(answer, reference).answer for answer in rule["different"])


@pytest.mark.parametrize(
    "spellings",
    [
        [r"\frac12", "0.5", "1/2", r"\dfrac{1}{2}", "0.50", "x = 1/2", r"\frac{2}{4}"],
        ["(1,2)", "(1, 2)", r"\left(1,2\right)"],
        ["1, 2", "2, 1", r"\{1,2\}", "1 and 2"],
        ["1234", "1,234", "1{,}234", "1 234", r"1234\text{ cm}", r"\$1234"],
        [r"\frac{1}{\sqrt3}", r"\frac{\sqrt{3}}{3}"],
        ["(x+1)^2", "x^2+2x+1"],
        ["6:30 p.m.", "6:30 PM", r"6:30\text{ pm}"],
        ["Tuesday", r"\text{tuesday}", "**Tuesday**"],
        ["B", "(B)", "Option B", "(B) 12"],
        ["1010_2", r"1010_{\text{two}}"],
        ["|x|<2", "-2<x<2", "(-2,2)", r"x \in (-2, 2)"],
        ["2x+4y=3", "x+2y=1.5", "8y = 6 - 4x"],
        [r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\ \frac42\end{bmatrix}"],
        ["1:2", "2 to 4", "2:4"],
        ["2 hours 30 minutes", "2 hours and 30 minutes", r"2\text{ hours, }30\text{ minutes}"],
    ],
)
def test_equal_wrong_answers_vote_together(spellings: list[str]) -> None:
    verdicts = [judged(spelling, "977") for spelling in spellings]
    assert not any(verdict.correct for verdict in verdicts)
    assert len({verdict.answer for verdict in verdicts}) == 1


def test_long_answers_keep_their_differences() -> None:
    answers = [judged("7" * 500 + last, "5").answer for last in "123"]
    assert len(set(answers)) == 3
    assert max(map(len, answers)) <= mathematics.MAX_SHOWN_CHARACTERS


@pytest.mark.parametrize(
    "response",
    [
        "Answer: **42**.",
        "**Answer: 42**.",
        "#### **42**.",
        "Answer: **42 apples**.",
        "Answer: **42** apples.",
        "Answer: __42__",
        "__Answer: 42__.",
        "__Answer__: 42",
        "Answer: ***42***",
        "_Answer: 42_",
        "**Final Answer:** $42$.",
        "**Answer: $$42$$**.",
        "Answer:\n\n$$\n42\n$$",
        "Answer:\n\\[\n42\n\\]",
        "Answer:\n\\(\n42\n\\)",
        "Answer:\n```\n42\n```",
        "Answer:\n- 42",
        "Answer:\n* **42**.",
        "Answer:\n1. 42",
        "Answer: $$\n42\n$$",
        "####\n$$\n42\n$$",
        "#### \\[\n42\n\\]",
        "Answer:\n$$\n\\boxed{42}\n$$",
        "Answer:\n```text\n42\n```\nDone.",
        "Answer:\n$$\nx = 42.\n$$",
        "<answer>Answer: 42</answer>",
        "#### 42</answer>",
        "Answer: <answer>42</answer>",
        "Answer: 42</think>",
        "Answer:\n<answer>\n42\n</answer>",
        "<answer>#### 42</answer>",
        "Answer：42",
        "Final Answer： 42。",
        "#### Answer: 42",
        "Answer: exactly 42",
        "Answer: 42 (forty-two)",
    ],
)
def test_where_answers_stand_and_what_surrounds_them(response: str) -> None:
    assert mathematics.verify(response, "42", "stop").correct
    assert not mathematics.verify(response.replace("42", "43"), "42", "stop").correct
    assert not mathematics.verify(response.replace("42", "42, 43"), "42", "stop").correct


def test_an_answer_over_several_lines_is_read_to_its_end() -> None:
    matrix = "\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}"
    for response in (f"Answer:\n$$\n{matrix}\n$$", f"Answer: {matrix}\nDone.", f"Answer:\n{matrix}"):
        assert mathematics.verify(response, matrix, "stop").correct
        assert not mathematics.verify(response.replace("3", "5"), matrix, "stop").correct
    assert mathematics.verify("Answer:\n- 1\n- 2\n", "1, 2", "stop").correct
    assert not mathematics.verify("Answer:\n- 1\n- 2\n", "1", "stop").correct


# ---------------------------------------------------------------------------------------------------------------- laws

SEPARATORS = [
    ", ",
    ",",
    " ",
    ";",
    "; ",
    " and ",
    " or ",
    r"\text{ and }",
    r"\text{ or }",
    " & ",
    r"\&",
    r"\lor ",
    r"\vee ",
    r"\land ",
    r"\wedge ",
    r"\to ",
    r"\Rightarrow ",
    r"\implies ",
    r"\iff ",
    "=",
    "<",
    ">",
    r"\le ",
    r"\ge ",
    r"\ne ",
    r"\approx ",
    r"\sim ",
    r"\equiv ",
    r"\in ",
    r"\subset ",
    ":",
    "::",
    "/",
    "|",
    r"\|",
    r"\mid ",
    r"\\",
    "\n",
    "\t",
    r"\quad ",
    "~",
    r"\,",
    r"\;",
    r"\ ",
    "...",
    r"\ldots ",
    r", \ldots, ",
    " to ",
    " then ",
    " not ",
    " but ",
    " except ",
    " vs ",
    r"\cup ",
    r"\cap ",
    r"\setminus ",
    r"\oplus ",
    r"\circ ",
    r"\star ",
    "*",
    "**",
    "^",
    "!",
    "?",
    "'",
    '"',
    "@",
    "#",
    "%",
    r"\%",
    "$",
    r"\$",
    "$$",
    "{}",
    "()",
    "[]",
    r"\{\}",
    r"\text{}",
    r"\boxed{}",
    "-",
    "--",
    "+",
    r"\pm ",
    r"\mp ",
    r"\times ",
    r"\cdot ",
    r"\div ",
    "->",
    "=>",
    "<->",
    "e",
    "x",
    r"\mapsto ",
    ".",
    ". ",
    ": ",
    "; or ",
    "(or ",
    "(not ",
    "≠",
    "→",
    "、",
    "，",
    "｜",
    "•",
    "‖",
    "\u2003",
    "\u200b",
    "\u2028",
]
WRAPPERS = [
    "%s",
    "$%s$",
    r"\(%s\)",
    "(%s)",
    "[%s]",
    r"\{%s\}",
    "{%s}",
    "**%s**",
    r"\text{%s}",
    r"\textbf{%s}",
    r"\mathrm{%s}",
    r"\boxed{%s}",
    "x=%s",
    r"x \in \{%s\}",
    "`%s`",
    "|%s|",
    r"\left(%s\right)",
    "-%s",
    r"%s\%%",
    "%s cm",
    r"\$%s",
    r"\color{red}{%s}",
    "(A) %s",
    "Answer: %s",
]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(SEPARATORS), st.sampled_from(WRAPPERS), st.integers(2, 99), st.integers(100, 3000))
def test_no_answer_equals_two_integers(separator: str, wrapper: str, first: int, second: int) -> None:
    answer = wrapper % f"{first}{separator}{second}"
    assert not (judged(answer, str(first)).correct and judged(answer, str(second)).correct), answer


SPELLINGS = [
    "%s",
    "$%s$",
    r"\(%s\)",
    "**%s**",
    "%s.",
    r"\boldsymbol{%s}",
    r"\color{red}{%s}",
    "x = %s",
    r"\displaystyle %s",
    "{%s}",
    "(%s)",
    r"\text{%s}",
    " %s ",
    "%s,",
    "\u200b%s",
]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.fractions(), st.sampled_from(SPELLINGS), st.sampled_from(SPELLINGS))
def test_a_number_equals_itself_in_every_spelling_and_no_other(value: Fraction, one: str, other: str) -> None:
    texts = [f"{value.numerator}/{value.denominator}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"]
    assert judged(one % texts[0], other % texts[1]).correct
    assert judged(one % texts[1], texts[0]).answer == judged(other % texts[0], texts[0]).answer
    neighbour = value + Fraction(1, value.denominator)
    assert not judged(one % texts[0], other % f"{neighbour.numerator}/{neighbour.denominator}").correct


ANSWERS = [answer for rule in RULES for answer in (rule["reference"], *rule["equal"], *rule["different"])]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(ANSWERS), st.sampled_from(ANSWERS))
def test_equality_is_symmetric(first: str, second: str) -> None:
    assert judged(first, second).correct is judged(second, first).correct


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (r"\frac{1}{2}\text{ if } x>0", "words between mathematics"),
        (r"n^2 \equiv 3 \pmod 7", "a command that the parser reads as a product"),
        (r"\begin{cases} 1 & x>0 \\ 2 & x<0 \end{cases}", "of which the parser keeps one branch"),
        ("3 4", "which the parser adds"),
        (r"\triangle ABC \sim \triangle DEF", "a relation between names"),
        ("f'(x)", "whose prime the parser drops"),
        ("2 + 1010_2", "whose base the parser drops"),
    ],
)
def test_what_the_parser_would_drop_is_compared_as_text(text: str, why: str) -> None:
    assert judged(text, text).correct
    for other in (r"\frac12", "5", "1", "2", "7", "f(x)", "1012", r"n^2 \equiv 4 \pmod 7", "-2", "3"):
        assert not judged(text, other).correct, why
        assert not judged(other, text).correct, why


def test_without_the_exact_rules_the_laws_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with a fixed low precision, or with units ignored, some of the answers above are misjudged."""
    assert not judged("5 km", "5 m").correct
    monkeypatch.setattr(algebra, "MOST_DIGITS", algebra.FEWEST_DIGITS)
    assert algebra.equal(algebra.parse(r"\pi-2^{-3000}"), algebra.parse(r"\pi"))
    monkeypatch.setattr(units.Unit, "agrees_with", lambda unit, other: True)
    assert judged("5 km", "5 m").correct is False  # cached
    mathematics._compared.cache_clear()
    assert judged("5 km", "5 m").correct
    monkeypatch.undo()
    mathematics._compared.cache_clear()
    assert not judged("5 km", "5 m").correct
    assert not algebra.equal(algebra.parse(r"\pi-2^{-3000}"), algebra.parse(r"\pi"))


# -------------------------------------------------------------------------------------------------- hostile answers

HOSTILE = {
    "digits": "Answer: " + "7" * TEN_MEGABYTES,
    "open boxes": "\\boxed{" * (TEN_MEGABYTES // 7),
    "braces": "{" * TEN_MEGABYTES,
    "boxes in boxes": "\\boxed{" * 20_000 + "5" + "}" * 20_000,
    "answers": "Answer: 1\n" * (TEN_MEGABYTES // 10),
    "empty answers": "answer:\n" * (TEN_MEGABYTES // 8),
    "line feeds": "Answer:" + "\n" * TEN_MEGABYTES,
    "spaces": "answer" + " " * TEN_MEGABYTES + ":5",
    "tags": "<answer>" * (TEN_MEGABYTES // 8),
    "fractions in fractions": "\\boxed{" + "\\frac{1}{" * 300 + "1" + "}" * 300 + "}",
    "parentheses": "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "tower": "\\boxed{9^{9^{9^{9}}}}",
    "Python's tower": "Answer: 9**9**9",
    "tower in brackets": "\\boxed{(9^{9})^{(9^9)}}",
    "tower of brackets": "\\boxed{(((9^{5000})^{5000})^{5000})^{5000}}",
    "exponent": "\\boxed{2^{99999999999}}",
    "scientific": "Answer: 9e999999999",
    "factorial": "\\boxed{99999999!}",
    "binomial": "\\boxed{\\binom{99999999}{49999999}}",
    "expansion": "\\boxed{(x+y+z)^{4999}}",
    "integral": "\\boxed{\\int_0^1 \\sin(\\sin(\\sin(x^x))) dx}",
    "exponentials": "\\boxed{\\exp(\\exp(\\exp(100)))}",
    "factorials of factorials": "\\boxed{((99!)!)!}",
    "hidden factorials": "\\boxed{((((10!)!)!)!)!}",
    "hidden exponent": "\\boxed{10^{5000\\cdot5000\\cdot5000}}",
    "factorial in an exponent": "\\boxed{3^{4000!}}",
    "negative tower": "\\boxed{10^{-10^{9}}}",
    "exponent by division": "\\boxed{2^{1/10^{-12}}}",
    "what cannot be rounded": "\\boxed{\\lfloor 10^{4000}\\pi\\rfloor}",
    "import": "Answer: __import__('os').system('touch pwned')",
    "surrogate": "Answer: \x00\ud800",
}


def test_hostile_answers_are_wrong_and_leave_their_neighbours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = [
        VerifierJob("math", text, "5000000") for hostile in HOSTILE.values() for text in (hostile, "Answer: 5000000")
    ]
    with VerifierPool(num_workers=2, timeout_s=60.0, verifiers=["math"]) as pool:
        verdicts = pool.judge_all(jobs)
    # An error would mean that a worker was killed.
    assert [verdict.error for verdict in verdicts] == [""] * len(jobs)
    assert {name for name, verdict in zip(HOSTILE, verdicts[0::2], strict=True) if verdict.correct} == set()
    assert all(verdict.correct for verdict in verdicts[1::2])
    assert max(len(verdict.answer) for verdict in verdicts) <= mathematics.MAX_SHOWN_CHARACTERS
    assert list(tmp_path.iterdir()) == []


def test_without_the_limits_a_hostile_answer_costs_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the limits, a hostile answer runs into the time-out; the pool survives it."""
    (tmp_path / "careless.py").write_text(
        "import contextlib\n"
        "from megatron_fipo.verifiers import mathematics\n"
        "from megatron_fipo.verifiers.answers import algebra\n"
        "mathematics.is_computable = algebra.is_computable = lambda text: True\n"
        "mathematics.size_limit = contextlib.nullcontext\n"
        "verify = mathematics.verify\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(pool_module, "MEMORY_GIB", 2.0)
    jobs = [VerifierJob("careless:verify", text, "7") for text in (HOSTILE["binomial"], "Answer: 7")]
    with VerifierPool(timeout_s=3.0, verifiers=["careless:verify"]) as pool:
        hostile, honest = pool.judge_all(jobs)
    assert "took longer than verifier.timeout_s=3" in hostile.error
    assert honest.correct


def test_numbers_that_get_too_large_are_given_up_wherever_they_come_up() -> None:
    for expression in ("Integer(10)**(10**9)", "Rational(1, 3)**(10**9)", "factorial(10**6)", "binomial(10**9, 10**8)"):
        with pytest.raises(TooLargeError), size_limit():
            sympy.sympify(expression)
    with size_limit():
        assert sympy.Integer(2) ** 2024 == 2**2024
        assert sympy.factorial(2024) / sympy.factorial(2023) == 2024
        assert sympy.binomial(10**9, 10**9 - 1) == 10**9
        assert sympy.Integer(-1) ** (10**12) == 1
    assert sympy.factorial(20_001) % 2 == 0  # outside the block, sympy computes it


@pytest.mark.parametrize(
    ("text", "computable"),
    [
        ("2^{2024}", True),
        ("x^{2^{10}}", True),
        ("e^{x^{2}}", True),
        (r"\left(\frac{2}{3}\right)^{2024}", True),
        ("(x+1)^{10}", True),
        ("20!", True),
        ("2^{2^{13}}", False),
        ("2^{5001}", False),
        ("5001!", False),
        (r"\binom{5001}{2}", False),
        ("(2^{1000})^{1000}", False),
        ("(" * 25 + ")" * 25, False),
    ],
)
def test_what_is_computable(text: str, computable: bool) -> None:
    assert is_computable(text) is computable


def test_markers_are_looked_for_near_the_end_only() -> None:
    filler = "." * (MAX_SEARCHED_CHARACTERS - 9)
    assert last_boxed("x" + r"\boxed{1}" + filler) == (1, "1")
    assert last_boxed("x" + r"\boxed{1}." + filler) is None
    assert last_answer_tag("<answer>1</answer>" + filler) is None
    assert last_line("1\n" + filler + "\n2\n\n") == "2"
    assert last_boxed(r"\boxed{\boxed{1} and \{ \boxed{2}}") == (0, r"\boxed{1} and \{ \boxed{2}")


# ------------------------------------------------------------------------------------------------------- CPU limit


def spin() -> Iterator[None]:
    while True:
        yield


def test_cpu_limit_interrupts_and_cleans_up() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(CpuLimitError), cpu_limit(0.05):
        for _ in spin():
            pass
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    with cpu_limit(60.0):
        result = sum(range(1000))
    assert result == 499500


def test_cpu_limit_comes_through_code_that_swallows_exceptions() -> None:
    swallowed = []

    def stubborn() -> None:
        for _ in spin():
            try:
                for _ in spin():
                    pass
            except CpuLimitError as error:
                swallowed.append(error)
                if len(swallowed) == 3:
                    raise

    with pytest.raises(CpuLimitError), cpu_limit(0.05):
        stubborn()
    assert len(swallowed) == 3


def test_cpu_limit_is_not_for_other_threads() -> None:
    results: list[int] = []

    def work() -> None:
        with cpu_limit(0.001):
            results.append(sum(range(10**6)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [499999500000]
