"""Metrics merged over ranks as flat tensors: rank 0 of a group adds up, the others send theirs and receive the sum.

1. Every rank offers: whether its metrics count, how long they are, and digests of what they are (kinds and settings).
2. Rank 0 answers with the first rank that counts and its digests.
3. Ranks that count send their content to rank 0, and what it is only where it differs from the answer; the first that
   counts always does. Rank 0 adds up in the order of ranks.
4. Rank 0 broadcasts the sum, and what it is only if some rank lacks it.

So a rank sends its content and receives a sum however many ranks there are, and connects to rank 0 and to its
neighbours in a broadcast, which are at most log2 of the ranks. Rank 0 alone receives from each: only one that has all
parts adds them up in the order of ranks, to the bits that one process would get.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.parallel.exchange import broadcast
from megatron_fipo.parallel.flat_metrics import Part, Reader, add_up, as_bytes, as_tensor, flatten, on_cpu

_ADDS_UP = 0
"""Rank of the group that adds up."""
_ABSENT, _COUNTS, _FAILED = range(3)
"""What a rank says of its metrics."""
_RAISED = (ValueError, TypeError, ArithmeticError, RuntimeError)
"""What may be wrong with one rank's metrics, or with those of two ranks; raised on every rank."""

Digests = tuple[bytes, bytes]
"""Of kinds and of settings, 16 bytes each."""


def merge_metrics(own: Metrics | None, group: ProcessGroup) -> Metrics:
    """Add up every rank's metrics; None where a rank's do not count. The same result everywhere. Collective.

    The result is that of `reductions.merge` of the metrics by rank, bit for bit, with 0-d tensors as numbers and all
    others on the CPU. A rank waits for its device once for each dtype.

    Args:
        group: one that has gloo for tensors on the CPU.

    Raises:
        ValueError, TypeError: on every rank, if metrics of one name cannot be added up, or cannot be sent.
    """
    if group.size() == 1:
        return on_cpu(own or {})
    share = _share_of(own)
    offers = _gather(share.offer, group)
    answer = broadcast(_answer(offers) if offers else torch.empty(5, dtype=torch.int64), _ADDS_UP, group)
    first, reference = int(answer[0]), _digests_in(answer[1:])
    if first == group.size():
        return {}
    if offers:
        return _merge_on_the_adding_rank(share, [_Offer.read(offer) for offer in offers], first, group)
    if share.state != _ABSENT:
        message = share.message(_Offer.read(share.offer).untold(reference, is_first=group.rank() == first))
        dist.send(message, group=group, group_dst=_ADDS_UP)
    return _receive_sum(share, group)


@dataclass(frozen=True)
class _Share:
    """Metrics that travel, or what went wrong with them: then the content says so, and both texts are empty."""

    state: int
    content: Tensor
    texts: tuple[bytes, bytes] = (b"", b"")
    """Kinds and settings of `FlatMetrics`."""

    @cached_property
    def digests(self) -> Digests:
        kinds, settings = (hashlib.blake2b(text, digest_size=16).digest() for text in self.texts)
        return kinds, settings

    @property
    def offer(self) -> Tensor:
        """int64 [8]: state, three lengths in bytes, both digests."""
        lengths = [self.state, self.content.numel(), *map(len, self.texts)]
        return torch.cat([torch.tensor(lengths), _as_numbers(self.digests)])

    def message(self, told: Sequence[bool]) -> Tensor:
        """uint8: the content, then those texts that are told."""
        texts = [as_tensor(text) for text, is_told in zip(self.texts, told, strict=True) if is_told]
        return torch.cat([self.content, *texts])

    def metrics(self) -> Metrics:
        """The metrics, or the error that this is instead."""
        if self.state == _FAILED:
            failure = as_bytes(self.content)
            raise _RAISED[failure[0]](failure[1:].decode())
        return Reader(*self.texts).read(self.content).metrics()


@dataclass(frozen=True)
class _Offer:
    """What a rank says before it sends."""

    state: int
    lengths: tuple[int, int, int]
    digests: Digests

    @staticmethod
    def read(offer: Tensor) -> _Offer:
        state, *lengths = offer[:4].tolist()
        return _Offer(state, tuple(lengths), _digests_in(offer[4:]))

    def untold(self, known: Digests, *, is_first: bool = False) -> list[bool]:
        """Which of the two texts have to be sent beside the content to one who knows these."""
        return [is_first or own != there for own, there in zip(self.digests, known, strict=True)]

    def length(self, told: Sequence[bool]) -> int:
        """Bytes of the message."""
        content, *texts = self.lengths
        return content + sum(length for length, is_told in zip(texts, told, strict=True) if is_told)

    def share(self, message: Tensor, told: Sequence[bool], known: Sequence[bytes]) -> _Share:
        """What arrived. A text that was not told is the one that is known."""
        place, texts = self.lengths[0], []
        for length, is_told, text in zip(self.lengths[1:], told, known, strict=True):
            texts.append(as_bytes(message[place : place + length]) if is_told else text)
            place += length if is_told else 0
        return _Share(self.state, message[: self.lengths[0]], (texts[0], texts[1]))


