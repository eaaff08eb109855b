"""The sizes and switches of one model; with its family they decide all of its tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of a decoder with grouped-query attention, RoPE, RMSNorm and SwiGLU.

    Attributes:
        family: a name in `families.FAMILIES`.
        qkv_bias: whether q, k and v have a bias.
        output_bias: whether o_proj has a bias.
        qk_norm: whether each head of q and k is normalised before RoPE.
        num_experts: experts of a layer's MLP; 0 in a dense model, and all present families are dense.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    norm_epsilon: float
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0

    @property
    def query_size(self) -> int:
        """Channels of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Channels of all key heads together, and of all value heads."""
        return self.num_query_groups * self.head_dim

    def padded_vocab_size(self, tp_size: int) -> int:
        """Vocabulary rounded up so that each tensor-parallel rank holds a multiple of 128 rows."""
        multiple = 128 * tp_size
        return -(-self.vocab_size // multiple) * multiple
