"""Applying a model's chat template, which is a program that came with the model: it may fail, or never end."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

from megatron_fipo.verifiers.cpu_limit import CpuLimitError, cpu_limit

LIMIT_S = 10.0
"""CPU time that one prompt may take; templates take less than a millisecond."""

_WAIT_FACTOR = 12
"""Longest wall-clock wait for a trial, in multiples of LIMIT_S: the machine may be busy with other work."""

_SPARE_CHARACTERS = 1_000_000
"""Characters that a template may add beyond ten times the messages' own: lists of tools and rules are shorter."""

_REMEDY = (
    "Mend the template in the model's folder, or set chat_template=false and write the format into prompt_template"
)

Messages = list[dict[str, str]]


def render(tokenizer: Any, messages: Messages, place: str) -> str:
    """The text of a chat with the turn of the assistant opened.

    Raises:
        ValueError: if the template fails or takes too long, naming the place and the remedy.
    """
    try:
        with cpu_limit(LIMIT_S):
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except CpuLimitError as error:
        raise ValueError(_endless(place)) from error
    except Exception as error:  # a template can raise anything: its own errors, jinja2's, and any expression's
        told = f"{type(error).__name__}: {error}".replace("\n", " ")
        system = any(message["role"] == "system" for message in messages)
        hint = " Some templates take no system message: leave out system_prompt." if system else ""
        raise ValueError(f"{place}: the tokenizer's chat template fails ({told:.300}).{hint} {_REMEDY}") from error
    if problem := _text_problem(text, messages):
        raise ValueError(f"{place}: the tokenizer's chat template {problem}. {_REMEDY}")
    return text


def _text_problem(text: str, messages: Messages) -> str:
    """What is wrong with the text of a chat, whose last message is the user's; empty where nothing is."""
    written = sum(len(message["content"]) for message in messages)
    if len(text) > _SPARE_CHARACTERS + 10 * written:
        return f"makes {len(text):,} characters of a chat of {written:,}"
    last = messages[-1]["content"].strip()
    _, found, behind = text.rpartition(last)
    if not found:
        return f"leaves out or changes the last message ({last[:60]!r}): the model would answer another question"
    if last and not behind.strip():
        return (
            "writes nothing after the last message, neither its end nor the beginning of an answer: the model would "
            "continue the question"
        )
    return ""


def try_out(tokenizer: Any, messages: Messages, place: str) -> None:
    """Apply the template once in a process that can be killed: a single expression that never ends (10**10**10) would
    hold this one for ever.

    Raises:
        ValueError: if it does not end.
    """
    if not _ends(lambda: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)):
        raise ValueError(_endless(place))


def _endless(place: str) -> str:
    return f"{place}: the tokenizer's chat template does not end (over {LIMIT_S:g} s for one prompt). {_REMEDY}"


def _ends(action: Callable[[], object]) -> bool:
    """Whether an action ends, in whatever way, within its limit; it runs in a child process."""
    child = os.fork()
    if child == 0:
        try:
            # The kernel ends the process even while the interpreter is blocked; CPU time counts from the fork.
            resource.setrlimit(resource.RLIMIT_CPU, (int(LIMIT_S), int(LIMIT_S) + 1))
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            action()
        finally:
            os._exit(0)  # without the parent's clean-up; its errors come up again in the parent
    deadline = time.monotonic() + _WAIT_FACTOR * LIMIT_S
    pause = 0.001
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return not os.WIFSIGNALED(status)
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
