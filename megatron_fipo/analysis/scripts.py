"""Scripts of a response's letters, and where it changes from one to another. Code and mathematics do not count."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

from megatron_fipo.analysis.parts import code_blocks
from megatron_fipo.analysis.words import Words

_SCRIPTS = {
    "LATIN": "Latin",
    "CYRILLIC": "Cyrillic",
    "ARABIC": "Arabic",
    "HEBREW": "Hebrew",
    "DEVANAGARI": "Devanagari",
    "BENGALI": "Bengali",
    "TAMIL": "Tamil",
    "THAI": "Thai",
    "GREEK": "Greek",
    "ARMENIAN": "Armenian",
    "GEORGIAN": "Georgian",
    "CJK": "CJK",
    "HIRAGANA": "CJK",
    "KATAKANA": "CJK",
    "HANGUL": "Hangul",
}
"""By the first word of a letter's Unicode name. Japanese mixes three scripts, which are one here."""
_IDEOGRAPHIC = {"CJK"}
_LETTERS = 12
"""Letters of an alphabet that make a run: two or three words, not a name or a variable."""
_IDEOGRAPHS = 2
_MATHEMATICS = re.compile(
    r"\$\$[^$]{0,4000}\$\$|\$[^$\n]{1,400}\$|\\\[(?:(?!\\\[).){0,4000}?\\\]|\\\((?:(?!\\\().){0,1000}?\\\)|`[^`\n]{1,400}`|\\[a-zA-Z]{1,30}"
    r"|https?://\S{1,400}",
    re.DOTALL,
)
_LATIN = re.compile(r"[A-Za-z\u00aa-\u024f\u1e00-\u1eff]+")
_OTHER = re.compile(
    r"[\u0370-\u1dff\u1f00-\u1fff\u2c00-\u2dff\u2e80-\u2fdf\u3005-\u3007\u3040-\ufdff\ufe70-\ufefe\uff66-\uffdc"
    r"\U00010000-\U0001d3ff\U00020000-\U0003ffff]+"
)
"""Where letters of other scripts lie; what is none there is passed over."""


@dataclass(frozen=True)
class Scripts:
    """The scripts of a text.

    Attributes:
        switches: how many times a run in one script is followed by one in another.
        other_share: share of the letters that are not in the script with the most, 0 without letters.
    """

    switches: int
    other_share: float


def scripts_of(text: str, words: Words) -> Scripts:
    """Look at the scripts of a text's runs of letters.

    Args:
        words: of the text, in any case.
    """
    if not words.has_other_scripts:
        return Scripts(0, 0.0)
    runs = _runs(_without_code(text))
    counts: dict[str, int] = {}
    for script, letters in runs:
        counts[script] = counts.get(script, 0) + letters
    total = sum(counts.values())
    lasting = [script for script, letters in runs if letters >= (_IDEOGRAPHS if script in _IDEOGRAPHIC else _LETTERS)]
    switches = sum(one != other for one, other in pairwise(lasting))
    return Scripts(switches, 1.0 - max(counts.values()) / total if total else 0.0)


def _runs(text: str) -> list[tuple[str, int]]:
    """(script, letters) of the text's runs in one script, whatever is no letter between."""
    runs: list[tuple[str, int]] = []

    def add(script: str, letters: int) -> None:
        if runs and runs[-1][0] == script:
            runs[-1] = script, runs[-1][1] + letters
        else:
            runs.append((script, letters))

    position = 0
    for other in [*_OTHER.finditer(text), None]:
        latin = sum(map(len, _LATIN.findall(text, position, other.start() if other else len(text))))
        if latin:
            add("Latin", latin)
        if other is not None:
            position = other.end()
            for script, letters in groupby(filter(None, map(_script, other[0]))):
                add(script, sum(1 for _ in letters))
    return runs


def _without_code(text: str) -> str:
    kept, position = [], 0
    for start, end in code_blocks(text):
        kept.append(text[position:start])
        position = end
    return _MATHEMATICS.sub(" ", "".join([*kept, text[position:]]))


@lru_cache(maxsize=65536)
def _script(char: str) -> str:
    """A letter's script; "" for what is none, or is of a script that is not told apart here."""
    return _SCRIPTS.get(unicodedata.name(char, "").partition(" ")[0].partition("-")[0], "")
