"""The head of a policy: log-probs of given tokens, and the entropy of the distribution that they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.actor.hidden_states import HiddenStateModel
from megatron_fipo.config import Config, log_prob_chunk_tokens
from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.vocab_log_probs import vocab_log_probs
from megatron_fipo.rl.packed_batch import PackedBatch


class PolicyOutputs(NamedTuple):
    """The policy's outputs for each token."""

    log_probs: Tensor
    """float32 [T_local]: log-probs of the labels."""
    entropy: Tensor
    """float32 [T_local]: entropy of the distribution over the vocabulary."""


@dataclass(frozen=True)
class PolicyHead:
    """Log-probs and entropy from the language model's own output layer; a `Head`.

    Attributes:
        vocab_size: size of the vocabulary, without the padding rows.
        temperature: what logits are divided by.
        chunk_mib: memory that the logits of one chunk of tokens may take on each rank.
        tp_group: the ranks that the output layer's rows are spread over.
        sequence_parallel: whether each of them has hidden states of its own tokens only.
    """

    vocab_size: int
    temperature: float
    chunk_mib: float
    tp_group: ProcessGroup
    sequence_parallel: bool

    @classmethod
    def from_config(cls, config: Config, shape: ModelShape, ranks: ParallelGroups) -> PolicyHead:
        """The head of the policy that rollouts are drawn from: at their temperature."""
        return cls(
            shape.vocab_size,
            config.rollout.temperature,
            config.model.log_prob_chunk_mib,
            ranks.tp,
            config.parallel.sequence_parallel,
        )

    @property
    def uses_output_layer(self) -> bool:
        """True: the log-probs come from it."""
        return True

    def own_module(self, config: TransformerConfig) -> None:
        """Return None: this head has no parameters of its own."""

    def __call__(self, hidden: Tensor, batch: PackedBatch, model: HiddenStateModel) -> PolicyOutputs:
        """Log-probs of the batch's labels, and entropy. Collective over `tp_group`; differentiable."""
        weight = model.output_weight()
        log_probs, entropy = vocab_log_probs(
            hidden.squeeze(1),
            weight,
            batch.labels,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            chunk_tokens=log_prob_chunk_tokens(self.chunk_mib, len(weight)),
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
        )
        return PolicyOutputs(log_probs, entropy)
