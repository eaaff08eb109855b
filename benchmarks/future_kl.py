"""Future-KL of whole sequences: our blocked scan beside the sum over all pairs, and beside a copy of the same bytes.

    python benchmarks/future_kl.py [--num-sequences 64] [--length 20480] [--half-life 32] [--device cuda]

The peer is the sum as the paper's formula writes it, F_t = sum over k >= t of gamma^(k-t) x_k: for a chunk of tokens t
at a time, a matrix of powers [chunk, L], shared by all sequences, times x. "product alone" is the kindest reading of
it, where the powers cost nothing (rows of the matrix are windows into one table) and the O(L^2) product is left. All
sides run in one process, in turns; the fastest of the repeats counts. Errors are against the float64 recurrence,
relative to the sum of gamma^(k-t) |x_k|.

On CUDA these times are the host's, launches included, and of few bytes. So a second table has the GPU's own, of eight
times as many sequences: by events around calls that were queued together, lengths on the CPU, tables made before.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_fipo.rl.future_kl import future_kl, future_kl_reference, segment_suffix_sum
from megatron_fipo.rl.segments import segments_of

TIMES_AS_MANY = 8
"""Sequences of the GPU's own table, as a multiple of --num-sequences: 42 MB each way at the defaults."""
CALLS = 10
"""Calls between two events."""
HEAD_START_CYCLES = 100_000_000
"""Cycles for which the GPU idles at first, some 50 ms: by then the host has queued all calls."""


def sum_over_pairs(x: Tensor, half_life: float, chunk: int) -> Tensor:
    """F [B, L] of x [B, L]: O(L^2) work, O(L * chunk) memory."""
    length = x.shape[1]
    positions = torch.arange(length, device=x.device)
    gamma = torch.tensor(2.0 ** (-1.0 / half_life), device=x.device)
    result = torch.empty_like(x)
    for start in range(0, length, chunk):
        distance = positions[None, :] - positions[start : start + chunk, None]
        weights = torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0.0)
        result[:, start : start + chunk] = x @ weights.t()
    return result


def product_alone(x: Tensor, half_life: float, chunk: int) -> Tensor:
    """`sum_over_pairs`, but with the matrix of powers read from one table."""
    length = x.shape[1]
    distances = torch.arange(length, device=x.device, dtype=torch.float64)
    table = torch.cat([x.new_zeros(length - 1), torch.exp2(-distances / half_life).float()])
    result = torch.empty_like(x)
    for start in range(0, length, chunk):
        rows = min(chunk, length - start)
        # Entry (i, k) is the power of k - (start + i), zero where that is negative; rows run backwards in the table.
        windows = table.as_strided((rows, length), (1, 1), length - start - rows).flip(0)
        result[:, start : start + rows] = x @ windows.t()
    return result


def seconds(function: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    """Fastest of the repeats, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def milliseconds_on_gpu(function: Callable[[], Tensor], repeats: int) -> float:
    """The GPU's own time of one call, the median of the repeats, after three calls that do not count."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        for _ in range(CALLS):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def print_gpu_times(num_sequences: int, length: int, half_life: float, repeats: int, device: torch.device) -> None:
    """Print the GPU's time of our scan, beside a copy of the same bytes."""
    x = 0.1 * torch.randn(num_sequences * length, device=device)
    cu_seqlens = torch.arange(num_sequences + 1) * length
    segments = segments_of(cu_seqlens, len(x), device)
    exact = future_kl_reference(x.cpu(), cu_seqlens, half_life)
    scale = future_kl_reference(x.abs().cpu(), cu_seqlens, half_life)
    error = float(((segment_suffix_sum(x, segments, half_life).cpu() - exact).abs() / scale).max())
    ours = milliseconds_on_gpu(lambda: segment_suffix_sum(x, segments, half_life), repeats)
    copy = milliseconds_on_gpu(x.clone, repeats)
    print(f"\n[{num_sequences}, {length:,}], the GPU's own time, median of {repeats} x {CALLS} calls")
    print(f"{'':16} {'ms':>12} {'x copy':>10} {'GB/s':>15} {'largest error':>15}")
    for side, time_ms, said in (("ours", ours, f"{error:.1e}"), ("copy", copy, "")):
        # A value is read and a value is written; what ours moves beyond that counts as time alone.
        print(f"{side:16} {time_ms:12,.4f} {time_ms / copy:10,.2f} {8e-6 * len(x) / time_ms:15,.0f} {said:>15}")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=20480)
    parser.add_argument("--half-life", type=float, default=32.0)
    parser.add_argument("--chunk", type=int, default=128, help="tokens whose powers the peer holds at a time")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peer-repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)

    x = 0.1 * torch.randn(args.num_sequences, args.length, device=device)
    cu_seqlens = torch.arange(args.num_sequences + 1) * args.length
    flat = x.flatten()
    sides: dict[str, tuple[Callable[[], Tensor], int]] = {
        "ours": (lambda: future_kl(flat, cu_seqlens, args.half_life), args.repeats),
        "sum over pairs": (lambda: sum_over_pairs(x, args.half_life, args.chunk).flatten(), args.peer_repeats),
        "product alone": (lambda: product_alone(x, args.half_life, args.chunk).flatten(), args.peer_repeats),
        "copy": (lambda: flat.clone(), args.repeats),
    }
    exact = future_kl_reference(flat.cpu(), cu_seqlens, args.half_life)
    scale = future_kl_reference(flat.abs().cpu(), cu_seqlens, args.half_life)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"[{args.num_sequences}, {args.length:,}], half-life {args.half_life:g}, {args.threads} of {os.cpu_count()} "
        f"threads, {name}, torch {torch.__version__}"
    )
    print(f"{'':16} {'ms':>12} {'x ours':>10} {'largest error':>15}")
    times = {side: seconds(function, repeats, device) for side, (function, repeats) in sides.items()}
    for side, (function, _) in sides.items():
        error = "" if side == "copy" else f"{float(((function().cpu() - exact).abs() / scale).max()):.1e}"
        print(f"{side:16} {1e3 * times[side]:12,.2f} {times[side] / times['ours']:10,.2f} {error:>15}")
    if device.type == "cuda":
        print_gpu_times(TIMES_AS_MANY * args.num_sequences, args.length, args.half_life, args.repeats, device)


if __name__ == "__main__":
    main()
