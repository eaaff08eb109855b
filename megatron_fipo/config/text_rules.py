"""What a text of the configuration must be: names, paths, templates."""

from __future__ import annotations

import re
import unicodedata

LONGEST_NAME = 255
"""Bytes in a file's name that file systems take."""

REPOSITORY_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
"""A repository on the Hugging Face hub: owner/name."""


def text_problem(value: str, kind: str) -> tuple[str, str] | None:
    """The rule that a text of its kind breaks, and the remedy; None where nothing is wrong.

    Args:
        kind: a `declaration.TextKind`.
    """
    if kind != "prompt" and (control := control_character(value)):
        return f"holds the control character {control!r}, which no name or path needs", "Remove it"
    if half := lone_surrogate(value):
        return half, "Write the whole character"
    if kind == "path" and any(len(part.encode()) > LONGEST_NAME for part in value.split("/")):
        return f"file systems take names of at most {LONGEST_NAME} bytes", "Shorten it"
    return None


def control_character(text: str) -> str:
    """The first control character of a text; empty where it has none."""
    return next((character for character in text if unicodedata.category(character) == "Cc"), "")


def lone_surrogate(text: str) -> str:
    """A message about the first lone surrogate of a text; empty where it has none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"\\u{ord(text[error.start]):04x} at character {error.start + 1} is half of a character (a lone "
            "surrogate), which is no text"
        )
    return ""


def not_blank(value: str) -> str:
    """The rule for a text that must not be blank; empty where it is kept."""
    return "" if value.strip() else "must not be blank"


def one_folder_name(value: str) -> str:
    """The rule for a name that becomes a folder's; empty where it is kept."""
    if value.strip() and value not in (".", "..") and not {*value} & {"/", "\\", "\0", "\n"}:
        return ""
    return (
        "must be one folder's name, since run.output_dir is outputs/NAME by default: not empty, not . or .. and "
        "without /"
    )


def names_a_model(value: str) -> str:
    """The rule for model.path; empty where it is kept."""
    if value.strip():
        return ""
    return "must name a folder with a Hugging Face checkpoint, or a model on the hub (owner/name)"


def repository_or_empty(value: str) -> str:
    """The rule for checkpoint.push_to_hub; empty where it is kept."""
    if not value or REPOSITORY_NAME.fullmatch(value):
        return ""
    return "must be a repository on the Hugging Face hub, such as me/my-model, or empty"


def holds_prompt(value: str) -> str:
    """The rule for a template around prompts; empty where it is kept."""
    return "" if "{prompt}" in value else "must hold {prompt}, where the prompt goes"
