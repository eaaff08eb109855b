"""The patterns of re-checks, corrections and restarts: their examples, their cost, and where marks do not count."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import pytest

from megatron_fipo.analysis.names import NAMES
from megatron_fipo.analysis.parts import code_blocks
from megatron_fipo.analysis.patterns import (
    ERROR,
    KINDS,
    Mark,
    Pattern,
    error_class,
    error_classes,
    find_marks,
    load_patterns,
    lowered,
    mark_patterns,
)

EVERY = {pattern.id: pattern for pattern in load_patterns()}
LONGEST_REPETITION = 60


def found(text: str, prompt: str = "", code: Any = ()) -> list[str]:
    """The words of the marks in a text."""
    return [text[mark.start : mark.end] for mark in find_marks(lowered(text), lowered(prompt), code)]


def wrong_examples(pattern: Pattern) -> list[str]:
    """The examples that a pattern does not treat as the file says."""
    missed = [text for text in pattern.matches if not find_marks(lowered(text), patterns=(pattern,))]
    return missed + [text for text in pattern.matches_not if find_marks(lowered(text), patterns=(pattern,))]


def repetitions(tree: Any) -> Iterator[tuple[int, Any]]:
    """(most times, what) of the repetitions in a parsed expression, those within others too."""
    for operation, argument in tree:
        if operation in (parser.MAX_REPEAT, parser.MIN_REPEAT):
            yield argument[1], argument[2]
            yield from repetitions(argument[2])
        elif operation is parser.SUBPATTERN:
            yield from repetitions(argument[3])
        elif operation is parser.BRANCH:
            for branch in argument[1]:
                yield from repetitions(branch)
        elif operation in (parser.ASSERT, parser.ASSERT_NOT):
            yield from repetitions(argument[1])


def long_repetitions(expression: str) -> list[int]:
    """How often at most, of repetitions that are long; and of a repetition of what itself is one, the product."""
    every = list(repetitions(parser.parse(expression)))
    nested = [
        most * inner
        for most, what in every
        for inner, _ in repetitions(what)
        if most > 1 and inner > 1 and most * inner
    ]
    return [int(most) for most in (*(most for most, _ in every), *nested) if most > LONGEST_REPETITION]


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_complete() -> None:
    assert len(EVERY) == len(load_patterns()), "an id comes twice"
    marks = mark_patterns()
    assert {pattern.kind for pattern in marks} == set(KINDS)
    assert {pattern.language for pattern in marks} == {"en", "de", "zh"}
    for language in ("en", "de", "zh"):
        assert {pattern.kind for pattern in marks if pattern.language == language} == set(KINDS)
    others = {pattern.kind for pattern in EVERY.values()} - set(KINDS)
    assert others
    assert all(kind.startswith(ERROR) for kind in others)
    assert all(pattern.matches and pattern.matches_not for pattern in EVERY.values())
    assert all(pattern.words == tuple(lowered(word) for word in pattern.words) for pattern in EVERY.values())


@pytest.mark.parametrize("name", EVERY)
def test_examples(name: str) -> None:
    assert wrong_examples(EVERY[name]) == []


def test_a_wrong_pattern_is_noticed() -> None:
    wait = EVERY["en_wait"]
    assert wrong_examples(dataclasses.replace(wait, compiled=re.compile("wait")))
    assert wrong_examples(dataclasses.replace(wait, compiled=re.compile("never")))
    assert wrong_examples(dataclasses.replace(wait, words=("seldom",)))
    assert wrong_examples(dataclasses.replace(wait, begins_sentence=False))


def test_every_value_has_a_name() -> None:
    assert {f"error/{kind}" for kind in error_classes()} <= set(NAMES)
    assert {f"{kind}/{stat}" for kind in KINDS for stat in ("per_response", "share")} <= set(NAMES)


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_no_repetition_is_without_a_bound(name: str) -> None:
    assert long_repetitions(EVERY[name].compiled.pattern) == []


@pytest.mark.parametrize("expression", ["a+b", "(?:a{1,9}){1,9}", "x(?:y|z*)", "(?=q{3,})", "a{0,100}"])
def test_a_costly_expression_is_noticed(expression: str) -> None:
    assert long_repetitions(expression)


def hostile_text(pattern: Pattern) -> str:
    """A text of 100,000 characters of what the pattern looks for, whole and cut, and of single characters, each again
    and again.
    """
    examples = [lowered(text) for text in pattern.matches]
    pieces = [*examples, *(text[: len(text) // 2] for text in examples), *(f"{word} " for word in pattern.words)]
    pieces += [f"let me {word}" for word in pattern.words] + [f"{word}\n  " for word in pattern.words]
    pieces = list(dict.fromkeys([*filter(None, pieces), " ", "\n", "a", "h", "?", "=", "\x00", "\ud800", "等"]))
    share = 100_000 // len(pieces)
    return "".join((piece * (share // len(piece) + 1))[:share] for piece in pieces).ljust(100_000)


@pytest.mark.parametrize("name", [pattern.id for pattern in mark_patterns()])
def test_a_hostile_text_takes_no_second(name: str) -> None:
    """The time is the processor's, so that a busy machine does not fail this."""
    text = hostile_text(EVERY[name])
    before = time.process_time()
    assert find_marks(text, patterns=(EVERY[name],))
    assert time.process_time() - before < 1.0


# --- where marks count ------------------------------------------------------------------------------------------------


