"""The allocator's settings: text in, text out, and what is set around buffers that other processes open."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_fipo.parallel import device_memory
from megatron_fipo.parallel.device_memory import (
    allocator_settings,
    give_back_caches,
    is_expandable,
    prefer_expandable_segments,
    shareable_allocations,
    with_expandable,
)

FULL = "max_split_size_mb:512, expandable_segments : true,garbage_collection_threshold:0.6"


def test_one_entry_changes_and_all_others_stay() -> None:
    assert is_expandable(FULL)
    off = with_expandable(FULL, False)
    assert off == "max_split_size_mb:512,garbage_collection_threshold:0.6,expandable_segments:False"
    assert not is_expandable(off)
    assert with_expandable("", True) == "expandable_segments:True"
    assert not is_expandable("")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator is told, on a machine with a GPU."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_memory, "_set_allocator", told.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_segments_may_grow_unless_the_environment_says_something(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
        prefer_expandable_segments()
        assert said == []
        assert allocator_settings() == "max_split_size_mb:64"
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        prefer_expandable_segments()
        assert said == [allocator_settings()]
        assert is_expandable(allocator_settings())
        assert "pinned_max_round_threshold_mb:1," in said[0]
        patch.setattr(torch, "__version__", "2.11.0+cu130")
        patch.setattr(os, "environ", {})
        prefer_expandable_segments()
        assert said[1:] == ["expandable_segments:True"]


def test_buffers_for_others_lie_in_segments_of_fixed_size(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with shareable_allocations():
        pass
    assert said == [], "nothing to turn off"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", FULL)

    def allocate() -> None:
        with shareable_allocations():
            assert said == [with_expandable(FULL, False)]
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        allocate()
    assert said == [with_expandable(FULL, False), FULL], "and is back, also after an error"


def test_nothing_happens_on_a_cpu() -> None:
    before = dict(os.environ)
    prefer_expandable_segments()
    with shareable_allocations():
        give_back_caches()
    assert dict(os.environ) == before
