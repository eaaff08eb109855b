"""Future-KL on a GPU, by the Triton kernels: the bound of the CPU tests at full size."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_fipo.rl.future_kl import future_kl, future_kl_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.parametrize("half_life", [8.0, 32.0, 256.0])
def test_within_the_bound_at_20480_tokens(half_life: float) -> None:
    lengths = torch.tensor([20480, 1, 0, 1023, 1024, 1025, 7000])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    x = torch.randn(int(lengths.sum()), generator=torch.Generator().manual_seed(0))
    exact, scale = (future_kl_reference(values, cu_seqlens, half_life) for values in (x, x.abs()))
    found = future_kl(x.cuda(), cu_seqlens, half_life).cpu()
    assert ((found - exact).abs() <= 2e-6 * scale).all()


def test_gradients_are_those_of_the_cpu() -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 1000, 3000])
    on_cpu, on_gpu = x.clone().requires_grad_(), x.cuda().requires_grad_()
    for values in (on_cpu, on_gpu):
        future_kl(values, cu_seqlens, 32.0).square().sum().backward()
    assert on_cpu.grad is not None
    assert on_gpu.grad is not None
    torch.testing.assert_close(on_gpu.grad.cpu(), on_cpu.grad)
