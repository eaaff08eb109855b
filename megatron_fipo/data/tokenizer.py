"""Loading a model's tokenizer as its files describe it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder.

    A folder that names the generic class means its tokenizer.json literally. AutoTokenizer of transformers 5 prefers
    the class of the model family: for a Qwen2 model it replaces the file's pre-tokenizer and decoder by Qwen2's
    byte-level ones, and characters outside a small vocabulary are then dropped in silence instead of becoming <unk>.

    Raises:
        ValueError: if the folder has no tokenizer.
    """
    folder = Path(folder)
    description = folder / "tokenizer_config.json"
    if not description.is_file():
        raise ValueError(
            f"{folder} has no tokenizer: {description.name} is missing. Copy the tokenizer's files next to the weights."
        )
    name = json.loads(description.read_text(encoding="utf-8")).get("tokenizer_class")
    loader = PreTrainedTokenizerFast if name in _GENERIC_CLASSES else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(folder)
    return tokenizer
