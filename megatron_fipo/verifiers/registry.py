"""Loads verifiers by name: a built-in name, the dotted path of a user's own function, or the URL of a reward model.

What only the last two need, asyncio and an HTTP client, is imported with the first of them: it is a third of what the
worker of a built-in verifier would import.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_fipo.system.nearest_name import did_you_mean
from megatron_fipo.verifiers.names import BUILTIN_VERIFIERS, is_own_function, is_reward_model
from megatron_fipo.verifiers.verdict import JobVerifier, Verifier, split_name

FOLDERS_VARIABLE = "MEGATRON_FIPO_VERIFIER_FOLDERS"
"""Environment variable with further folders, separated as in PATH, in which a user's own modules are searched. Workers
inherit it."""


class CannotLoadError(ImportError):
    """A user's own verifier cannot be used. The message says why and what to do, so no traceback is needed."""


def shown_name(name: str) -> str:
    """A verifier's name, or a `combined_name`, as messages show it: without a key that a URL may contain."""
    weights = split_name(name)
    if len(weights) == 1:
        if not is_reward_model(name):
            return name
        from megatron_fipo.verifiers.reward_model import without_secrets

        return without_secrets(name)
    return " + ".join(f"{weight:g}*{shown_name(part)}" for part, weight in weights.items())


def also_look_in(folder: Path) -> None:
    """Add a folder to those in which a user's own modules are searched, for every process started from now on.

    It is searched last: modules in the current directory or the environment take precedence.
    """
    folders = [text for text in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if text]
    if str(folder.resolve()) not in folders:
        os.environ[FOLDERS_VARIABLE] = os.pathsep.join([*folders, str(folder.resolve())])


@cache
def load_verifier(name: str) -> Verifier:
    """Import a verifier.

    Raises:
        ValueError: for a name that no verifier can have.
        CannotLoadError: if a user's own verifier cannot be used: there is no such module or function, importing it
            fails, or its signature cannot be called.
        ImportError: if a package that a built-in verifier needs is not installed.
    """
    if is_reward_model(name):
        from megatron_fipo.verifiers.reward_model import RewardModel

        return RewardModel(name)
    if is_own_function(name):
        return _own(name)
    if name not in BUILTIN_VERIFIERS:
        raise ValueError(f"verifier {name!r} cannot be loaded: no verifier can have that name.")
    module, _, function = BUILTIN_VERIFIERS[name].partition(":")
    verifier: Verifier = getattr(importlib.import_module(module), function)
    return verifier


# ------------------------------------------------------------------------------------------------- a user's own module


def _own(name: str) -> JobVerifier:
    from megatron_fipo.verifiers.own_function import OwnFunction, SignatureError

    module_name, _, attribute = name.partition(":")
    module = _import(name, module_name)
    if not hasattr(module, attribute):
        raise CannotLoadError(_no_such_function(name, module, attribute))
    found = getattr(module, attribute)
    if isinstance(found, JobVerifier):
        return found
    if inspect.isclass(found):
        raise CannotLoadError(
            f"verifier {name!r} is a class. Name an instance of it: `{attribute.lower()} = {attribute}(…)` in the "
            f"module, and verifier: {module_name}:{attribute.lower()}."
        )
    if not callable(found):
        raise CannotLoadError(f"verifier {name!r} is a {type(found).__name__}, not a function.")
    try:
        return OwnFunction(name, found)
    except SignatureError as error:
        raise CannotLoadError(str(error)) from error


def _import(name: str, module_name: str) -> ModuleType:
    for folder in (str(Path.cwd()), *os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.append(folder)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise CannotLoadError(_no_such_module(name, module_name, error.name)) from error
        raise CannotLoadError(
            f"verifier {name!r}: its module imports {error.name!r}, which is not installed for {sys.executable}."
        ) from error
    except (Exception, SystemExit) as error:
        raise CannotLoadError(
            f"verifier {name!r}: importing its module failed: {type(error).__name__}: {error} ({_place(error)})."
        ) from error


def _no_such_module(name: str, module_name: str, missing: str) -> str:
    folders = _searched()
    where = ", ".join(str(folder) for folder in folders)
    parent, _, leaf = missing.rpartition(".")
    if parent:
        known = [module.name for module in pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", []))]
        where = f"the package {parent}"
    else:
        known = [module.name for folder in folders for module in pkgutil.iter_modules([str(folder)])]
    as_it_would_be = module_name.replace(missing, f"{parent}.{{}}" if parent else "{}", 1)
    hint = did_you_mean(leaf, known, shown_as=f"{as_it_would_be}:{name.partition(':')[2]}")
    return (
        f"verifier {name!r}: there is no module {missing!r}. It was looked for in {where}"
        f"{'' if parent else ' and among the installed packages'}.{hint}"
    )


def _searched() -> list[Path]:
    """The folders of sys.path without those of the interpreter and of installed packages, for messages."""
    folders = []
    for entry in sys.path:
        folder = Path(entry or ".").resolve()
        is_installed = any(folder.is_relative_to(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix))
        if folder.is_dir() and folder not in folders and not is_installed and folder.name != "site-packages":
            folders.append(folder)
    return folders


def _no_such_function(name: str, module: ModuleType, attribute: str) -> str:
    own = sorted(key for key, value in vars(module).items() if not key.startswith("_") and _could_judge(module, value))
    hint = did_you_mean(attribute, own, shown_as=f"{module.__name__}:{{}}")
    place = getattr(module, "__file__", None) or module.__name__
    return f"verifier {name!r}: {place} has no {attribute!r}; it has {', '.join(own) or 'no function'}.{hint}"


def _could_judge(module: ModuleType, value: Any) -> bool:
    if isinstance(value, JobVerifier):
        return True
    return callable(value) and not inspect.isclass(value) and getattr(value, "__module__", None) == module.__name__


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"
