"""The policy loss as tests call it: of tensors by name, whole sequences packed one behind the other."""

from __future__ import annotations

from torch import Tensor

from megatron_fipo.config import FipoConfig, choices_of
from megatron_fipo.rl.objective import LossOutput, policy_loss
from megatron_fipo.rl.sequences import WholeSequences
from megatron_fipo.rl.token_values import TokenValues

CORRECTIONS = choices_of(FipoConfig, "rollout_correction")


def packed_loss(cu_seqlens: Tensor, config: FipoConfig, **per_token: Tensor) -> LossOutput:
    """`policy_loss` of whole sequences; per_token are the fields of `TokenValues`."""
    tokens = TokenValues(**per_token)
    return policy_loss(tokens, WholeSequences(cu_seqlens, tokens.log_probs.device), config)
