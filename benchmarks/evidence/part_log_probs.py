"""Log-probs and entropy from hidden states: time, memory and error, ours beside whole logits and others' kernels.

Errors are against float64 arithmetic on the same bfloat16 numbers, at some of the tokens; the weight's gradient is
compared in a pass over those tokens alone.

Shapes: T tokens, H hidden size, V rows of the output layer on one tensor-parallel rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from benchmarks.evidence import machine
from benchmarks.evidence.measuring import gib, peak_memory, time_calls
from benchmarks.evidence.models import LOGIT_STD
from benchmarks.evidence.report import Settings, SkipCase
from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.vocab_log_probs import vocab_log_probs

LogProbs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(hidden [T, H], weight [V, H], labels [T]) -> log-probs and entropy [T], the latter None where a peer has none."""

_SHAPES = {"0.5b": (896, 152064), "7b": (3584, 152064), "32b of tp 8": (5120, 19008)}
_TOKENS, _WHOLE_LOGITS_TOKENS, _CHECKED_TOKENS = 20480, 4096, 256
_CHUNKS = (512, 2048)
_ENTROPY_WEIGHT = 0.1
_PEERS = ("whole logits", "verl", "cut cross-entropy")


@dataclass(frozen=True)
class _Case:
    shape: str
    side: str
    tokens: int
    chunk: int | None

    @property
    def name(self) -> str:
        chunk = f", chunks of {self.chunk}" if self.chunk else ""
        return f"{self.shape}: {self.side}{chunk}, {self.tokens} tokens"


