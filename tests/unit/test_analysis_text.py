"""Parts of a response, repetition and scripts, against values worked out by hand."""

from __future__ import annotations

import random
import time
import zlib

import pytest

from megatron_fipo.analysis.parts import (
    ANSWER,
    CODE,
    THINKING,
    Part,
    characters_by_part,
    is_chain,
    parts_of,
    tokens_by_part,
)
from megatron_fipo.analysis.repetition import (
    MIN_BYTES,
    Loop,
    compressible_share,
    expected_share,
    loop_at_end,
    repeated_ngrams,
)
from megatron_fipo.analysis.scripts import scripts_of
from megatron_fipo.analysis.words import Wanted, Words, hash_of


def split(text: str) -> list[tuple[str, str]]:
    parts = parts_of(text.lower())
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])][: len(parts)]
    assert not parts or parts[-1].end == len(text)
    return [(part.kind, text[part.start : part.end]) for part in parts]


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("<think>Hm.</think>It is 5.", [(THINKING, "<think>Hm.</think>"), (ANSWER, "It is 5.")]),
        ("Hm.</think>5", [(THINKING, "Hm.</think>"), (ANSWER, "5")]),  # the template had opened it
        ("<think>Hm, answer: 5", [(THINKING, "<think>Hm, answer: 5")]),  # cut
        ("1+1=2\n#### 2", [(THINKING, "1+1=2\n"), (ANSWER, "#### 2")]),
        ("So\nwe get \\boxed{2}.\nDone", [(THINKING, "So\n"), (ANSWER, "we get \\boxed{2}.\nDone")]),
        ("a\nAnswer: 1\nb\nAnswer: 2", [(THINKING, "a\nAnswer: 1\nb\n"), (ANSWER, "Answer: 2")]),
        ("a\n**Answer:** 1\nan answer", [(THINKING, "a\n"), (ANSWER, "**Answer:** 1\nan answer")]),
        ("Das heißt\nAntwort: 5", [(THINKING, "Das heißt\n"), (ANSWER, "Antwort: 5")]),
        ("所以\n答案：5", [(THINKING, "所以\n"), (ANSWER, "答案：5")]),
        ("No mark at all.", [(THINKING, "No mark at all.")]),
        ("3+9=12;12-5=8?7;#7", [(THINKING, "3+9=12;12-5=8?7;"), (ANSWER, "#7")]),
        ("3+9=12;12-5", [(THINKING, "3+9=12;12-5")]),
        ("a ```x``` b", [(THINKING, "a "), (CODE, "```x```"), (THINKING, " b")]),
        ("a ```x", [(THINKING, "a "), (CODE, "```x")]),
        (
            "<think>a```x```</think>b```y```c",
            [
                (THINKING, "<think>a"),
                (CODE, "```x```"),
                (THINKING, "</think>"),
                (ANSWER, "b"),
                (CODE, "```y```"),
                (ANSWER, "c"),
            ],
        ),
    ],
)
def test_parts(text: str, expected: list[tuple[str, str]]) -> None:
    assert split(text) == expected


def test_characters_by_part() -> None:
    assert characters_by_part(parts_of("1+1=2\n#### 2")) == {"thinking": 6, "answer": 6, "code": 0}
    assert characters_by_part([]) == {"thinking": 0, "answer": 0, "code": 0}


def test_tokens_by_part() -> None:
    """A token counts where it begins; one without text, within a character, where the next one does."""
    parts = [Part(THINKING, 0, 6), Part(ANSWER, 6, 12)]
    texts = ["1+", "1=", "2\n###", "", "#", " 2"]  # they begin at 0, 2, 4, 9, 9 and 10
    assert tokens_by_part(parts, texts, [True] * 6) == {"thinking": 3, "answer": 3, "code": 0}
    assert tokens_by_part(parts, texts, [True, False, True, True, True, False]) == {
        "thinking": 2,
        "answer": 2,
        "code": 0,
    }
    assert tokens_by_part([], [], []) == {"thinking": 0, "answer": 0, "code": 0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3+9=12;#12", True), ("3-1=<unk>;#2", True), ("12", False), ("3+9=12; so 12", False), ("", False)],
)
def test_chains_are_told_by_their_characters(text: str, expected: bool) -> None:
    assert is_chain(text) is expected


# --- repetition -------------------------------------------------------------------------------------------------------


def shares(text: str) -> dict[str, float | None]:
    return repeated_ngrams(Words(text.lower()))


def test_repeated_ngrams_of_words() -> None:
    """a b c d a b c d has the 4-grams abcd bcda cdab dabc abcd, of which the last came before: 1 of 5."""
    assert shares("a b c d a b c d") == {"word4": pytest.approx(0.2), "word10": None, "character10": None}
    twenty = " ".join(f"w{number}" for number in range(10))
    found = shares(f"{twenty} {twenty}")  # 17 4-grams, 7 of them again; 11 10-grams, 1 again
    assert found["word4"] == pytest.approx(7 / 17)
    assert found["word10"] == pytest.approx(1 / 11)
    assert shares("a b c") == {"word4": None, "word10": None, "character10": None}
    assert shares("") == {"word4": None, "word10": None, "character10": None}
    assert shares("A b c d a B c d")["word4"] == pytest.approx(0.2), "case does not count"


def test_order_tells_ngrams_apart() -> None:
    assert shares("a b c d d c b a b a d c")["word4"] == 0.0


