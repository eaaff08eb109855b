"""What is measured of each response; `names.py` says what the values mean."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from megatron_fipo.analysis.parts import (
    PARTS,
    Part,
    characters_by_part,
    code_blocks,
    is_chain,
    parts_of,
    tokens_by_part,
)
from megatron_fipo.analysis.patterns import KINDS, error_class, error_classes, find_marks, lowered
from megatron_fipo.analysis.rechecks import (
    CHANGED,
    FOR_BETTER,
    FOR_WORSE,
    UNTOLD,
    Recheck,
    chain_rechecks,
    text_rechecks,
)
from megatron_fipo.analysis.repetition import compressible_share, loop_at_end, repeated_ngrams
from megatron_fipo.analysis.responses import Response
from megatron_fipo.analysis.scripts import scripts_of
from megatron_fipo.analysis.words import Words


@dataclass
class Totals:
    """Sums over responses: by name, of values and of what they are divided by; and how often each pattern was found."""

    num_responses: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    marks: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, value: float | None, count: float = 1.0) -> None:
        """Add a value, or the sum of `count` values; None adds nothing."""
        if value is not None:
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        """The mean of each name's values; those of which there are none are left out."""
        return {name: self.sums[name] / count for name, count in self.counts.items() if count}


def add_response(totals: Totals, response: Response) -> None:
    """Add what is measured of a response."""
    totals.num_responses += 1
    lower = lowered(response.text)
    parts = parts_of(lower)
    words = Words(lower)
    _add_lengths(totals, response, lower, parts)
    _add_thoughts(totals, response, lower, words)
    _add_repetition(totals, response.text, words)
    _add_scripts(totals, response.text, words)
    _add_end(totals, response)


def _add_lengths(totals: Totals, response: Response, lower: str, parts: list[Part]) -> None:
    totals.add("length/tokens", response.num_tokens)
    totals.add(f"length/tokens_{'right' if response.is_right else 'wrong'}", response.num_tokens)
    totals.add("length/characters", len(response.text))
    characters = characters_by_part(parts)
    for part in PARTS:
        totals.add(f"length/{part}_characters", characters[part])
    totals.add("length/thinking_share", characters["thinking"], len(response.text))
    if is_chain(lower):
        totals.add("length/chain_steps", lower.count(";"))
    else:
        totals.add("length/paragraphs", sum(bool(text) and not text.isspace() for text in lower.split("\n\n")))
    if response.token_texts is not None and response.own_tokens is not None:
        # The tokens' own text: the response, as its verifier saw it, may lack special tokens.
        whole = lowered("".join(response.token_texts))
        tokens = tokens_by_part(parts_of(whole), response.token_texts, response.own_tokens)
        for part in PARTS:
            totals.add(f"length/{part}_tokens", tokens[part])


def _add_thoughts(totals: Totals, response: Response, lower: str, words: Words) -> None:
    rechecks, kinds = rechecks_of(response, lower, words, totals.marks)
    for kind in KINDS:
        totals.add(f"{kind}/per_response", kinds[kind])
        totals.add(f"{kind}/share", kinds[kind] > 0)
    totals.add("recheck/per_response", len(rechecks))
    totals.add("recheck/share", bool(rechecks))
    totals.add("recheck/per_1000_tokens", 1000.0 * len(rechecks), response.num_tokens)
    totals.add(f"right/{'with' if rechecks else 'without'}_recheck", response.is_right)
    for recheck in rechecks:
        is_told = recheck.outcome != UNTOLD
        totals.add("recheck/told_share", is_told)
        if is_told:
            totals.add("recheck/changed_share", recheck.outcome in (CHANGED, FOR_BETTER, FOR_WORSE))
            totals.add("recheck/for_better_share", recheck.outcome == FOR_BETTER)
            totals.add("recheck/for_worse_share", recheck.outcome == FOR_WORSE)
    totals.add("recheck/for_better_per_response", sum(one.outcome == FOR_BETTER for one in rechecks))
    totals.add("recheck/for_worse_per_response", sum(one.outcome == FOR_WORSE for one in rechecks))


def rechecks_of(
    response: Response, lower: str, words: Words, marks: Counter[str] | None = None
) -> tuple[list[Recheck], Counter[str]]:
    """The re-checks of a response, and how many marks of each kind there are.

    Args:
        lower: the response's text, lowered.
        words: its words.
        marks: counts how often each pattern was found.
    """
    if is_chain(lower):
        looks = chain_rechecks(lower)
        return looks, Counter(check=len(looks))
    found = find_marks(lower, lowered(response.prompt), code_blocks(lower), words=words)
    if marks is not None:
        marks.update(mark.pattern for mark in found)
    verdict = response.is_right if response.answer and not response.error else None
    return text_rechecks(lower, found, response.reference, verdict), Counter(mark.kind for mark in found)


def _add_repetition(totals: Totals, text: str, words: Words) -> None:
    totals.add("repetition/compressible_share", compressible_share(text))
    for size, share in repeated_ngrams(words).items():
        totals.add(f"repetition/{size}_share", share)
    loop = loop_at_end(text)
    totals.add("repetition/loop_share", loop is not None)
    if loop is not None:
        totals.add("repetition/loop_characters", loop.length)


def _add_scripts(totals: Totals, text: str, words: Words) -> None:
    scripts = scripts_of(text, words)
    totals.add("language/switches_per_response", scripts.switches)
    totals.add("language/switched_share", scripts.switches > 0)
    totals.add("language/other_script_share", scripts.other_share)


ENDS = ("right", "partly_right", "wrong_answer", "no_answer", "cut_without_answer", "not_judged")
"""How a response ends by its verdict; each ends in one way."""


def end_of(response: Response) -> str:
    """How a response ends."""
    if response.error:
        return "not_judged"
    if response.score >= 1:
        return "right"
    if response.score > 0:
        return "partly_right"
    if response.answer:
        return "wrong_answer"
    return "cut_without_answer" if response.finish_reason == "length" else "no_answer"


def _add_end(totals: Totals, response: Response) -> None:
    totals.add("truncated/share", response.finish_reason == "length")
    end = end_of(response)
    for one in ENDS:
        totals.add(f"end/{one}", one == end)
    kind = error_class(response.error) if response.error else ""
    for one in error_classes():
        totals.add(f"error/{one}", one == kind)
