"""What the models of a family have in common."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fipo.convert.families.row import Row


@dataclass(frozen=True)
class Family:
    """A family of models: its table, and the defaults of transformers for what a config.json leaves out.

    Attributes:
        name: model_type in config.json, and the family's name here.
        architecture: the class that config.json's `architectures` names, by which rollout engines choose.
        table: every kind of parameter that some model of the family has. Within a layer the rows stand in the order in
            which a converted checkpoint holds them.
        key_value_heads: default of num_key_value_heads; None: as many as there are query heads.
        head_dim: default of head_dim; None: hidden_size / num_attention_heads.
        always_has_qkv_bias: q, k and v have a bias and o_proj has none, whatever config.json says; otherwise
            attention_bias decides about all four.
        has_qk_norm: each head of q and k is normalised before RoPE.
        has_window_switch: config.json has use_sliding_window, without which a sliding_window means nothing.
    """

    name: str
    architecture: str
    table: tuple[Row, ...]
    key_value_heads: int | None = None
    head_dim: int | None = None
    always_has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_window_switch: bool = False
