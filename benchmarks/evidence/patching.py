"""Changes attributes of the project's modules for a while, in this process, to make a variant from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.evidence.report import SkipCase
from megatron_fipo.actor import model as model_module


@contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes that are there already, and put the old ones back.

    Raises:
        SkipCase: if one is not there: the code has moved on, and the variant would change nothing.
    """
    if missing := [name for name in values if not hasattr(owner, name)]:
        raise SkipCase(f"this revision has no {owner.__name__}.{missing[0]} to change")
    old = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(owner, name, value)


@contextmanager
def megatron_fields(**changes: Any) -> Iterator[None]:
    """Change fields of Megatron's TransformerConfig, after its own checks, for actors that are built inside."""
    original = model_module.transformer_config

    def changed(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        for name, value in changes.items():
            assert hasattr(config, name), f"TransformerConfig has no {name}"
            setattr(config, name, value)
        return config

    with patched(model_module, transformer_config=changed):
        yield
