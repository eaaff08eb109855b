"""Brings the actor's weights into the servers, bucket by bucket, and proves that they arrived.

Three ways: by value or CUDA IPC handle over HTTP (tensor), by broadcast in a process group (distributed), or over a
folder that both see (disk). Whatever fails, no server generates with weights that are half old and half new: servers
are held while they are written, and stay away from generation until an update has wholly succeeded.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from megatron_fipo.parallel.external_group import ExternalGroup
from megatron_fipo.rollout.servers.api import Bucket, GroupAddress, InferenceServer
from megatron_fipo.rollout.servers.canary import CanaryError, compare_checksums
from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.http import ServerError, ServerUnreachableError
from megatron_fipo.rollout.servers.packers import Packers
from megatron_fipo.rollout.servers.pool import ArrivedWeights, Server, ServerPool
from megatron_fipo.rollout.servers.snapshots import Snapshots

Method = Literal["tensor", "distributed", "disk"]


@dataclass(frozen=True)
class SyncReport:
    """What one update took, on this process."""

    num_bytes: int
    """Of the weights; each server got so many."""
    num_buckets: int
    num_servers: int
    """That hold them now."""
    transfer_s: float
    """Until the last server had taken the last tensor over; packing and snapshot included."""
    check_s: float
    """Checksums, after that."""

    @property
    def gigabytes_per_s(self) -> float:
        """Weights / time of the transfer, to each server; servers are written at the same time."""
        return self.num_bytes / self.transfer_s / 1e9


class WeightSync:
    """Updates a pool of servers.

    Args:
        pool: the servers.
        loop: where the pool lives.
        method: the way.
        packers: makes the buckets, in step with the node's other ranks where servers open them on their own GPUs.
        timeout_s: longest wait for one bucket, or for all checksums.
        snapshots: keeps the newest weights on disk, for servers that have to start anew; required by `disk`.
        host: address of this process that servers can reach (distributed).
    """

    def __init__(
        self,
        pool: ServerPool,
        loop: EventLoopThread,
        *,
        method: Method,
        packers: Packers,
        timeout_s: float,
        snapshots: Snapshots | None,
        host: str = "127.0.0.1",
    ) -> None:
        assert method != "disk" or snapshots is not None, "disk updates go over snapshots"
        self._pool, self._loop, self._snapshots = pool, loop, snapshots
        self._packers, self._timeout_s = packers, timeout_s
        self._transfer: _Transfer
        if method == "tensor":
            self._transfer = _TensorTransfer(loop, timeout_s)
        elif method == "distributed":
            self._transfer = _DistributedTransfer(loop, timeout_s, host)
        else:
            self._transfer = _DiskTransfer(loop, timeout_s)

    def run(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        version: str,
        *,
        keep_held: bool = False,
        beforehand: Callable[[], None] = lambda: None,
    ) -> SyncReport:
        """Update all servers that live. Requests in flight wait meanwhile and go on with the new weights.

        Args:
            tensors: all weights under their Hugging Face names. Drained to its end, also past an error.
            version: what servers report from now on.
            keep_held: leave the servers paused and out of use, because their caches have no memory yet. One that dies
                waits for `let_go_all` too: what it would size its cache by is the actor's yet.
            beforehand: what readies the servers; where it fails the node's other packers hear of it.

        Raises:
            ServerError: if a server refuses, or none is left. All are STALE then.
            CanaryError: if a server answers with other checksums. All are STALE then.
            ValueError: if the stream of weights lacks or repeats a tensor.
        """
        stream = iter(tensors)
        self._packers.begin()
        try:
            if self._snapshots is not None:
                self._snapshots.begin()
            beforehand()
            return self._run(stream, version, keep_held)
        except BaseException as error:
            self._packers.fail(str(error) or type(error).__name__)
            if self._snapshots is not None:
                self._snapshots.abandon(str(error) or type(error).__name__)
            raise
        finally:
            for _ in stream:  # other ranks send into it
                pass

    def forget_older_snapshots(self) -> None:
        """Delete all snapshots but the newest. No rank is in an update: servers start from them there."""
        if self._snapshots is not None and self._pool.arrived is not None and self._pool.arrived.folder is not None:
            self._snapshots.keep_only(self._pool.arrived.folder)

    def close(self) -> None:
        """Leave what groups there are."""
        self._transfer.close()

    def _run(self, stream: Iterator[tuple[str, Tensor]], version: str, keep_held: bool) -> SyncReport:
        start = time.perf_counter()
        session = _Session(self._loop, self._loop.run(self._pool.hold()))
        try:
            ledger = session.servers[0].client.ledger()  # servers of a pool are alike
            num_bytes = num_buckets = 0
            self._transfer.open(session)
            for bucket in self._packers.buckets(stream, self._transfer.settle):
                self._transfer.send(session, bucket)
                for name, tensor in bucket.tensors():
                    ledger.add(name, tensor)
                if self._snapshots is not None:
                    self._snapshots.add(bucket)
                num_bytes, num_buckets = num_bytes + len(bucket.flat), num_buckets + 1
            folder = None if self._snapshots is None else self._snapshots.commit(version)
            self._transfer.finish(session, version, folder)
            transferred = time.perf_counter()
            expected = ledger.expected()
            session.each(lambda server: _check(server, expected, self._timeout_s))
            # Only now: no token is generated with weights that are not proven, nor into a cache without memory.
            if not keep_held:
                session.each(lambda server: server.client.resume())
        except BaseException as error:
            for server in session.all:
                self._loop.run(self._pool.set_stale(server, f"the update to weights {version} failed: {error}"))
            raise
        self._pool.arrived = ArrivedWeights(version, folder, expected)
        # Also what was stale is sound now.
        self._loop.run((self._pool.keep if keep_held else self._pool.let_go)(session.servers))
        bring_back = self._pool.restart_when_there_is_memory if keep_held else self._pool.restart
        for server, reason in session.died:
            self._loop.run(bring_back(server, reason))
        return SyncReport(
            num_bytes, num_buckets, len(session.servers), transferred - start, time.perf_counter() - transferred
        )


async def _check(server: Server, expected: dict[str, str], timeout_s: float) -> None:
    compare_checksums(f"{server.name} ({server.client.url})", expected, await server.client.checksums(timeout_s))


class _Session:
    """The servers of one update. One that dies leaves it; it goes on while one is left."""

    def __init__(self, loop: EventLoopThread, servers: Sequence[Server]) -> None:
        self._loop = loop
        self.all = list(servers)
        self.servers = list(servers)
        self.died: list[tuple[Server, str]] = []
        self.refusals: list[ServerError | CanaryError] = []
        """Both are known as soon as one server has said so, while others still work on the same."""

    def each(self, action: Callable[[Server], Awaitable[object]]) -> None:
        """Do something with every server at the same time, and wait for all."""
        self.start(action).result()

    def start(self, action: Callable[[Server], Awaitable[object]]) -> concurrent.futures.Future[None]:
        """Begin to do something with every server.

        The future raises what a server refused with, and ServerError when the last server has died.
        """
        return self._loop.submit(self._each(action))

    async def _each(self, action: Callable[[Server], Awaitable[object]]) -> None:
        async def act(server: Server) -> None:
            try:
                await action(server)
            except ServerUnreachableError as error:
                self.servers.remove(server)
                self.died.append((server, str(error)))
            except (ServerError, CanaryError) as error:
                self.refusals.append(error)

        await asyncio.gather(*(act(server) for server in list(self.servers)))
        if self.refusals:
            raise self.refusals[0]
        if not self.servers:
            raise ServerError("no server survived the update: " + "; ".join(reason for _, reason in self.died))


class _Transfer(Protocol):
    """One way to bring weights in."""

    def open(self, session: _Session) -> None:
        """Before the first bucket."""
        ...

    def send(self, session: _Session, bucket: Bucket) -> None:
        """Send a bucket; may return before it has arrived. The one before has, see `settle`."""
        ...

    def settle(self) -> None:
        """Wait until what was sent has arrived."""
        ...

    def finish(self, session: _Session, version: str, folder: Path | None) -> None:
        """After the last bucket; returns when all servers have everything and report the version."""
        ...

    def close(self) -> None: ...


async def _open_update(client: InferenceServer) -> None:
    await client.pause()
    await client.begin_update()


class _TensorTransfer:
    """Tensors over HTTP: their values, or on a GPU of this host a handle to them."""

    def __init__(self, loop: EventLoopThread, timeout_s: float) -> None:
        self._loop, self._timeout_s = loop, timeout_s
        self._sending: concurrent.futures.Future[None] | None = None

    def open(self, session: _Session) -> None:
        self._sending = None
        session.each(lambda server: _open_update(server.client))

    def send(self, session: _Session, bucket: Bucket) -> None:
        self._sending = session.start(lambda server: server.client.load_bucket(bucket, self._timeout_s))

    def settle(self) -> None:
        if self._sending is not None:
            self._sending.result()

    def finish(self, session: _Session, version: str, folder: Path | None) -> None:
        self.settle()
        session.each(lambda server: server.client.end_update(version))

    def close(self) -> None:
        pass


class _DiskTransfer:
    """A folder that servers can read; it is the snapshot, which is written anyway."""

    def __init__(self, loop: EventLoopThread, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def open(self, session: _Session) -> None:
        pass

    def send(self, session: _Session, bucket: Bucket) -> None:
        pass

    def settle(self) -> None:
        pass

    def finish(self, session: _Session, version: str, folder: Path | None) -> None:
        assert folder is not None, "disk updates go over snapshots"

        async def load(server: Server) -> None:
            await _open_update(server.client)
            await server.client.load_folder(folder, self._timeout_s)
            await server.client.end_update(version)

        session.each(load)

    def close(self) -> None:
        pass


class _DistributedTransfer:
    """One broadcast a bucket, to every tensor-parallel rank of every server. The group lives until a server changes."""

    def __init__(self, loop: EventLoopThread, timeout_s: float, host: str) -> None:
        self._loop, self._timeout_s, self._host = loop, timeout_s, host
        self._group: ExternalGroup | None = None
        self._name = ""
        self._members: list[tuple[str, int]] = []

    def open(self, session: _Session) -> None:
        members = [(server.name, server.incarnation) for server in session.servers]
        if self._group is None or members != self._members:
            self._form_group(session, members)
        session.each(lambda server: _open_update(server.client))
        self._expect_whole(session)

    def send(self, session: _Session, bucket: Bucket) -> None:
        group = self._group
        assert group is not None, "open() formed it"
        receiving = session.start(
            lambda server: server.client.receive_bucket(bucket.specs, self._name, self._timeout_s)
        )

        try:
            group.broadcast(bucket.flat, lambda: self._expect_whole(session))
            receiving.result()
        except ServerError:
            self.close()
            raise
        except RuntimeError as error:  # the backend's; what members said tells more
            self._expect_whole(session)
            self.close()
            raise ServerError(f"broadcasting weights to {len(session.servers)} servers failed: {error}") from error
        self._expect_whole(session)

    def settle(self) -> None:
        pass

    def finish(self, session: _Session, version: str, folder: Path | None) -> None:
        session.each(lambda server: server.client.end_update(version))

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group, self._members = None, []

    def _form_group(self, session: _Session, members: list[tuple[str, int]]) -> None:
        kept = {server.name: server for server in session.servers if (server.name, server.incarnation) in self._members}
        old_name = self._name
        self.close()
        if kept:
            session.each(lambda server: server.client.leave_group(old_name) if server.name in kept else _nothing())
        first_rank: dict[str, int] = {}
        world_size = 1
        for server in session.servers:
            first_rank[server.name] = world_size
            world_size += server.spec.tp
        backend: Literal["gloo", "nccl"] = "nccl" if session.servers[0].spec.device == "cuda" else "gloo"
        name = f"weights-{uuid.uuid4().hex[:12]}"  # a server attached to may know one of an earlier run
        group = ExternalGroup(self._host, name, backend, world_size, self._timeout_s)
        self._group, self._name = group, name  # from here on close() leaves it

        def join(server: Server) -> Awaitable[object]:
            address = GroupAddress(self._host, group.port, name, backend, world_size, first_rank[server.name])
            return server.client.join_group(address, self._timeout_s)

        joining = session.start(join)
        try:
            group.meet()
        except RuntimeError as error:  # the store's; what members said tells more
            self._expect_whole(session)
            self.close()
            raise ServerError(f"servers did not join the weight update's process group: {error}") from error
        joining.result()
        self._members = members
        self._expect_whole(session)

    def _expect_whole(self, session: _Session) -> None:
        """Every member of the group still takes part; else the group is given up.

        Raises:
            ServerError: with what the one said that does not.
        """
        if session.refusals or session.died:
            self.close()
        if session.refusals:
            raise session.refusals[0]
        if session.died:
            raise ServerError(
                "a member of the weight update's process group died: " + "; ".join(reason for _, reason in session.died)
            )


async def _nothing() -> None:
    pass
