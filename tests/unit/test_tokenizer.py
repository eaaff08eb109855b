"""A folder's tokenizer: loaded as its files describe it, or refused with the folder's name and what is expected."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_fipo.data.tokenizer import load_tokenizer

BASE = Path("examples/quickstart/base")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    for file in BASE.glob("*.json"):
        shutil.copy(file, root)
    return root


def test_the_quick_starts_is_loaded(folder: Path) -> None:
    assert load_tokenizer(folder).decode(load_tokenizer(folder)("3+4=")["input_ids"]) == "3+4="


def test_a_folder_without_a_vocabulary_says_which_files_are_expected(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer: beside tokenizer_config\.json there is none of") as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(f"{folder} has no tokenizer")
    assert "tokenizer.json, vocab.json with merges.txt, tokenizer.model" in str(caught.value)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer: tokenizer_config\.json is missing"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": 7}'),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b'{"tokenizer_class": 7}'),
        ("tokenizer_config.json", b'{"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": 7}'),
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="Copy or download") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert name in str(caught.value)
