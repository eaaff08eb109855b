"""GPUs that a run may be planned for."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator, by its vendor's data sheet.

    Attributes:
        memory_gib: what the driver reports, somewhat less than what the name promises.
        peak_flops: operations per second in dense bfloat16 with float32 accumulation.
        bandwidth: the memory's bandwidth, bytes per second.
        link_bandwidth: bandwidth to the other GPUs of the node (NVLink), bytes per second each way.
        fp8_flops: operations per second in dense FP8; 0 without it.
        fp8_recipes: values of model.fp8 that it computes.
        reads_fp8_both_ways: whether FP8 products take a matrix in rows or in columns. Where they do not (compute
            capability below 10), a second, transposed copy is kept.
    """

    name: str
    memory_gib: float
    peak_flops: float
    bandwidth: float
    link_bandwidth: float
    fp8_flops: float = 0.0
    fp8_recipes: tuple[str, ...] = ()
    reads_fp8_both_ways: bool = False


_HOPPER = ("tensorwise", "blockwise")

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-80gb", 79.2, 312e12, 2.04e12, 300e9),
        Gpu("h100-80gb", 79.6, 989e12, 3.35e12, 450e9, 1979e12, _HOPPER),
        Gpu("h200", 140.4, 989e12, 4.8e12, 450e9, 1979e12, _HOPPER),
        Gpu("b200", 178.4, 2250e12, 7.7e12, 900e9, 4500e12, (*_HOPPER, "mxfp8"), True),
    )
}
"""Hardware by the name that --gpu takes."""
