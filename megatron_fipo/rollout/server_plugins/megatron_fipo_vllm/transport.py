"""A buffer on its way from the trainer to a worker: its bytes, or a handle to memory on a GPU of the same host."""

from __future__ import annotations

import base64
import pickle
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

_DEVICE_ARGUMENT = 6
"""Position of the device's number among the arguments of torch's rebuild_cuda_tensor."""


def pack(flat: Tensor) -> dict[str, str]:
    """The values, as they go into the request for one worker.

    Args:
        flat: uint8 [bytes] on the CPU, contiguous.
    """
    return {"bytes": base64.b64encode(flat.numpy().data).decode()}


def pack_handle(device_uuid: str, arguments: tuple[Any, ...]) -> dict[str, str]:
    """A handle to a buffer on the worker's GPU; the buffer must live until that worker has answered.

    Args:
        arguments: of torch's rebuild_cuda_tensor, None in the device's place.
    """
    return {"cuda_ipc": base64.b64encode(pickle.dumps(arguments)).decode(), "device": device_uuid}


def unpack(message: dict[str, str], device: torch.device) -> Tensor:
    """The buffer in memory of its own, on the worker's device.

    Raises:
        ValueError: if the buffer lies on a GPU that this process does not see.
    """
    if "bytes" in message:
        return torch.frombuffer(bytearray(base64.b64decode(message["bytes"])), dtype=torch.uint8).to(device)
    arguments: list[Any] = list(pickle.loads(base64.b64decode(message["cuda_ipc"])))
    visible = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if message["device"] not in visible:
        raise ValueError(
            f"the buffer lies on GPU {message['device']}; this server sees {visible} only. A trainer hands weights "
            "over by CUDA IPC on GPUs that they share; take the distributed weight sync for servers on other GPUs."
        )
    arguments[_DEVICE_ARGUMENT] = visible.index(message["device"])
    shared = reductions.rebuild_cuda_tensor(*arguments)
    own = shared.to(device, copy=True)
    torch.cuda.synchronize(device)  # the sender overwrites the buffer once it has the answer
    return own
