"""Reinforcement learning that teaches language models to reason, on Megatron-Core.

    from megatron_fipo import FipoConfig, TokenValues, WholeSequences, padded_policy_loss, policy_loss

is the objective for trainers of others (docs/library.md). The names are looked up when they are asked for, so that
importing the package alone costs nothing and draws in no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_fipo.config import FipoConfig
    from megatron_fipo.parallel.sharded_sequences import ShardedSequences
    from megatron_fipo.rl.future_kl import future_kl
    from megatron_fipo.rl.objective import LossOutput, influence_weights, policy_loss
    from megatron_fipo.rl.padded import padded_future_kl, padded_policy_loss
    from megatron_fipo.rl.sequences import Sequences, WholeSequences
    from megatron_fipo.rl.token_values import TokenValues

__version__ = "0.1.0"

__all__ = [
    "FipoConfig",
    "LossOutput",
    "Sequences",
    "ShardedSequences",
    "TokenValues",
    "WholeSequences",
    "__version__",
    "future_kl",
    "influence_weights",
    "padded_future_kl",
    "padded_policy_loss",
    "policy_loss",
]

_HOMES = {
    "FipoConfig": "megatron_fipo.config",
    "LossOutput": "megatron_fipo.rl.objective",
    "Sequences": "megatron_fipo.rl.sequences",
    "ShardedSequences": "megatron_fipo.parallel.sharded_sequences",
    "TokenValues": "megatron_fipo.rl.token_values",
    "WholeSequences": "megatron_fipo.rl.sequences",
    "future_kl": "megatron_fipo.rl.future_kl",
    "influence_weights": "megatron_fipo.rl.objective",
    "padded_future_kl": "megatron_fipo.rl.padded",
    "padded_policy_loss": "megatron_fipo.rl.padded",
    "policy_loss": "megatron_fipo.rl.objective",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