def _cases(settings: Settings) -> list[_Case]:
    shrink = 80 if settings.tiny else 1
    many, few = _TOKENS // shrink, _WHOLE_LOGITS_TOKENS // shrink
    cases = []
    for shape in _SHAPES:
        cases += [_Case(shape, "ours", many, max(chunk // shrink, 8)) for chunk in _CHUNKS]
        cases += [_Case(shape, peer, many, None) for peer in _PEERS if peer != "whole logits"]
        cases.append(_Case(shape, "ours", few, max(_CHUNKS[0] // shrink, 8)))
        cases.append(_Case(shape, "whole logits", few, None))
    return cases


def case_names(settings: Settings) -> list[str]:
    return [case.name for case in _cases(settings)]


@contextmanager
def prepared(settings: Settings) -> Iterator[ProcessGroup]:
    ranks = parallel_groups.initialize(ParallelSection(), seed=0)
    try:
        yield ranks.tp
    finally:
        parallel_groups.shut_down()


def ours(group: ProcessGroup, chunk_tokens: int, hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
    """Call this project's function, with the chunk's size in the unit that this revision takes."""
    parameters = inspect.signature(vocab_log_probs).parameters
    chunk: dict[str, Any] = {}
    if "chunk_tokens" in parameters:
        chunk = {"chunk_tokens": chunk_tokens}
    elif "chunk_mib" in parameters:
        chunk = {"chunk_mib": max(chunk_tokens * len(weight) * 4 // 2**20, 1)}
    elif "chunk_bytes" in parameters:
        chunk = {"chunk_bytes": chunk_tokens * len(weight) * 4}
    return vocab_log_probs(
        hidden,
        weight,
        labels,
        vocab_size=len(weight),
        temperature=1.0,
        tp_group=group,
        sequence_parallel=False,
        **chunk,
    )


def whole_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy by way of all logits at once, in float32."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    return log_p.gather(-1, labels[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def _verl() -> LogProbs:
    """verl's Triton kernels, which have the same contract: entropy, temperature, a tensor-parallel group."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    def log_probs_and_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_probs, entropy = linear_cross_entropy(hidden, weight, labels, 1.0, "none", None)
        for output in (log_probs, entropy):
            if (
                output.requires_grad
            ):  # its backward takes contiguous gradients alone; that of a sum is one number, expanded
                output.register_hook(Tensor.contiguous)
        return log_probs, entropy

    return log_probs_and_entropy


def _cut_cross_entropy() -> LogProbs:
    """Apple's kernels, without entropy and without tensor parallelism."""
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    return lambda hidden, weight, labels: (-linear_cross_entropy(hidden, weight, labels, reduction="none"), None)


def _side(case: _Case, group: ProcessGroup) -> LogProbs:
    if case.side == "ours":
        assert case.chunk is not None
        return partial(ours, group, case.chunk)
    if case.side == "whole logits":
        return whole_logits
    if not torch.cuda.is_available():
        raise SkipCase(f"{case.side} is a kernel for CUDA, and there is no CUDA device")
    try:
        return _verl() if case.side == "verl" else _cut_cross_entropy()
    except ImportError as error:
        raise SkipCase(f"{case.side} was not carried here: {error}") from None


def _loss(function: LogProbs, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_probs, entropy = function(hidden, weight, labels)
    loss = log_probs.sum()
    return loss if entropy is None else loss + _ENTROPY_WEIGHT * entropy.sum()


def _exact(hidden: Tensor, weight: Tensor, labels: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    """(log-probs, entropy, gradient of hidden, gradient of weight) in float64."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    log_p = torch.log_softmax(inputs[0] @ inputs[1].t(), dim=-1)
    log_probs = log_p.gather(-1, labels[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = log_probs.sum() + (_ENTROPY_WEIGHT * entropy.sum() if with_entropy else 0.0)
    return (log_probs.detach(), entropy.detach(), *torch.autograd.grad(loss, inputs))


def run_case(name: str, group: ProcessGroup, settings: Settings) -> dict[str, Any]:
    case = next(case for case in _cases(settings) if case.name == name)
    hidden_size, rows = (64, 512) if settings.tiny else _SHAPES[case.shape]
    function = _side(case, group)
    generator = torch.Generator(settings.device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=settings.device)
    hidden = normal(case.tokens, hidden_size).bfloat16().requires_grad_()
    weight = (normal(rows, hidden_size) * (LOGIT_STD / hidden_size**0.5)).bfloat16().requires_grad_()
    labels = torch.randint(rows, (case.tokens,), generator=generator, device=settings.device)

    def forward() -> None:
        with torch.no_grad():
            function(hidden, weight, labels)

    def forward_and_backward() -> None:
        hidden.grad = weight.grad = None
        _loss(function, hidden, weight, labels).backward()

    errors = _errors(function, hidden, weight, labels)
    hidden.grad = weight.grad = None
    with peak_memory(settings.device) as peak:
        forward_and_backward()
    assert weight.grad is not None
    own = weight.grad.nbytes
    forward_ms = time_calls(forward, settings).median_ms
    both_ms = time_calls(forward_and_backward, settings).median_ms
    return {
        "kind": "log_probs",
        "side": case.side,
        "shape": case.shape,
        "hidden_size": hidden_size,
        "rows": rows,
        "tokens": case.tokens,
        "chunk_tokens": case.chunk,
        "forward_ms": round(forward_ms, 3),
        "backward_ms": round(both_ms - forward_ms, 3),
        "extra_gib": gib(max(peak.extra_bytes - own, 0)),
        "tflop_per_s": round(6 * case.tokens * rows * hidden_size / both_ms / 1e9, 4),
        **errors,
        "clock_sm_mhz": machine.sm_clock_mhz(settings.device),
    }


def _errors(function: LogProbs, hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Errors against float64, at tokens spread over the whole batch."""
    step = max(len(hidden) // _CHECKED_TOKENS, 1)
    chosen, chosen_labels = hidden.detach()[::step].clone().requires_grad_(), labels[::step].contiguous()
    log_probs, entropy = function(chosen, weight, chosen_labels)
    exact_log_probs, exact_entropy, *exact_gradients = _exact(chosen, weight, chosen_labels, entropy is not None)
    loss = log_probs.sum() + (0.0 if entropy is None else _ENTROPY_WEIGHT * entropy.sum())
    gradients = torch.autograd.grad(loss, [chosen, weight])
    with torch.no_grad():  # the whole batch's rows must be those of the few
        of_whole = function(hidden, weight, labels)[0][::step]
    apart = (of_whole.double() - exact_log_probs).abs()
    entropy_error = None
    if entropy is not None:
        entropy_error = float((entropy.detach().double() - exact_entropy).abs().max())
    relative = [
        float((found.double() - exact).norm() / exact.norm())
        for found, exact in zip(gradients, exact_gradients, strict=True)
    ]
    return {
        "max_log_prob_error": float(apart.max()),
        "mean_log_prob_error": float(apart.mean()),
        "max_entropy_error": entropy_error,
        "hidden_gradient_error": relative[0],
        "weight_gradient_error": relative[1],
    }
