"""Measures weights on their way to a server's process on the same GPU: stream, buckets, CUDA IPC, copy.

The other process does what a server's worker does, by the worker's own code, and no engine is needed. On a CPU tensors
go over by value.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.evidence import models
from benchmarks.evidence.measuring import seconds_of
from benchmarks.evidence.receiver import receive
from benchmarks.evidence.report import Settings
from benchmarks.evidence.workbench import Workbench, workbench
from megatron_fipo.actor.actor import Actor
from megatron_fipo.rollout.servers.packers import NodeGroup, Packers
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm import transport
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.digest import digest
from megatron_fipo.rollout.servers.sglang.checksums import SglangExpectedChecksums
from megatron_fipo.rollout.servers.snapshots import SnapshotWriter
from megatron_fipo.rollout.servers.vllm.checksums import VllmExpectedChecksums
from megatron_fipo.rollout.servers.weight_buckets import Bucket

_GPU = "0"
_ANSWER_S = 120.0
_ROUNDS = 3
"""Rounds: the first opens handles and maps memory; the median of all counts."""
CHECKSUMS = "checksums"


def case_names(settings: Settings) -> list[str]:
    return [
        f"{size}: {what}"
        for size in settings.sizes or ("1.5b",)
        for what in ("without snapshot", "with snapshot", CHECKSUMS)
    ]


def prepared(settings: Settings) -> AbstractContextManager[Workbench]:
    return workbench()


def run_case(name: str, bench: Workbench, settings: Settings) -> dict[str, Any]:
    size_name, _, what = name.partition(": ")
    size, packing = models.size_of(size_name, settings.tiny), models.even_packings(settings.tiny)[1]
    config = bench.config(size, size.built[-1], packing)
    actor = bench.build(config)
    if what == CHECKSUMS:
        return {"kind": CHECKSUMS, "model": size.name, **_checksums(actor, settings)}
    snapshots = None
    if what == "with snapshot":
        snapshots = SnapshotWriter(bench.folder / "snapshots", config.model.path)
    bucket_bytes = 64 * 1024 if settings.tiny else config.servers.bucket_mib * 2**20
    with _receiver(settings.device) as pipe:
        is_whole = _send(actor, pipe, bucket_bytes, None, checks=True).is_whole
        rounds = [_send(actor, pipe, bucket_bytes, snapshots, checks=False) for _ in range(_ROUNDS)]
    if snapshots is not None:
        snapshots.close()
    middle = sorted(rounds, key=lambda sent: sent.seconds)[len(rounds) // 2]
    pack_s = seconds_of(lambda: _pack_alone(actor, bucket_bytes))
    return {
        "kind": "sync",
        "model": size.name,
        "transport": "CUDA IPC" if settings.device == "cuda" else "values",
        "snapshot": snapshots is not None,
        "num_bytes": middle.num_bytes,
        "num_buckets": middle.num_buckets,
        "bucket_mib": bucket_bytes / 2**20,
        "seconds": round(middle.seconds, 5),
        "first_seconds": round(rounds[0].seconds, 5),
        "gb_per_s": round(middle.num_bytes / middle.seconds / 1e9, 3),
        "pack_s": round(pack_s, 5),
        "snapshot_s": round(middle.snapshot_s, 5) if snapshots is not None else None,
        "arrived_whole": is_whole,
    }


class _Sent:
    """The measurements of one handover. Its snapshot is copied within, and written later."""

    def __init__(self) -> None:
        self.seconds = self.snapshot_s = 0.0
        self.num_bytes = self.num_buckets = 0
        self.is_whole = True


def _send(
    actor: Actor, pipe: Connection, bucket_bytes: int, snapshots: SnapshotWriter | None, *, checks: bool
) -> _Sent:
    """Hand weights over as WeightSync does: while one bucket travels, the next is packed."""
    sent, under_way = _Sent(), False
    own_digests: list[int] = []

    def settle() -> None:
        nonlocal under_way
        if under_way:
            assert pipe.poll(_ANSWER_S), "the other process did not answer"
            answer = pipe.recv()
            if isinstance(answer, str):
                raise RuntimeError(f"the other process failed: {answer}")
            if checks:
                sent.is_whole &= answer == own_digests.pop(0)
            under_way = False

    if snapshots is not None:
        snapshots.begin()
    start = time.perf_counter()
    packers = _packers(actor, bucket_bytes)
    packers.begin()
    for bucket in packers.buckets(actor.weights(), settle):
        if checks:
            own_digests.append(digest(bucket.flat, 0))
        pipe.send((_message(bucket), checks))
        under_way = True
        if snapshots is not None:
            before = time.perf_counter()
            snapshots.add(bucket)
            sent.snapshot_s += time.perf_counter() - before
        sent.num_bytes, sent.num_buckets = sent.num_bytes + len(bucket.flat), sent.num_buckets + 1
    settle()
    if snapshots is not None:
        snapshots.keep_only(snapshots.commit("1"))
    sent.seconds = time.perf_counter() - start
    return sent


def _packers(actor: Actor, bucket_bytes: int) -> Packers:
    node = NodeGroup(actor.ranks.world, _GPU) if torch.cuda.is_available() else None
    return Packers(bucket_bytes, torch.bfloat16, None, node)


def _message(bucket: Bucket) -> dict[str, str]:
    if not bucket.handles:
        return transport.pack(bucket.flat)
    handle = bucket.handles[_GPU]
    return transport.pack_handle(handle.device_uuid, handle.arguments)


def _pack_alone(actor: Actor, bucket_bytes: int) -> None:
    """Pack the stream into buckets that nobody takes."""
    packers = Packers(bucket_bytes, torch.bfloat16, None, None)
    packers.begin()
    for _ in packers.buckets(actor.weights(), lambda: None):
        pass


@contextmanager
def _receiver(device: str) -> Iterator[Connection]:
    """The other process's pipe; the process has its device ready."""
    context = multiprocessing.get_context("spawn")  # on a CPU too: it must be another process, not a copy of this one
    ours, theirs = context.Pipe()
    process = context.Process(target=receive, args=(theirs, device), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(_ANSWER_S), "the other process did not start"
        assert ours.recv() == "ready"
        yield ours
        ours.send(None)
        process.join(_ANSWER_S)
    finally:
        process.kill()
        process.join()
        gc.collect()
        if device == "cuda":
            torch.cuda.ipc_collect()


def _checksums(actor: Actor, settings: Settings) -> dict[str, Any]:
    """Cost of the expected checksums for the trainer, for both kinds of server."""
    num_bytes = sum(tensor.nbytes for _, tensor in actor.weights())
    ledgers = {
        "sglang": lambda: SglangExpectedChecksums(actor.shape, 1, hashes_on_gpu=settings.device == "cuda"),
        "vllm": lambda: VllmExpectedChecksums(actor.shape, 1),
    }
    values: dict[str, Any] = {"num_bytes": num_bytes}
    for name, make in ledgers.items():

        def compute(make: Any = make) -> None:
            ledger = make()
            for key, tensor in actor.weights():
                ledger.add(key, tensor)
            ledger.expected()

        compute()
        spent = seconds_of(compute)
        values |= {f"{name}_s": round(spent, 5), f"{name}_gb_per_s": round(num_bytes / spent / 1e9, 3)}
    return values
