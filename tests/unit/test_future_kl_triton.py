"""The Triton kernels of Future-KL: their numbers under Triton's interpreter, and that they compile for a GPU.

Both run in a process of their own, because Triton decides at import whether it interprets. Neither needs a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (it comes with CUDA builds of torch; `pip install --no-deps triton` will do)",
)

INTERPRETED = """
import itertools
import torch
from megatron_fipo.rl import future_kl_triton
from megatron_fipo.rl.future_kl import future_kl_reference
from megatron_fipo.rl.segments import segments_of

def suffix_sum(x, cu, half_life):
    return future_kl_triton.triton_suffix_sum(x, segments_of(cu, len(x), x.device), half_life)

BOUND = 2e-6
future_kl_triton.BLOCK = 32
empty = torch.empty_like
torch.empty_like = lambda x: empty(x).fill_(torch.nan)
torch.manual_seed(0)
worst = 0.0
lengths = ([1], [31], [32], [33], [64], [0], [0, 5, 0, 150, 1, 32, 96, 95, 0], [1000])
inputs = {
    "noise": torch.randn,
    "one sign": lambda n: torch.rand(n) + 0.5,
    "cancelling": lambda n: torch.tensor([20.0, -20.0]).repeat(n // 2 + 1)[:n] * (1 + 1e-3 * torch.rand(n)),
    "mostly masked": lambda n: torch.randn(n) * (torch.rand(n) < 0.1),
}
for sizes, half_life, (name, make) in itertools.product(lengths, (0.5, 32.0, 256.0), inputs.items()):
    cu = torch.tensor([0, *sizes]).cumsum(0)
    x = make(sum(sizes))
    found = suffix_sum(x, cu, half_life)
    exact, scale = (future_kl_reference(values, cu, half_life) for values in (x, x.abs()))
    assert found.dtype == torch.float32 and found.isfinite().all(), (sizes, half_life, name)
    assert ((found - exact).abs() <= BOUND * scale).all(), (sizes, half_life, name)

# The bound notices a carry that is lost between blocks, and a sequence that leaks into the one before it.
x, cu = torch.ones(96), torch.tensor([0, 96])
exact = future_kl_reference(x, cu, 32.0)
for wrong in (torch.tensor([0, 32, 96]), torch.tensor([0, 64, 96])):
    found = suffix_sum(x, wrong, 32.0)
    assert not ((found - exact).abs() <= BOUND * exact).all()

# What is not finite stays within its own sequence.
x = torch.ones(100)
x[70] = torch.nan
found = suffix_sum(x, torch.tensor([0, 40, 80, 100]), 8.0)
assert found[40:71].isnan().all() and found[:40].isfinite().all() and found[71:].isfinite().all()
print("interpreted")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_fipo.rl import future_kl_triton as kernels

common = {"x": "*fp32", "cu_segments": "*i64", "powers": "*fp64"}
tail = {"num_blocks": "i32", "BLOCK": "constexpr"}
for function, arguments, constants in (
    (kernels._head_kernel, common | {"heads": "*fp64"} | tail, {"BLOCK": kernels.BLOCK}),
    (
        kernels._scan_kernel,
        common | {"block_powers": "*fp64", "heads": "*fp64", "result": "*fp32"} | tail | {"NUM_HEADS": "constexpr"},
        {"BLOCK": kernels.BLOCK, "NUM_HEADS": 32},
    ),
):
    source = ASTSource(fn=function, signature=arguments, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
print("compiled")
"""


@pytest.mark.parametrize(
    ("code", "interpret", "said"), [(INTERPRETED, "1", "interpreted"), (COMPILED, "0", "compiled")]
)
def test_kernels(code: str, interpret: str, said: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"TRITON_INTERPRET": interpret},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [said]
