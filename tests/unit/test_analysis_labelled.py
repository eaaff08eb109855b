"""Precision and recall of what is found in responses, on 100 that a person has read and labelled.

The patterns were tuned on 50 of them, and not on the other 50. The head of the file says where they come from; who
wrote the texts also wrote the patterns, so that texts of other models may show less.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.analysis.measures import rechecks_of
from megatron_fipo.analysis.parts import code_blocks, is_chain
from megatron_fipo.analysis.patterns import KINDS, Pattern, find_marks, lowered, mark_patterns
from megatron_fipo.analysis.rechecks import OUTCOMES, UNTOLD, chain_rechecks
from megatron_fipo.analysis.repetition import loop_at_end
from megatron_fipo.analysis.responses import Response
from megatron_fipo.analysis.scripts import scripts_of
from megatron_fipo.analysis.words import Words

FILE = Path(__file__).resolve().parents[1] / "analysis/labelled_responses.jsonl"
SPLITS = ("tuning", "held_out")

MEASURED = {
    "tuning": {"doubt": (8, 9, 8), "check": (28, 29, 28), "correction": (2, 2, 3), "restart": (3, 3, 3)},
    "held_out": {"doubt": (11, 11, 13), "check": (15, 16, 16), "correction": (5, 6, 7), "restart": (4, 4, 5)},
}
"""By split and kind: marks that were found and labelled, that were found, that were labelled."""
MEASURED_OUTCOMES = {"tuning": (18, 18, 21), "held_out": (14, 14, 22)}
"""Re-checks whose outcome was told as labelled, was told, and was labelled as one that a reader can tell."""


def labelled() -> list[dict[str, Any]]:
    about, *rows = (json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines())
    assert "about" in about
    return rows


ROWS = labelled()


def of_split(split: str) -> list[dict[str, Any]]:
    return [row for row in ROWS if row["split"] == split]


def found_in(row: dict[str, Any], patterns: tuple[Pattern, ...] | None = None) -> list[tuple[str, int, int]]:
    """(kind, start, end) of the marks that are found in a response."""
    lower = lowered(row["response"])
    if is_chain(lower):
        return [("check", one.start, one.end) for one in chain_rechecks(lower)]
    marks = find_marks(lower, lowered(row["prompt"]), code_blocks(lower), patterns)
    return [(mark.kind, mark.start, mark.end) for mark in marks]


def agreement(
    rows: Sequence[dict[str, Any]], patterns: tuple[Pattern, ...] | None = None
) -> dict[str, tuple[int, int, int]]:
    """By kind: marks that are found and labelled, found, labelled. Those that overlap are the same."""
    both, found, wanted = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        labels = [(kind, start, start + len(text)) for kind, start, text in row["marks"]]
        wanted.update(kind for kind, _, _ in labels)
        for kind, start, end in found_in(row, patterns):
            found[kind] += 1
            same = [one for one in labels if one[0] == kind and one[1] < end and start < one[2]]
            if same:
                labels.remove(same[0])
                both[kind] += 1
    return {kind: (both[kind], found[kind], wanted[kind]) for kind in KINDS}


def outcomes(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(labelled, found) of each labelled re-check; "" where none is found there."""
    for row in rows:
        response = Response("", row["prompt"], row["response"], row["reference"], "", 0.0, 1, row["finish_reason"], "")
        lower = lowered(row["response"])
        found, _ = rechecks_of(response, lower, Words(lower))
        for place, outcome in row["rechecks"]:
            yield outcome, next((one.outcome for one in found if one.start <= place < one.end), "")


def outcome_agreement(pairs: Sequence[tuple[str, str]]) -> tuple[int, int, int]:
    told = [(labelled, found) for labelled, found in pairs if found not in ("", UNTOLD)]
    return sum(one == other for one, other in told), len(told), sum(labelled != UNTOLD for labelled, _ in pairs)


def shown(counts: tuple[int, int, int]) -> str:
    both, found, wanted = counts
    return f"precision {both:2}/{found:2} = {both / found:.2f}   recall {both:2}/{wanted:2} = {both / wanted:.2f}"


# --- the labels -------------------------------------------------------------------------------------------------------


def test_the_labels_are_whole() -> None:
    assert len(ROWS) == 100
    assert [len(of_split(split)) for split in SPLITS] == [50, 50]
    assert Counter(row["origin"] for row in ROWS) == {"smollm2": 23, "quickstart": 20, "written": 57}
    for row in ROWS:
        for kind, start, text in row["marks"]:
            assert kind in KINDS
            assert row["response"][start : start + len(text)] == text
        places = [start for kind, start, _ in row["marks"] if kind != "restart"]
        assert all(outcome in OUTCOMES and place in places for place, outcome in row["rechecks"])


# --- agreement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_precision_and_recall(split: str, capsys: pytest.CaptureFixture[str]) -> None:
    counts = agreement(of_split(split))
    with capsys.disabled():
        print(f"\n{split}")
        for kind in KINDS:
            print(f"  {kind:<11}{shown(counts[kind])}")
    for kind in KINDS:
        (both, found, wanted), (least_both, most_found, labelled) = counts[kind], MEASURED[split][kind]
        assert wanted == labelled, "labels have changed: measure anew"
        assert both / found >= least_both / most_found, f"precision of {kind}"
        assert both / wanted >= least_both / labelled, f"recall of {kind}"


@pytest.mark.parametrize("split", SPLITS)
def test_what_a_recheck_did(split: str, capsys: pytest.CaptureFixture[str]) -> None:
    right, told, wanted = outcome_agreement(list(outcomes(of_split(split))))
    with capsys.disabled():
        print(f"\n{split}\n  {'outcome':<11}{shown((right, told, wanted))}")
    least_right, most_told, labelled = MEASURED_OUTCOMES[split]
    assert wanted == labelled, "labels have changed: measure anew"
    assert right / told >= least_right / most_told
    assert right / wanted >= least_right / labelled


def test_loops_and_scripts() -> None:
    assert {row["id"] for row in ROWS if loop_at_end(row["response"])} == {row["id"] for row in ROWS if row["loop"]}
    switches = {row["id"]: scripts_of(row["response"], Words(row["response"])).switches for row in ROWS}
    assert switches == {row["id"]: row["switches"] for row in ROWS}
    assert sum(row["loop"] for row in ROWS) == 2
    assert sum(row["switches"] > 0 for row in ROWS) == 2


# --- that the measurement can fail ------------------------------------------------------------------------------------


def test_a_plain_word_costs_precision() -> None:
    """ "Wait" alone, wherever it stands, is as often an ordinary verb or noun."""
    plain = tuple(
        dataclasses.replace(one, compiled=re.compile("wait"), begins_sentence=False) if one.id == "en_wait" else one
        for one in mark_patterns()
    )
    both, found, _ = agreement(ROWS, plain)["doubt"]
    strict_both, strict_found, _ = agreement(ROWS)["doubt"]
    assert both / found < strict_both / strict_found - 0.2


def test_fewer_patterns_cost_recall() -> None:
    fewer = tuple(pattern for pattern in mark_patterns() if pattern.id != "en_wait")
    assert agreement(ROWS, fewer)["doubt"][0] < agreement(ROWS)["doubt"][0]


def test_a_wrong_outcome_is_noticed() -> None:
    pairs = list(outcomes(of_split("held_out")))
    right, told, wanted = outcome_agreement(pairs)
    swapped = [(label, "right_to_wrong" if found == "wrong_to_right" else found) for label, found in pairs]
    assert outcome_agreement(swapped)[0] < right
    assert outcome_agreement(swapped)[1:] == (told, wanted)
