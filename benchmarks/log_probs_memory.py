"""Peak memory of log-probs and entropy, forward and backward: ours in chunks beside the whole logits.

    python benchmarks/log_probs_memory.py [--vocab-size 152064] [--hidden-size 512] [--dtype bfloat16] ...

The peer computes float32 logits of all tokens and calls log_softmax; both run where both fit, ours alone at the longest
length. Each measurement is a process of its own: its resident high-water mark (VmHWM of /proc, reset before) less what
was resident before, less the weight's gradient, which every way of computing must hold. Linux only.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.config import ModelSection, log_prob_chunk_tokens
from megatron_fipo.parallel.vocab_log_probs import vocab_log_probs

GIB = 2**30
LogProbs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(chunk_mib: float) -> LogProbs:
    """This project's computation, on one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None

    def compute(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return vocab_log_probs(
            hidden,
            weight,
            labels,
            vocab_size=len(weight),
            temperature=1.0,
            chunk_tokens=log_prob_chunk_tokens(chunk_mib, len(weight)),
            tp_group=group,
            sequence_parallel=False,
        )

    return compute


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) by way of the whole logits."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    return log_p.gather(-1, labels[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def status_bytes(key: str) -> int:
    """A size from /proc/self/status."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def measure(side: str, num_tokens: int, args: argparse.Namespace) -> tuple[float, float, float]:
    """(peak extra GiB, seconds, gradient norm of the hidden states), in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(num_tokens, args.hidden_size).to(dtype).requires_grad_()
    weight = (torch.randn(args.vocab_size, args.hidden_size) / args.hidden_size**0.5).to(dtype).requires_grad_()
    labels = torch.randint(args.vocab_size, (num_tokens,))
    compute = plain if side == "plain" else ours(args.chunk_mib)
    for parameter in (hidden, weight):  # their gradients' libraries and threads, before the count begins
        (parameter[:2].float() @ parameter[:2].float().t()).sum().backward()
        parameter.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start = status_bytes("VmRSS"), time.perf_counter()
    log_probs, entropy = compute(hidden, weight, labels)
    (log_probs.sum() + 0.1 * entropy.sum()).backward()
    spent = time.perf_counter() - start
    assert hidden.grad is not None
    assert weight.grad is not None
    extra = status_bytes("VmHWM") - before - weight.grad.nbytes
    return extra / GIB, spent, float(hidden.grad.float().norm())


def in_own_process(side: str, num_tokens: int) -> tuple[float, float, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", side, str(num_tokens)]
    # Freed memory goes back to the system at once, so that a peak is what was in use together.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    extra, spent, norm = map(float, output.split()[-3:])
    return extra, spent, norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=2048, help="where both sides run")
    parser.add_argument("--most-tokens", type=int, default=20480, help="where ours runs alone")
    parser.add_argument("--vocab-size", type=int, default=152064)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--chunk-mib", type=float, default=ModelSection.log_prob_chunk_mib)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(*measure(args.measure[0], int(args.measure[1]), args))
        return
    tokens = log_prob_chunk_tokens(args.chunk_mib, args.vocab_size)
    print(
        f"vocabulary {args.vocab_size:,}, hidden {args.hidden_size}, {args.dtype}, chunks of {args.chunk_mib:g} MiB "
        f"({tokens} tokens), {args.threads} of {os.cpu_count()} threads, torch {torch.__version__}"
    )
    print(f"{'':8} {'tokens':>8} {'peak extra, GiB':>16} {'seconds':>9} {'|d hidden|':>12}", flush=True)
    for side, num_tokens in (("plain", args.num_tokens), ("ours", args.num_tokens), ("ours", args.most_tokens)):
        extra, spent, norm = in_own_process(side, num_tokens)
        print(f"{side:8} {num_tokens:8,} {extra:16.2f} {spent:9.1f} {norm:12.5f}", flush=True)


if __name__ == "__main__":
    main()
