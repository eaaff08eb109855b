"""Loading a model's tokenizer as its files describe it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
"""Groups of files; each group by itself holds a vocabulary."""
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder.

    A folder that names the generic class means its tokenizer.json literally. AutoTokenizer of transformers 5 prefers
    the class of the model family: for a Qwen2 model it replaces the file's pre-tokenizer and decoder by Qwen2's
    byte-level ones, and characters outside a small vocabulary are then dropped in silence instead of becoming <unk>.

    Raises:
        ValueError: if the folder has no tokenizer, or its files cannot be used, naming the folder.
    """
    folder = Path(folder)
    description = folder / "tokenizer_config.json"
    if not description.is_file():
        raise ValueError(
            f"{folder} has no tokenizer: {description.name} is missing. Copy the tokenizer's files next to the weights."
        )
    if not any(all((folder / name).is_file() for name in files) for files in _VOCABULARIES):
        raise ValueError(
            f"{folder} has no tokenizer: beside {description.name} there is none of "
            f"{', '.join(' with '.join(files) for files in _VOCABULARIES)}. Copy the tokenizer's files next to the "
            "weights; "
            "most models have a tokenizer.json."
        )
    name = _read(description).get("tokenizer_class")
    loader = PreTrainedTokenizerFast if name in _GENERIC_CLASSES else AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(folder)
    except Exception as error:  # tokenizers raises Exception itself for a file that it cannot read
        raise ValueError(
            f"{folder}: the tokenizer cannot be loaded from {_files_there(folder)}: {type(error).__name__}: {error}. "
            "Copy or "
            "download the tokenizer's files again."
        ) from error
    return tokenizer


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{file} cannot be read: {error}. Copy or download it again.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds a {type(raw).__name__}; an object was expected. Copy or download it again.")
    return raw


def _files_there(folder: Path) -> str:
    known = {"tokenizer_config.json", *(name for files in _VOCABULARIES for name in files)}
    return ", ".join(sorted(path.name for path in folder.iterdir() if path.name in known))
