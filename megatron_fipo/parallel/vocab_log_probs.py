"""Log-probs and entropy of given tokens from hidden states, without ever holding the whole logits.

Logits of 20,480 tokens over a vocabulary of 152,064 are 12 GB in float32, and more than twice that with their gradient.
Here the output layer runs over chunks of tokens, forward and again in backward, on each rank's shard of the vocabulary;
what the ranks exchange is four numbers a token.

Shapes: T tokens, H hidden size, V_local rows of the padded vocabulary on this tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

_ROWS_PER_PRODUCT = 16384
"""Rows of the weight's gradient that one product adds to where it is summed in float32 from a lower precision."""


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
        maximum = torch.full((num_tokens,), -torch.inf, dtype=torch.float32, device=hidden.device)
        # Rows: sum of e = exp(logit - max), sum of e * (logit - max), the label's logit. Differences from the maximum
        # rather than logits, so that the entropy keeps its digits where logits are large.
        sums = torch.zeros(3, num_tokens, dtype=torch.float32, device=hidden.device)
        for start in range(0, num_tokens if rows else 0, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, num_tokens))
            logits = _logits(hidden[chunk], weight[:rows], temperature)
            is_here, local_labels = _local_labels(labels[chunk], first_row, rows)
            maximum[chunk] = logits.amax(dim=-1)
            sums[2, chunk] = torch.where(is_here, logits.gather(-1, local_labels[:, None]).squeeze(-1), 0.0)
            # Against this rank's own maximum; moved to the maximum of all ranks in the exchange.
            differences = logits.sub_(maximum[chunk, None])
            exponentials = differences.exp()
            sums[0, chunk] = exponentials.sum(dim=-1)
            sums[1, chunk] = torch.linalg.vecdot(exponentials, differences)
            del logits, differences, exponentials  # or they would live on beside the next chunk's
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
        ctx.save_for_backward(hidden, weight, labels, maximum, log_sum, entropy)
        ctx.settings = (first_row, rows, temperature, chunk_tokens)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        log_prob_gradient, entropy_gradient = gradients
        hidden, weight, labels, maximum, log_sum, entropy = ctx.saved_tensors
        first_row, rows, temperature, chunk_tokens = ctx.settings
        hidden_gradient = torch.zeros_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden) if rows else 0, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, len(hidden)))
            log_p = _logits(hidden[chunk], weight[:rows], temperature)
            log_p.sub_(maximum[chunk, None]).sub_(log_sum[chunk, None])
            p = log_p.exp()
            # d log_prob / d logit_j = [j = label] - p_j;  d entropy / d logit_j = -p_j (log p_j + entropy).
            gradient = log_p.add_(entropy[chunk, None]).mul_(-entropy_gradient[chunk, None])
            gradient.sub_(log_prob_gradient[chunk, None]).mul_(p)
            del p  # two copies of a chunk's logits are held, never more
            is_here, local_labels = _local_labels(labels[chunk], first_row, rows)
            at_label = torch.where(is_here, log_prob_gradient[chunk], 0.0)
            gradient.scatter_add_(-1, local_labels[:, None], at_label[:, None])
            gradient.div_(temperature)
            in_dtype = gradient.to(hidden.dtype)
            del log_p, gradient
            hidden_gradient[chunk] = in_dtype @ weight[:rows]
            _add_product(weight_gradient[:rows], in_dtype, hidden[chunk])
            del in_dtype
        return hidden_gradient, weight_gradient.to(weight.dtype), None, None, None, None, None


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradient.T @ hidden, without a product as large as the weight.

    Args:
        total: float32 [rows, H]. gradient: [tokens, rows]. hidden: [tokens, H], of the gradient's dtype.
    """
    if total.dtype == hidden.dtype:
        total.addmm_(gradient.t(), hidden)
        return
    for start in range(0, len(total), _ROWS_PER_PRODUCT):
        rows = slice(start, start + _ROWS_PER_PRODUCT)
        total[rows].add_(gradient[:, rows].t() @ hidden)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """float32 [tokens, rows]; a new tensor."""
    return (hidden @ weight.t()).float().div_(temperature)


def _local_labels(labels: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    """(whether each label is among this rank's rows, its row there or a harmless one)."""
    local = labels - first_row
    return (local >= 0) & (local < rows), local.clamp(0, max(rows - 1, 0))
