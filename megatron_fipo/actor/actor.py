"""The actor: the trained model as a policy, which gives log-probs of tokens to training and to rollouts.

Shapes: T_local tokens of a microbatch on this context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_fipo.actor.policy_head import PolicyHead, PolicyOutputs
from megatron_fipo.actor.schedule import run_schedule
from megatron_fipo.actor.trainable import ALL_WEIGHTS, Trainable
from megatron_fipo.actor.trained import TrainedModel, load_chunks, tensors_of
from megatron_fipo.config import Config
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.parallel.batch import build_scoring_batches
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.token_values import gather_token_values
from megatron_fipo.rl.packed_batch import PackedBatch


class Actor(TrainedModel[PolicyOutputs]):
    """A trained policy and, where there is a KL penalty, the frozen one that it started from.

    Its loss functions take (log_probs float32 [T_local], entropy float32 [T_local], microbatch). All its methods but
    `offload` and `onload` are collective.
    """

    head: PolicyHead

    def __init__(self, config: Config, ranks: ParallelGroups, trainable: Trainable = ALL_WEIGHTS) -> None:
        """Build the policy in the config's layout and load its weights; see `TrainedModel`."""
        shape = read_model_shape(config.model.path)
        super().__init__(config, ranks, shape, PolicyHead.from_config(config, shape, ranks), trainable)
        self._config = config
        self._reference: list[nn.Module] = []
        if config.objective.kl_coefficient:
            self._reference = load_chunks(config, shape, ranks, self.head)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, which are 0 … vocab_size - 1."""
        return self.shape.vocab_size

    def log_probs(
        self, microbatches: Sequence[PackedBatch], *, reference: bool = False, temperature: float | None = None
    ) -> list[Tensor]:
        """Log-probs of the labels under the current weights, or the frozen starting ones.

        Args:
            temperature: temperature of the softmax; None takes rollout.temperature.

        Returns:
            float32 [T_local] for each microbatch; empty except on the last pipeline stage.
        """
        head = self.head if temperature is None else replace(self.head, temperature=temperature)
        if not reference:
            return [outputs.log_probs for outputs in self.forward(microbatches, head)]
        assert self._reference, "no reference policy was built: objective.kl_coefficient is 0"
        with torch.no_grad():
            found = run_schedule(self._reference, microbatches, head, forward_only=True)
        return [outputs.log_probs for outputs in found]

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probs of each sequence's tokens from the second on, under the current weights.

        Collective over all ranks: each gives the same sequences and gets the same answer, whatever the layout.

        Raises:
            ValueError: if a sequence is empty, or longer than batch.max_tokens_per_microbatch.
        """
        batches = build_scoring_batches(sequences, self._config, self.ranks)
        values = gather_token_values(batches, self.log_probs(batches, temperature=temperature), self.ranks)
        return [values[index][1].tolist() for index in range(len(sequences))]

    def _lasting_tensors(self) -> Iterator[Tensor]:
        yield from super()._lasting_tensors()
        yield from tensors_of(self._reference)
