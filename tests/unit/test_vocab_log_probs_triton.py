"""The Triton kernels of log-probs: their numbers under Triton's interpreter, and that they compile for a GPU.

Each runs in a process of its own, because Triton decides at import whether it interprets. None needs a GPU.
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

SET_UP = """
import itertools
import torch
from megatron_fipo.parallel import logit_rows, logit_rows_triton as kernels

BLOCK = kernels.SUMS_BLOCK = kernels.GRADIENT_BLOCK = 32
torch.manual_seed(0)
empty, empty_like = torch.empty, torch.empty_like
torch.empty = lambda *a, **k: empty(*a, **k).fill_(torch.nan)  # what a kernel leaves out shows
torch.empty_like = lambda *a, **k: empty_like(*a, **k).fill_(torch.nan)
T = 7
"""

ROWS = """
def labels_of(columns):
    # The first, the last, one between, and such as lie on other ranks, near and far.
    return torch.tensor([0, columns - 1, columns // 2, -1, columns, -5 * columns, columns + 2**40])

def exact_of(logits, labels, temperature, gradients):
    # (log-probs where the label is here, entropy, gradient of the logits, what backward needs), all in float64
    logits = (logits.double() / temperature).requires_grad_()
    log_p = logits.log_softmax(-1)
    here = (labels >= 0) & (labels < logits.shape[1])
    columns = labels.clamp(0, logits.shape[1] - 1)
    log_probs = log_p.gather(-1, columns[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    # A label on another rank has a constant for its own logit: what is left is -(the log of the sum).
    own = torch.where(here, log_probs, -logits.logsumexp(-1))
    torch.autograd.backward([own, entropy], [g.double() for g in gradients])
    maximum = logits.detach().amax(-1)
    log_sum = (logits.detach() - maximum[:, None]).logsumexp(-1)
    return own.detach(), entropy.detach(), logits.grad / temperature, (maximum, log_sum)

def results_of(module, logits, labels, temperature, gradients, dtype):
    sums_of, gradient_of = module
    sums = sums_of(logits.clone(), labels, temperature)
    assert sums.shape == (4, len(labels)) and sums.dtype == torch.float32
    maximum, total, weighted, at_label = sums
    entropy = total.log() - weighted / total
    per_token = torch.stack([maximum, total.log(), entropy, *gradients])
    gradient = gradient_of(logits.clone(), labels, per_token, temperature, dtype)
    assert gradient.shape == logits.shape and gradient.dtype == dtype
    return at_label - maximum - total.log(), entropy, gradient

PLAIN = (logit_rows.row_sums, logit_rows.logit_gradient)
TRITON = (kernels.triton_row_sums, kernels.triton_logit_gradient)

def errors(found, exact, logits, temperature):
    # Over what float32 must round off: 2^-24 of the largest logit, and of the result itself.
    floor = 2**-24 * float(logits.abs().max()) / temperature
    worst = []
    for value, right in zip(found, exact):
        scale = max(1.0, float(right.abs().max()))
        worst.append(float((value.double() - right).abs().max()) / (scale * 2**-24 * 8 + 4 * scale * floor))
    return worst
"""

NUMBERS = (
    SET_UP
    + ROWS
    + """
compared = 0
for columns, temperature, scale in itertools.product(
    (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 7 * BLOCK + 5), (1.0, 0.7, 1.3), (0.01, 3.0, 1e4)
):
    logits, labels = torch.randn(T, columns).clamp(-1, 1) * scale, labels_of(columns)
    gradients = (torch.randn(T), torch.randn(T))
    *exact, _ = exact_of(logits, labels, temperature, gradients)
    found = results_of(TRITON, logits, labels, temperature, gradients, torch.float32)
    plain = results_of(PLAIN, logits, labels, temperature, gradients, torch.float32)
    case = (columns, temperature, scale)
    assert all(value.isfinite().all() for value in found), case
    assert max(errors(found, exact, logits, temperature)) <= 1, (case, errors(found, exact, logits, temperature))
    assert max(errors(plain, exact, logits, temperature)) <= 1, (case, errors(plain, exact, logits, temperature))
    assert max(errors(found, [value.double() for value in plain], logits, temperature)) <= 1, case
    # In bfloat16 it is the same gradient to 8 bits. (The interpreter cuts off where a GPU rounds: see below.)
    rounded = results_of(TRITON, logits, labels, temperature, gradients, torch.bfloat16)
    assert ((rounded[2].float() - found[2]).abs() <= 2**-7 * found[2].abs() + 2**-126).all(), case
    compared += 1
assert compared == 63

# Logits that stand apart by thousands keep the digits of the entropy: two of them share all the probability.
logits = torch.full((T, 70), -1e4)
logits[:, 3], logits[:, 69] = 1e4, 1e4
found = results_of(TRITON, logits, torch.full((T,), 69), 1.0, (torch.ones(T), torch.ones(T)), torch.float32)
torch.testing.assert_close(found[1], torch.full((T,), 2.0).log())
torch.testing.assert_close(found[0], torch.full((T,), 0.5).log())
print("numbers")
"""
)

MISTAKES = (
    SET_UP
    + ROWS
    + """
# The bound notices each mistake: a label one off, a temperature left out, padding that takes part, a lost last block,
# a lost carry between lanes, entropy's gradient left out.
columns = 3 * BLOCK + 5
logits, labels = torch.randn(T, columns) * 3, labels_of(columns)
gradients = (torch.randn(T), torch.randn(T))
*exact, _ = exact_of(logits, labels, 0.7, gradients)
right = results_of(TRITON, logits, labels, 0.7, gradients, torch.float32)
assert max(errors(right, exact, logits, 0.7)) <= 1

def is_noticed(found, which):
    worst = errors(found, exact, logits, 0.7)
    assert all(worst[index] > 100 for index in which), (worst, which)

is_noticed(results_of(TRITON, logits, labels + 1, 0.7, gradients, torch.float32), (0, 2))
is_noticed(results_of(TRITON, logits, labels, 1.0, gradients, torch.float32), (0, 1, 2))
padded = torch.cat([logits, torch.full((T, 3), 7.0)], dim=1)
found = results_of(TRITON, padded, labels, 0.7, gradients, torch.float32)
is_noticed((*found[:2], found[2][:, :columns]), (0, 1, 2))
found = results_of(TRITON, logits[:, : 3 * BLOCK], labels, 0.7, gradients, torch.float32)
is_noticed(found[:2], (0, 1))
is_noticed(results_of(TRITON, logits, labels, 0.7, (gradients[0], gradients[1] * 0), torch.float32), (2,))

# What a kernel does not write shows.
assert torch.empty(3).isnan().all() and torch.empty_like(logits).isnan().all()

# A logit that is not a number spoils its own token, and no other: the actor looks for that.
for value in (torch.nan, torch.inf):
    spoilt = logits.clone()
    spoilt[2, BLOCK + 1] = value
    found = results_of(TRITON, spoilt, labels, 0.7, gradients, torch.float32)
    for result in found:
        is_finite = result.isfinite().view(T, -1)
        assert not is_finite[2].all() and is_finite[[0, 1, 3, 4, 5, 6]].all()

# Rows behind 2^31 logits: the offsets of a chunk of 8 GiB, of which only these pages are touched.
apart = 2**30 + 64
far = empty(0).set_(empty(2 * apart + columns).untyped_storage(), 0, (3, columns), (apart, 1)).copy_(logits[:3])
per_token = torch.stack([logits[:3].amax(-1), torch.ones(3), torch.ones(3), gradients[0][:3], gradients[1][:3]])
assert torch.equal(kernels.triton_row_sums(far, labels[:3], 1.0), kernels.triton_row_sums(logits[:3], labels[:3], 1.0))
near = kernels.triton_logit_gradient(logits[:3].clone(), labels[:3], per_token, 1.0, torch.float32)
assert torch.equal(kernels.triton_logit_gradient(far, labels[:3], per_token, 1.0, torch.float32), near)
print("mistakes")
"""
)

WHOLE = (
    SET_UP
    + """
from unittest import mock
import torch.distributed as dist
import torch.nn.functional as F
from megatron_fipo.parallel import vocab_log_probs as module

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
T, H, V = 26, 16, 150
hidden, weight, labels = torch.randn(T, H) * 0.5, torch.randn(V + 10, H), torch.randint(0, V, (T,))
gradients = [torch.randn(T), torch.randn(T)]
exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
log_p = F.log_softmax(exact_hidden @ exact_weight[:V].t() / 0.7, dim=-1)
exact = [log_p.gather(-1, labels[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)]
torch.autograd.backward(exact, [gradient.double() for gradient in gradients])
exact = [*exact, exact_hidden.grad, exact_weight.grad]
functions = (kernels.triton_row_sums, kernels.triton_logit_gradient)

def compute(chunk_tokens, **changes):
    own = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    keywords = {"vocab_size": V, "temperature": 0.7, "tp_group": dist.group.WORLD, "sequence_parallel": False}
    found = module.vocab_log_probs(*own, labels, chunk_tokens=chunk_tokens, **(keywords | changes))
    torch.autograd.backward(list(found), gradients)
    return [*found, *(tensor.grad for tensor in own)]

def worst(found):
    return max(float((value - right).abs().max() / right.abs().max()) for value, right in zip(found, exact))

with mock.patch.object(module, "_row_functions", lambda on: functions):
    for chunk_tokens in (1, 7, T, 10 * T):
        assert worst(compute(chunk_tokens)) <= 1e-6
    assert worst(compute(7, temperature=1.0)) > 1e-4
    assert worst(compute(7, vocab_size=V + 1)) > 1e-4
print("whole")
"""
)

COMPILED = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_fipo.parallel import logit_rows_triton as kernels

tail = {"num_columns": "i32", "temperature": "fp32", "IS_SCALED": "constexpr", "BLOCK": "constexpr"}
sums = {"logits": "*fp32", "labels": "*i64", "sums": "*fp32", "row_stride": "i32"}
sums |= {"num_columns": "i32", "num_tokens": "i32"} | tail
gradient = {"logits": "*fp32", "labels": "*i64", "per_token": "*fp32", "gradient": "", "row_stride": "i32"}
gradient |= {"gradient_stride": "i32", "per_token_stride": "i32"} | tail
for is_scaled, dtype in itertools.product((False, True), ("*bf16", "*fp32")):
    for kernel, arguments, block, warps in (
        (kernels._sums_kernel, sums, kernels.SUMS_BLOCK, kernels.SUMS_WARPS),
        (kernels._gradient_kernel, gradient | {"gradient": dtype}, kernels.GRADIENT_BLOCK, kernels.GRADIENT_WARPS),
    ):
        # As at run time with a vocabulary of a multiple of 16: such numbers and pointers are marked.
        is_marked = [kind[0] == "*" or name.endswith(("stride", "columns")) for name, kind in arguments.items()]
        source = ASTSource(
            fn=kernel,
            signature=arguments,
            constexprs={"IS_SCALED": is_scaled, "BLOCK": block},
            attrs={(i,): [["tt.divisibility", 16]] for i, marked in enumerate(is_marked) if marked},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert compiled.asm["cubin"]
        assert "ld.global.v4.b32" in compiled.asm["ptx"], "logits are not read by 16 bytes"
        is_rounded = kernel is kernels._gradient_kernel and dtype == "*bf16"
        assert ("cvt.rn.bf16x2.f32" in compiled.asm["ptx"]) == is_rounded, "to the nearest bfloat16"
print("compiled")
"""


@pytest.mark.parametrize(
    ("code", "interpret", "said"),
    [(NUMBERS, "1", "numbers"), (MISTAKES, "1", "mistakes"), (WHOLE, "1", "whole"), (COMPILED, "0", "compiled")],
    ids=["numbers", "mistakes", "whole", "compiled"],
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
