"""Verifiers by name. A built-in name stands for a dotted path, so any other importable function works the same way."""

from __future__ import annotations

import difflib
import importlib
from functools import cache

from megatron_fipo.rl.verifiers.verdict import Verifier

BUILTIN_VERIFIERS = {
    "chain_arithmetic": "megatron_fipo.rl.verifiers.chain_arithmetic:verify",
    "exact": "megatron_fipo.rl.verifiers.exact:verify",
    "math": "megatron_fipo.rl.verifiers.mathematics:verify",
    "reasoning_gym": "megatron_fipo.rl.verifiers.reasoning_gym_tasks:verify",
}
"""Dotted path of each built-in verifier; modules load on first use, so that only those in use need their packages."""


def check_verifier_name(name: str) -> None:
    """Check that a name can stand for a verifier, without importing anything.

    Raises:
        ValueError: if it is neither built in nor of the form "package.module:function".
    """
    if name in BUILTIN_VERIFIERS:
        return
    module, separator, function = name.partition(":")
    if separator and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return
    nearest = difflib.get_close_matches(name, BUILTIN_VERIFIERS, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
        f"unknown verifier {name!r}: known are {', '.join(sorted(BUILTIN_VERIFIERS))}, "
        f"or a function of your own as 'package.module:function'.{hint}"
    )


@cache
def load_verifier(name: str) -> Verifier:
    """Import a verifier.

    Raises:
        ValueError: for a name that cannot stand for a verifier.
        ImportError: if its module, or a package that this needs, is not installed.
        AttributeError: if the module has no such function.
    """
    check_verifier_name(name)
    module, _, function = BUILTIN_VERIFIERS.get(name, name).partition(":")
    verifier: Verifier = getattr(importlib.import_module(module), function)
    return verifier
