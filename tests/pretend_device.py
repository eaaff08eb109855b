"""A device that is none: its tensors compute on the CPU, but what would make a host wait for a GPU is written down.

    device = pretend_device.register()         # once in a process, which has no other device
    with pretend_device.watching() as crossings:
        ...                                    # with tensors.to(device)
    assert crossings == []

To torch the tensors lie on a device of their own (its PrivateUse1 backend), so autograd, shapes and dtypes are real,
and so are the numbers; tensors of the host among them are refused. Collectives of torch.distributed go to the CPU's
process groups.

Written down are reads by the host (`.item()`, `.tolist()`, `bool()`), results whose size only the device knows
(`nonzero`, masks as indices, `repeat_interleave` without its output size), and copies between host and device. A kernel
that copies on its own, within one operation, does not show; so tests on a GPU watch by torch's own means.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"

aten = torch.ops.aten
_HOST_READS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.item, aten.allclose}
_UNKNOWN_SIZES = {
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten._unique2,
    aten._unique,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


@dataclass(frozen=True)
class Crossing:
    """One thing that a host would wait for, or send."""

    kind: str
    """read, size, to_host or to_device."""
    operation: str
    place: str
    """The line of the project that asked for it."""

    def __str__(self) -> str:
        return f"{self.kind} by {self.operation} at {self.place}"


class _PretendTensor(Tensor):
    """A tensor on the device; `host` computes for it."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> _PretendTensor:
        made: _PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        made.host = host.detach()
        return made

    def tolist(self) -> Any:  # torch's own refuses subclasses
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"on {NAME}: {self.host!r}"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of pretend_device.watching()")


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[Crossing] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _tensors_of((args, kwargs))
        on_device = [tensor for tensor in tensors if isinstance(tensor, _PretendTensor)]
        target = kwargs.get("device")
        makes_on_device = target is not None and torch.device(target).type == NAME
        if not on_device and not makes_on_device:
            return func(*args, **kwargs)
        self._note(func, args, kwargs, tensors, makes_on_device)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        host_args, host_kwargs = tree_map_only(_PretendTensor, lambda tensor: tensor.host, (args, kwargs))
        result = func(*host_args, **host_kwargs)
        if target is not None and not makes_on_device:
            # A copy to the host: not the device's own memory, even where the types are the same.
            return tree_map_only(Tensor, lambda tensor: tensor.clone(), result)
        wrapped = tree_map(lambda value: _PretendTensor(value) if isinstance(value, Tensor) else value, result)
        if not on_device or not str(func).startswith("aten."):
            return wrapped
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _note(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], makes_on_device: bool) -> None:
        on_device = [isinstance(tensor, _PretendTensor) for tensor in tensors]
        packet = getattr(func, "overloadpacket", func)
        kind = None
        if packet in _HOST_READS:
            kind = "read"
        elif _is_of_unknown_size(packet, args, kwargs):
            kind = "size"
        elif packet is aten._to_copy:
            if kwargs.get("device") is not None and on_device[0] != makes_on_device:
                kind = "to_device" if makes_on_device else "to_host"
        elif packet is aten.copy_:
            if on_device[0] != on_device[1]:
                kind = "to_device" if on_device[0] else "to_host"
        elif packet in _INDEXED and not all(on_device):
            kind = "to_device"  # indices on the host are sent
        elif any(not is_there and tensor.dim() for is_there, tensor in zip(on_device, tensors, strict=True)):
            raise RuntimeError(f"{func} got tensors of the host and of {NAME} at {_place()}")
        if kind:
            self.crossings.append(Crossing(kind, str(func), _place()))


def _is_of_unknown_size(packet: Any, args: Any, kwargs: Any) -> bool:
    """Whether only the device knows how large the result is."""
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet in _INDEXED:
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return packet in _UNKNOWN_SIZES


def register() -> torch.device:
    """The device. For a process of its own: torch has one such backend, and does not forget it."""
    _setup_privateuseone_for_python_backend(NAME)
    return torch.device(NAME, 0)


@contextmanager
def watching() -> Iterator[list[Crossing]]:
    """Let the device compute, and collect what crosses between it and the host."""
    with _Watch() as watch:
        yield watch.crossings


def on_host(value: Any) -> Any:
    """The same with every tensor of the device as one of the CPU, without counting."""
    return tree_map_only(_PretendTensor, lambda tensor: tensor.host, value)


def _tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frames = [frame for frame in frames if not frame.filename.endswith("pretend_device.py")]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "backward"
