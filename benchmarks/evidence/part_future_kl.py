"""Future-KL: its kernels alone, the whole call, and a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.evidence import machine
from benchmarks.evidence.measuring import profile, time_calls
from benchmarks.evidence.report import Settings
from benchmarks.future_kl import sum_over_pairs
from megatron_fipo.rl.future_kl import future_kl, future_kl_reference

HALF_LIFE = 32.0
ERROR_BOUND = 2e-6
"""The project's bound on errors, relative to the sum of gamma^(k-t) |x_k|."""
_BYTES_PER_TOKEN = 12
"""Each float32 is read twice and written once."""
_KERNELS = r"_head_kernel|_scan_kernel"
_SIZES = {"1.3 M tokens": (64, 20480), "10.5 M tokens": (512, 20480)}
_TINY = {"1.3 M tokens": (4, 320), "10.5 M tokens": (16, 320)}


def case_names(settings: Settings) -> list[str]:
    return list(_SIZES)


@contextmanager
def prepared(settings: Settings) -> Iterator[None]:
    yield None


def run_case(name: str, context: None, settings: Settings) -> dict[str, Any]:
    num_sequences, length = (_TINY if settings.tiny else _SIZES)[name]
    x = 0.1 * torch.randn(num_sequences * length, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.arange(num_sequences + 1) * length
    exact, scale = (future_kl_reference(values, cu_seqlens, HALF_LIFE) for values in (x, x.abs()))
    on_device = x.to(settings.device)
    error = ((future_kl(on_device, cu_seqlens, HALF_LIFE).cpu() - exact).abs() / scale).max()

    whole = time_calls(lambda: future_kl(on_device, cu_seqlens, HALF_LIFE), settings)
    copy = time_calls(on_device.clone, settings)
    peer = None
    if num_sequences == min(count for count, _ in _SIZES.values()) or settings.tiny:
        matrix = on_device.view(num_sequences, length)
        peer = time_calls(lambda: sum_over_pairs(matrix, HALF_LIFE, 128), settings).median_ms
    found = profile(lambda: future_kl(on_device, cu_seqlens, HALF_LIFE), settings.device)
    kernels = found.kernel_ms(_KERNELS) if settings.device == "cuda" else None
    copy_rate = 8 * len(x) / copy.median_ms / 1e6
    rate = _BYTES_PER_TOKEN * len(x) / kernels / 1e6 if kernels else None
    return {
        "kind": "suffix_sum",
        "sequences": num_sequences,
        "length": length,
        "call_ms": round(whole.median_ms, 4),
        "kernels_ms": kernels,
        "copy_ms": round(copy.median_ms, 4),
        "copy_gb_per_s": round(copy_rate, 2),
        "kernels_gb_per_s": None if rate is None else round(rate, 2),
        "share_of_copy_rate": None if rate is None else round(rate / copy_rate, 4),
        "largest_error": float(error),
        "error_bound": ERROR_BOUND,
        "peer_ms": peer,
        "top_kernels": found.top_kernels,
        "clock_sm_mhz": machine.sm_clock_mhz(settings.device),
    }
