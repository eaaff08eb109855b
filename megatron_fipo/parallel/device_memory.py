"""A GPU's memory where other processes use the same GPU: caches are given back, and buffers can be opened by others.

On a CPU every function here does nothing.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where torch's allocator takes its settings from; the first one that is set counts. Releases before 2.9 know the
second alone."""
_EXPANDABLE = "expandable_segments"
_PINNED_AS_ASKED = "pinned_max_round_threshold_mb:1"
"""Blocks of pinned memory above this many MiB are as large as they are asked for. Otherwise each is rounded up to a
power of two: an actor that lends its memory would take up to twice as much of the host's. Known since torch 2.13."""


def allocator_settings() -> str:
    """The settings that torch's allocator was started with, such as "expandable_segments:True"."""
    return next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), "")


def is_expandable(settings: str) -> bool:
    """Whether settings ask for expandable segments."""
    return any(_key_and_value(entry) == (_EXPANDABLE, "true") for entry in settings.split(","))


def with_expandable(settings: str, value: bool) -> str:
    """Return the settings with expandable segments on or off and every other entry unchanged."""
    entries = [entry.strip() for entry in settings.split(",") if entry.strip()]
    kept = [entry for entry in entries if _key_and_value(entry)[0] != _EXPANDABLE]
    return ",".join([*kept, f"{_EXPANDABLE}:{value}"])


def prefer_expandable_segments() -> None:
    """Let segments grow, and round no large block of pinned memory up, unless the environment says how to allocate.

    Microbatches are of ever new lengths. With segments of fixed size what they leave behind fits no later one, and the
    allocator holds on to far more than is ever in use.
    """
    if torch.cuda.is_available() and not allocator_settings():
        settings = with_expandable(_PINNED_AS_ASKED if _knows_pinned_threshold() else "", True)
        os.environ[_VARIABLES[0]] = os.environ[_VARIABLES[1]] = settings
        _set_allocator(settings)


@contextmanager
def shareable_allocations() -> Iterator[None]:
    """What is allocated within lies in segments that another process can open by a CUDA IPC handle.

    Expandable segments have no such handle that every release of torch can open, so they are off meanwhile. The whole
    text of the settings is written: torch resets each entry that a text leaves out.
    """
    settings = allocator_settings()
    is_off_meanwhile = torch.cuda.is_available() and is_expandable(settings)
    if is_off_meanwhile:
        _set_allocator(with_expandable(settings, False))
    try:
        yield
    finally:
        if is_off_meanwhile:
            _set_allocator(settings)


def give_back_caches() -> None:
    """Return to the device what torch's allocator holds and nobody uses. No communication.

    Other processes do not see that such memory is free.
    """
    if torch.cuda.is_available():
        gc.collect()  # a tensor in a reference cycle would keep its block
        torch.cuda.ipc_collect()  # buffers that servers had opened and have let go of
        torch.cuda.empty_cache()


def _knows_pinned_threshold() -> bool:
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 13)


def _key_and_value(entry: str) -> tuple[str, str]:
    key, _, value = entry.partition(":")
    return key.strip(), value.strip().lower()


def _set_allocator(settings: str) -> None:
    if hasattr(torch._C, "_accelerator_setAllocatorSettings"):
        torch._C._accelerator_setAllocatorSettings(settings)
    else:
        torch.cuda.memory._set_allocator_settings(settings)
