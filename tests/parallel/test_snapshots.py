"""One rank writes the weights to disk; another node's learns where they lie, or that they will not come."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

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
            snapshots.begin()
            for bucket in pack(iter(load(base).state_dict().items()), 20_000, torch.float32, torch.device("cpu")):
                snapshots.add(bucket)
            if version == "2":
                if rank == 0:
                    snapshots.abandon("the disk is full")
                    continue
                with pytest.raises(OtherRankError, match=r"^snapshot of the weights: the disk is full$"):
                    snapshots.commit(version)
                continue
            place = snapshots.commit(version)
            snapshots.abandon("too late: it is there")
            assert load(place).state_dict().keys() == load(base).state_dict().keys()
            found.append(str(place))
        snapshots.begin()
        if rank == 0:
            announcements.tell(str(Path(folder) / "elsewhere"))
        else:
            with pytest.raises(ServerError, match=r"version 4 .*elsewhere and are not there on this node\. Set"):
                snapshots.commit("4")
            announcements.begin()
            with pytest.raises(OtherRankError, match="nothing was heard of it within 1 s"):
                announcements.wait(timeout_s=1)
        torch.distributed.barrier()
    return found


def test_one_snapshot_serves_the_servers_of_all_nodes(tmp_path: Path) -> None:
    save_random_model(tmp_path / "model")
    written, followed = run_ranks(_weights_of_versions, 2, str(tmp_path), timeout_s=120)
    assert written == followed == [str(tmp_path / f"snapshots/version-{version}") for version in (1, 3)]
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir() if path.name != "partial") == [
        "version-1",
        "version-3",
    ], "one copy of each on disk"
