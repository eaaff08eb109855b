"""Future-KL across context-parallel ranks: our exchange beside gathering whole sequences and recomputing everywhere.

    python benchmarks/cp_exchange.py [--num-sequences 16] [--length 20480] [--cp 2 4 8]

Real ranks over gloo on this machine. The peer gathers every rank's rows, puts them into order, runs our own blocked
scan over the whole sequences and keeps its rows: what other projects do, with a scan that is better than theirs. A
repeat's time is that of the slowest rank; the fastest of the repeats counts. Bytes are what one rank receives.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.parallel import cp_layout, exchange
from megatron_fipo.parallel.cp_suffix_sum import cp_future_kl, exchanged_bytes
from megatron_fipo.parallel.local_ranks import run_local_ranks
from megatron_fipo.rl.future_kl import future_kl


@dataclass(frozen=True)
class Load:
    """The sequences that are summed up, and the number of repeats."""

    num_sequences: int
    length: int
    half_life: float
    repeats: int


def gather_and_recompute(x_local: Tensor, cu_seqlens: Tensor, half_life: float) -> Tensor:
    """future_kl [T_local] by way of the whole sequences on every rank."""
    group = dist.group.WORLD
    assert group is not None
    gathered = torch.cat(exchange.all_gather_tensors(x_local, group))
    whole = torch.empty_like(gathered)
    whole[cp_layout.gathered_positions(cu_seqlens, group.size())] = gathered
    rows = cp_layout.local_indices(cu_seqlens, group.size(), group.rank())
    return future_kl(whole, cu_seqlens, half_life)[rows]


def slowest_rank_s(function: Callable[[], Tensor]) -> float:
    """Seconds of the slowest rank, all starting together."""
    dist.barrier()
    start = time.perf_counter()
    function()
    spent = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def run_rank(load: Load) -> tuple[float, float, float]:
    """(our seconds, the peer's seconds, largest difference between the two results)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    cu_seqlens = torch.arange(load.num_sequences + 1) * load.length
    x = 0.1 * torch.randn(load.num_sequences * load.length, generator=torch.Generator().manual_seed(0))
    local = x[cp_layout.local_indices(cu_seqlens, group.size(), group.rank())]

    def ours() -> Tensor:
        result = cp_future_kl(local, cu_seqlens, load.half_life, group)
        assert isinstance(result, Tensor)
        return result

    def theirs() -> Tensor:
        return gather_and_recompute(local, cu_seqlens, load.half_life)

    difference = float((ours() - theirs()).abs().max())
    times = [(slowest_rank_s(ours), slowest_rank_s(theirs)) for _ in range(load.repeats)]
    dist.destroy_process_group()
    return min(mine for mine, _ in times), min(others for _, others in times), difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=20480)
    parser.add_argument("--half-life", type=float, default=32.0)
    parser.add_argument("--cp", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    load = Load(args.num_sequences, args.length, args.half_life, args.repeats)
    print(
        f"{load.num_sequences} sequences of {load.length:,} tokens, gloo, {os.cpu_count()} cores for all ranks, "
        f"torch {torch.__version__}"
    )
    print(
        f"{'cp':>3} {'ours, ms':>10} {'gather, ms':>11} {'ratio':>7} {'ours, bytes':>12} {'gather, bytes':>14} "
        f"{'ratio':>8} {'difference':>11}"
    )
    for cp in args.cp:
        mine, others, difference = run_local_ranks(
            run_rank, cp, load, preload=("megatron_fipo.parallel.cp_suffix_sum",)
        )[0]
        own_bytes = exchanged_bytes(load.num_sequences, cp)
        their_bytes = 4 * load.num_sequences * load.length
        print(
            f"{cp:3} {1e3 * mine:10.2f} {1e3 * others:11.2f} {others / mine:7.1f} {own_bytes:12,} {their_bytes:14,} "
            f"{their_bytes / own_bytes:8,.0f} {difference:11.1e}"
        )


if __name__ == "__main__":
    main()
