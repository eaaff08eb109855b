"""The text of each token of a response, such that they join to the whole response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tokenizers.decoders import DecodeStream

TokenTexts: TypeAlias = Callable[[Sequence[int]], list[str]]
"""The text of each of a response's tokens, special tokens included."""


def token_texts_with(tokenizer: Any) -> TokenTexts:
    """`TokenTexts` of a Hugging Face tokenizer.

    A token that ends within a character has no text; the token that ends the character has all of it. What a response
    leaves unfinished at its end is the last token's. A tokenizer that is written in Python decodes each token by
    itself, so that spaces between words may be missing.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda token_ids: [str(tokenizer.decode([token], skip_special_tokens=False)) for token in token_ids]

    def texts(token_ids: Sequence[int]) -> list[str]:
        stream = DecodeStream(skip_special_tokens=False)
        found = [stream.step(backend, int(token)) or "" for token in token_ids]
        whole, shown = backend.decode(list(token_ids), skip_special_tokens=False), "".join(found)
        if found and whole.startswith(shown):
            found[-1] += whole[len(shown) :]
        return found

    return texts
