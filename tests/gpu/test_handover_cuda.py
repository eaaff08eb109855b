"""A GPU's memory opened by another process: what a rollout server's worker does with each bucket of weights."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch

from benchmarks.evidence.receiver import receive
from megatron_fipo.parallel.device_memory import prefer_expandable_segments
from megatron_fipo.rollout.servers.cuda_handles import cuda_handle
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm import transport
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.digest import digest
from megatron_fipo.rollout.servers.weight_buckets import pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

BUCKET_BYTES = 1 << 20
TIMEOUT_S = 120.0


@pytest.fixture
def other_process() -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=receive, args=(theirs, "cuda"), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(TIMEOUT_S), "the other process did not start"
        assert ours.recv() == "ready"
        yield ours
        ours.send(None)
        process.join(TIMEOUT_S)
    finally:
        process.kill()
        process.join()


def test_buckets_arrive_in_another_process(other_process: Connection) -> None:
    """Also where training lets the allocator's segments grow, which no handle names; buffers are used in turns."""
    prefer_expandable_segments()
    generator = torch.Generator("cuda").manual_seed(0)
    weights = [
        (f"weight {index}", torch.randn(300_000, generator=generator, device="cuda").bfloat16()) for index in range(7)
    ]
    num_buckets, seen = 0, set()
    for bucket in pack(weights, BUCKET_BYTES, torch.bfloat16, None):
        handle = cuda_handle(bucket.flat)
        other_process.send((transport.pack_handle(handle.device_uuid, handle.arguments), True))
        assert other_process.poll(TIMEOUT_S), "the other process did not answer"
        answer, own = other_process.recv(), digest(bucket.flat)
        assert answer == own, answer
        bucket.flat[0] ^= 1
        assert digest(bucket.flat) != answer, "the digest notices nothing"
        num_buckets += 1
        seen.add(answer)
    assert num_buckets == len(seen) > 2, "no buffer was used twice, or one bucket came again and again"