def test_marks_are_found_in_order_with_their_kinds() -> None:
    text = "It is 5. Wait, that's not right. Let me recalculate: 6. Let's start over."
    assert find_marks(lowered(text)) == [
        Mark(9, 13, "doubt", "en_wait"),
        Mark(15, 31, "correction", "en_that_is_wrong"),
        Mark(33, 51, "check", "en_redo"),
        Mark(56, 72, "restart", "en_start_over"),
    ]


def test_of_overlapping_marks_of_a_kind_one_counts() -> None:
    text = "Let me double-check this."  # both a "let me … check" and a "double-check"
    kinds = [mark.kind for mark in find_marks(lowered(text))]
    assert kinds == ["check"]
    single = [
        bool(find_marks(lowered(text), patterns=(EVERY[name],))) for name in ("en_intent_check", "en_double_check")
    ]
    assert single == [True, True]


def test_code_holds_no_marks() -> None:
    text = "Fine.\n```\n# Wait, no\n```\n"
    assert found(text) == ["Wait,"[:4]]
    assert found(text, code=[(6, 25)]) == []


def test_what_is_quoted_from_the_prompt_is_no_mark() -> None:
    prompt = "Mia says nothing. Wait, let me check, says Tom, and leaves the room."
    response = "The text has this: Wait, let me check, says Tom, and leaves the room. So it is Tom."
    assert found(response)
    assert found(response, prompt) == []
    assert found("It is Mia. Wait, no.", prompt) == ["Wait"]


def test_what_begins_behind_a_quotation_mark_is_no_mark() -> None:
    assert found('He said: "Wait, no."') == []
    assert found("He said: Wait, no.") == ["Wait"]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("Wait, no", True),
        ("so 5. Wait, no", True),
        ("so 5.\n\nWait, no", True),
        ("- Wait, no", True),
        ("so 5, but wait, no", True),
        ("<think>wait, no", True),
        ("Okay, so, wait, no", True),
        ("they wait, no", False),
        ("x" * 60 + " wait, no", False),
        ("you must wait. I", False),
    ],
)
def test_where_a_sentence_begins(text: str, counts: bool) -> None:
    assert bool(find_marks(lowered(text), patterns=(EVERY["en_wait"],))) is counts


def test_lower_case_keeps_every_place() -> None:
    text = "İİ. That’s odd. WAIT, İ"
    assert len(lowered(text)) == len(text)
    assert lowered(text)[6:13] == "at's od"
    assert found(text) == ["That’s odd", "WAIT"]


def test_a_text_in_another_language_is_searched_for_its_words() -> None:
    """The words of Chinese and German patterns may be parts of words, and are searched for as such."""
    assert [mark.pattern for mark in find_marks("所以x=2。等等，不对，是3。")] == ["zh_dengdeng", "zh_correction"]
    assert [mark.pattern for mark in find_marks("das sind 5. zur überprüfung: 2+3")] == ["de_pruefen"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("verifier math took longer than verifier.timeout_s=10 and was killed", "time_out"),
        ("verifier code ended its process (signal 9)", "process_ended"),
        ("verifier mine:judge raised KeyError: 'answer' (/x/mine.py:7)", "raised"),
        ("reward model at http://127.0.0.1:9 did not answer (3 requests): timed out", "time_out"),
        ("reward model at http://127.0.0.1:9 answered with status 500, not 200", "unreachable"),
        ("generation was aborted", "generation_aborted"),
        ("verifier mine:judge returned None", "no_verdict"),
        ("\x00 something \ud800 else", "other"),
    ],
)
def test_classes_of_errors(error: str, kind: str) -> None:
    assert error_class(error) == kind
    assert kind in error_classes()


@pytest.mark.parametrize(
    "text",
    [
        "self._loop.add_reader(pidfd, self._do_wait, pid)",
        "if typo in names_to_check: raise",
        "POLICY_CHECK: int = 5",
        "address, winapi.PIPE_WAIT, 1",
    ],
)
def test_parts_of_a_name_in_code_are_no_marks(text: str) -> None:
    assert find_marks(lowered(text)) == []


@pytest.mark.parametrize("text", ["_Wait, no._", "So 5.\n*_Wait, no._*", "It is 5. (_wait, no_)"])
def test_a_mark_in_italics_is_one(text: str) -> None:
    assert [mark.kind for mark in find_marks(lowered(text))] == ["doubt"]


def test_the_text_between_blocks_of_code_counts() -> None:
    text = "Wait, no. ```wait, no.```\nWait, no. ```wait, no.```\nWait, no. ```wait, no."
    marks = find_marks(lowered(text), code=code_blocks(text))
    assert [mark.start for mark in marks] == [place for place in range(len(text)) if text.startswith("Wait", place)]


def test_many_blocks_of_code_take_no_long_time() -> None:
    """Each of 60,000 marks would be looked for in each of 60,000 blocks: minutes."""
    text = "```wait, ```\nwait. " * 60_000
    before = time.process_time()
    assert len(find_marks(text, code=code_blocks(text))) == 60_000
    assert time.process_time() - before < 20


@pytest.mark.parametrize("quoted", ['"Wait, no."', "“Wait, no.”", "„Warte, nein.“", "「等等，不对。」"])
def test_other_quotation_marks_are_such_too(quoted: str) -> None:
    assert [mark for mark in find_marks(lowered(f"He said:\n{quoted}")) if mark.start < 12] == []
    assert [mark.start for mark in find_marks(lowered(f"He said:\n{quoted[1:]}"))][:1] == [9]
