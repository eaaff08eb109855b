"""What single rows of logits give towards log-probs and entropy, and what comes back to them in backward.

These are the formulas as torch writes them: the reference, and what runs on the CPU. `logit_rows_triton` is the same on
CUDA in one pass each.

Shapes: T tokens of a chunk, V columns: the rows of the vocabulary that this tensor-parallel rank holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_sums(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """A row's maximum, sum of e = exp(logit - maximum), sum of e * (logit - maximum), and the label's logit.

    Differences from the maximum rather than logits, so that the entropy keeps its digits where logits are large.

    Args:
        logits: float32 [T, V], before the temperature; overwritten.
        labels: int64 [T], columns; one outside of 0 … V - 1 lies on another rank, and its logit counts as 0.

    Returns:
        float32 [4, T], in that order.
    """
    _divide(logits, temperature)
    is_here, columns = _columns(labels, logits.shape[1])
    maximum = logits.amax(dim=-1)
    at_label = torch.where(is_here, logits.gather(-1, columns[:, None]).squeeze(-1), 0.0)
    differences = logits.sub_(maximum[:, None])
    exponentials = differences.exp()
    total = exponentials.sum(dim=-1)
    return torch.stack([maximum, total, exponentials.mul_(differences).sum(dim=-1), at_label])


def logit_gradient(logits: Tensor, labels: Tensor, per_token: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Gradient of the logits before the temperature, from those of log-probs and entropy.

    d log_prob / d logit_j = [j = label] - p_j;  d entropy / d logit_j = -p_j (log p_j + entropy).

    Args:
        logits: float32 [T, V], before the temperature; overwritten.
        labels: int64 [T], columns, as for `row_sums`.
        per_token: float32 [5, T]: maximum and logarithm of the sum of exponentials over the whole vocabulary, entropy,
            gradient of the log-prob, gradient of the entropy.

    Returns:
        dtype [T, V].
    """
    maximum, log_sum, entropy, log_prob_gradient, entropy_gradient = per_token
    _divide(logits, temperature)
    log_p = logits.sub_(maximum[:, None]).sub_(log_sum[:, None])
    p = log_p.exp()
    gradient = log_p.add_(entropy[:, None]).mul_(-entropy_gradient[:, None])
    gradient.sub_(log_prob_gradient[:, None]).mul_(p)
    del p  # two copies of the logits are held, never more
    is_here, columns = _columns(labels, logits.shape[1])
    at_label = torch.where(is_here, log_prob_gradient, 0.0)
    gradient.scatter_add_(-1, columns[:, None], at_label[:, None])
    _divide(gradient, temperature)
    return gradient.to(dtype)


def _divide(values: Tensor, temperature: float) -> None:
    """Divide in place. A temperature of 1 changes no bit and costs no pass."""
    if temperature != 1.0:
        values.div_(temperature)


def _columns(labels: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """(whether each label is among the columns, its column or a harmless one)."""
    return (labels >= 0) & (labels < num_columns), labels.clamp(0, num_columns - 1)
