"""One rank writes the weights to disk; another node's learns where they lie, or that they will not come."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.distributed.distributed_c10d import _get_default_store

from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel.announcements import Announcements
from megatron_fipo.parallel.waiting import OtherRankError
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.snapshots import SnapshotFollower, Snapshots, SnapshotWriter
from megatron_fipo.rollout.servers.weight_buckets import pack
from tests.models import load, save_random_model
from tests.parallel.layouts import layout
from tests.parallel.ranks import run_ranks


def _weights_of_versions(folder: str) -> list[str]:
    """Three updates, of which the writer's second one fails; what each rank's servers would start from."""
    base, rank = Path(folder) / "model", int(os.environ["RANK"])
    found = []
    with layout(ParallelSection()):
        announcements = Announcements("snapshot of the weights")
        snapshots: Snapshots = (
            SnapshotFollower(announcements, timeout_s=60, visible_within_s=0.5)
            if rank
            else SnapshotWriter(Path(folder) / "snapshots", base, announcements)
        )
        for version in ("1", "2", "3"):
            _begin_after(version, rank, snapshots)
            for bucket in pack(iter(load(base).state_dict().items()), 20_000, torch.float32, torch.device("cpu")):
                snapshots.add(bucket)
            if version == "2":
                if rank == 0:
                    snapshots.abandon(RuntimeError("the disk is full"))
                    continue
                with pytest.raises(OtherRankError, match=r"^snapshot of the weights: the disk is full$"):
                    snapshots.commit(version).result()
                continue
            committed = snapshots.commit(version)
            snapshots.abandon(RuntimeError("too late: it is on its way"))
            place = committed.result()
            assert load(place).state_dict().keys() == load(base).state_dict().keys()
            found.append(str(place))
        _say_where_it_is_not(rank, folder, snapshots, announcements)
        torch.distributed.barrier()
    return found


def _begin_after(version: str, rank: int, snapshots: Snapshots) -> None:
    """Begin a version; the one after the failure hears of it, once, where others failed."""
    if rank == 1 and version == "3":
        with pytest.raises(OtherRankError, match="the disk is full"):
            snapshots.begin()  # begun it is all the same: both count alike
    else:
        snapshots.begin()


def _say_where_it_is_not(rank: int, folder: str, snapshots: Snapshots, announcements: Announcements) -> None:
    snapshots.begin()
    if rank == 0:
        announcements.tell(str(Path(folder) / "elsewhere"))
        snapshots.close()
        return
    with pytest.raises(ServerError, match=r"version 4 .*elsewhere and are not there on this node\. Set"):
        snapshots.commit("4").result()
    announcements.begin()
    with pytest.raises(OtherRankError, match="nothing was heard of it within 1 s"):
        announcements.wait(timeout_s=1)
    never = snapshots.commit("5")
    snapshots.close()
    assert "nobody here waits for it any more" in str(never.exception()), "not its time-out"


def _told_meanwhile(folder: str) -> str:
    """The writer does not go on before the follower, which waits for it, has said so over the same store."""
    rank = int(os.environ["RANK"])
    with layout(ParallelSection()):
        store = _get_default_store()
        announcements = Announcements("snapshot of the weights")
        if rank == 0:
            writer = SnapshotWriter(Path(folder) / "snapshots", Path(folder) / "model", announcements)
            writer.begin()
            store.wait(["go on"])
            committed = writer.commit("1")
        else:
            follower = SnapshotFollower(announcements, timeout_s=60)
            follower.begin()
            committed = follower.commit("1")
            for _ in range(3):  # while the thread looks
                store.add("asked", 1)
            store.set("go on", "")
        place = str(committed.result())
        torch.distributed.barrier()
    return place


def test_one_snapshot_serves_the_servers_of_all_nodes(tmp_path: Path) -> None:
    save_random_model(tmp_path / "model")
    written, followed = run_ranks(_weights_of_versions, 2, str(tmp_path), timeout_s=120)
    assert written == followed == [str(tmp_path / f"snapshots/version-{version}") for version in (1, 3)]
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir() if path.name != "partial") == [
        "version-1",
        "version-3",
    ], "one copy of each on disk"


def test_who_waits_for_a_snapshot_keeps_nobody_from_the_store(tmp_path: Path) -> None:
    save_random_model(tmp_path / "model")
    assert run_ranks(_told_meanwhile, 2, str(tmp_path), timeout_s=120) == [str(tmp_path / "snapshots/version-1")] * 2
