"""Merging a step's metrics over ranks: sums on one rank, beside gathering everybody's metrics as objects.

    python benchmarks/metric_merge.py [--ranks 2 8 32] [--parts 1024] [--repeats 10]

Metrics are those of a microbatch's loss, two histograms of 3,502 bins among them. Real ranks over gloo on this machine,
one thread each. The peer gathers every rank's metrics in a pickle and adds all of them up on every rank, as this
project did. Bytes are those of TCP, by the kernel's own counters; CPU seconds are those of the whole process. For the
numbers of ranks that no single machine holds, one process adds up the parts of so many, as the adding rank does, and
as every rank did.
"""

from __future__ import annotations

import argparse
import os
import pickle
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.config import FipoConfig
from megatron_fipo.metrics.reductions import Metrics, merge
from megatron_fipo.parallel import by_value, exchange
from megatron_fipo.parallel.flat_metrics import Reader, add_up, flatten, on_cpu
from megatron_fipo.parallel.local_ranks import run_local_ranks
from megatron_fipo.parallel.metric_merge import merge_metrics
from megatron_fipo.rl.objective_metrics import policy_metrics

NUM_TOKENS = 512


@dataclass(frozen=True)
class Cost:
    """What a merge costs one rank."""

    cpu_s: float
    sent: int
    received: int


def metrics_of(rank: int) -> Metrics:
    """Metrics of a microbatch of random numbers."""
    generator = torch.Generator().manual_seed(rank)

    def numbers() -> torch.Tensor:
        return torch.randn(NUM_TOKENS, generator=generator)

    mask = numbers() > -1
    return policy_metrics(
        shift=0.01 * numbers(),
        advantages=numbers(),
        weights=1 + 0.1 * numbers(),
        future_kl=0.1 * numbers(),
        response_mask=mask,
        num_filtered=torch.tensor(1),
        loss=(numbers().sum(), mask.sum()),
        reference_kl=numbers(),
        entropy=numbers().abs(),
        config=FipoConfig(),
    )


def gather_objects(own: Metrics, group: dist.ProcessGroup) -> Metrics:
    """Every rank's metrics on every rank, added up there."""
    return merge(list(exchange.all_gather_objects(on_cpu(own), group)))


def traffic() -> tuple[int, int]:
    """(bytes sent, bytes received) over this process's TCP connections, by the kernel's `tcp_info`."""
    all_sent = all_received = 0
    for path in Path("/proc/self/fd").iterdir():
        if path.is_symlink() and os.readlink(path).startswith("socket:"):
            with socket.socket(fileno=os.dup(int(path.name))) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6):
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                    sent, again = struct.unpack_from("<QQ", info, 200)
                    all_sent += sent - again
                    all_received += struct.unpack_from("<Q", info, 128)[0]
    return all_sent, all_received


def cost_of(merging: Callable[[Metrics, dist.ProcessGroup], Metrics], own: Metrics, repeats: int) -> Cost:
    """Cost of one merge, the mean of the repeats. Collective."""
    group = dist.group.WORLD
    assert group is not None
    merging(own, group)  # connects
    dist.barrier()
    sent, received = traffic()
    start = time.process_time()
    for _ in range(repeats):
        merging(own, group)
    cpu_s = time.process_time() - start
    dist.barrier()
    sent_now, received_now = traffic()
    return Cost(cpu_s / repeats, (sent_now - sent) // repeats, (received_now - received) // repeats)


def run_rank(repeats: int) -> tuple[Cost, Cost]:
    """(our cost, the peer's)."""
    torch.set_num_threads(1)
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    dist.init_process_group("gloo")
    own = metrics_of(dist.get_rank())
    costs = cost_of(merge_metrics, own, repeats), cost_of(gather_objects, own, repeats)
    dist.destroy_process_group()
    return costs


def adding_s(num_parts: int) -> tuple[float, float]:
    """CPU seconds to read and add up so many ranks' metrics: (from flat ones, from pickles)."""
    parts = [on_cpu(metrics_of(rank)) for rank in range(32)]
    flats = [flatten(part) for part in parts]
    contents = [flats[index % 32].content.clone() for index in range(num_parts)]
    pickles = [by_value.dumps(parts[index % 32]) for index in range(num_parts)]
    start = time.process_time()
    reader = Reader(flats[0].kinds, flats[0].settings)
    flatten(add_up([reader.read(content) for content in contents]))
    flat_s = time.process_time() - start
    start = time.process_time()
    merge([pickle.loads(part) for part in pickles])
    return flat_s, time.process_time() - start


def row(who: str, ours: Cost, theirs: Cost) -> str:
    return (
        f"{who:24} {1e3 * ours.cpu_s:9.2f} {1e3 * theirs.cpu_s:9.2f} {ours.sent:11,} {theirs.sent:11,} "
        f"{ours.received:11,} {theirs.received:11,}"
    )


def busiest(costs: list[Cost]) -> Cost:
    """The largest of each."""
    return Cost(*(max(getattr(cost, field) for cost in costs) for field in ("cpu_s", "sent", "received")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--parts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{len(metrics_of(0))} metrics, gloo, {os.cpu_count()} cores for all ranks, torch {torch.__version__}")
    print(f"{'':24} {'CPU ms':>9} {'objects':>9} {'sent':>11} {'objects':>11} {'received':>11} {'objects':>11}")
    for ranks in args.ranks:
        preload = ("megatron_fipo.parallel.metric_merge", "megatron_fipo.rl.objective_metrics")
        found = run_local_ranks(run_rank, ranks, args.repeats, preload=preload)
        print(row(f"{ranks:4} ranks: the adding", *found[0]))
        others = found[1:]
        print(row("      busiest other", *(busiest([costs[side] for costs in others]) for side in (0, 1))))
    for num_parts in args.parts:
        flat_s, objects_s = map(min, zip(*(adding_s(num_parts) for _ in range(3)), strict=True))
        print(f"{num_parts} ranks' metrics read and added up: {flat_s:.3f} s, from objects {objects_s:.3f} s")


if __name__ == "__main__":
    main()
