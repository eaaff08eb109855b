"""The names that a verifier may have: those of the built-in verifiers, and the forms of all others.

Configurations are checked against them before anything is loaded, so this module imports only the standard library.
"""

from __future__ import annotations

import re

BUILTIN_VERIFIERS = {
    "chain_arithmetic": "megatron_fipo.verifiers.chain_arithmetic:verify",
    "reasoning_gym": "megatron_fipo.verifiers.reasoning_gym_tasks:verify",
    "math": "megatron_fipo.verifiers.mathematics:verify",
    "exact": "megatron_fipo.verifiers.exact:verify",
    "math_answer": "megatron_fipo.verifiers.mathematics:verify_answer_line",
    "math_boxed": "megatron_fipo.verifiers.mathematics:verify_boxed",
    "code": "megatron_fipo.verifiers.code:verify",
    "code_unprotected": "megatron_fipo.verifiers.code:verify_unprotected",
}
"""Dotted path of each built-in verifier. A module is imported on first use, so that only these need their packages."""

_URL = re.compile(r"https?://[^\s/]+\S*")


def is_own_function(name: str) -> bool:
    """Whether a verifier's name is a dotted path, "package.module:function"."""
    module, separator, function = name.partition(":")
    return bool(separator) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def is_reward_model(name: str) -> bool:
    """Whether a verifier's name is the URL of a reward model."""
    return bool(_URL.fullmatch(name))


OTHER_FORMS = {"package.module:function": is_own_function, "http://host:port/path": is_reward_model}
"""Forms of all other verifiers' names: the form as messages write it, and its test."""
