"""Talk to an exported model in the terminal, with the same engine and sampling as in training."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from transformers import PreTrainedTokenizerBase

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.config import read_model_config
from megatron_fipo.convert.inspection import check_weights
from megatron_fipo.data.formatting import raw_token_ids
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.hub.models import model_folder
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams, sample_seed
from megatron_fipo.rollout.in_process.engine import InProcessEngine
from megatron_fipo.system.error_net import say_on_stderr
from megatron_fipo.system.event_loop import run_to_end
from megatron_fipo.system.text_hygiene import clean_text

MAX_LISTED_CHARACTERS = 100
"""If a tokenizer knows no more characters than this, they are all listed when somebody types another one."""


@dataclass(frozen=True)
class ChatOptions:
    """The options of `megatron-fipo chat`, without the model."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    """Longest answer."""
    raw: bool = False
    """Continue the text as it is, also where the tokenizer has a chat template."""
    seed: int | None = None
    """None draws a new one each time."""


class TextPrinter:
    """Writes tokens as text as they come, holding back characters whose bytes are not complete yet.

    What a model writes is text for the reader and no order to the terminal: control codes appear as what they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        self._tokenizer = tokenizer
        self._out = out
        self._ids: list[int] = []
        self._shown = 0

    def token(self, token_id: int) -> None:
        """Take the next token."""
        self._ids.append(token_id)
        text = self._text()
        # An unfinished character decodes to U+FFFD; the next token completes it.
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """Write what was held back, and end the line."""
        self._show(self._text() + "\n")
        self._ids, self._shown = [], 0

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _show(self, text: str) -> None:
        self._out.write(clean_text(text[self._shown :]))
        self._out.flush()
        self._shown = len(text)
        if text.endswith("\n"):  # decode whole lines only, or a long answer would take quadratic time
            self._ids, self._shown = [], 0


class Chat:
    """A conversation with one model.

    With a chat template every turn sees those before it; raw text is continued each time from that text alone.
    """

    def __init__(self, folder: str | Path, options: ChatOptions, out: TextIO | None = None) -> None:
        """Load a Hugging Face folder, or a model by its name on the hub.

        It goes on the GPU where there is one, in the checkpoint's dtype, else on the CPU in float32.

        Raises:
            ValueError: if the folder does not hold one whole model of finite numbers, as training wants it.
        """
        folder = model_folder(str(folder), key="model")
        read_model_config(folder)  # transformers would look for a path that does not exist on the hub, code and all
        self.warning = check_weights(folder)
        """A warning about files in the folder that are not read; empty where there are none."""
        self.options = options
        self.tokenizer = load_tokenizer(folder)
        on_gpu = torch.cuda.is_available()
        self.engine = InProcessEngine(
            folder,
            dtype="auto" if on_gpu else torch.float32,
            max_batch_size=1,
            device="cuda" if on_gpu else "cpu",
            tokenizer=self.tokenizer,
        )
        self.uses_template = bool(self.tokenizer.chat_template) and not options.raw
        self._out = sys.stdout if out is None else out
        self._seed = secrets.randbits(62) if options.seed is None else options.seed
        self._messages: list[dict[str, str]] = []
        self._num_turns = 0

    def answer(self, text: str) -> str:
        """Answer one message, writing the text as it is generated; returns it.

        Raises:
            ValueError: if the tokenizer does not know part of the text.
            KeyboardInterrupt: on Ctrl-C; the turn is forgotten then.
        """
        if not text.isascii() and text != text.encode("utf-8", "replace").decode("utf-8"):
            raise ValueError(f"{text!a} holds bytes that are no UTF-8, so that no tokenizer can read it")
        prompt, messages = text, [*self._messages, {"role": "user", "content": text}]
        if self.uses_template:
            prompt = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        if self.uses_template:
            token_ids = tuple(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        else:
            token_ids = tuple(raw_token_ids(self.tokenizer, [prompt])[0])
        if self.tokenizer.unk_token_id in token_ids:
            known = _known_characters(self.tokenizer)
            more = f"; all that it knows is {known}" if known else ""
            raise ValueError(f"the model's tokenizer does not know every character of {text!r}{more}")
        options, printer = self.options, TextPrinter(self.tokenizer, self._out)
        request = GenerationRequest(
            sample_id=str(self._num_turns),
            group_id=self._num_turns,
            sample_index=0,
            prompt_ids=token_ids,
            sampling=SamplingParams(options.max_tokens, options.temperature, options.top_p),
            seed=sample_seed(self._seed, 0, self._num_turns, 0),
        )
        try:
            sample = run_to_end(self.engine.generate(request, on_token=printer.token))
        finally:
            printer.end()
        self._num_turns += 1
        reply = str(self.tokenizer.decode(sample.response_ids.tolist(), skip_special_tokens=True))
        if self.uses_template:
            self._messages = [*messages, {"role": "assistant", "content": reply}]
        return reply

    def loop(self, lines: Iterable[str]) -> None:
        """Answer line after line. Ctrl-C ends the answer under way, not the conversation."""
        for line in lines:
            if not line.strip():
                continue
            try:
                self.answer(line)
            except KeyboardInterrupt:
                print("[interrupted]", file=self._out)
            except ValueError as error:
                print(f"[{error}]", file=self._out)


def _known_characters(tokenizer: PreTrainedTokenizerBase) -> str:
    """Every character that the tokenizer knows; empty where it knows too many to list, or whole words."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: int(item[1]))
    known = [word for word, _ in words if word not in tokenizer.all_special_tokens]
    is_small = len(known) <= MAX_LISTED_CHARACTERS and all(len(word) == 1 for word in known)
    return "".join(known) if is_small else ""


def terminal_lines() -> Iterator[str]:
    """Lines that the user types, until Ctrl-D or Ctrl-C at the prompt."""
    marker = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(marker)
        except (EOFError, KeyboardInterrupt):
            if marker:
                print()
            return
        yield line


def talk(folder: str, prompt: str | None, options: ChatOptions) -> None:
    """Answer one prompt, or every line of standard input until it ends."""
    if prompt is None and sys.stdin is None:
        raise ValueError("standard input is closed, so that there is nothing to answer; give a text with --prompt.")
    chat = Chat(folder, options)
    if chat.warning:
        say_on_stderr(f"warning: {chat.warning}")
    if prompt is not None:
        chat.answer(prompt)
        return
    if sys.stdin.isatty():
        how = "as chat messages" if chat.uses_template else "as text to continue"
        print(f"{folder}: what you type is taken {how}. Ctrl-C stops an answer, Ctrl-D leaves.")
    chat.loop(terminal_lines())
