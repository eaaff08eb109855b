"""The patterns of `patterns.yaml`, and the places of a text where they are found."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from megatron_fipo.analysis.words import Wanted, Words, hash_of

PATTERNS = Path(__file__).with_name("patterns.yaml")
FORMAT = 1
KINDS = ("doubt", "check", "correction", "restart")
ERROR = "error/"
"""Beginning of the kinds that are classes of errors."""

_REACH = 160
"""Characters behind a word in which a match ends; no pattern is longer."""
_LEAD = 44
"""Characters before a match that tell whether a sentence begins there."""
_QUOTED = 40
"""Characters that are looked for in the prompt, half of them before a mark or all behind it; there, it is quoted."""
_FRAGMENT = re.compile(r"<([a-z]+)>")
_SENTENCE_BEGINS = re.compile(
    r"(?:\A|[.!?:;…—–\n>*_#\]。！？：；，、](?:[\"”'])? {0,2}|\n[ \t]{0,8}(?:[-*•]|\d{1,2}[.)]) {1,2}|- |"
    r", (?=(?:but|no|oh|hmm|wait|aber|nein) ))"
    r"(?:(?:but|oh|ah|no|hm{1,6}|so|ok|okay|and|well|yes|yeah|right|wait|now|then|actually|hold on|oops|also|alright|"
    r"aber|nein|ja|gut|doch|但|但是|可是|那|哦|啊|嗯)[,.…!，。]{0,3} ?){0,3}\Z"
)
"""Where a sentence or clause begins, perhaps with a word or three that announce a turn."""
_LETTERS = re.compile(r"[^\W\d_]+")
_WITHOUT_SPACES = "zh"
_WITHIN_NAME = re.compile(r"[^\s*(]_\Z")
"""The beginning of a name of code before its last part, do_wait; before _wait_ in italics stands nothing."""
_QUOTATION_MARKS = frozenset("\"“„«'‘「『")


@dataclass(frozen=True)
class Pattern:
    """One of the file's entries, as its head explains them."""

    id: str
    kind: str
    language: str
    words: tuple[str, ...]
    before: int
    begins_sentence: bool
    compiled: re.Pattern[str]
    matches: tuple[str, ...]
    matches_not: tuple[str, ...]


@dataclass(frozen=True, order=True)
class Mark:
    """A place of a text where a pattern was found."""

    start: int
    end: int
    kind: str
    pattern: str


@lru_cache(maxsize=1)
def load_patterns() -> tuple[Pattern, ...]:
    """All patterns, in the order of the file."""
    content = yaml.safe_load(PATTERNS.read_text(encoding="utf-8"))
    assert content["format"] == FORMAT
    return tuple(_pattern(entry, content["fragments"]) for entry in content["patterns"])


def _pattern(entry: dict[str, Any], fragments: dict[str, str]) -> Pattern:
    text = entry["pattern"]
    while (filled := _FRAGMENT.sub(lambda match: fragments[match[1]], text)) != text:
        text = filled
    assert entry["place"] in ("sentence", "anywhere"), entry["id"]
    return Pattern(
        id=entry["id"],
        kind=entry["kind"],
        language=entry["language"],
        words=tuple(entry["words"]),
        before=entry.get("before", 0),
        begins_sentence=entry["place"] == "sentence",
        compiled=re.compile(text),
        matches=tuple(entry["matches"]),
        matches_not=tuple(entry["matches_not"]),
    )


def lowered(text: str) -> str:
    """The text as patterns want it, each character in its place: lower case, one kind of apostrophe."""
    if text.isascii():
        return text.lower()
    lower = text.lower()
    if len(lower) != len(text):  # a capital I with a dot above becomes two characters
        lower = "".join(char.lower()[0] for char in text)
    return lower.replace("’", "'").replace("‘", "'")


@lru_cache(maxsize=1)
def mark_patterns() -> tuple[Pattern, ...]:
    """Those that are searched in responses."""
    return tuple(pattern for pattern in load_patterns() if pattern.kind in KINDS)


def find_marks(
    lower: str,
    prompt: str = "",
    code: Sequence[tuple[int, int]] = (),
    patterns: tuple[Pattern, ...] | None = None,
    words: Words | None = None,
) -> list[Mark]:
    """Where the patterns are found, in order; of marks of a kind that overlap, the one that begins first.

    The time is linear in the text: around each of the patterns' words a bounded stretch is searched.

    Args:
        lower: the text, `lowered`.
        prompt: the prompt, `lowered`; a mark in what is quoted from it is none.
        code: (start, end) of the blocks of code, in order, in which there are no marks.
        patterns: which; None takes `mark_patterns`.
        words: of the text, where they are known.
    """
    index = _index(mark_patterns() if patterns is None else patterns)
    found: set[Mark] = set()
    for at, of_word in _places(index, lower, Words(lower) if words is None else words):
        for pattern in of_word:
            match = _match(pattern, lower, at)
            if match is not None and _counts(pattern, lower, match.start(), prompt, code):
                found.add(Mark(match.start(), match.end(), pattern.kind, pattern.id))
    return list(_without_overlaps(sorted(found)))


