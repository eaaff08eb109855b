"""Tasks of the package reasoning-gym, judged by the package's own scorers.

Some scorers read the answer with Python's `eval`. Here, text is evaluated only if it is a harmless expression
(`expressions_only`), and a response whose scorer does more than compute is judged in a confined process of its own
(`worker`, `forked_judge`).
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import reasoning_gym
from reasoning_gym.composite import DatasetSpec

from megatron_fipo.verifiers.answer_markers import last_answer_line, last_answer_tag, last_line
from megatron_fipo.verifiers.cpu_limit import CpuLimitError, cpu_limit
from megatron_fipo.verifiers.expressions_only import expressions_only
from megatron_fipo.verifiers.verdict import Verdict

MAX_SCORING_CPU_S = 4.0
"""CPU time for one answer. If it takes longer, the answer is wrong and not an error, since the response caused it."""


def open_task(task: str, params: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """Create a data set of reasoning-gym.

    Args:
        task: the data set's name.
        params: its parameters. The task composite takes datasets, a list of {name, weight, config} as in its YAML.
        seed: the seed of its first entry.
        size: number of its entries.
    """
    if task == "composite" and "datasets" in params:
        parts = [DatasetSpec(**part) if isinstance(part, Mapping) else part for part in params["datasets"]]
        params = {**params, "datasets": parts}
    return reasoning_gym.create_dataset(task, seed=seed, size=size, **params)


def extract_answer(response_text: str) -> str:
    """Return the last <answer>…</answer>, else what follows the last "Answer:" or "####", else the last line.

    A full stop at the end of "Answer: …" is not part of the answer.
    """
    tagged = last_answer_tag(response_text)
    if tagged is not None:
        return tagged
    marked = last_answer_line(response_text)
    return marked[1] if marked is not None else last_line(response_text)


def verify(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    """Score the extracted answer with the task's scorer, partial credit included.

    Many scorers give part of the score to a wrong answer of the right form, or to one that merely contains the right
    one: use `Verdict.correct` if only right and wrong count. A truncated response is judged by its text, like others.

    Args:
        response_text: the response.
        reference: {"task": name of the data set, "params": its parameters, "entry": the entry that the data set made}.
        finish_reason: not used.

    Raises:
        ValueError: for a reference of another form.
        Exception: what the scorer raises over the entry's own answer, if it is broken.
    """
    _check(reference)
    answer = extract_answer(response_text)
    if not answer:
        return Verdict(0.0)
    entry = reference["entry"]
    score_answer = _dataset(reference["task"], reference["params"]).score_answer
    try:
        with cpu_limit(MAX_SCORING_CPU_S), expressions_only():
            score = float(score_answer(answer, entry))
    except (CpuLimitError, RecursionError, MemoryError):
        score = 0.0
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, SyntaxError):
        # Some scorers raise over an answer of the wrong form: that answer is wrong. If the scorer raises over the right
        # answer, too, or does not accept it, it is broken. An entry without an answer does not allow this check.
        if entry["answer"] is not None and float(score_answer(entry["answer"], entry)) != 1.0:
            raise
        score = 0.0
    task = entry["metadata"]["source_dataset"] if reference["task"] == "composite" else reference["task"]
    is_right = _EXTRA_CHECKS.get(task)
    if score >= _FULL_MARKS and is_right is not None and not is_right(answer, str(entry["answer"])):
        score = 0.0
    if score == 1.0 and _NO_NUMBER.search(answer) and not _NO_NUMBER.search(str(entry["answer"])):
        score = 0.0
    return Verdict(min(max(score, 0.0), 1.0), answer)


_NO_NUMBER = re.compile(r"(?<![a-z])(nan|inf|infinity)[ij]?(?![a-z])", re.IGNORECASE)
"""Texts that Python reads as NaN or infinity; complex_arithmetic takes a distance to them for small (in 0.1.25)."""


def _same_truth(answer: str, right: str) -> bool:
    words = {"true": True, "yes": True, "false": False, "no": False}
    said = words.get(answer.strip().strip(".").lower())
    return said is not None and said == words[right.lower()]


def _same_probability(answer: str, right: str) -> bool:
    try:
        said, probability = Fraction(answer.replace(",", "").strip()), Fraction(right)
        return abs(said - probability) <= min(Fraction(1, 10**4), probability / 1000)
    except (ValueError, ZeroDivisionError):
        return False


def _same_words(answer: str, right: str) -> bool:
    return answer.lower().split() == right.lower().split()


def _same_only_number(answer: str, right: str) -> bool:
    """Whether the right number, with its sign, is the only one in the answer; words and repetitions do not matter."""
    numbers = re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?", answer.replace(",", ""))
    return {float(number) for number in numbers} == {float(right)}


def _same_numbers(answer: str, right: str) -> bool:
    said, sorted_right = (re.findall(r"-?\d+(?:\.\d+)?", text) for text in (answer, right))
    return list(map(float, said)) == list(map(float, sorted_right))


def _makes_24(answer: str, right: str) -> bool:
    """Whether the answer uses the task's numbers, which are those of its right answer, and is exactly 24."""
    if sorted(re.findall(r"\d+", answer)) != sorted(re.findall(r"\d+", right)):
        return False
    try:
        return _exact(ast.parse(answer.strip(), mode="eval").body) == 24
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False


