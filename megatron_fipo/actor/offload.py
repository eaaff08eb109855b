"""Lends a device's memory and takes it back; afterwards every tensor, view and alias is what it was.

Moving tensors (`p.data = p.data.cpu()`) would tear views from the buffers that they lie in: Megatron's parameters are
views of one buffer, and in float32 its main parameters are views of them. Here the storages themselves are emptied and
filled again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, UntypedStorage


class StorageOffload:
    """The storages of some tensors, which can be emptied and filled again.

    Args:
        kept: tensors whose contents are copied to host memory and come back; those that share a storage share its copy.
        dropped: tensors whose contents may be lost, such as gradients between steps; they come back as zeros.
    """

    def __init__(self, kept: Iterable[Tensor], dropped: Iterable[Tensor] = ()) -> None:
        self._storages = _by_address(kept)
        self._dropped = {key: value for key, value in _by_address(dropped).items() if key not in self._storages}
        self._sizes = {key: storage.nbytes() for key, storage in (self._storages | self._dropped).items()}
        self._copies: dict[int, UntypedStorage] = {}
        self._is_offloaded = False

    @property
    def is_offloaded(self) -> bool:
        """Whether the device's memory is lent out."""
        return self._is_offloaded

    @property
    def num_bytes(self) -> int:
        """Device memory that offloading frees."""
        return sum(self._sizes.values())

    def is_of_same_storages(self, other: StorageOffload) -> bool:
        """Whether the other has these very storages, and not others of equal size that took their places."""
        return self._identities() == other._identities()

    def offload(self) -> None:
        """Copy what is kept to the host and give all memory back to the device."""
        assert not self._is_offloaded, "offloaded already"
        self._is_offloaded = True
        for key, storage in self._storages.items():
            if key not in self._copies:
                self._copies[key] = _host_memory(storage.nbytes(), is_pinned=storage.device.type == "cuda")
            self._copies[key].copy_(storage, non_blocking=True)
        self._synchronize()
        for storage in (self._storages | self._dropped).values():
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Take the memory back and fill it."""
        assert self._is_offloaded, "nothing is offloaded"
        self._is_offloaded = False
        for key, storage in (self._storages | self._dropped).items():
            storage.resize_(self._sizes[key])
            if key in self._copies:
                storage.copy_(self._copies[key], non_blocking=True)
            else:
                torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
        self._synchronize()

    def _identities(self) -> tuple[set[int], set[int]]:
        # These are addresses of the storage objects, which `self` keeps alive: their memory moves with every resize.
        kept, dropped = ({storage._cdata for storage in part.values()} for part in (self._storages, self._dropped))
        return kept, dropped

    def _synchronize(self) -> None:
        if any(storage.device.type == "cuda" for storage in self._storages.values()):
            torch.cuda.synchronize()


def _host_memory(num_bytes: int, *, is_pinned: bool) -> UntypedStorage:
    """Memory that is pinned when it is allocated: pinning pageable memory would need room for both at once."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned).untyped_storage()


def _by_address(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """Each storage of the tensors once, without those that are empty and so have no memory to lend."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}
