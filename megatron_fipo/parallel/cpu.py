"""Megatron-Core on hosts without CUDA.

Megatron-Core names CUDA devices, streams and random states unconditionally in a few places. `install` redirects those
names to their CPU equivalents, in this process only, so that the unmodified package trains over gloo: the same tensor,
pipeline, context and data parallelism as on GPUs, exact and slow. Where CUDA is there it does nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.utils._device

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "rand", "randn")
_installed = False


class _NoStream:
    """Stands for a CUDA stream or event where there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def record_event(self, event: Any = None) -> _NoStream:
        return self

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The same tensor factory on the CPU: it replaces a literal CUDA device and pins no memory (needs a driver)."""

    @functools.wraps(factory)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return redirected


def install() -> None:
    """Redirect CUDA names to the CPU; idempotent. Call it before a model is built."""
    global _installed
    if torch.cuda.is_available() or _installed:
        return
    _installed = True
    # Megatron's fused functions go through torch.compile, which on a CPU would compile C++ for minutes.
    torch._dynamo.config.disable = True
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.default_generator.manual_seed  # not torch.manual_seed: it seeds CUDA too
    # torch.device(...) as a context (transformers loads models under it) knows the factories by identity: have it note
    # the real ones, which the redirecting ones call.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    tensor_class: Any = torch.Tensor
    module_class: Any = torch.nn.Module
    tensor_class.cuda = lambda self, *args, **kwargs: self
    module_class.cuda = lambda self, *args, **kwargs: self
    type_of = tensor_class.type

    def type_as_on_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers choose by this string and know the CUDA names only.
        if dtype is None:
            return type_of(self).replace("torch.", "torch.cuda.", 1)
        return type_of(self, dtype, *args, **kwargs)

    tensor_class.type = type_as_on_cuda

    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
