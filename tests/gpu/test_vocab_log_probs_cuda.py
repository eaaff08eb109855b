"""Log-probs and entropy on a GPU at the sizes of real models: against float64 of the same weights, kernels against the
plain formulas, and the memory that they take."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.config import log_prob_chunk_tokens
from megatron_fipo.parallel import logit_rows
from megatron_fipo.parallel import vocab_log_probs as module
from megatron_fipo.parallel.vocab_log_probs import vocab_log_probs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

NUM_TOKENS, TEMPERATURE, CHUNK_MIB = 1100, 0.9, 512.0
SHAPES = [(896, 152_064, 151_936), (5120, 19_072, 18_900)]
"""Hidden size, rows, and those that are not padding: Qwen2.5-0.5B whole, and of the 32B model a rank of eight."""
PLAIN = (logit_rows.row_sums, logit_rows.logit_gradient)


@pytest.fixture(autouse=True)
def group() -> Iterator[dist.ProcessGroup]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()
    torch.set_float32_matmul_precision(precision)


class Problem:
    """Inputs on the GPU, and what float64 makes of them."""

    def __init__(self, hidden_size: int, rows: int, vocab_size: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        scale = 8.0 / hidden_size**0.5  # logits of up to some 40, where bfloat16 is a quarter apart
        self.hidden = torch.randn(NUM_TOKENS, hidden_size, device="cuda").to(dtype)
        self.weight = (torch.randn(rows, hidden_size, device="cuda") * scale).to(dtype)
        self.labels = torch.randint(vocab_size, (NUM_TOKENS,), device="cuda")
        self.gradients = [torch.randn(NUM_TOKENS, device="cuda") for _ in range(2)]
        self.vocab_size, self.rows = vocab_size, rows

    def expected(self) -> dict[str, Tensor]:
        """By hand, a few tokens at a time."""
        hidden, weight = self.hidden.double(), self.weight[: self.vocab_size].double()
        parts: list[tuple[Tensor, ...]] = []
        weight_gradient = torch.zeros_like(weight)
        for chunk in torch.arange(NUM_TOKENS, device="cuda").split(275):
            log_p = (hidden[chunk] @ weight.t() / TEMPERATURE).log_softmax(-1)
            p = log_p.exp()
            entropy = -(p * log_p).sum(-1)
            of_log_prob, of_entropy = (gradient[chunk].double()[:, None] for gradient in self.gradients)
            gradient = -p * of_log_prob - of_entropy * p * (log_p + entropy[:, None])
            gradient.scatter_add_(-1, self.labels[chunk, None], of_log_prob)
            gradient /= TEMPERATURE
            weight_gradient += gradient.t() @ hidden[chunk]
            parts.append((log_p.gather(-1, self.labels[chunk, None])[:, 0], entropy, gradient @ weight))
        log_probs, entropies, hidden_gradient = (torch.cat(part) for part in zip(*parts, strict=True))
        return {
            "log_probs": log_probs,
            "entropy": entropies,
            "hidden gradient": hidden_gradient,
            "weight gradient": weight_gradient,
        }

    def by_pytorch(self) -> dict[str, Tensor]:
        """By PyTorch's own functions and gradients, from float32 products of the same operands."""
        hidden = self.hidden.float().clone().requires_grad_()
        weight = self.weight[: self.vocab_size].float().clone().requires_grad_()
        if self.hidden.dtype == torch.float32:
            logits = hidden @ weight.t()
        else:
            logits = torch.mm(self.hidden, self.weight[: self.vocab_size].t(), out_dtype=torch.float32)
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        log_probs = log_p.gather(-1, self.labels[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        found = {"log_probs": log_probs.detach(), "entropy": entropy.detach()}
        if self.hidden.dtype == torch.float32:
            torch.autograd.backward([log_probs, entropy], self.gradients)
            assert hidden.grad is not None
            assert weight.grad is not None
            found |= {"hidden gradient": hidden.grad, "weight gradient": weight.grad}
        return found

    def compute(self, group: dist.ProcessGroup, **changes: Any) -> dict[str, Tensor]:
        hidden, weight = (tensor.clone().requires_grad_() for tensor in (self.hidden, self.weight))
        arguments: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "temperature": TEMPERATURE,
            "chunk_tokens": log_prob_chunk_tokens(CHUNK_MIB, self.rows),
            "sequence_parallel": False,
        }
        log_probs, entropy = vocab_log_probs(hidden, weight, self.labels, tp_group=group, **(arguments | changes))
        torch.autograd.backward([log_probs, entropy], self.gradients)
        assert hidden.grad is not None
        assert weight.grad is not None
        assert not weight.grad[self.vocab_size :].any(), "padding rows have a gradient"
        return {
            "log_probs": log_probs.detach(),
            "entropy": entropy.detach(),
            "hidden gradient": hidden.grad,
            "weight gradient": weight.grad[: self.vocab_size],
        }


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of log-probs and entropy; of gradients, if there are any, ||difference|| / ||expected||."""
    result = {name: float((found[name] - expected[name]).abs().max()) for name in ("log_probs", "entropy")}
    for name in {"hidden gradient", "weight gradient"} & found.keys():
        result[name] = float((found[name].double() - expected[name]).norm() / expected[name].double().norm())
    return result


def within(found: dict[str, float], values: float, gradients: float) -> bool:
    return all(error <= (gradients if "gradient" in name else values) for name, error in found.items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_gradients_are_those_of_float64(
    group: dist.ProcessGroup, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """The errors are at most twice those of PyTorch's own functions in float32: those of sums of 896 or 5,120 products.

    In bfloat16 logits are float32 sums of exact products; their gradient is rounded to 8 bits, as is each result.
    """
    problem = Problem(*shape, dtype)
    expected = problem.expected()
    theirs = errors(problem.by_pytorch(), expected)
    bounds = {name: 2 * theirs[name] if name in theirs else 2**-8 for name in expected}
    assert max(bounds.values()) <= (1e-3 if dtype == torch.float32 else 2**-8), "PyTorch's are no measure"
    found = errors(problem.compute(group), expected)
    assert all(found[name] <= bounds[name] for name in found), (found, theirs)

    wrong = errors(problem.compute(group, temperature=1.0), expected)
    assert min(wrong.values()) > 10 * max(bounds.values()), wrong
    if dtype == torch.bfloat16:
        with mock.patch.object(module, "_logits", lambda hidden, weight: (hidden @ weight.t()).float()):
            rounded = errors(problem.compute(group), expected)
        assert rounded["log_probs"] > 100 * found["log_probs"], "logits in bfloat16 are as good"


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_kernels_are_the_plain_formulas(
    group: dist.ProcessGroup, shape: tuple[int, int, int], dtype: torch.dtype, temperature: float
) -> None:
    problem = Problem(*shape, dtype)
    found = problem.compute(group, temperature=temperature)
    again = problem.compute(group, temperature=temperature)
    assert all(torch.equal(found[name], again[name]) for name in ("log_probs", "entropy")), "not the same each time"
    with mock.patch.object(module, "_row_functions", return_value=PLAIN):
        plain = problem.compute(group, temperature=temperature)
    difference = errors(found, plain)
    assert within(difference, 2e-5, 2**-8 if dtype == torch.bfloat16 else 1e-5), difference


@needs_triton
def test_a_chunk_of_more_than_two_to_the_31_logits() -> None:
    from megatron_fipo.parallel import logit_rows_triton as kernels

    num_tokens, columns = 14_200, 152_064
    assert num_tokens * columns > 2**31
    logits = torch.randn(num_tokens, columns, device="cuda")
    labels = torch.randint(columns, (num_tokens,), device="cuda")
    per_token = torch.rand(5, num_tokens, device="cuda") + 5
    last = slice(num_tokens - 40, num_tokens)
    sums = kernels.triton_row_sums(logits, labels, 1.0)
    assert torch.equal(sums[:, last], kernels.triton_row_sums(logits[last].clone(), labels[last], 1.0))
    gradient = kernels.triton_logit_gradient(logits, labels, per_token, 1.0, torch.bfloat16)
    expected = kernels.triton_logit_gradient(
        logits[last].clone(), labels[last], per_token[:, last].contiguous(), 1.0, torch.bfloat16
    )
    assert torch.equal(gradient[last], expected)


@pytest.mark.parametrize("rows", [1, 7, 128, 19_072])
def test_products_are_added_in_float32(rows: int) -> None:
    """16 products of bfloat16 numbers; a sum in bfloat16 would lose them to the first."""
    torch.manual_seed(0)
    total = torch.full((rows, 896), 100.0, device="cuda")
    expected = total.double()
    in_bfloat16 = total.bfloat16()
    for _ in range(16):
        gradient, hidden = (torch.randn(512, size, device="cuda").bfloat16() * 0.01 for size in (rows, 896))
        module._add_product(total, gradient, hidden)
        expected += gradient.double().t() @ hidden.double()
        in_bfloat16 += gradient.t() @ hidden
    assert float((total - expected).abs().max()) <= 2e-4  # sixteen roundings at 100, of 4e-6 each, and the products'
    assert float((in_bfloat16 - expected).abs().max()) > 2e-3


def test_the_gradient_goes_into_megatrons_buffer(group: dist.ProcessGroup) -> None:
    problem = Problem(*SHAPES[0], torch.bfloat16)
    expected = problem.expected()["weight gradient"]
    weight = torch.nn.Parameter(problem.weight.clone())
    weight.main_grad = torch.ones(*weight.shape, dtype=torch.float32, device="cuda")  # type: ignore[attr-defined]
    found = vocab_log_probs(
        problem.hidden,
        weight,
        problem.labels,
        vocab_size=problem.vocab_size,
        temperature=TEMPERATURE,
        chunk_tokens=300,
        tp_group=group,
        sequence_parallel=False,
    )
    torch.autograd.backward(list(found), problem.gradients)
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    added = weight.main_grad[: problem.vocab_size].double() - 1  # type: ignore[attr-defined]
    assert float((added - expected).norm() / expected.norm()) <= 2**-8
    assert (weight.main_grad[problem.vocab_size :] == 1).all()  # type: ignore[attr-defined]


@needs_triton
def test_memory_is_a_chunks(group: dist.ProcessGroup) -> None:
    """One float32 copy of a chunk's logits forward, one and a half backward, beside gradients that anyone must hold."""
    problem = Problem(*SHAPES[0], torch.bfloat16)
    chunk_tokens = log_prob_chunk_tokens(CHUNK_MIB, problem.rows)
    assert chunk_tokens < NUM_TOKENS
    logits = 4 * chunk_tokens * problem.vocab_size
    slack = 64 * 2**20
    problem.compute(group)  # kernels, cuBLAS's workspace
    arguments: dict[str, Any] = {
        "vocab_size": problem.vocab_size,
        "temperature": TEMPERATURE,
        "chunk_tokens": chunk_tokens,
        "tp_group": group,
        "sequence_parallel": False,
    }
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()

    def peak_of(backward: bool) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(backward):
            found = vocab_log_probs(hidden, weight, problem.labels, **arguments)
            if backward:
                torch.autograd.backward(list(found), problem.gradients)
        hidden.grad = weight.grad = None
        return torch.cuda.max_memory_allocated() - before

    assert logits <= peak_of(backward=False) <= logits + slack
    weight_sums = 4 * weight.numel()
    assert peak_of(backward=True) <= weight_sums + max(1.5 * logits, 2 * weight.numel()) + slack
    with mock.patch.object(module, "_row_functions", return_value=PLAIN):
        assert peak_of(backward=False) > logits + slack, "the bound notices no second copy"
