"""Time, memory and kernels of a call, on a GPU by its own clocks and counters, on a CPU by the system's."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.evidence.report import Settings

GIB = 2**30
NUM_KERNELS = 20
_ATTENTION = re.compile(r"flash|fmha|attention|attn|sdpa|cudnn_generated", re.IGNORECASE)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the calls that counted."""

    calls_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.calls_ms)


def time_calls(function: Callable[[], object], settings: Settings) -> Timing:
    """Warm-up calls, then those that count: CUDA events around each on a GPU, the wall clock on a CPU.

    Stops early, with one call that counts at least, when the settings' time for one measurement is used up.
    """
    start = time.perf_counter()
    for _ in range(settings.warmup):
        function()
        synchronize()
        if time.perf_counter() - start > settings.measurement_s / 2:
            break
    times: list[float] = []
    for _ in range(settings.repeats):
        times.append(_one_call_ms(function, settings.device))
        if time.perf_counter() - start > settings.measurement_s:
            break
    return Timing(tuple(times))


def _one_call_ms(function: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    function()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after))


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of one call by the wall clock, with the device idle before and after."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class PeakMemory:
    """Peak memory: on a GPU the allocator's count, on a CPU the process's resident memory.

    Attributes:
        before_bytes: memory in use when the measurement began.
        peak_bytes: most memory in use, all in all.
        reserved_bytes: most memory that the allocator held; None on a CPU.
    """

    before_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int | None = None

    @property
    def extra_bytes(self) -> int:
        """Peak memory beyond what was in use before."""
        return max(self.peak_bytes - self.before_bytes, 0)


@contextmanager
def peak_memory(device: str) -> Iterator[PeakMemory]:
    """Measure the peak memory inside the context; the result is filled in at the end."""
    found = PeakMemory()
    synchronize()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        found.before_bytes = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        found.before_bytes = status_bytes("VmRSS")
    yield found
    synchronize()
    if device == "cuda":
        found.peak_bytes, found.reserved_bytes = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        found.peak_bytes = status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    """A size from /proc/self/status."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def gib(num_bytes: float) -> float:
    return round(num_bytes / GIB, 4)


@dataclass
class Profile:
    """One call's kernels and waits.

    Attributes:
        top_kernels: [{name, calls, ms}], the longest first: kernels on a GPU, operators on a CPU.
        kernels_ms: time of all kernels together; None on a CPU.
        stream_synchronizes: calls of cudaStreamSynchronize.
        device_to_host_copies: copies from the device to the host.
        scalar_reads: aten::_local_scalar_dense: `.item()`, `int(tensor)` and the like, counted on a CPU too.
        attention_kernels: names of kernels that look like attention, None on a CPU.
    """

    top_kernels: list[dict[str, Any]]
    kernels_ms: float | None
    stream_synchronizes: int
    device_to_host_copies: int
    scalar_reads: int
    attention_kernels: list[str] | None

    def values(self) -> dict[str, Any]:
        return dict(vars(self))

    def kernel_ms(self, pattern: str) -> float:
        """Time of those of the top kernels whose names match."""
        return sum(kernel["ms"] for kernel in self.top_kernels if re.search(pattern, kernel["name"]))


def profile(function: Callable[[], object], device: str) -> Profile:
    """Run once under torch.profiler, which makes its times incomparable with others."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        synchronize()
    events = [event for event in profiler.key_averages() if not getattr(event, "is_user_annotation", False)]
    counts = {event.key: event.count for event in events}
    if device == "cuda":
        ran = [(event, event.self_device_time_total) for event in events if event.device_type == DeviceType.CUDA]
    else:
        ran = [(event, event.self_cpu_time_total) for event in events]
    ran = sorted(ran, key=lambda pair: -pair[1])
    top = [{"name": event.key[:160], "calls": event.count, "ms": round(us / 1e3, 4)} for event, us in ran[:NUM_KERNELS]]
    names = [event.key for event, _ in ran]
    attention = sorted({name[:160] for name in names if _ATTENTION.search(name)})
    return Profile(
        top_kernels=top,
        kernels_ms=round(sum(us for _, us in ran) / 1e3, 4) if device == "cuda" else None,
        stream_synchronizes=counts.get("cudaStreamSynchronize", 0),
        device_to_host_copies=sum(event.count for event, _ in ran if event.key.startswith("Memcpy DtoH")),
        scalar_reads=counts.get("aten::_local_scalar_dense", 0),
        attention_kernels=attention if device == "cuda" else None,
    )