@dataclass(frozen=True, eq=False)
class _Index:
    """The words of some patterns, by how they are looked for.

    Attributes:
        wanted: the longest pieces of letters of those words that are whole in their language.
        by_piece: (word, place of the piece in it, its patterns) by the piece's hash.
        within: (word, its patterns) of those that may be parts of words, by language.
    """

    wanted: Wanted
    by_piece: dict[int, list[tuple[str, int, list[Pattern]]]]
    within: dict[str, list[tuple[str, list[Pattern]]]]


@lru_cache(maxsize=256)
def _index(patterns: tuple[Pattern, ...]) -> _Index:
    by_word: dict[tuple[str, str], list[Pattern]] = {}
    for pattern in patterns:
        for word in pattern.words:
            by_word.setdefault((pattern.language, word), []).append(pattern)
    pieces: list[str] = []
    by_piece: dict[int, list[tuple[str, int, list[Pattern]]]] = {}
    within: dict[str, list[tuple[str, list[Pattern]]]] = {}
    for (language, word), of_word in by_word.items():
        if language != "en":
            within.setdefault(language, []).append((word, of_word))
            continue
        piece = max(_LETTERS.finditer(word), key=lambda match: len(match[0]))
        pieces.append(piece[0])
        by_piece.setdefault(hash_of(piece[0]), []).append((word, piece.start(), of_word))
    return _Index(Wanted.of(pieces), by_piece, within)


def _places(index: _Index, lower: str, words: Words) -> Iterator[tuple[int, list[Pattern]]]:
    """Where words of patterns stand, with the patterns."""
    for place, piece in words.places_of(index.wanted):
        for word, offset, of_word in index.by_piece[piece]:
            if place >= offset and lower.startswith(word, place - offset):
                yield place - offset, of_word
    for language, entries in index.within.items():
        if language == "zh" and not words.has_other_scripts:
            continue
        if language == "de" and not words.places_of(_german()):
            continue
        for word, of_word in entries:
            at = lower.find(word)
            while at >= 0:
                yield at, of_word
                at = lower.find(word, at + len(word))


@lru_cache(maxsize=1)
def _german() -> Wanted:
    """Words of which each German text has one, however short."""
    articles = ["das", "der", "ein", "eine", "zur"]
    return Wanted.of(
        [*articles, "ist", "sind", "ich", "wir", "und", "nicht", "von", "aber", "warte", "probe", "korrektur"]
    )


def _match(pattern: Pattern, lower: str, at: int) -> re.Match[str] | None:
    """The match that holds the word at a place."""
    end = at + _REACH
    # Where it may begin: at the word, or at one before it; text without spaces may begin anywhere.
    for start in range(max(at - pattern.before, 0), at + 1):
        if start == at or pattern.language == _WITHOUT_SPACES or not lower[start - 1 : start].isalnum():
            match = pattern.compiled.match(lower, start, end)
            if match is not None and match.end() > at:
                return match
    return None


def _counts(pattern: Pattern, lower: str, start: int, prompt: str, code: Sequence[tuple[int, int]]) -> bool:
    if start and (lower[start - 1] in _QUOTATION_MARKS or _WITHIN_NAME.search(lower, max(start - 2, 0), start)):
        return False
    if pattern.begins_sentence and not _begins_sentence(lower, start):
        return False
    block = bisect_right(code, (start, len(lower) + 1)) - 1  # the last one that begins up to here
    if block >= 0 and start < code[block][1]:
        return False
    return not (prompt and _is_quoted(lower, start, prompt))


def _is_quoted(lower: str, start: int, prompt: str) -> bool:
    """Whether what stands around a place, or begins there, stands in the prompt, too."""
    stretches = lower[max(start - _QUOTED // 2, 0) : start + _QUOTED // 2], lower[start : start + _QUOTED]
    return any(len(stretch) > _QUOTED // 2 and stretch in prompt for stretch in stretches)


def _begins_sentence(lower: str, start: int) -> bool:
    lead = lower[max(start - _LEAD, 0) : start]
    if start > _LEAD:
        lead = f"a{lead}"  # the text goes on before it
    return _SENTENCE_BEGINS.search(lead) is not None


def _without_overlaps(marks: Sequence[Mark]) -> Iterator[Mark]:
    ends: dict[str, int] = {}
    for mark in marks:
        if mark.start >= ends.get(mark.kind, 0):
            ends[mark.kind] = mark.end
            yield mark


def error_class(error: str) -> str:
    """The class of a text that says why a response could not be judged; "other" where no pattern fits."""
    lower = lowered(error[:2000])
    for pattern in load_patterns():
        if pattern.kind.startswith(ERROR) and pattern.compiled.search(lower):
            return pattern.kind.removeprefix(ERROR)
    return "other"


def error_classes() -> list[str]:
    """All of them."""
    return [*(p.kind.removeprefix(ERROR) for p in load_patterns() if p.kind.startswith(ERROR)), "other"]
