"""The text of each token of a response, such that they join to the whole response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tokenizers.decoders import DecodeStream

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How a decoder shows bytes that are no character, or not yet one."""
_MOST_UNFINISHED = 3
"""Tokens that a character which has begun can wait for the end of: it has four bytes at most."""

TokenTexts: TypeAlias = Callable[[Sequence[int]], list[str]]
"""The text of each of a response's tokens, special tokens included."""


def token_texts_with(tokenizer: Any) -> TokenTexts:
    """`TokenTexts` of a Hugging Face tokenizer.

    A token that ends within a character has no text; the token that ends the character has all of it. What a response
    leaves unfinished at its end is the last token's. The texts join to the whole, except that bytes which are no
    characters may show as other replacement characters where the decoder looks further than a character's length at
    them (Llama 2's and Gemma's do). A tokenizer that is written in Python decodes each
    token by itself, so that spaces between words may be missing.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda token_ids: [str(tokenizer.decode([token], skip_special_tokens=False)) for token in token_ids]

    def texts(token_ids: Sequence[int]) -> list[str]:
        ids = list(token_ids)
        return _streamed(ids, backend) or _told_apart(
            ids, lambda some: str(backend.decode(some, skip_special_tokens=False))
        )

    return texts


def _streamed(ids: list[int], backend: Any) -> list[str]:
    """The tokens' texts, five times as fast; [] where some of their bytes are no characters.

    There `DecodeStream` raises an error with some decoders, and with others decodes a long stretch of such bytes anew
    with each of them.
    """
    stream, found, unfinished = DecodeStream(skip_special_tokens=False), [], 0
    for token in ids:
        try:
            found.append(stream.step(backend, int(token)) or "")
        except Exception:  # noqa: BLE001 - tokenizers has no class of its own for it
            return []
        unfinished = 0 if found[-1] else unfinished + 1
        if unfinished > _MOST_UNFINISHED:
            return []
    whole, shown = str(backend.decode(ids, skip_special_tokens=False)), "".join(found)
    if not (found and whole.startswith(shown)):
        return []
    found[-1] += whole[len(shown) :]
    return found


def _told_apart(ids: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The tokens' texts by decoding a few of them at a time, whatever they are."""
    found = [""] * len(ids)
    context, start, known = 0, 0, ""  # ids[context:start] are told, and decode to `known`: spaces depend on them
    for end in range(1, len(ids) + 1):
        cut, text = end, decode(ids[context:end])
        if text.endswith(_UNFINISHED) and end < len(ids):
            cut = end - _MOST_UNFINISHED  # older ones can no longer become a character
            if cut <= start:
                continue
            text = decode(ids[context:cut])
        found[cut - 1] = text[len(known) :] if text.startswith(known) else decode(ids[start:cut])
        context, start = max(min(start, cut - _MOST_UNFINISHED), 0), cut  # a character's beginning is in it
        known = decode(ids[context:start])
    return found