def _share_of(own: Metrics | None) -> _Share:
    if not own:
        return _Share(_ABSENT, as_tensor(b""))
    try:
        flat = flatten(on_cpu(own))
    except _RAISED as error:
        return _failure(error, f"rank {dist.get_rank()}: ")
    return _Share(_COUNTS, flat.content, (flat.kinds, flat.settings))


def _failure(error: Exception, place: str = "") -> _Share:
    index = next(index for index, kind in enumerate(_RAISED) if isinstance(error, kind))
    return _Share(_FAILED, as_tensor(bytes([index]) + f"{place}{error}".encode()))


def _gather(offer: Tensor, group: ProcessGroup) -> list[Tensor] | None:
    """All offers by rank on the rank that adds up, None elsewhere."""
    gathered = [torch.empty_like(offer) for _ in range(group.size())] if group.rank() == _ADDS_UP else None
    dist.gather(offer, gathered, group=group, group_dst=_ADDS_UP)
    return gathered


def _answer(offers: Sequence[Tensor]) -> Tensor:
    """int64 [5]: the first rank that is not absent (the number of ranks if all are), and its digests."""
    first = next((rank for rank, offer in enumerate(offers) if int(offer[0]) != _ABSENT), len(offers))
    digests = offers[first][4:] if first < len(offers) else torch.zeros(4, dtype=torch.int64)
    return torch.cat([torch.tensor([first]), digests])


def _merge_on_the_adding_rank(share: _Share, offers: Sequence[_Offer], first: int, group: ProcessGroup) -> Metrics:
    """Receive what counts, add it up, tell every rank."""
    shares = _receive_shares(share, offers, first, group)
    result = _sum_of(shares)
    lacking = [offer.untold(result.digests) for rank, offer in enumerate(offers) if rank != _ADDS_UP]
    told = [any(lacks) for lacks in zip(*lacking, strict=True)]
    broadcast(torch.cat([result.offer, torch.tensor(told).long()]), _ADDS_UP, group)
    broadcast(result.message(told), _ADDS_UP, group)
    return result.metrics()


def _receive_shares(own: _Share, offers: Sequence[_Offer], first: int, group: ProcessGroup) -> list[_Share]:
    """What every rank that is not absent has sent, by rank."""
    reference = offers[first].digests
    pending = []
    for rank, offer in enumerate(offers):
        if rank != _ADDS_UP and offer.state != _ABSENT:
            told = offer.untold(reference, is_first=rank == first)
            message = torch.empty(offer.length(told), dtype=torch.uint8)
            work = dist.irecv(message, group=group, group_src=rank)
            assert work is not None, "this rank belongs to the group"
            pending.append((offer, message, told, work))
    shares = [own] if own.state != _ABSENT else []
    for offer, message, told, work in pending:
        work.wait()
        shares.append(offer.share(message, told, shares[0].texts if shares else (b"", b"")))
    return shares


def _sum_of(shares: Sequence[_Share]) -> _Share:
    """The sum of all, or what went wrong first."""
    failed = next((share for share in shares if share.state == _FAILED), None)
    if failed is not None:
        return failed
    readers: dict[tuple[bytes, bytes], Reader] = {}
    parts: list[Part] = []
    try:
        for share in shares:
            reader = readers.get(share.texts)
            if reader is None:
                reader = readers[share.texts] = Reader(*share.texts)
            parts.append(reader.read(share.content))
        flat = flatten(add_up(parts))
    except _RAISED as error:
        return _failure(error)
    return _Share(_COUNTS, flat.content, (flat.kinds, flat.settings))


def _receive_sum(own: _Share, group: ProcessGroup) -> Metrics:
    head = broadcast(torch.empty(10, dtype=torch.int64), _ADDS_UP, group)
    offer, told = _Offer.read(head[:8]), head[8:].bool().tolist()
    message = broadcast(torch.empty(offer.length(told), dtype=torch.uint8), _ADDS_UP, group)
    return offer.share(message, told, own.texts).metrics()


def _as_numbers(digests: Digests) -> Tensor:
    """int64 [4]."""
    return torch.tensor(struct.unpack("<4q", b"".join(digests)))


def _digests_in(numbers: Tensor) -> Digests:
    both = struct.pack("<4q", *numbers.tolist())
    return both[:16], both[16:]
