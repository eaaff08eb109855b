"""Weights on their way: packed into buckets, and broadcast to processes of other worlds."""

from __future__ import annotations

import base64
import json
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import _world

from megatron_fipo.parallel.external_group import ExternalGroup
from megatron_fipo.rollout.servers import transfers
from megatron_fipo.rollout.servers.sglang import client as sglang
from megatron_fipo.rollout.servers.weight_buckets import pack

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TIMEOUT_S = 300.0
MEMBER = str(Path(__file__).with_name("external_group_member.py"))


def weights(*sizes: int) -> list[tuple[str, Tensor]]:
    return [(f"t{i}", torch.randn(size)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "bucket_bytes", "expected"),
    [
        ((4, 4, 4), 32, [["t0", "t1"], ["t2"]]),
        ((4, 4, 4), 48, [["t0", "t1", "t2"]]),
        ((4, 4, 4), 47, [["t0", "t1"], ["t2"]]),
        ((1, 100, 1, 1), 16, [["t0"], ["t1"], ["t2", "t3"]]),
        ((100, 100), 1, [["t0"], ["t1"]]),
        ((), 16, []),
    ],
)
def test_buckets_hold_what_fits(sizes: tuple[int, ...], bucket_bytes: int, expected: list[list[str]]) -> None:
    tensors = weights(*sizes)
    found, names = {}, []
    for bucket in pack(iter(tensors), bucket_bytes, torch.float32, CPU):
        names.append([spec.name for spec in bucket.specs])
        found |= {name: tensor.clone() for name, tensor in bucket.tensors()}
        assert [spec.start for spec in bucket.specs] == [0, *(spec.stop for spec in bucket.specs[:-1])]
        assert len(bucket.flat) == bucket.specs[-1].stop
    assert names == expected
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors)


def test_a_bucket_stays_until_the_one_after_the_next_is_asked_for() -> None:
    tensors = weights(4, 4, 4)
    buckets = pack(iter(tensors), 16, torch.float32, CPU)
    first, second = next(buckets), next(buckets)
    assert torch.equal(next(iter(first.tensors()))[1], tensors[0][1])
    third = next(buckets)
    assert torch.equal(next(iter(second.tensors()))[1], tensors[1][1])
    assert torch.equal(next(iter(first.tensors()))[1], tensors[2][1])  # its memory is the third's now
    assert third.flat.data_ptr() == first.flat.data_ptr()


def test_a_bucket_that_is_not_full_is_sent_without_the_rest() -> None:
    (bucket,) = pack(iter(weights(4, 4)), 2**20, torch.float32, CPU)
    assert bucket.flat.untyped_storage().nbytes() == 2**20
    sent = base64.b64decode(sglang._serialize(bucket, None))
    assert len(sent) < 4096
    assert torch.equal(pickle.loads(sent)["flattened_tensor"], bucket.flat)


def test_tensors_are_converted_and_may_be_views() -> None:
    table = torch.randn(3, 5)
    (bucket,) = pack(iter([("a", table.t()), ("b", torch.tensor(2.0))]), 1000, torch.bfloat16, CPU)
    tensors = dict(bucket.tensors())
    assert torch.equal(tensors["a"], table.t().bfloat16())
    assert tensors["b"].shape == ()
    assert [(spec.dtype, spec.shape) for spec in bucket.specs] == [(torch.bfloat16, (5, 3)), (torch.bfloat16, ())]


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="t0 came twice"):
        list(pack(iter([*weights(1), *weights(1)]), 100, torch.float32, CPU))


# --- the group -------------------------------------------------------------------------------------------------------


def listening_at(port: int) -> list[str]:
    """Addresses at which this process listens on a port."""
    return [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]


def test_members_are_met_at_one_address_of_the_host() -> None:
    group = ExternalGroup("127.0.0.1", "weights", "gloo", 2, TIMEOUT_S)
    assert listening_at(group.port) == ["127.0.0.1"]
    left_to_itself = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert listening_at(left_to_itself.port) != ["127.0.0.1"], "this is why the socket is made first"
    with pytest.raises(OSError, match=r"meet the servers at 192\.0\.2\.1, .* cannot listen there"):
        ExternalGroup("192.0.2.1", "weights", "gloo", 2, TIMEOUT_S)


def join(group: ExternalGroup, num_bytes: int) -> subprocess.Popen[str]:
    """A member in a process of its own; both have met when this returns."""
    member = subprocess.Popen(
        [sys.executable, MEMBER, str(group.port), str(num_bytes)], stdout=subprocess.PIPE, text=True
    )
    group.meet(lambda: None)
    return member


