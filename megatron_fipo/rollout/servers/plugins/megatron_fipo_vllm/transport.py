"""A buffer on its way from the trainer to a worker: its bytes, or a handle to memory on a GPU of the same host.

Both are JSON. torch hands CUDA memory over as the pickled arguments of its rebuild_cuda_tensor; those of a buffer of
bytes are numbers and byte strings, so they are written as such, and the worker unpickles nothing.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

_NUM_ARGUMENTS = 15
"""Number of arguments of torch's rebuild_cuda_tensor."""
_FIXED: dict[int, Any] = {0: torch.Tensor, 4: torch.storage.TypedStorage, 5: torch.uint8, 10: False}
"""Arguments that are the same for every buffer: class, class of the storage, dtype, requires_grad."""
_SIZE, _STRIDE, _DEVICE = 1, 2, 6
_NUMBERS = {"offset": 3, "storage_bytes": 8, "storage_offset": 9, "counter_offset": 12}
_BYTES = {"handle": 7, "counter": 11, "event": 13}
_SYNC = 14
_HANDLE_BYTES = 4096
"""Limit on each of the three byte strings, which are much shorter."""


def pack(flat: Tensor) -> dict[str, Any]:
    """The values, as they go into the request for one worker.

    Args:
        flat: uint8 [bytes] on the CPU, contiguous.
    """
    return {"bytes": base64.b64encode(flat.numpy().data).decode()}


def pack_handle(device_uuid: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """A handle to a buffer on the worker's GPU; the buffer must live until that worker has answered.

    Args:
        arguments: those of torch's rebuild_cuda_tensor, None in the device's place.

    Raises:
        ValueError: if they are not those of a contiguous buffer of bytes, as torch names it.
    """
    if (
        len(arguments) != _NUM_ARGUMENTS
        or any(arguments[position] != value for position, value in _FIXED.items())
        or tuple(arguments[_STRIDE]) != (1,)
    ):
        raise ValueError(
            f"torch {torch.__version__} describes a buffer on a GPU by {arguments!r}, which is not what this transport "
            "knows. Take the version of constraints-gpu.txt, or servers.weight_sync=distributed."
        )
    (size,) = arguments[_SIZE]
    numbers = {name: int(arguments[position]) for name, position in _NUMBERS.items()}
    texts = {name: base64.b64encode(arguments[position]).decode() for name, position in _BYTES.items()}
    return {"device": device_uuid, "size": int(size), **numbers, **texts, "sync": bool(arguments[_SYNC])}


def unpack(message: dict[str, Any], device: torch.device) -> Tensor:
    """The buffer in memory of its own, on the worker's device.

    Raises:
        ValueError: if the message is not of the form that `pack` and `pack_handle` write, or names a GPU that this
            process does not see.
    """
    if isinstance(message, dict) and set(message) == {"bytes"}:
        return torch.frombuffer(bytearray(_decode(message, "bytes")), dtype=torch.uint8).to(device)
    arguments = _arguments(message)
    visible = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if message["device"] not in visible:
        raise ValueError(
            f"the buffer lies on GPU {message['device']}; this server sees {visible} only. A trainer hands weights "
            "over by CUDA IPC on GPUs that they share; take the distributed weight sync for servers on other GPUs."
        )
    arguments[_DEVICE] = visible.index(message["device"])
    shared = reductions.rebuild_cuda_tensor(*arguments)
    own = shared.to(device, copy=True)
    torch.cuda.synchronize(device)  # the sender overwrites the buffer once it has the answer
    return own


def _arguments(message: Any) -> list[Any]:
    """The arguments of torch's rebuild_cuda_tensor without the device, each checked for its kind."""
    names = {"device", "size", *_NUMBERS, *_BYTES, "sync"}
    if not isinstance(message, dict) or set(message) != names:
        raise ValueError(f"a bucket is {{bytes}} or a handle of {sorted(names)}; this one is {_described(message)}")
    for name in ("size", *_NUMBERS):
        if type(message[name]) is not int or not 0 <= message[name] < 2**63:
            raise ValueError(
                f"a handle's {name} must be a whole number of bytes from 0 on: {_described(message[name])}"
            )
    if type(message["sync"]) is not bool or type(message["device"]) is not str:
        raise ValueError("a handle's sync must be true or false and its device a text")
    if message["offset"] + message["size"] > message["storage_bytes"]:
        raise ValueError(f"a handle's {message['size']} bytes reach beyond its memory of {message['storage_bytes']}")
    arguments: list[Any] = [None] * _NUM_ARGUMENTS
    for position, value in _FIXED.items():
        arguments[position] = value
    arguments[_SIZE], arguments[_STRIDE] = torch.Size([message["size"]]), (1,)
    for name, position in _NUMBERS.items():
        arguments[position] = message[name]
    for name, position in _BYTES.items():
        arguments[position] = _decode(message, name, _HANDLE_BYTES)
    arguments[_SYNC] = message["sync"]
    return arguments


def _decode(message: dict[str, Any], name: str, longest: int | None = None) -> bytes:
    try:
        content = base64.b64decode(message[name], validate=True)
    except (TypeError, binascii.Error, ValueError) as error:
        raise ValueError(f"a bucket's {name} must be base64: {error}") from error
    if longest is not None and len(content) > longest:
        raise ValueError(f"a handle's {name} has {len(content)} bytes; none has more than {longest}")
    return content


def _described(value: Any) -> str:
    return str(sorted(value) if isinstance(value, dict) else repr(value))[:200]
