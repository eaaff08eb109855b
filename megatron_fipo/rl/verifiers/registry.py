"""Verifiers by name.

A built-in name stands for a dotted path, so any other importable function works the same way. The URL of a reward model
is a name, too.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from functools import cache
from pathlib import Path

from megatron_fipo.rl.verifiers.reward_model import RewardModel
from megatron_fipo.rl.verifiers.verdict import Verifier

BUILTIN_VERIFIERS = {
    "chain_arithmetic": "megatron_fipo.rl.verifiers.chain_arithmetic:verify",
    "code": "megatron_fipo.rl.verifiers.code:verify",
    "code_unprotected": "megatron_fipo.rl.verifiers.code:verify_unprotected",
    "exact": "megatron_fipo.rl.verifiers.exact:verify",
    "math": "megatron_fipo.rl.verifiers.mathematics:verify",
    "math_answer": "megatron_fipo.rl.verifiers.mathematics:verify_answer_line",
    "math_boxed": "megatron_fipo.rl.verifiers.mathematics:verify_boxed",
    "reasoning_gym": "megatron_fipo.rl.verifiers.reasoning_gym_tasks:verify",
}
"""Dotted path of each built-in verifier; modules load on first use, so that only those in use need their packages."""

_URL = re.compile(r"https?://[^\s/]+\S*")


def check_verifier_name(name: str) -> None:
    """Check that a name can stand for a verifier, without importing anything.

    Raises:
        ValueError: if it is neither built in, nor of the form "package.module:function", nor the URL of a reward model.
    """
    if name in BUILTIN_VERIFIERS or _URL.fullmatch(name):
        return
    module, separator, function = name.partition(":")
    if separator and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return
    nearest = difflib.get_close_matches(name, BUILTIN_VERIFIERS, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
        f"unknown verifier {name!r}: known are {', '.join(sorted(BUILTIN_VERIFIERS))}, "
        f"a function of your own as 'package.module:function', or the URL of a reward model.{hint}"
    )


def also_look_in(folder: Path) -> None:
    """Have modules of the user's own looked for in a folder as well, in every process started from here on.

    It comes last: what the current directory or the environment has under a name is what the name means.
    """
    folders = [text for text in os.environ.get("PYTHONPATH", "").split(os.pathsep) if text]
    if str(folder.resolve()) not in folders:
        os.environ["PYTHONPATH"] = os.pathsep.join([*folders, str(folder.resolve())])


@cache
def load_verifier(name: str) -> Verifier:
    """Import a verifier.

    Raises:
        ValueError: for a name that cannot stand for a verifier.
        ImportError: if its module, or a package that this needs, is not installed.
        AttributeError: if the module has no such function.
    """
    check_verifier_name(name)
    if _URL.fullmatch(name):
        return RewardModel(name)
    module, _, function = BUILTIN_VERIFIERS.get(name, name).partition(":")
    verifier: Verifier = getattr(importlib.import_module(module), function)
    return verifier
