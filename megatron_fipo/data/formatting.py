"""Turns questions into prompt tokens: template, chat format, tokenizer."""

from __future__ import annotations

from typing import Any

from megatron_fipo.config import DataSourceConfig
from megatron_fipo.data import chat_templates
from megatron_fipo.data.records import Record


class PromptFormatter:
    """Formats the prompts of one source."""

    def __init__(self, source: DataSourceConfig, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Keep what formatting needs.

        Args:
            source: gives prompt_template, system_prompt and chat_template; already checked by `require_source`.
            tokenizer: a transformers tokenizer.
            vocab_size: tokens that the model has; None skips the checks that need it.

        Raises:
            ValueError: for a tokenizer without a chat template where one is needed.
        """
        if source.chat_template and not tokenizer.chat_template:
            raise ValueError(
                "chat_template=true, but the model's tokenizer has no chat template. Set chat_template=false and "
                "prompt_template, or take an instruction-tuned model."
            )
        self._source = source
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._is_template_tried = False
        self._known_characters: set[str] = set()

    def text(self, record: Record) -> str:
        """The text to tokenize. In a chat, the template goes around the last user message.

        Raises:
            ValueError: for more than a single user message where chat_template is false, or if the last message is not
                the user's.
        """
        template = self._source.prompt_template
        if not self._source.chat_template:
            return template.replace("{prompt}", _raw_text(record))
        if isinstance(record.prompt, str):
            messages = [{"role": "user", "content": template.replace("{prompt}", record.prompt)}]
        else:
            *history, last = record.prompt
            if last["role"] != "user":
                raise ValueError(
                    f"{record.place}: the last chat message has role {last['role']!r}; it must be the user's"
                )
            messages = [*history, {**last, "content": template.replace("{prompt}", last["content"])}]
        if self._source.system_prompt:
            messages.insert(0, {"role": "system", "content": self._source.system_prompt})
        if not self._is_template_tried:
            chat_templates.try_out(self._tokenizer, messages, record.place)
            self._is_template_tried = True
        return chat_templates.render(self._tokenizer, messages, record.place)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of formatted texts.

        Raw text gets the special tokens that the tokenizer adds by itself (Llama's beginning of sequence), unless it
        begins with that token; a chat template has written its own.
        """
        if not self._source.chat_template:
            return raw_token_ids(self._tokenizer, texts)
        encoded: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return encoded

    def check_known(self, token_ids: list[int], text: str, place: str) -> None:
        """Check that the tokenizer represents every character, and the model every token.

        A byte-level BPE tokenizer with a small vocabulary silently drops characters that it does not know, so each
        visible character is encoded by itself, once.

        Raises:
            ValueError: naming the place and the characters, if one is left out or the text gives the unknown token
                (other than by spelling it out), or if the model has no such token.
        """
        if self._vocab_size is not None and token_ids and max(token_ids) >= self._vocab_size:
            token_id = max(token_ids)
            raise ValueError(
                f"{place}: the prompt holds token {token_id} ({self._tokenizer.decode([token_id])!r}), and the model "
                f"has tokens 0 … {self._vocab_size - 1} (vocab_size in its config.json). The tokenizer is another "
                "model's, or tokens were added to it without a row in the embedding: leave them out of prompts and "
                "templates, or take a model that was trained with them"
            )
        unknown_id = self._tokenizer.unk_token_id
        has_unknown = unknown_id in token_ids and self._tokenizer.unk_token not in text
        new_characters = sorted(set(text) - self._known_characters)
        characters = [c for c in new_characters if (c.isprintable() or c in "\n\t") and not self._represents(c)]
        if has_unknown or characters:
            shown = ", ".join(map(repr, characters[:10])) or f"a part of {text!r:.100}"
            raise ValueError(f"{place}: the model's tokenizer does not know {shown}; the prompt cannot be represented")
        self._known_characters.update(new_characters)

    def _represents(self, character: str) -> bool:
        token_ids = self._tokenizer(character, add_special_tokens=False)["input_ids"]
        return bool(token_ids) and self._tokenizer.unk_token_id not in token_ids


def raw_token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of raw texts, with the special tokens that the tokenizer adds by itself.

    A text that begins with the beginning-of-sequence token keeps a single one: a chat format written by hand includes
    the token, and models are not trained on two.
    """
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
    bos = getattr(tokenizer, "bos_token_id", None)  # a tokenizer need not have the concept
    if bos is None:
        return encoded
    return [
        ids[1:] if ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token) else ids
        for text, ids in zip(texts, encoded, strict=True)
    ]


def _raw_text(record: Record) -> str:
    """The prompt as text; of a conversation, the one user message's content: any other needs a chat template."""
    prompt = record.prompt
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    raise ValueError(
        f"{record.place} holds a conversation of {len(prompt)} messages, and only a single user message can do without "
        "a chat template; set chat_template=true for this data source"
    )
