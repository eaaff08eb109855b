"""Log-probs and entropy of given tokens from hidden states, without ever holding the whole logits.

Logits of 20,480 tokens over a vocabulary of 152,064 are 12 GB in float32, and more than twice that with their gradient.
Here the output layer runs over chunks of tokens, forward and again in backward, on each rank's shard of the vocabulary;
what the ranks exchange is four numbers a token. On CUDA, where Triton is installed, a chunk's logits are read once in
each direction.

Shapes: T tokens, H hidden size, V_local rows of the padded vocabulary on this tensor-parallel rank.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.parallel import logit_rows

_ROWS_PER_PRODUCT = 16384
"""Rows of the weight's gradient that one product adds to where float32 sums of a lower precision are taken on a CPU."""

_ADDS_TO_MAIN_GRADIENT = ("cuda",)
"""Devices on which the weight's gradient is summed in Megatron's own buffer. A sum of its own costs six bytes a weight
there, and three passes over them; on a CPU it keeps the order, and so the last digits, that sums have always had."""


def vocab_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    chunk_tokens: int,
    tp_group: ProcessGroup,
    sequence_parallel: bool,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the labels, and the entropy of that distribution.

    Collective over `tp_group`; differentiable in hidden and weight.

    Args:
        hidden: [T, H], or [T / tp, H] under sequence parallelism, in the model's dtype.
        weight: [V_local, H], this rank's rows of the output layer; rows at and beyond vocab_size are padding and count
            as logits of -inf.
        labels: int64 [T], each below vocab_size.
        vocab_size: size of the vocabulary without padding.
        temperature: what logits are divided by, as the rollout engine does.
        chunk_tokens: tokens whose logits are held at a time.

    Returns:
        (log_probs float32 [T], entropy float32 [T]); the same on every tensor-parallel rank.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp_group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    log_probs, entropy = _VocabLogProbs.apply(hidden, weight, labels, vocab_size, temperature, chunk_tokens, tp_group)
    return log_probs, entropy


class _VocabLogProbs(torch.autograd.Function):
    """Chunked, vocabulary-parallel log-softmax at the labels, with entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        temperature: float,
        chunk_tokens: int,
        tp_group: ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        first_row = tp_group.rank() * len(weight)
        rows = min(max(vocab_size - first_row, 0), len(weight))
        num_tokens = len(hidden)
        local_labels = labels - first_row
        row_sums, _ = _row_functions(hidden)
        # The rows of `row_sums`, against this rank's own maximum; moved to that of all ranks in the exchange.
        sums = torch.zeros(4, num_tokens, dtype=torch.float32, device=hidden.device)
        sums[0] = -torch.inf
        for start in range(0, num_tokens if rows else 0, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, num_tokens))
            logits = _logits(hidden[chunk], weight[:rows])
            sums[:, chunk] = row_sums(logits, local_labels[chunk], temperature)
            del logits  # or it would live on beside the next chunk's
        maximum, sums = sums[0], sums[1:]
        if tp_group.size() > 1:
            own_maximum = maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
            if rows:
                below = own_maximum - maximum
                sums[1] += sums[0] * below
                sums[:2] *= below.exp()
            dist.all_reduce(sums, group=tp_group)
        log_sum = sums[0].log()
        log_probs = sums[2] - maximum - log_sum
        entropy = log_sum - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, local_labels, maximum, log_sum, entropy)
        ctx.settings = (rows, temperature, chunk_tokens)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local_labels, *of_tokens = ctx.saved_tensors
        rows, temperature, chunk_tokens = ctx.settings
        _, logit_gradient = _row_functions(hidden)
        per_token = torch.stack([*of_tokens, *gradients])
        hidden_gradient = torch.zeros_like(hidden)
        main_gradient = _main_gradient(weight)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if main_gradient is None else main_gradient
        for start in range(0, len(hidden) if rows else 0, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, len(hidden)))
            logits = _logits(hidden[chunk], weight[:rows])
            gradient = logit_gradient(logits, local_labels[chunk], per_token[:, chunk], temperature, hidden.dtype)
            del logits
            hidden_gradient[chunk] = gradient @ weight[:rows]
            _add_product(weight_gradient[:rows], gradient, hidden[chunk])
            del gradient
        for_autograd = weight_gradient.to(weight.dtype) if main_gradient is None else _already_added(weight)
        return hidden_gradient, for_autograd, None, None, None, None, None


def _row_functions(on: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`row_sums` and `logit_gradient` for the tensor's device."""
    if on.is_cuda and importlib.util.find_spec("triton") is not None:
        from megatron_fipo.parallel import logit_rows_triton

        return logit_rows_triton.triton_row_sums, logit_rows_triton.triton_logit_gradient
    return logit_rows.row_sums, logit_rows.logit_gradient


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """float32 [tokens, rows]; a new tensor. On CUDA it is what the tensor cores summed up, never rounded in between."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return (hidden @ weight.t()).float()


def _main_gradient(weight: Tensor) -> Tensor | None:
    """float32 [V_local, H]: where Megatron's data-parallel wrapper sums this weight's gradient; None without one."""
    main_gradient: Tensor | None = getattr(weight, "main_grad", None)
    if main_gradient is None or weight.device.type not in _ADDS_TO_MAIN_GRADIENT:
        return None
    return main_gradient if main_gradient.dtype == torch.float32 else None


def _already_added(weight: Tensor) -> Tensor | None:
    """Tell Megatron that its buffer holds the gradient, and return what autograd is to hand on in its place.

    Megatron's hook drops a gradient that is marked so, but wants one to be there where it overlaps communication. A
    weight that is the embedding's too it marks with zero_out_wgrad, and adds whatever autograd brings: the embedding's
    gradient, which no numbers of ours may join.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return None if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradient.T @ hidden, in float32 and without a product as large as the weight.

    Args:
        total: float32 [rows, H]. gradient: [tokens, rows]. hidden: [tokens, H], of the gradient's dtype.
    """
    if total.dtype == hidden.dtype:
        total.addmm_(gradient.t(), hidden)
    elif total.is_cuda:
        torch.addmm(total, gradient.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        for start in range(0, len(total), _ROWS_PER_PRODUCT):
            rows = slice(start, start + _ROWS_PER_PRODUCT)
            total[rows].add_(gradient[:, rows].t() @ hidden)