def test_repeated_ngrams_of_characters() -> None:
    """Text without spaces: 30 characters, of which the last 10 are the first 10, have 21 10-grams, 1 of them again."""
    first, between = "一二三四五六七八九十", "甲乙丙丁戊己庚辛壬癸"
    assert shares(first + between + first) == {"word4": None, "word10": None, "character10": pytest.approx(1 / 21)}
    assert shares("x" * 1000)["character10"] == pytest.approx(990 / 991)


def test_compressible_share() -> None:
    assert compressible_share("a" * (MIN_BYTES - 1)) is None
    text = "abc " * 500
    share = len(zlib.compress(text.encode(), 1)) / 2000
    assert compressible_share(text) == pytest.approx(1 - share / 0.495)
    assert compressible_share(text) > 0.9  # type: ignore[operator]
    random_like = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=2000))
    assert compressible_share(random_like) == 0.0


def test_ordinary_text_depends_on_its_length() -> None:
    assert expected_share(200) == pytest.approx(0.716)
    assert expected_share(2_000) == pytest.approx(0.495)
    assert 0.467 < expected_share(3_000) < 0.495
    assert expected_share(10**7) == pytest.approx(0.423)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So x = 5. " * 10, Loop(10, 99)),  # without the blank at the end
        ("First we think\n" + "So x = 5. " * 10 + "So x", Loop(10, 104)),
        ("a" * 60, Loop(1, 60)),
        ("a" * 59, None),
        ("ab" * 40, Loop(2, 80)),
        ("One two three. " * 2, None),
        ("A sentence of some length that comes twice, no more than that. " * 2, None),
        ("A sentence of some length that comes thrice, and no less than that. " * 3, Loop(68, 203)),
        ("A sentence of some length that comes thrice, and no less than that. " * 4, Loop(68, 271)),
        ("", None),
        ("Nothing comes again here, so that this is no loop at all, whatever its length may be.", None),
    ],
)
def test_loops(text: str, expected: Loop | None) -> None:
    assert loop_at_end(text) == expected


def test_a_loop_with_a_long_stretch_is_found() -> None:
    """The stretch holds its own short end several times, which must not be taken for the period."""
    stretch = (
        "the end; the end; but then again " + "".join(f"{number}, " for number in range(200)) + "the end; the end; "
    )
    found = loop_at_end("Begin. " + stretch * 4)
    assert found is not None
    assert found.period == len(stretch)


# --- scripts ----------------------------------------------------------------------------------------------------------


def switches(text: str) -> int:
    return scripts_of(text, Words(text)).switches


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("All in English.", 0),
        ("Größe, déjà vu, Łódź, “quoted” — fine.", 0),
        ("The capital is Canberra. 首都是堪培拉。 So Canberra is it.", 2),
        ("首先 we need the formula 所以和是", 2),
        ("我们用 BFS 算法", 0),  # a name of three letters is no change
        ("Let α be the angle and β the other one.", 0),
        ("The answer is yes. Ответ такой же, как раньше.", 1),
        ("The code prints ```首都是堪培拉``` and no more.", 0),
        ("We write $首都是堪培拉$ for the city and \\(首都是堪培拉\\).", 0),
        ("漢字とひらがなとカタカナ", 0),
        ("هذا هو الجواب الصحيح and this is the same one", 1),
        ("", 0),
        ("𝐱 + 𝐲 = 2 in bold letters of mathematics", 0),
    ],
)
def test_changes_of_script(text: str, expected: int) -> None:
    assert switches(text) == expected


def test_formulas_that_are_never_closed_take_no_long_time() -> None:
    """Each of 500,000 openings would look for its end in the next thousands of characters: minutes."""
    before = time.process_time()
    for opening in ("\\[", "\\(", "$$ ", "$"):
        assert switches("首都 " + opening * 500_000) == 0
    assert time.process_time() - before < 10
    assert switches("All is well \\[ and open \\[首都是堪培拉\\] and so it goes on.") == 0


def test_other_share() -> None:
    """8 Latin letters and 2 ideographs: a fifth is not in the main script."""
    assert scripts_of("abcd efgh 首都", Words("abcd efgh 首都")).other_share == pytest.approx(0.2)
    assert scripts_of("abcd", Words("abcd")).other_share == 0.0


# --- words ------------------------------------------------------------------------------------------------------------


def test_hashes_are_those_of_words_and_pieces() -> None:
    text = "\x00Wait—no,  über\u3000双 x2y\tEnd "
    words = Words(text)
    assert words.word_hashes.tolist() == [hash_of(word) for word in text.split()]
    places, hashes = words.pieces
    pieces = ["Wait", "no", "über", "双", "x", "y", "End"]
    assert hashes.tolist() == [hash_of(piece) for piece in pieces]
    assert [text[place:].startswith(piece) for place, piece in zip(places.tolist(), pieces, strict=True)] == [True] * 7
    assert len({hash_of(piece) for piece in [*pieces, "on", "ab", "ba", "", "a", "aa"]}) == 13


def test_letters_of_latin_script_are_told_from_others() -> None:
    assert not Words("Łódź, Größe, Ėė, Việt Nam: fine.").has_other_scripts
    for other in ("α", "я", "等", "한", "𝐱"):
        assert Words(f"So {other} it is").has_other_scripts


def test_pieces_that_are_wanted() -> None:
    found = Words("on no, not now. no!").places_of(Wanted.of(["no", "never"]))
    assert found == [(3, hash_of("no")), (16, hash_of("no"))]
    assert Words("").places_of(Wanted.of(["no"])) == []


def test_a_long_text_has_the_same_hashes() -> None:
    """Hashes are differences of sums that wrap around many times."""
    words = Words("wait " * 300_000)
    assert set(words.word_hashes.tolist()) == {hash_of("wait")}
