"""Handles to a GPU's memory that another process on the same GPU can open (CUDA IPC)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

DEVICE_ARGUMENT = 6
"""Position of the device's number among the arguments of torch's rebuild_cuda_tensor."""


@dataclass(frozen=True)
class CudaHandle:
    """A tensor on one GPU, as another process on this host can open it.

    torch counts how often memory is opened, so each handle must be opened once, by one process.

    Attributes:
        device_uuid: the GPU's UUID. Processes that see different GPUs number them differently.
        arguments: what torch's rebuild_cuda_tensor takes, picklable, with None in the device's place.
    """

    device_uuid: str
    arguments: tuple[Any, ...]


HandleMaker = Callable[[Tensor], CudaHandle]
"""Makes the handle of a contiguous buffer of bytes."""


def cuda_handle(flat: Tensor) -> CudaHandle:
    """The handle of a CUDA tensor, which must live, and keep its contents, until it has been read."""
    torch.cuda.current_stream(flat.device).synchronize()  # it must be filled before others read it
    arguments = list(reductions.reduce_tensor(flat)[1])
    arguments[DEVICE_ARGUMENT] = None
    return CudaHandle(str(torch.cuda.get_device_properties(flat.device).uuid), tuple(arguments))
