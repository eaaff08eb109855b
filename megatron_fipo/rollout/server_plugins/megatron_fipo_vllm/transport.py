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
    """What goes into the request for one worker; a CUDA buffer must live until that worker has answered.

    Args:
        flat: uint8 [bytes], contiguous.
    """
    if not flat.is_cuda:
        return {"bytes": base64.b64encode(flat.numpy().data).decode()}
    torch.cuda.current_stream(flat.device).synchronize()  # what filled the buffer is done before others read it
    arguments = list(reductions.reduce_tensor(flat)[1])
    # Numbers of devices differ between processes that see different ones; the UUID does not.
    arguments[_DEVICE_ARGUMENT] = None
    uuid = str(torch.cuda.get_device_properties(flat.device).uuid)
    return {"cuda_ipc": base64.b64encode(pickle.dumps(tuple(arguments))).decode(), "device": uuid}


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
