"""Imports Megatron-Core; without CUDA its fused functions stay the plain ones that they are written as.

Megatron hands them to torch.compile as they are defined, which imports the whole compiler: a second of every start.
`parallel.cpu` switches that compiler off where there is no CUDA, so there the plain functions are what runs either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


if torch.cuda.is_available():
    import megatron.core
else:
    # megatron.core.jit keeps the decorator under a name of its own, for what is imported later.
    _compile = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = _compile
