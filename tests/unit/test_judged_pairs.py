"""Pairs of response and reference, labelled by hand, are judged as labelled and agree with docs/verifiers.md."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest

from benchmarks import verifier_baselines as baselines
from benchmarks import verifier_error_rates as error_rates
from benchmarks.verifier_error_rates import Pair
from megatron_fipo.verifiers.names import BUILTIN_VERIFIERS
from megatron_fipo.verifiers.verdict import Verdict

pytestmark = pytest.mark.slow

PAIRS = error_rates.read_pairs()
PAGE = error_rates.PAGE.read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \| (equal|different) \|$", re.MULTILINE)
EXPENSIVE = "math-verify alone"
"""The judge that takes ten seconds of computer algebra; only the test marked ci recomputes its numbers."""


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    return error_rates.judged_by_ours(PAIRS)


def misjudged(pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> list[tuple[Pair, Verdict]]:
    """The pairs that were judged otherwise than labelled, or could not be judged."""
    return [
        (pair, verdict)
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if verdict.error or verdict.correct is not (pair["label"] == "equal")
    ]


def test_every_pair_is_judged_as_labelled(verdicts: list[Verdict]) -> None:
    wrong = misjudged(PAIRS, verdicts)
    assert not wrong, "\n".join(f"{pair} -> {verdict}" for pair, verdict in wrong)


def test_right_answers_to_one_reference_are_one_vote(verdicts: list[Verdict]) -> None:
    votes = defaultdict(list)
    for pair, verdict in zip(PAIRS, verdicts, strict=True):
        if pair["label"] == "equal":
            votes[pair["verifier"], str(pair["reference"])].append(verdict.answer)
    assert sum(len(answers) > 1 for answers in votes.values()) >= 50
    assert not {reference: answers for reference, answers in votes.items() if len(set(answers)) > 1}


# ------------------------------------------------------------------------------------------------------- the table


def test_the_table_is_well_formed() -> None:
    assert len(PAIRS) >= 500
    required = {"kind", "rule", "style", "verifier", "response", "reference", "label"}
    for pair in PAIRS:
        assert required <= pair.keys() <= required | {"why", "source"}, pair
        assert pair["verifier"] in BUILTIN_VERIFIERS, pair
        assert pair["label"] in ("equal", "different"), pair
        assert pair["rule"] in range(1, 12), pair
        assert all(pair[key] for key in pair.keys() - {"response", "reference"}), pair
        assert str(pair["reference"]), pair


def test_no_pair_stands_there_twice() -> None:
    counts = Counter((pair["verifier"], pair["response"], str(pair["reference"])) for pair in PAIRS)
    assert [pair for pair, count in counts.items() if count > 1] == []


def test_every_kind_and_every_rule_has_both_labels() -> None:
    for key in ("kind", "rule", "verifier"):
        labels = defaultdict(set)
        for pair in PAIRS:
            labels[pair[key]].add(pair["label"])
        assert all(len(found) == 2 for found in labels.values()), labels
    share = sum(pair["label"] == "different" for pair in PAIRS) / len(PAIRS)
    assert 0.4 < share < 0.6


# -------------------------------------------------------------------------------------------------------- the page


def in_table(answer: str, reference: str, label: str) -> bool:
    """Whether the table has a pair of this reference and label whose response has the answer at its marker."""
    at_marker = re.compile(rf"(?:\\boxed\{{{re.escape(answer)}\}}|(?::(?:\*\*)?|####) {re.escape(answer)}$)")
    return any(
        pair["verifier"] == "math"
        and (pair["reference"], pair["label"]) == (reference, label)
        and at_marker.search(pair["response"])
        for pair in PAIRS
    )


def test_every_example_of_the_page_is_in_the_table() -> None:
    examples = EXAMPLE.findall(PAGE)
    assert len(examples) >= 60
    assert {label for *_, label in examples} == {"equal", "different"}
    assert [example for example in examples if not in_table(*example)] == []


def test_an_example_that_is_not_in_the_table_is_noticed() -> None:
    assert in_table("2x=4", "4", "different")
    assert not in_table("2x=4", "4", "equal")
    assert not in_table("x=4", "4", "different")


def without_the_expensive(tables: str) -> str:
    """The two tables of error rates without the judge EXPENSIVE: its rows in the first, its column in the second."""
    overall, by_kind = tables.split("\n\n")
    kept = [line for line in overall.splitlines() if f"| {EXPENSIVE} |" not in line]
    rows = [line.split("|") for line in by_kind.splitlines()]
    column = rows[0].index(f" {EXPENSIVE} ")
    return "\n".join(kept + ["|".join(row[:column] + row[column + 1 :]) for row in rows])


def tables_of(pairs: Sequence[Pair], verdicts: Sequence[Verdict], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(error_rates.BASELINES, EXPENSIVE, lambda response, reference: False)
    accepted = error_rates.judged_by_all(pairs, [verdict.correct for verdict in verdicts])
    return without_the_expensive(error_rates.tables(pairs, accepted))


def test_the_error_rates_of_the_page_are_up_to_date(verdicts: list[Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    present = without_the_expensive(error_rates.in_page(PAGE))
    assert tables_of(PAIRS, verdicts, monkeypatch) == present, (
        "python benchmarks/verifier_error_rates.py --write brings docs/verifiers.md up to date"
    )
    other = [{**PAIRS[0], "label": "different" if PAIRS[0]["label"] == "equal" else "equal"}, *PAIRS[1:]]
    assert tables_of(other, verdicts, monkeypatch) != present, "a label turned round must be seen"


@pytest.mark.ci
def test_the_error_rates_of_every_judge_are_up_to_date() -> None:
    command = [sys.executable, str(error_rates.ROOT / "benchmarks/verifier_error_rates.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr


def test_a_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="put both back"):
        error_rates.in_page(PAGE.replace(error_rates.END, ""))


# ------------------------------------------------------------------------------------------------ negative controls


def test_a_wrong_label_is_noticed(verdicts: list[Verdict]) -> None:
    before = len(misjudged(PAIRS, verdicts))
    for pair in (PAIRS[0], next(pair for pair in PAIRS if pair["label"] == "different")):
        index = PAIRS.index(pair)
        turned = {**pair, "label": "equal" if pair["label"] == "different" else "different"}
        found = misjudged([*PAIRS[:index], turned, *PAIRS[index + 1 :]], verdicts)
        assert abs(len(found) - before) == 1
        assert (turned in [pair for pair, _ in found]) is (len(found) > before)


def last_number(response: str, reference: str) -> bool:
    number = r"-?\d+(?:\.\d+)?"
    return re.findall(number, response)[-1:] == re.findall(number, reference)[-1:]


def reference_within(response: str, reference: str) -> bool:
    return reference in response


def test_sloppy_and_strict_judges_fail_many_pairs() -> None:
    """Negative control: each of these simple judges fails many pairs."""
    judges: dict[str, tuple[baselines.Judge, int, int]] = {
        "accepts everything": (lambda response, reference: True, 400, 0),
        "refuses everything": (lambda response, reference: False, 0, 400),
        "last number": (last_number, 200, 100),
        "reference within the response": (reference_within, 100, 150),
        "last box as text": (baselines.last_box_as_text, 0, 300),
        "DAPO's scorer": (baselines.dapo_scorer, 5, 300),
    }
    for name, (judge, accepted, refused) in judges.items():
        rates = error_rates.rates(PAIRS, [judge(pair["response"], str(pair["reference"])) for pair in PAIRS])
        assert rates.num_wrongly_accepted >= accepted, (name, rates)
        assert rates.num_wrongly_refused >= refused, (name, rates)


# ----------------------------------------------------------------------------------------------------- DAPO's scorer


@pytest.mark.parametrize(
    ("response", "reference", "accepted"),
    [
        ("Answer: 34", "34", True),
        ("answer : 1,234", "1234", True),
        ("Answer: x = 5", "5", True),
        ("Answer: 12 dollars", "12", True),
        (r"Answer: 5 \text{ cm}", "5 cm", True),
        (r"Answer: \frac12", r"\frac{1}{2}", True),
        (r"So it is \boxed{34}.", "34", False),
        ("Answer: 34.", "34", False),
        ("Answer: **34**", "34", False),
        ("Answer: 0.5", r"\frac{1}{2}", False),
        ("Answer: 34\n" + "and so on " * 30, "34", False),
        ("Answer: 2=3=7", "7", True),
        ("Answer: 5 km", "5 cm", True),
    ],
)
def test_dapo_scorer_does_what_its_description_says(response: str, reference: str, accepted: bool) -> None:
    assert baselines.dapo_scorer(response, reference) is accepted
