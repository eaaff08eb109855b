"""The ranks of one node that pack the same weights, each on its own GPU, for the servers' ranks on that GPU.

A server's process sees only its own GPUs, and a CUDA IPC handle opens on the GPU that it names. So a bucket lies on
every GPU that servers use: each rank there packs it from the stream of weights, which all of them have anyway, and the
rank that owns the node's servers collects the handles and hands each server the ones of its GPUs.

Where handles are not needed (values over HTTP, a broadcast, a folder) only the owner packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.parallel import exchange
from megatron_fipo.rollout.servers.api import Bucket
from megatron_fipo.rollout.servers.cuda_handles import CudaHandle, HandleMaker, cuda_handle
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.weight_buckets import pack


@dataclass(frozen=True)
class _Report:
    """One packer's message in an exchange."""

    gpu: str
    handle: CudaHandle | None = None
    problem: str = ""
    is_done: bool = False


@dataclass(frozen=True)
class NodeGroup:
    """The packers of a node.

    Attributes:
        group: the process group of the packers, over gloo; the owner of the servers is among them.
        gpu: this rank's GPU, as the servers' specifications name it; "" where no server's rank is on it.
        make_handle: makes a handle to this rank's bucket.
    """

    group: ProcessGroup
    gpu: str
    make_handle: HandleMaker = cuda_handle


class Packers:
    """Makes buckets of a stream of weights, on this rank only or in step with the others of the node.

    In step means: one exchange for each bucket, after it is packed and the one before has arrived at the servers. Two
    buffers take turns, so then everybody may overwrite the buffer of the one before. Whoever fails says so in the next
    exchange, and all of them stop there.

    Args:
        bucket_bytes: size of a bucket; two are held at a time.
        dtype: the dtype of the servers' weights. Tensors of another dtype are converted first.
        device: where buckets lie; None leaves them where the tensors are.
        node: the packers of the node; None where only this rank packs.
    """

    def __init__(
        self, bucket_bytes: int, dtype: torch.dtype, device: torch.device | None, node: NodeGroup | None = None
    ) -> None:
        self._bucket_bytes, self._dtype, self._device, self._node = bucket_bytes, dtype, device, node
        self._is_under_way = False

    def begin(self) -> None:
        """Call this before anything can fail: from here on the others wait for this rank's message."""
        self._is_under_way = True

    def buckets(self, stream: Iterable[tuple[str, Tensor]], settle: Callable[[], None]) -> Iterator[Bucket]:
        """Buckets of the stream, with every packer's handle to its own copy. Collective over the node's packers.

        Args:
            settle: waits until the bucket that was sent last has arrived; called before each exchange.

        Raises:
            ServerError: on every packer, with the words of the one that failed.
        """
        assert self._is_under_way, "begin() comes first"
        for bucket in pack(stream, self._bucket_bytes, self._dtype, self._device):
            settle()
            yield replace(bucket, handles=self._exchange(self._own_report(bucket.flat)))
        if self._node is not None:
            self._exchange(_Report(self._node.gpu, is_done=True))
        self._is_under_way = False

    def follow(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """Pack along on a rank that owns no servers. Collective over the node's packers.

        Raises:
            ServerError: see `buckets`.
        """
        self.begin()
        try:
            for _ in self.buckets(stream, settle=lambda: None):
                pass
        except BaseException as error:
            self.fail(str(error) or type(error).__name__)
            raise

    def fail(self, problem: str) -> None:
        """Tell the others that this rank's part has failed, if they still wait for its message."""
        if self._is_under_way and self._node is not None:
            self._is_under_way = False
            words = _Report(self._node.gpu, problem=problem or "it failed")
            exchange.all_gather_objects(words, self._node.group)
        self._is_under_way = False

    def _own_report(self, flat: Tensor) -> _Report:
        if self._node is None:
            return _Report("")
        # A handle that nobody opens would keep torch from reusing the buffer.
        handle = self._node.make_handle(flat) if self._node.gpu else None
        return _Report(self._node.gpu, handle)

    def _exchange(self, own: _Report) -> dict[str, CudaHandle]:
        """The handles of all packers, by GPU."""
        if self._node is None:
            return {}
        words = exchange.all_gather_objects(own, self._node.group)
        if problems := [f"GPU {word.gpu or '(none)'}: {word.problem}" for word in words if word.problem]:
            self._is_under_way = False  # all have heard it
            raise ServerError("packing weights for the servers failed on another rank of this node: " + problems[0])
        assert len({word.is_done for word in words}) == 1, "all packers have the same stream of weights"
        return {word.gpu: word.handle for word in words if word.handle is not None}
