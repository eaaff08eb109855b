"""Checks, when data is read, that each reference answer is one that its verifier can compare responses with.

A reference that no response can equal makes every response wrong without an error: the run learns nothing, and no log
says why. The rules, by verifier:

- all: not null, not NaN or infinite (what a missing number becomes in a table), no half characters (lone surrogates).
- the mathematical ones (math, math_answer, math_boxed), chain_arithmetic and exact: a text or a number; a list of one
  counts as what is in it, and so does its JSON (["34"]; not for exact). Refused are lists of several (which of them
  counts cannot be told: write one, or judge by a function of your own), empty lists, structs (name the field:
  answer_field=answer.target), true and false, bytes. The mathematical ones and chain_arithmetic also refuse a text
  without a letter, digit or symbol in it, and what tables write for a missing number ("nan"): a response without an
  answer is wrong there, so nothing would be right. For exact an empty text is an empty response.
- code and code_unprotected: what `verifiers.code_reference.check_reference` lets through.
- your own and reward models: whatever the first rule lets through.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

MATHEMATICAL = ("math", "math_answer", "math_boxed")
COMPARED = (*MATHEMATICAL, "chain_arithmetic", "exact")
"""Verifiers that compare the answer with the reference's text."""
_MISSING_NUMBERS = ("nan", "<na>", "nat")
"""Missing values as pandas writes them as text, in lower case."""
PROGRAMS = ("code", "code_unprotected")


def checked_reference(reference: Any, verifiers: Sequence[str], name: str) -> Any:
    """The reference that the verifiers get.

    Args:
        reference: the value in the file.
        verifiers: names of the source's verifiers; each must be able to compare with the reference.
        name: the reference's name in messages: "column 'answer'".

    Raises:
        ValueError: if no response can be right, with the rule and the remedy; the caller adds the place.
    """
    if reference is None:
        raise ValueError(f"{name} is null; every prompt needs a reference answer")
    if isinstance(reference, (float, Decimal)) and not math.isfinite(reference):
        raise ValueError(f"{name} is {reference}; every prompt needs a reference answer. Leave such rows out")
    for text in _texts(reference):
        check_characters(text, name)
    if any(verifier in PROGRAMS for verifier in verifiers):
        # Imported here: other sources need nothing of it.
        from megatron_fipo.verifiers.code_reference import check_reference

        try:
            check_reference(reference)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for verifier in verifiers:
        if verifier in COMPARED:
            reference = _compared(reference, verifier, name)
    return reference


def check_characters(text: str, name: str) -> None:
    """Refuse a lone surrogate, which is half of a character.

    Raises:
        ValueError: for a text with one, which no tokenizer and no file takes.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds \\u{ord(text[error.start]):04x} at character {error.start + 1}, half of a character (a lone "
            "surrogate), which is no text. Mend it where the file was made"
        ) from error


def _compared(reference: Any, verifier: str, name: str) -> Any:
    """A reference that is compared as text; of a list of one, the one."""
    shown = f"{reference!r:.100}"
    if isinstance(reference, Mapping):
        fields = ", ".join(map(str, reference)) or "nothing"
        is_program = reference.keys() & {"tests", "inputs", "outputs"}
        remedy = "Set verifier=code" if is_program else "Name the field that holds it, as in answer_field=answer.target"
        raise ValueError(f"{name} is a struct of {fields}, and verifier={verifier} compares with one answer. {remedy}")
    if verifier != "exact" and isinstance(reference, str):
        reference = _from_text(reference, verifier, name)
    if isinstance(reference, list):
        if len(reference) != 1:
            raise ValueError(
                f"{name} holds a list of {len(reference)} ({shown}), and verifier={verifier} compares with one answer. "
                "Write the one that counts, or judge by a function of your own (package.module:function)"
            )
        return checked_reference(reference[0], [verifier], name)
    if isinstance(reference, bool) or not isinstance(reference, (str, int, float, Decimal, date, time)):
        raise ValueError(
            f"{name} is {shown}, and verifier={verifier} compares with a text or a number. Write what a right answer "
            "says, as text"
        )
    if verifier != "exact" and isinstance(reference, str) and not _says_something(reference):
        raise ValueError(f"{name} is {shown}: no answer equals it. Every prompt needs a reference answer")
    return reference


def _from_text(reference: str, verifier: str, name: str) -> Any:
    """A list that travelled as the JSON of its texts, as in Skywork-OR1's ["34"]; any other text as it is.

    Intervals and points ([1, 2]) hold no quotes, and stay texts.

    Raises:
        ValueError: for the text that tables write for a missing number.
    """
    text = reference.strip()
    if text.lower() in _MISSING_NUMBERS:
        raise ValueError(
            f"{name} is {reference!r}, what tables write for a number that is missing, and verifier={verifier} "
            "compares with an answer. Leave such rows out"
        )
    if not text.startswith('["') or not text.endswith('"]'):
        return reference
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return reference
    return values if all(isinstance(value, str) for value in values) else reference


def _says_something(text: str) -> bool:
    """Whether a letter, a digit or a symbol beyond punctuation stands in the text ("####" and "$$" say nothing)."""
    return any(character.isalnum() or ord(character) > 127 or character in "{}[]()" for character in text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