def _exact(node: ast.expr) -> Fraction:
    """Value of an expression of integers with +, -, * and /; raises ValueError for anything else."""
    match node:
        case ast.Constant(value=int() as number):
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_exact(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _exact(left) + _exact(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _exact(left) - _exact(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _exact(left) * _exact(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _exact(left) / _exact(right)
    raise ValueError("not arithmetic")


def _is_zeros_and_ones(answer: str, right: str) -> bool:
    return set(re.findall(r"-?\d+", answer)) <= {"0", "1"}


def _is_a_number(answer: str, right: str) -> bool:
    return "nan" not in answer.lower()


_FULL_MARKS = 1.0 - 1e-9
"""Smallest full score: some scorers add up equal shares, whose sum is rounded."""

_EXTRA_CHECKS: dict[str, Callable[[str, str], bool]] = {
    "game_of_life_halting": _same_truth,
    "coin_flip": _same_probability,
    "letter_jumble": _same_words,
    "spell_backward": _same_words,
    "gsm_symbolic": _same_only_number,
    "number_sorting": _same_numbers,
    "puzzle24": _makes_24,
    "kakurasu": _is_zeros_and_ones,
    "complex_arithmetic": _is_a_number,
}
"""Further checks of a right answer, (answer, right answer) -> bool, for tasks whose scorer accepts wrong ones (0.1.25).

In this order, their scorers accept any text as a yes, a number that begins like the right one, the right words followed
by others (twice), a number without its sign, a list with other numbers, any numbers that make 24 or a little more, the
digits of a larger number, and nan.
"""


def prepare(reference: Any) -> None:
    """Create the reference's data set and score the reference's own answer, so that caches are warm.

    A worker calls this before it may fork. Errors are ignored, since judging a response reports them.
    """
    with contextlib.suppress(Exception):
        _check(reference)
        if _key(reference["task"], reference["params"]) not in _datasets:
            dataset, entry = _dataset(reference["task"], reference["params"]), reference["entry"]
            dataset.score_answer(entry["answer"], entry)


def _check(reference: Any) -> None:
    if not isinstance(reference, Mapping) or not {"task", "params", "entry"} <= reference.keys():
        raise ValueError(f"a reasoning_gym reference is a mapping with task, params and entry, got {reference!r:.200}")


_datasets: dict[tuple[str, str], Any] = {}
"""Data sets by task and parameters, kept because some load word lists; some scorers read the parameters."""


def _dataset(task: str, params: Mapping[str, Any]) -> Any:
    key = _key(task, params)
    if key not in _datasets:
        _datasets[key] = open_task(task, params, seed=0, size=1)
    return _datasets[key]


def _key(task: str, params: Mapping[str, Any]) -> tuple[str, str]:
    return task, repr(sorted(params.items()))
