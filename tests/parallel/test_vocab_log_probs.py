"""Chunked, vocabulary-parallel log-probs and entropy are torch's log_softmax, in value and gradient.

The reference is float64 on the whole vocabulary, unpadded, in one piece. The vocabulary of 20 is padded to 128 rows a
rank, so under tensor parallelism one whole rank holds nothing but padding; a vocabulary of 150 ends inside the second.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.vocab_log_probs import vocab_log_probs
from tests.parallel.ranks import run_ranks

NUM_TOKENS, HIDDEN, ROWS_A_RANK = 26, 16, 128
BOUND = 1e-6
"""Of the largest magnitude of each compared tensor; logits are of the order of 1 … 10."""


@dataclass(frozen=True)
class Problem:
    """Inputs, and what float64 makes of them."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    temperature: float
    gradients: tuple[Tensor, Tensor]
    expected: dict[str, Tensor]


def make_problem(
    vocab_size: int, temperature: float, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Problem:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = (torch.randn(NUM_TOKENS, HIDDEN, generator=generator) * 0.5 * scale).to(dtype)
    weight = torch.randn(vocab_size, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, vocab_size, (NUM_TOKENS,), generator=generator)
    gradients = (torch.randn(NUM_TOKENS, generator=generator), torch.randn(NUM_TOKENS, generator=generator))
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = F.log_softmax(exact_hidden @ exact_weight.t() / temperature, dim=-1)
    log_probs = log_p.gather(-1, labels[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.autograd.backward([log_probs, entropy], [gradient.double() for gradient in gradients])
    assert exact_hidden.grad is not None
    assert exact_weight.grad is not None
    expected = {
        "log_probs": log_probs.detach(),
        "entropy": entropy.detach(),
        "hidden gradient": exact_hidden.grad,
        "weight gradient": exact_weight.grad,
    }
    return Problem(hidden, weight, labels, temperature, gradients, expected)


def compute(problem: Problem, group: dist.ProcessGroup, **changes: Any) -> dict[str, Tensor]:
    """What this rank gets: its own rows of the weight's gradient, the rest whole."""
    padded = torch.full((ROWS_A_RANK * group.size(), HIDDEN), 7.0, dtype=problem.weight.dtype)
    padded[: len(problem.weight)] = problem.weight
    weight = padded.chunk(group.size())[group.rank()].clone().requires_grad_()
    arguments: dict[str, Any] = {
        "vocab_size": len(problem.weight),
        "temperature": problem.temperature,
        "chunk_tokens": NUM_TOKENS,
        "sequence_parallel": False,
    } | changes
    hidden = problem.hidden
    if arguments["sequence_parallel"]:
        hidden = hidden.chunk(group.size())[group.rank()]
    hidden = hidden.clone().requires_grad_()
    log_probs, entropy = vocab_log_probs(hidden, weight, problem.labels, tp_group=group, **arguments)
    assert log_probs.dtype == entropy.dtype == torch.float32
    torch.autograd.backward([log_probs, entropy], list(problem.gradients))
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == problem.hidden.dtype
    return {
        "log_probs": log_probs.detach(),
        "entropy": entropy.detach(),
        "hidden gradient": hidden.grad,
        "weight gradient": weight.grad,
    }


def errors(problem: Problem, group: dist.ProcessGroup, **changes: Any) -> dict[str, float]:
    """Largest difference of each result over the largest magnitude of what it should be."""
    found = {}
    vocab_size = len(problem.weight)
    first_row = group.rank() * ROWS_A_RANK
    for name, value in compute(problem, group, **changes).items():
        expected = problem.expected[name]
        scale = float(expected.abs().max())
        if name == "weight gradient":
            rows = max(min(vocab_size - first_row, ROWS_A_RANK), 0)
            assert not value[rows:].any(), "padding rows have a gradient"
            value, expected = value[:rows], expected[first_row : first_row + rows]
        elif name == "hidden gradient" and changes.get("sequence_parallel"):
            expected = expected.chunk(group.size())[group.rank()]
        found[name] = float((value.double() - expected).abs().max()) / scale if value.numel() else 0.0
    return found


def _check_float32(tp_size: int) -> int:
    group = parallel_groups.initialize(ParallelSection(tp=tp_size), seed=0).tp
    cases = itertools.product(
        (20, 150)[:tp_size],
        (1.0, 0.7, 1.3),
        (1, 7, NUM_TOKENS, 10 * NUM_TOKENS),
        (False, True)[:tp_size],
    )
    count = 0
    for vocab_size, temperature, chunk, sequence_parallel in cases:
        count += 1
        problem = make_problem(vocab_size, temperature)
        found = errors(problem, group, chunk_tokens=chunk, sequence_parallel=sequence_parallel)
        assert max(found.values()) <= BOUND, (vocab_size, temperature, chunk, sequence_parallel, found)
    return count


@pytest.mark.parametrize(("tp_size", "num_cases"), [(1, 12), (2, 48)])
def test_values_and_gradients_are_log_softmaxs(tp_size: int, num_cases: int) -> None:
    assert run_ranks(_check_float32, tp_size, tp_size, timeout_s=120) == [num_cases] * tp_size


def _check_extremes(tp_size: int) -> None:
    """Logits of several hundred: nothing overflows, improbable labels keep their log-probs, entropy its digits.

    What float32 rounds off a logit itself, 2^-24 of it, no method gets back; gradients are proportional to it.
    """
    group = parallel_groups.initialize(ParallelSection(tp=tp_size), seed=0).tp
    for vocab_size in (20, 150)[:tp_size]:
        problem = make_problem(vocab_size, 1.0, scale=100.0)
        assert float(problem.expected["log_probs"].min()) < -300
        largest_logit = float((problem.hidden @ problem.weight.t()).abs().max())
        found = errors(problem, group, chunk_tokens=5)
        assert found["log_probs"] <= BOUND, found
        entropy_scale = float(problem.expected["entropy"].abs().max())
        assert found["entropy"] * entropy_scale <= 2**-24 * largest_logit * 2, (found, entropy_scale, largest_logit)
        assert max(found["hidden gradient"], found["weight gradient"]) <= 2**-24 * largest_logit * 2, found


def _check_bfloat16(tp_size: int) -> None:
    """In bfloat16 the logits are rounded to 8 bits, and nothing after them."""
    group = parallel_groups.initialize(ParallelSection(tp=tp_size), seed=0).tp
    problem = make_problem(20, 1.0, dtype=torch.bfloat16)
    results = compute(problem, group)
    logits = problem.hidden @ problem.weight.t()
    log_p = F.log_softmax(logits.double(), dim=-1)
    expected = log_p.gather(-1, problem.labels[:, None]).squeeze(-1)
    assert float((results["log_probs"] - expected).abs().max()) <= BOUND * float(expected.abs().max())
    # The rounding of two logits, the label's and the largest, is what a log-prob can be off by.
    error = float((results["log_probs"].double() - problem.expected["log_probs"]).abs().max())
    assert 1e-4 < error <= 2 * 2**-9 * float(logits.abs().max())
    for name in ("hidden gradient", "weight gradient"):
        assert results[name].dtype == torch.bfloat16


def _check_what_is_noticed(tp_size: int) -> None:
    """Each mistake is beyond the bound on every rank that can see it."""
    group = parallel_groups.initialize(ParallelSection(tp=tp_size), seed=0).tp
    problem = make_problem(20, 0.7)

    def worst(**changes: Any) -> float:
        own = max(errors(problem, group, **changes).values())
        found: list[float] = [0.0] * group.size()
        dist.all_gather_object(found, own, group=group)
        return max(found)

    assert worst() <= BOUND
    assert worst(temperature=1.0) > 100 * BOUND, "temperature"
    problem = make_problem(20, 0.7)
    with pytest.raises(AssertionError, match="padding rows have a gradient"):
        # Padding rows hold 7s, as they may after weight decay and a foreign checkpoint; unmasked they take part.
        errors(problem, group, vocab_size=ROWS_A_RANK * group.size())
    padded = compute(problem, group, vocab_size=ROWS_A_RANK * group.size())
    missing_mask = (padded["log_probs"].double() - problem.expected["log_probs"]).abs().max()
    assert float(missing_mask) > 0.1, "missing vocabulary mask"


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("check", [_check_extremes, _check_bfloat16, _check_what_is_noticed])
def test_extremes_and_mistakes(check: Any, tp_size: int) -> None:
    run_ranks(check, tp_size, tp_size, timeout_s=120)
