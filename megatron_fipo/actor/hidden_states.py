"""Megatron's GPTModel, up to the hidden states from which a head computes its outputs.

Shapes: T_local tokens of a microbatch on this context-parallel rank, H hidden size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn


class HiddenStateModel(GPTModel):
    """GPTModel whose last stage returns hidden states: log-probs are computed from them in chunks, without logits."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Megatron's, with the rotary angles of each token of packed sequences looked up once for all layers.

        Without a fused kernel Megatron would, for queries and for keys of every layer, cut the batch into its sequences
        and put their angles together, from lengths that it reads from the device. Told that the batch is a plain one,
        it turns each token by the angles that it is given for it: the same numbers.
        """
        found: tuple[Any, ...] = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        packed = kwargs.get("packed_seq_params")
        if packed is None or self.config.apply_rope_fusion:
            return found
        decoder_input, angles, *others = found
        packed.qkv_format = "sbhd"  # of this forward pass alone, whose attention has lengths of its own
        return decoder_input, angles[position_ids[0]], *others

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[T_local, 1, H] after the final norm (T_local / tp rows under sequence parallelism)."""
        return hidden_states

    def output_weight(self) -> Tensor:
        """This rank's rows [V_local, H] of the output layer; the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def remove_output_layer(self) -> None:
        """Remove the output layer of a last stage whose head does not read it. The final norm stays."""
        assert not self.share_embeddings_and_output_weights, "what is tied to the embedding cannot be removed alone"
        del self.output_layer
        self.post_process = False  # where this is set, Megatron looks for an output layer to save


def unwrap(chunk: nn.Module) -> HiddenStateModel:
    """The model inside Megatron's wrappers (data parallel, half precision)."""
    while not isinstance(chunk, HiddenStateModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
