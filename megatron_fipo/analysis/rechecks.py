"""Re-checks of a response, and what each did to the value that it looked at again.

In text, marks of doubt, of checks and of corrections that stand close together are one re-check. In the quick-start's
chains a re-check is a "?" behind a result: 12-5=8?7.

What a re-check did is told where a value can be compared: the same left side of an equation before and after
("17*3=41. Wait, 17*3=51"), the answers that the response names before and after, or a result that is found again in
another way. Whether a value is right is told by working the left side out, or by the reference; otherwise only
whether it changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_fipo.analysis.arithmetic import value_of
from megatron_fipo.analysis.candidates import Candidate, answers_in, is_same
from megatron_fipo.analysis.patterns import Mark
from megatron_fipo.data.chain_arithmetic import MAX_VALUE

UNCHANGED, CHANGED, FOR_BETTER, FOR_WORSE, UNTOLD = "unchanged", "changed", "wrong_to_right", "right_to_wrong", "untold"
OUTCOMES = (UNCHANGED, CHANGED, FOR_BETTER, FOR_WORSE, UNTOLD)
"""`CHANGED`: to another value, of which it is not told whether either is right, or neither is."""

RESTART = "restart"
_GAP = 80
"""Characters between marks of one re-check, at most."""
_NEAR = 400
"""Characters around a re-check in which equations are looked for."""
_SIDE = r"[0-9(][0-9+*/×·÷^()., -]{0,60}"
_EQUATION = re.compile(rf"(?<![0-9a-z.])(?:{_SIDE}(?:=|≈)[ $]{{0,3}}){{1,6}}-?[0-9][0-9,]{{0,20}}(?:\.[0-9]{{1,12}})?")
_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
_STEP = re.compile(r"(?:(?<![0-9])([0-9]{1,6})([+-])([0-9]{1,6}))?=([0-9]{0,9})((?:\?[0-9]{0,9}){1,50})")


@dataclass(frozen=True)
class Recheck:
    """One re-check.

    Attributes:
        start, end: its first mark's beginning and its last one's end.
        outcome: one of OUTCOMES.
    """

    start: int
    end: int
    outcome: str


# --- chains ----------------------------------------------------------------------------------------------------------


def chain_rechecks(text: str) -> list[Recheck]:
    """The re-checks of a chain; each "?" is one. Right is what the step itself comes to, as the chain wrote it."""
    found = []
    for step in _STEP.finditer(text):
        left, operator, right, first, looks = step.groups()
        truth = None
        if left is not None:
            exact = int(left) + int(right) if operator == "+" else int(left) - int(right)
            truth = str(min(max(exact, 0), MAX_VALUE))
        before, place = first, step.start(5)
        for after in looks[1:].split("?"):
            found.append(Recheck(place, place + 1, _outcome(before, after, partial(_is, truth=truth))))
            before, place = after or before, place + 1 + len(after)
    return found


def _is(value: str, truth: str | None) -> bool | None:
    return None if truth is None else value == truth


def _outcome(before: str, after: str, is_right: Callable[[str], bool | None]) -> str:
    if not before or not after:
        return UNTOLD
    if is_same(before, after):
        return UNCHANGED
    was, now = is_right(before), is_right(after)
    if was is False and now:
        return FOR_BETTER
    return FOR_WORSE if was and now is False else CHANGED


# --- text -------------------------------------------------------------------------------------------------------------


def text_rechecks(text: str, marks: Sequence[Mark], reference: str, is_right: bool | None) -> list[Recheck]:
    """The re-checks of a text.

    Args:
        text: the response, lowered.
        marks: all that were found in it, in order.
        reference: the right answer; "" where there is none as text.
        is_right: the verdict on the response's last answer; None where there is none.
    """
    spans = _spans([mark for mark in marks if mark.kind != RESTART], text)
    if not spans:
        return []
    answers = answers_in(text)
    bounds = [*(start for start, _, _ in spans[1:]), len(text)]
    judge = _Judge(reference, answers[-1] if answers else None, is_right)
    found = []
    for (start, behind, end), bound in zip(spans, bounds, strict=True):
        outcome = _by_answers(answers, start, behind, bound, judge)
        if outcome == UNTOLD:
            before, after = text[max(start - _NEAR, 0) : start], text[behind : min(behind + _NEAR, bound)]
            outcome = _by_equations(before, after)
        found.append(Recheck(start, end, outcome))
    return found


def _spans(marks: Sequence[Mark], text: str) -> list[tuple[int, int, int]]:
    """(start, end of the first mark, end) of the marks that stand close together, on one line."""
    spans: list[tuple[int, int, int]] = []
    for mark in marks:
        if spans and mark.start - spans[-1][2] <= _GAP and "\n" not in text[spans[-1][2] : mark.start]:
            start, behind, end = spans[-1]
            spans[-1] = start, behind, max(end, mark.end)
        else:
            spans.append((mark.start, mark.end, mark.end))
    return spans


@dataclass(frozen=True)
class _Judge:
    reference: str
    last: Candidate | None
    is_right: bool | None

    def __call__(self, candidate: Candidate) -> bool | None:
        """Whether an answer is right: the verifier's word for the last one, else the reference's."""
        if candidate is self.last and self.is_right is not None:
            return self.is_right
        if self.last is not None and self.is_right and is_same(candidate.value, self.last.value):
            return True
        return is_same(candidate.value, self.reference) if self.reference else None


def _by_answers(answers: Sequence[Candidate], start: int, end: int, bound: int, judge: _Judge) -> str:
    before = [one for one in answers if one.place < start]
    after = [one for one in answers if end <= one.place < bound]
    if not before or not after:
        return UNTOLD
    if is_same(before[-1].value, after[-1].value):
        return UNCHANGED
    was, now = judge(before[-1]), judge(after[-1])
    if was is False and now:
        return FOR_BETTER
    return FOR_WORSE if was and now is False else CHANGED


def _by_equations(before: str, after: str) -> str:
    """By the first equation behind a re-check of which a side that is to be worked out stands before it, too.

    Failing this, a line that comes in another way to the last result before it confirms that.
    """
    results = list(_results(before))
    if not results:
        return UNTOLD
    earlier, (_, last) = dict(results), results[-1]
    for side, value in _results(after):
        if side in earlier:
            return _outcome(earlier[side], value, partial(_comes_to, truth=value_of(side)))
    line = after.lstrip().partition("\n")[0]
    return UNCHANGED if any(is_same(value, last) for _, value in _results(line)) else UNTOLD


def _results(text: str) -> Iterator[tuple[str, str]]:
    """(side, number) of the equations of numbers, such as 17*3 and 51 of "17 × 3 = 51"; the last number counts."""
    for match in _EQUATION.finditer(text.replace(" is ", " = ")):
        *sides, value = re.split("[=≈]", match[0])
        for side in map(_left_side, sides):
            if not _NUMBER.fullmatch(side):
                yield side, value.strip(" $")


def _comes_to(value: str, truth: float | None) -> bool | None:
    if truth is None:
        return None
    return abs(float(value.replace(",", "")) - truth) <= 1e-9 * max(1.0, abs(truth))


def _left_side(text: str) -> str:
    return "".join(text.split()).replace("×", "*").replace("·", "*").replace("÷", "/").rstrip(".,")
