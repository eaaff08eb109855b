"""The other process of the part `sync`: it takes buckets over by the code of a server's worker, and imports no more."""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch

from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm import transport
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.digest import digest


def receive(pipe: Connection, device: str) -> None:
    """Copy each bucket into this process's own memory, and answer with True, or with its digest."""
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    torch.zeros(1, device=place)
    pipe.send("ready")
    while (word := pipe.recv()) is not None:
        message, wants_digest = word
        try:
            own = transport.unpack(message, place)
            pipe.send(digest(own, 0) if wants_digest else True)
        except Exception as error:  # noqa: BLE001 - the sender raises it
            pipe.send(f"{type(error).__name__}: {error}")
        own = None
