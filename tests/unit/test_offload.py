"""Memory lent out and taken back, on storages alone; with an actor around them in tests/parallel/test_handover.py."""

from __future__ import annotations

import torch

from megatron_fipo.actor import offload
from megatron_fipo.actor.offload import StorageOffload


def test_storages_that_were_replaced_at_equal_size_are_others() -> None:
    """An optimizer that loads its state makes new tensors of the old sizes: the old ones' memory is not theirs."""
    kept, dropped = [torch.arange(4.0), torch.ones(3)], [torch.zeros(5)]
    lent = StorageOffload(kept, dropped)
    assert lent.is_of_same_storages(StorageOffload([*kept, kept[0][1:]], dropped)), "a view is no other storage"
    loaded = [torch.arange(4.0), kept[1]]
    again = StorageOffload(loaded, dropped)
    assert again.num_bytes == lent.num_bytes
    assert not lent.is_of_same_storages(again)
    assert not lent.is_of_same_storages(StorageOffload(kept, [torch.zeros(5)]))
    assert not lent.is_of_same_storages(StorageOffload([kept[0]], [kept[1], *dropped]))


def test_they_are_the_same_after_their_memory_has_moved() -> None:
    kept = [torch.arange(1000.0)]
    lent = StorageOffload(kept)
    lent.offload()
    held = torch.zeros(2000)  # so that the same address is unlikely
    lent.onload()
    assert torch.equal(kept[0], torch.arange(1000.0))
    assert lent.is_of_same_storages(StorageOffload(kept))
    assert held.numel() == 2000


def test_host_memory_is_of_the_size_that_was_asked_for() -> None:
    assert offload._host_memory(12345, is_pinned=False).nbytes() == 12345
