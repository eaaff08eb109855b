"""Loads an implementation of the loss by name, calls it on a recording, and checks and orders what it returned.

Shapes: B responses, L their longest.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.conformance.recording import Recording
from megatron_fipo.rl.objective import LossOutput
from megatron_fipo.system.nearest_name import did_you_mean

Implementation = Callable[..., Any]
"""loss(log_probs, old_log_probs, advantages, response_mask, config); docs/library.md says what it may return."""

SIGNATURE = "loss(log_probs, old_log_probs, advantages, response_mask, config)"
PER_TOKEN = ("future_kl", "influence_weights", "token_loss", "final_mask")
KEYS = ("loss", "loss_sum", "normalizer", *PER_TOKEN)


class CannotUseError(ValueError):
    """An implementation that cannot be compared; the message says why and what to do."""


def load(name: str) -> Implementation:
    """Import "package.module:function". Modules are looked for in the current folder too.

    Raises:
        CannotUseError: if there is no such module or function.
    """
    module_name, separator, attribute = name.partition(":")
    parts = [*module_name.split("."), attribute]
    if not separator or not all(part.isidentifier() for part in parts):
        raise CannotUseError(f"{name!r} names no function. Write package.module:function, such as my_module:loss.")
    module = _import(name, module_name)
    if not hasattr(module, attribute):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = did_you_mean(attribute, functions, shown_as=f"{module_name}:{{}}")
        raise CannotUseError(f"{module_name} (in {module.__file__}) has no function {attribute!r}.{hint}")
    found: Implementation = getattr(module, attribute)
    if not callable(found):
        raise CannotUseError(f"{name} is a {type(found).__name__} and no function. It is called as {SIGNATURE}.")
    return found


def results(name: str, implementation: Implementation, recording: Recording) -> dict[str, Tensor]:
    """The implementation's results on a recording, detached: loss, gradient and the other KEYS that it returns.

    Raises:
        CannotUseError: if it raises, or returns what cannot be compared.
    """
    log_probs = recording.log_probs.clone().requires_grad_()
    others = (recording.old_log_probs, recording.advantages, recording.response_mask)
    try:
        returned = implementation(log_probs, *(tensor.clone() for tensor in others), recording.config)
    except (Exception, SystemExit) as error:
        raise CannotUseError(
            f"{name}: raised on the recording {recording.case}: {_told(error)}. It is called as {SIGNATURE}."
        ) from error
    found = _ordered(returned, f"{name}: on the recording {recording.case} it returned", log_probs.shape)
    if not found["loss"].requires_grad:
        raise CannotUseError(
            f"{name}: on the recording {recording.case} the loss does not depend on log_probs: it has no graph. "
            "Remove detach, item and no_grad from its computation."
        )
    (gradient,) = torch.autograd.grad(found["loss"], log_probs, allow_unused=True)
    if gradient is None:
        raise CannotUseError(f"{name}: on the recording {recording.case} the loss has a graph without log_probs.")
    found = {key: value.detach() for key, value in found.items()} | {"gradient": gradient}
    for key, value in found.items():
        where = recording.final_mask if key in PER_TOKEN else ...
        bad = int((~torch.isfinite(value[where])).sum())
        if bad:
            raise CannotUseError(
                f"{name}: on the recording {recording.case}, {key} holds {bad} numbers that are NaN or infinite. All "
                "inputs are finite, and so is what was recorded."
            )
    return found


def _ordered(returned: Any, what: str, shape: torch.Size) -> dict[str, Tensor]:
    """The returned tensors by name, with the loss as a mean."""
    if isinstance(returned, Tensor):
        returned = {"loss": returned}
    elif isinstance(returned, LossOutput):
        returned = {key: getattr(returned, key) for key in KEYS if getattr(returned, key, None) is not None}
    if not isinstance(returned, Mapping):
        raise CannotUseError(f"{what} a {type(returned).__name__}. Return the loss, or a dict of {', '.join(KEYS)}.")
    unknown = [key for key in returned if key not in KEYS]
    if unknown:
        raise CannotUseError(f"{what} {unknown[0]!r}, which is compared with nothing. Known are {', '.join(KEYS)}.")
    found = {}
    for key, value in returned.items():
        wanted = shape if key in PER_TOKEN else torch.Size()
        if not isinstance(value, Tensor) and key in ("loss", "loss_sum", "normalizer"):
            value = torch.as_tensor(value)
        if not isinstance(value, Tensor) or value.shape != wanted:
            given = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise CannotUseError(f"{what} {key} as {given}; it must be a tensor of the shape {tuple(wanted)}.")
        found[key] = value
    if "loss" not in found:
        if not {"loss_sum", "normalizer"} <= found.keys():
            raise CannotUseError(
                f"{what} no loss. Return its mean as loss, or loss_sum and the normalizer to divide by."
            )
        found["loss"] = found["loss_sum"] / found["normalizer"]
    found.pop("loss_sum", None)
    return found


def _import(name: str, module_name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise CannotUseError(
                f"{name}: there is no module {error.name!r} in this environment, nor in {Path.cwd()}. Run the command "
                "where it lies, or add its folder to PYTHONPATH."
            ) from error
        raise CannotUseError(f"{name}: {module_name} needs the module {error.name!r}, which is not there.") from error
    except (Exception, SystemExit) as error:
        raise CannotUseError(f"{name}: importing {module_name} raised {_told(error)}.") from error


def _told(error: BaseException) -> str:
    """An exception in words, with the innermost line of the implementation's code if that was entered."""
    on_the_way = (__file__, importlib.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename not in on_the_way and not frame.filename.startswith("<")]
    place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {error}{place}"
