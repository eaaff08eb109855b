"""Everything that the loss takes per token.

Shapes: T packed tokens; on a context-parallel rank the tokens that it holds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenValues:
    """What `policy_loss` is computed from, one entry per token, all on one device.

    Raises:
        ValueError: if log_probs is no vector, another tensor does not fit it, or the mask is not boolean.
    """

    log_probs: Tensor
    """[T] of the policy that is trained, with a graph."""
    old_log_probs: Tensor
    """[T] of the policy at the start of the step."""
    advantages: Tensor
    """[T], constant within a response."""
    response_mask: Tensor
    """bool [T], tokens that the policy wrote and that may carry loss."""
    reference_log_probs: Tensor | None = None
    """[T] of the frozen reference policy; needed if kl_coefficient is not 0, otherwise only logged."""
    entropy: Tensor | None = None
    """[T] of the policy; needed if entropy_coefficient is not 0, otherwise only logged."""
    rollout_log_probs: Tensor | None = None
    """[T] under the policy that wrote each token, by the rollout engine; needed for a rollout_correction and for
    future_kl_reference=behaviour, otherwise only logged."""
    staleness_steps: Tensor | None = None
    """int [T], by how many versions the weights that wrote the token are older than those of the step's start; -1 where
    nobody recorded it. Only logged: it splits the mismatch."""

    def __post_init__(self) -> None:
        shape, device = self.log_probs.shape, self.log_probs.device
        if self.log_probs.dim() != 1 or not shape[0]:
            raise ValueError(f"log_probs must be a vector of at least one token; its shape is {tuple(shape)}.")
        for field in fields(self):
            values = getattr(self, field.name)
            if values is None:
                continue
            if values.shape != shape:
                raise ValueError(
                    f"{field.name} has shape {tuple(values.shape)} but log_probs {tuple(shape)}: one entry per token."
                )
            if values.device != device:
                raise ValueError(
                    f"{field.name} lies on {values.device} but log_probs on {device}. Bring both to one device."
                )
        if self.response_mask.dtype != torch.bool:
            raise ValueError(f"response_mask must be bool; it is {self.response_mask.dtype}.")

    def raised(self) -> TokenValues:
        """Return the values with log-probs and advantages in one dtype, at least float32; entropy keeps its dtype."""
        dtype = torch.promote_types(self.log_probs.dtype, torch.float32)
        names = ("log_probs", "old_log_probs", "advantages", "reference_log_probs", "rollout_log_probs")
        given = {name: getattr(self, name) for name in names}
        return replace(self, **{name: values.to(dtype) for name, values in given.items() if values is not None})
