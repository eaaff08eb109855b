"""Three ways to bring weights into servers.

tensor: by value over HTTP, or on a GPU of this host by a CUDA IPC handle. distributed: by broadcast in a process group.
disk: over a folder that both sides see.
"""

from __future__ import annotations

import concurrent.futures
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, Protocol

from megatron_fipo.parallel.external_group import ExternalGroup
from megatron_fipo.rollout.servers.api import GroupAddress, InferenceServer
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.server import Server
from megatron_fipo.rollout.servers.session import UpdateSession
from megatron_fipo.rollout.servers.weight_buckets import Bucket

Method = Literal["tensor", "distributed", "disk"]
MakeGroup = Callable[[str, str, Literal["gloo", "nccl"], int, float], ExternalGroup]
"""Makes a process group, given what `ExternalGroup` takes."""


class Transfer(Protocol):
    """One way to bring weights in. Its methods are called by the thread that updates, in the order below."""

    def open(self, session: UpdateSession) -> None:
        """Ready the servers for the first bucket."""
        ...

    def send(self, session: UpdateSession, bucket: Bucket) -> None:
        """Send a bucket. This may return before it has arrived; the bucket before it has."""
        ...

    def settle(self) -> None:
        """Wait until what was sent has arrived."""
        ...

    def finish(self, session: UpdateSession, version: str, snapshot: concurrent.futures.Future[Path] | None) -> None:
        """Return when all servers have everything and report the version.

        Args:
            snapshot: the weights on disk, as soon as they are there; None if none are kept.
        """
        ...

    def close(self) -> None:
        """Release what is kept from one update to the next."""
        ...


def make_transfer(method: Method, timeout_s: float, host: str = "127.0.0.1") -> Transfer:
    """The transfer of servers.weight_sync.

    Args:
        timeout_s: longest wait for one bucket.
        host: address of this process that servers can reach (distributed).
    """
    if method == "tensor":
        return TensorTransfer(timeout_s)
    return DistributedTransfer(timeout_s, host) if method == "distributed" else DiskTransfer(timeout_s)


class TensorTransfer:
    """A `Transfer` over HTTP, of tensors' values or of handles to them."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._sending: concurrent.futures.Future[None] | None = None

    def open(self, session: UpdateSession) -> None:
        self._sending = None
        session.each(lambda server: _open_update(server.client))

    def send(self, session: UpdateSession, bucket: Bucket) -> None:
        self._sending = session.start(lambda server: server.client.load_bucket(bucket, self._timeout_s))

    def settle(self) -> None:
        if self._sending is not None:
            self._sending.result()

    def finish(self, session: UpdateSession, version: str, snapshot: concurrent.futures.Future[Path] | None) -> None:
        self.settle()
        session.each(lambda server: server.client.end_update(version))

    def close(self) -> None:
        pass


class DiskTransfer:
    """A `Transfer` over the snapshot, which is written anyway."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def open(self, session: UpdateSession) -> None:
        pass

    def send(self, session: UpdateSession, bucket: Bucket) -> None:
        pass

    def settle(self) -> None:
        pass

    def finish(self, session: UpdateSession, version: str, snapshot: concurrent.futures.Future[Path] | None) -> None:
        assert snapshot is not None, "disk updates go over snapshots"
        folder = snapshot.result()

        async def load(server: Server) -> None:
            await _open_update(server.client)
            await server.client.load_folder(folder, self._timeout_s)
            await server.client.end_update(version)

        session.each(load)

    def close(self) -> None:
        pass


class DistributedTransfer:
    """A `Transfer` by one broadcast a bucket, to every tensor-parallel rank of every server.

    The group lives until a server starts anew.

    Args:
        timeout_s: longest wait for the members, and for one bucket.
        host: address of this process that servers can reach.
        make_group: makes the process group; tests replace it.
    """

    def __init__(self, timeout_s: float, host: str, make_group: MakeGroup = ExternalGroup) -> None:
        self._timeout_s, self._host, self._make_group = timeout_s, host, make_group
        self._group: ExternalGroup | None = None
        self._name = ""
        self._members: list[tuple[str, int]] = []

    def open(self, session: UpdateSession) -> None:
        members = [(server.name, server.incarnation) for server in session.servers]
        if self._group is None or members != self._members:
            self._form_group(session, members)
        session.each(lambda server: _open_update(server.client))
        self._expect_whole(session)

    def send(self, session: UpdateSession, bucket: Bucket) -> None:
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

    def finish(self, session: UpdateSession, version: str, snapshot: concurrent.futures.Future[Path] | None) -> None:
        session.each(lambda server: server.client.end_update(version))

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group, self._members = None, []

    def _form_group(self, session: UpdateSession, members: list[tuple[str, int]]) -> None:
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
        group = self._make_group(self._host, name, backend, world_size, self._timeout_s)
        self._group, self._name = group, name  # from here on close() leaves it

        def join(server: Server) -> Awaitable[object]:
            address = GroupAddress(self._host, group.port, name, backend, world_size, first_rank[server.name])
            return server.client.join_group(address, self._timeout_s)

        joining = session.start(join)
        try:
            group.meet(lambda: self._expect_whole(session))
        except ServerError:
            raise
        except RuntimeError as error:  # the store's; what members said tells more
            self._expect_whole(session)
            self.close()
            raise ServerError(f"servers did not join the weight update's process group: {error}") from error
        joining.result()
        self._members = members
        self._expect_whole(session)

    def _expect_whole(self, session: UpdateSession) -> None:
        """Give the group up where a member does not take part any more, and raise what it said."""
        try:
            session.expect_whole()
        except BaseException:
            self.close()
            raise


async def _open_update(client: InferenceServer) -> None:
    await client.pause()
    await client.begin_update()


async def _nothing() -> None:
    pass
