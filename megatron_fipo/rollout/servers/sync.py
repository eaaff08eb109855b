"""Brings the actor's weights into the servers, bucket by bucket, and proves that they arrived.

Whatever fails, no server generates with weights that are half old and half new: servers are held while they are
written, and stay away from generation until an update has wholly succeeded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_fipo.metrics.reductions import Max, Metrics, Min, Sum
from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.packers import Packers
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.proof import compare_checksums
from megatron_fipo.rollout.servers.revival import ArrivedWeights
from megatron_fipo.rollout.servers.server import Server
from megatron_fipo.rollout.servers.session import UpdateSession
from megatron_fipo.rollout.servers.snapshots import Snapshots
from megatron_fipo.rollout.servers.transfers import DiskTransfer, Transfer


@dataclass(frozen=True)
class SyncReport:
    """What one update took, on this process."""

    num_bytes: int
    """Size of the weights. Each server got all of them."""
    num_buckets: int
    """Buckets that they came in."""
    num_servers: int
    """Servers that hold them now."""
    transfer_s: float
    """Time until the last server had taken the last tensor over, packing and the snapshot's copy included; where
    servers read the snapshot, its writing too."""
    check_s: float
    """Time that the checksums took after that."""
    snapshot_wait_s: float | None
    """Time before all of this that the writing of the snapshot before took; None where none is kept."""

    @property
    def gigabytes_per_s(self) -> float:
        """Rate of the transfer to each server; servers are written at the same time."""
        return self.num_bytes / self.transfer_s / 1e9

    def metrics(self) -> Metrics:
        """The report as metrics, to be merged over ranks."""
        metrics: Metrics = {
            "weight_sync/transfer_s": Max(self.transfer_s),
            "weight_sync/check_s": Max(self.check_s),
            "weight_sync/gigabytes_per_s": Min(self.gigabytes_per_s),
            "weight_sync/gigabytes": Max(self.num_bytes / 1e9),
            "weight_sync/buckets": Max(self.num_buckets),
            "weight_sync/servers": Sum(self.num_servers),
        }
        if self.snapshot_wait_s is not None:
            metrics["weight_sync/snapshot_wait_s"] = Max(self.snapshot_wait_s)
        return metrics


class WeightSync:
    """Updates a pool of servers. Its methods are called by the thread that trains; `loop` is where the pool lives.

    Args:
        transfer: sends the weights.
        packers: makes the buckets, in step with the node's other ranks where servers open them on their own GPUs.
        timeout_s: longest wait for a server's checksums.
        snapshots: keeps the newest weights on disk, for servers that have to start anew; `DiskTransfer` needs it.
    """

    def __init__(
        self,
        pool: ServerPool,
        loop: EventLoopThread,
        transfer: Transfer,
        packers: Packers,
        timeout_s: float,
        snapshots: Snapshots | None,
    ) -> None:
        assert snapshots is not None or not isinstance(transfer, DiskTransfer), "disk updates go over snapshots"
        self._pool, self._loop, self._transfer = pool, loop, transfer
        self._packers, self._timeout_s, self._snapshots = packers, timeout_s, snapshots

    def run(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        version: str,
        *,
        keep_held: bool = False,
        beforehand: Callable[[], None] = lambda: None,
    ) -> SyncReport:
        """Update all servers that live. Requests in flight wait meanwhile and go on with the new weights.

        A server that dies meanwhile is left out, and brought back with these weights.

        Args:
            tensors: all weights under their Hugging Face names. They are drained to their end, also past an error.
            version: what servers report from now on.
            keep_held: leave the servers paused and out of use, because the actor has the memory of their caches. One
                that dies waits for `let_go_all` too: it would size its cache by that memory.
            beforehand: readies the servers; where it fails, the node's other packers hear of it.

        Raises:
            ServerError: if a server refuses, or none is left and none comes back. All are STALE then.
            CanaryError: if a server answers with other checksums. All are STALE then.
            DiskError: if the last update's snapshot could not be written, or this one's where servers read it.
            ValueError: if the stream of weights lacks or repeats a tensor.
        """
        stream = iter(tensors)
        self._packers.begin()
        try:
            snapshot_wait_s = self._begin_snapshot()
            beforehand()
            return self._run(stream, version, keep_held, snapshot_wait_s)
        except BaseException as error:
            self._packers.fail(str(error) or type(error).__name__)
            if self._snapshots is not None:
                self._snapshots.abandon(error)
            raise
        finally:
            for _ in stream:  # other ranks send into it
                pass

    def forget_older_snapshots(self) -> None:
        """Delete all snapshots but the newest, once that is written. Call it while no rank is in an update, which may
        need an older one.
        """
        arrived = self._loop.call(lambda: self._pool.arrived)
        if self._snapshots is not None and arrived is not None and arrived.folder is not None:
            self._snapshots.keep_only(arrived.folder)

    def close(self) -> None:
        """Release what is kept from one update to the next."""
        self._transfer.close()

    def finish_snapshot(self) -> None:
        """Wait until the last snapshot is written; updates are over.

        Raises:
            DiskError: if it could not be written, or older ones not be deleted.
        """
        if self._snapshots is not None:
            self._snapshots.close()

    def _begin_snapshot(self) -> float | None:
        """Seconds that this waited for the snapshot before; None where none is kept."""
        if self._snapshots is None:
            return None
        start = time.perf_counter()
        self._snapshots.begin()
        return time.perf_counter() - start

    def _run(
        self, stream: Iterator[tuple[str, Tensor]], version: str, keep_held: bool, snapshot_wait_s: float | None
    ) -> SyncReport:
        start = time.perf_counter()
        session = UpdateSession(self._loop, self._loop.run(self._pool.hold()), self._pool.comes_back)
        try:
            expecting = self._pool.servers[0].client.expected_checksums()  # servers of a pool are alike
            num_bytes = num_buckets = 0
            self._transfer.open(session)
            for bucket in self._packers.buckets(stream, self._transfer.settle):
                self._transfer.send(session, bucket)
                for name, tensor in bucket.tensors():
                    expecting.add(name, tensor)
                if self._snapshots is not None:
                    self._snapshots.add(bucket)
                num_bytes, num_buckets = num_bytes + len(bucket.flat), num_buckets + 1
            snapshot = None if self._snapshots is None else self._snapshots.commit(version)
            self._transfer.finish(session, version, snapshot)
            transferred = time.perf_counter()
            expected = expecting.expected()
            session.each(lambda server: _check(server, expected, self._timeout_s))
            # Only now: no token is generated with weights that are not proven, nor into a cache without memory.
            if not keep_held:
                session.each(lambda server: server.client.resume())
        except BaseException as error:
            for server in session.all:
                self._loop.run(self._pool.set_stale(server, f"the update to weights {version} failed: {error}"))
            raise
        arrived = ArrivedWeights(version, snapshot, expected)
        self._loop.run(self._pool.accept(arrived, session.servers, session.died, keep_held=keep_held))
        checked = time.perf_counter()
        return SyncReport(
            num_bytes,
            num_buckets,
            len(session.servers),
            transferred - start,
            checked - transferred,
            snapshot_wait_s,
        )


async def _check(server: Server, expected: dict[str, str], timeout_s: float) -> None:
    compare_checksums(f"{server.name} ({server.client.url})", expected, await server.client.checksums(timeout_s))