def test_broadcast_to_a_process_outside_our_world() -> None:
    group = ExternalGroup("127.0.0.1", "weights", "gloo", 2, TIMEOUT_S)
    member = join(group, num_bytes=40)
    (bucket,) = pack(iter(weights(10)), 100, torch.float32, CPU)
    group.broadcast(bucket.flat, lambda: None)
    output, _ = member.communicate()
    assert json.loads(output) == bucket.flat.tolist()
    group.leave()


def test_a_member_that_is_gone_is_an_error_and_the_name_is_free_again() -> None:
    group = ExternalGroup("127.0.0.1", "weights", "gloo", 2, TIMEOUT_S)
    join(group, num_bytes=0).communicate()
    with pytest.raises(RuntimeError, match=r"Connection (closed|reset) by peer|Broken pipe"):
        group.broadcast(torch.zeros(2**24, dtype=torch.uint8), lambda: None)
    assert "weights" in _world.pg_names.values()
    group.leave()
    assert "weights" not in _world.pg_names.values()


def test_what_a_member_says_ends_the_wait_for_all_to_meet() -> None:
    """It is never going to join; nothing of the meeting is left behind."""
    group = ExternalGroup("127.0.0.1", "weights", "gloo", 3, TIMEOUT_S)
    others = {thread.ident for thread in threading.enumerate()}
    member = subprocess.Popen([sys.executable, MEMBER, str(group.port), "0", "3"], stderr=subprocess.PIPE, text=True)

    def refuse() -> None:
        assert group._daemon is not None
        if group._daemon.num_keys() > 2:  # the one member is there, and waits for the other
            raise ValueError("it said no")

    with pytest.raises(ValueError, match="it said no"):
        group.meet(refuse)
    assert {thread.ident for thread in threading.enumerate()} <= others
    _, errors = member.communicate()
    assert member.returncode, "the other member hears of it at once, too"
    assert "DistNetworkError" in errors
    assert "weights" not in _world.pg_names.values()


def test_what_a_member_says_ends_the_wait_for_all_to_be_connected() -> None:
    """NCCL connects within the first broadcast, which does not return before the last member is there."""
    group = ExternalGroup("127.0.0.1", "weights", "gloo", 2, TIMEOUT_S)
    member = join(group, num_bytes=40)
    connected = threading.Event()

    def connect(group: object) -> torch.distributed.Work:
        connected.wait()
        raise RuntimeError("never connected")

    def refuse() -> None:
        raise ValueError("it said no")

    kept = group._group
    with pytest.raises(ValueError, match="it said no"):
        group._issue(connect, CPU, refuse)
    group.leave()  # must not wait for what is never connected
    connected.set()
    group._group = kept
    with pytest.raises(RuntimeError, match="never connected"):
        group._issue(connect, CPU, lambda: None)
    member.kill()
    member.communicate()
    group.leave()


def test_a_member_that_takes_no_part_ends_the_wait_when_the_time_is_up() -> None:
    """It lives, and neither it nor `check` says anything: no other time-out ends this process before ours does."""
    group = ExternalGroup("127.0.0.1", "weights", "gloo", 2, TIMEOUT_S)
    member = join(group, num_bytes=2**26)
    member.send_signal(signal.SIGSTOP)
    group._timeout_s = 0.5
    with pytest.raises(RuntimeError, match=r"not all members took part within 0\.5 s"):
        group.broadcast(torch.zeros(2**26, dtype=torch.uint8), lambda: None)
    group.leave()
    assert "weights" not in _world.pg_names.values()
    member.kill()
    member.communicate()
    nobody = ExternalGroup("127.0.0.1", "weights", "gloo", 2, TIMEOUT_S)
    nobody._timeout_s = 0.5
    with pytest.raises(RuntimeError, match=r"not all members took part within 0\.5 s"):
        nobody.meet(lambda: None)


def test_what_a_member_says_ends_the_wait() -> None:
    """Nobody is going to receive; `check` knows why, long before any time-out."""
    group = ExternalGroup("127.0.0.1", "weights", "gloo", 2, TIMEOUT_S)
    member = join(group, num_bytes=2**26)
    member.send_signal(signal.SIGSTOP)

    def refuse() -> None:
        raise ValueError("it said no")

    with pytest.raises(ValueError, match="it said no"):
        group.broadcast(torch.zeros(2**26, dtype=torch.uint8), refuse)
    member.kill()
    member.communicate()
    group.leave()


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["127.0.0.1", "localhost", "127.7.7.7"], "127.0.0.1"),
        (["127.0.0.1", "10.0.0.2"], "10.0.0.1"),
    ],
)
def test_servers_on_other_hosts_are_told_this_ones_address(
    hosts: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that has joined from there."""
    monkeypatch.setattr(transfers.socket, "gethostbyname", lambda name: "10.0.0.1")
    assert transfers._own_address(hosts) == expected
