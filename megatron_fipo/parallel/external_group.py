"""A process group of this process and others outside its torch.distributed world, for sending tensors to them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import Backend, GroupName, _new_process_group_helper, _world

T = TypeVar("T")

_POLL_S = 0.001
_STORE_GONE_S = 10.0
"""Longest wait until a thread that waits at a store notices that the store is gone; it does so within milliseconds."""
_LATE_S = 3.0
"""The store of a meeting that has failed is still there for so long: a member on its way who found none would try to
connect until its own time-out, and one who is there hears at once that it is gone."""
_BACKENDS_MARGIN_S = 60.0
"""NCCL's time-out is longer than ours by this: where its own expires, it ends the process."""
_WELL_CONNECTED_S = 1.0
"""Longest wait for a backend to have begun a collective that is given up; unless it connects, it does so at once."""


class ExternalGroup:
    """This process is rank 0. The others meet it as `torch.distributed.rendezvous("tcp://host:port", …)` does.

    Args:
        host: address at which this process can be reached.
        name: the group's name; keys in the store begin with it.
        backend: gloo sends CPU tensors, nccl CUDA tensors.
        world_size: number of members, this one included.
        timeout_s: longest wait for the members, and for each broadcast.
    """

    def __init__(
        self, host: str, name: str, backend: Literal["gloo", "nccl"], world_size: int, timeout_s: float
    ) -> None:
        self._timeout_s = timeout_s
        self._host, self._name, self._backend, self._world_size = host, name, backend, world_size
        # Bound first, so that the others learn a port that is taken already, by us; and here, since a store left to
        # itself listens on all of a host's addresses, and asks nobody who he is.
        listener = _listen(host)
        self.port: int = listener.getsockname()[1]
        self._daemon: TCPStore | None = TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
        # Gloo keeps its connections for as long as anything refers to one of these; a traceback must not.
        self._group: dist.ProcessGroup | None = None
        self._work: dist.Work | None = None
        self._is_being_connected = False

    def meet(self, check: Callable[[], object]) -> None:
        """Wait until all members are there. They must be told of `port` before, and join meanwhile.

        Args:
            check: called while waiting; raises where a member has said that it will not join.

        Raises:
            RuntimeError: if they are not there in time.
        """
        device = torch.device("cuda", torch.cuda.current_device()) if self._backend == "nccl" else torch.device("cpu")
        connecting = _Call(self._connect, device)
        try:
            connecting.wait(check, self._timeout_s)
        except BaseException:
            connecting.result_within(_LATE_S)
            self._daemon = None  # whoever waits at the store for the others, here or a member, hears that it is gone
            self._group = connecting.result_within(_STORE_GONE_S)
            self.leave()
            raise
        self._group = connecting.result()

    def _connect(self) -> dist.ProcessGroup:
        # A client that waits for all counts itself in, as every member's does.
        timeout = timedelta(seconds=self._timeout_s)
        store = TCPStore(self._host, self.port, self._world_size, is_master=False, timeout=timeout)
        group, _ = _new_process_group_helper(
            self._world_size,
            0,
            [],
            Backend(self._backend),
            PrefixStore(self._name, store),
            group_name=GroupName(self._name),
            timeout=self._backends_timeout,
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(self._world_size)}  # leave() looks there
        return group

    def broadcast(self, tensor: Tensor, check: Callable[[], object]) -> None:
        """Send a tensor to all members. Returns once they have it.

        Args:
            tensor: contiguous, on the backend's device.
            check: called while waiting; raises where a member has said that it will not receive.

        Raises:
            RuntimeError: if a member left or did not receive in time; the group is unusable then.
        """
        assert self._group is not None, "meet() comes first"
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = self._backends_timeout
        deadline = time.monotonic() + self._timeout_s
        self._issue(lambda group: group.broadcast([tensor], options), tensor.device, check)
        assert self._work is not None, "it has been issued"
        while not self._work.is_completed():
            check()
            if time.monotonic() > deadline:
                raise RuntimeError(_late(self._timeout_s))
            time.sleep(_POLL_S)
        self._work.wait()
        if tensor.is_cuda:
            torch.cuda.current_stream().synchronize()

    @property
    def _backends_timeout(self) -> timedelta:
        """Gloo's ends what is still being sent; until then nobody who waits hears that the group has been given up."""
        return timedelta(seconds=self._timeout_s + (_BACKENDS_MARGIN_S if self._backend == "nccl" else 0.0))

    def leave(self) -> None:
        """Give up the group, whether or not the others still are in it.

        With gloo this may take until the time-out of a broadcast that a member who hangs does not receive.
        """
        self._work = None
        if self._group is not None and not self._is_being_connected:  # NCCL cannot give up what it is still forming
            self._group.abort()
            dist.destroy_process_group(self._group)
        self._group = None

    def _issue(
        self, call: Callable[[dist.ProcessGroup], dist.Work], device: torch.device, check: Callable[[], object]
    ) -> None:
        """Begin a collective. NCCL connects all members within the first one, and waits there for the last of them."""

        def begin() -> None:
            assert self._group is not None, "meet() made it"
            self._work = call(self._group)

        self._work, self._is_being_connected = None, True
        issuing = _Call(begin, device)
        try:
            issuing.wait(check, self._timeout_s)
        finally:
            issuing.result_within(_WELL_CONNECTED_S)
            self._is_being_connected = issuing.is_under_way
        issuing.result()


class _Call(Generic[T]):
    """A call of the backend in a thread of its own: it may block until the group's time-out, and others can be asked
    meanwhile.

    Args:
        function: the call.
        device: the device that the thread works on.
    """

    def __init__(self, function: Callable[[], T], device: torch.device) -> None:
        self._function, self._device = function, device
        self._outcome: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    def wait(self, check: Callable[[], object], timeout_s: float) -> None:
        """Return when it has ended, in whatever way; `check` is called while waiting.

        Raises:
            RuntimeError: if it has not ended within this time.
        """
        deadline = time.monotonic() + timeout_s
        while self.is_under_way:
            check()
            if time.monotonic() > deadline:
                raise RuntimeError(_late(timeout_s))
            time.sleep(_POLL_S)

    @property
    def is_under_way(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def result(self) -> T:
        """Wait for the function to end; return what it returned, or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    def result_within(self, seconds: float) -> T | None:
        """Return what the function returns if it ends within this time, else None."""
        self._thread.join(seconds)
        return next(iter(self._outcome), None)

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # each thread has its own
            self._outcome.append(self._function())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._error = error


def _late(timeout_s: float) -> str:
    return f"not all members took part within {timeout_s:g} s"


def _listen(host: str) -> socket.socket:
    """A socket that listens at one address of this host.

    Raises:
        OSError: if it is none.
    """
    try:
        return socket.create_server((host, 0))
    except OSError as error:
        raise OSError(
            error.errno,
            f"this process would meet the servers at {host}, the address of its host's name, and cannot listen there "
            f"({error.strerror}). Mend the name's address (/etc/hosts), or set servers.weight_sync=disk.",
        ) from error
