"""What a model writes reaches the terminal as text, and never as an order to it."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fipo.evaluation.chat import Chat, ChatOptions, TextPrinter, talk
from tests.models import save_random_model


class ByteTokenizer:
    """A token for each byte, as byte-level tokenizers have them."""

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return bytes(ids).decode(errors="replace")


def printed(text: str) -> str:
    """What the terminal gets of a text that comes byte by byte."""
    out = io.StringIO()
    tokenizer: Any = ByteTokenizer()
    printer = TextPrinter(tokenizer, out)
    for token_id in text.encode():
        printer.token(token_id)
    printer.end()
    return out.getvalue()


def test_text_is_printed_as_it_is() -> None:
    text = "a = 1\n\tb = ü, 漢字 👩\u200d🔬\n\nend"
    assert printed(text) == text + "\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]52;c;ZXZpbA==\x07done", r"\x1b]52;c;ZXZpbA==\x07done"),  # would fill the clipboard
        ("\x1b[2J\x1b[31mred", r"\x1b[2J\x1b[31mred"),
        ("\x9b31m\x9d0;title\x9c", r"\x9b31m\x9d0;title\x9c"),  # the same in one character, as 8-bit terminals take it
        ("safe\rover\x08written\x00", r"safe\x0dover\x08written\x00"),
        ("line\n\x1b[1A\x1b[2Kother", "line\n" + r"\x1b[1A\x1b[2Kother"),
        ("abc\u202edcba", r"abc\u202edcba"),
    ],
)
def test_control_codes_are_shown_and_not_obeyed(text: str, shown: str) -> None:
    assert printed(text) == shown + "\n"


@pytest.mark.parametrize("change", [{"model.norm.weight": math.nan}, {"lm_head.weight": 1.0}])
def test_weights_that_training_refuses_are_not_talked_to(tmp_path: Path, change: dict[str, float]) -> None:
    file = save_random_model(tmp_path, tie_word_embeddings=True) / "model.safetensors"
    weights = load_file(file)
    ((name, value),) = change.items()
    place = "model.embed_tokens.weight" if name == "lm_head.weight" else name
    weights[name] = torch.full_like(weights[place], value)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(name)):
        Chat(tmp_path, ChatOptions())


def test_a_text_that_is_no_text_is_refused() -> None:
    """As a terminal's bytes arrive that are no UTF-8."""
    with pytest.raises(ValueError, match=r"'1\+\\udcff' holds bytes that are no UTF-8"):
        Chat.answer(Chat.__new__(Chat), "1+\udcff")


def test_without_a_standard_input_there_is_nothing_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="give a text with --prompt"):
        talk("folder", None, ChatOptions())
