"""Three ways to bring weights into servers.

tensor: by value over HTTP, or on a GPU of this host by a CUDA IPC handle. distributed: by broadcast in a process group.
disk: over a folder that both sides see.
"""

from __future__ import annotations

import concurrent.futures
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from megatron_fipo.parallel.external_group import ExternalGroup
from megatron_fipo.rollout.servers.api import GroupAddress, InferenceServer
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.server import Server
from megatron_fipo.rollout.servers.session import UpdateSession
from megatron_fipo.rollout.servers.weight_buckets import Bucket

logger = logging.getLogger(__name__)

Method = Literal["tensor", "distributed", "disk"]
_MARGIN_S = 30.0
"""Servers have this much longer than the sender for what all do together. So if one of them hangs, the sender gives the
group up first, and the others can tell that they live before they would count as hung, too."""

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


def make_transfer(method: Method, timeout_s: float) -> Transfer:
    """The transfer of servers.weight_sync.

    Args:
        timeout_s: longest wait for one bucket.
    """
    if method == "tensor":
        return TensorTransfer(timeout_s)
    return DistributedTransfer(timeout_s) if method == "distributed" else DiskTransfer(timeout_s)


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

    The group lives until a server starts anew, or a member dies: then it is given up, those that are left form another
    one, and what was on its way is sent again.

    Args:
        timeout_s: longest wait for the members, and for one bucket.
        make_group: makes the process group; tests replace it.
    """

    def __init__(self, timeout_s: float, make_group: MakeGroup = ExternalGroup) -> None:
        self._timeout_s, self._make_group = timeout_s, make_group
        self._group: ExternalGroup | None = None
        self._name = ""
        self._members: list[tuple[str, int]] = []
        """Names and incarnations of the servers in the group; empty while it is not whole."""
        self._joined: dict[str, tuple[int, str]] = {}
        """By a server's name, the incarnation and the group that it is in, whether or not others still are."""

    def open(self, session: UpdateSession) -> None:
        # First: a server that is dead already is left out then, before others wait for it in a group.
        session.each(lambda server: _open_update(server.client))
        self._ensure_group(session)

    def send(self, session: UpdateSession, bucket: Bucket) -> None:
        has_arrived = False
        while session.servers and not has_arrived:
            group = self._ensure_group(session)
            has_arrived = group is None or self._broadcast(group, session, bucket)

    def settle(self) -> None:
        pass

    def finish(self, session: UpdateSession, version: str, snapshot: concurrent.futures.Future[Path] | None) -> None:
        session.each(lambda server: server.client.end_update(version))

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()
        self._group, self._members = None, []

    def _ensure_group(self, session: UpdateSession) -> ExternalGroup | None:
        """The group of all servers that are left; None where none is. Each attempt that fails has lost a server."""
        while session.servers:
            members = [(server.name, server.incarnation) for server in session.servers]
            if self._group is not None and members == self._members:
                return self._group
            self._form_group(session)
        self.close()
        return None

    def _form_group(self, session: UpdateSession) -> None:
        """Form a group of the servers that are left, unless one of them dies meanwhile.

        Raises:
            ServerError: if a server refuses, or none is left and none comes back.
        """
        self.close()
        session.each(self._leave_old)
        if not session.servers:
            return
        first_rank: dict[str, int] = {}
        world_size = 1
        for server in session.servers:
            first_rank[server.name] = world_size
            world_size += server.spec.tp
        members = [(server.name, server.incarnation) for server in session.servers]
        backend: Literal["gloo", "nccl"] = "nccl" if session.servers[0].spec.device == "cuda" else "gloo"
        name = f"weights-{uuid.uuid4().hex[:12]}"  # a server attached to may know one of an earlier run
        host = _own_address([server.spec.host for server in session.servers])
        group = self._make_group(host, name, backend, world_size, self._timeout_s)
        self._group, self._name = group, name  # from here on close() leaves it

        async def join(server: Server) -> None:
            address = GroupAddress(host, group.port, name, backend, world_size, first_rank[server.name])
            await server.client.join_group(address, self._timeout_s + _MARGIN_S)
            self._joined[server.name] = (server.incarnation, name)

        what = "servers did not join the weight update's process group"
        if self._together(session, join, group.meet, what):
            self._members = members

    async def _leave_old(self, server: Server) -> None:
        incarnation, name = self._joined.pop(server.name, (None, ""))
        if incarnation == server.incarnation:
            await server.client.leave_group(name)

    def _broadcast(self, group: ExternalGroup, session: UpdateSession, bucket: Bucket) -> bool:
        """Broadcast a bucket; False if a server died, so that it must be sent again to those that are left."""
        what = f"broadcasting weights to {len(session.servers)} servers failed"
        return self._together(
            session,
            lambda server: server.client.receive_bucket(bucket.specs, self._name, self._timeout_s + _MARGIN_S),
            lambda check: group.broadcast(bucket.flat, check),
            what,
        )

    def _together(
        self,
        session: UpdateSession,
        theirs: Callable[[Server], Awaitable[object]],
        ours: Callable[[Callable[[], object]], None],
        what: str,
    ) -> bool:
        """Do something that all members of the group do together.

        Args:
            theirs: each server's part.
            ours: this process's part, which calls its argument while it waits.
            what: begins the message where nobody but the backend complains.

        Returns:
            False if a server has died: the group is given up, and whether the others have done their part is not known.

        Raises:
            ServerError: what a server refused with while all were alive, or that none is left and none comes back.
        """
        attempt = session.attempt(theirs)
        problem: RuntimeError | None = None
        try:
            ours(attempt.expect_all)
        except RuntimeError as error:  # the backend's, or what `expect_all` has seen; members tell more, see below
            problem = error
            self.close()  # those that wait for the others hear of it
        except BaseException:
            self.close()
            raise
        attempt.ending.result()
        if attempt.died:
            # What others said after one had died is that their connection to it, or to us, broke.
            self.close()
            session.expect_some()
            logger.warning(
                "a member of the weight update's process group died; %s: %s",
                "the update goes on without it" if session.servers else "no server is left in the update",
                "; ".join(attempt.died),
            )
            return False
        if attempt.refusals:
            self.close()
            raise attempt.refusals[0] from problem
        if problem is not None:
            raise ServerError(f"{what}: {problem}") from problem
        return True


def _own_address(hosts: Sequence[str]) -> str:
    """The address at which servers on these hosts reach this process."""
    if all(host == "localhost" or host.startswith("127.") for host in hosts):
        return "127.0.0.1"
    return socket.gethostbyname(socket.gethostname())


async def _open_update(client: InferenceServer) -> None:
    await client.pause()
    await client.begin_update()
