"""Builds a Megatron-Core model from the shape of a Hugging Face checkpoint.

In bfloat16, with CUDA and Transformer Engine, the layers, the attention and its context parallelism are Transformer
Engine's; otherwise they are Megatron's own modules with this project's attention. Written for Megatron-Core 0.16 and
0.19.

Shapes: T packed tokens of a microbatch, T_local = T / cp, H hidden size.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fipo.actor.backend import uses_transformer_engine
from megatron_fipo.actor.head import Head
from megatron_fipo.actor.hidden_states import HiddenStateModel
from megatron_fipo.actor.precision import fp8_options
from megatron_fipo.config import ModelSection, ParallelSection, RecomputedPart, recomputed_part
from megatron_fipo.convert.dtypes import MODEL_DTYPES
from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.convert.stream import HEAD
from megatron_fipo.parallel.cp_attention import ContextParallelAttention
from megatron_fipo.parallel.groups import ParallelGroups, is_stage_edge

LENGTH_MULTIPLE = 1024
"""The longest sequence of a microbatch is given to Megatron rounded up to a multiple of this."""


class RmsNorm(nn.RMSNorm):
    """torch's RMSNorm, marked for the gradient all-reduce that sequence parallelism needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


_RECOMPUTE: dict[RecomputedPart, dict[str, Any]] = {
    "nothing": {},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "layer": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(shape: ModelShape, model: ModelSection, parallel: ParallelSection) -> TransformerConfig:
    """Megatron's configuration of the model. Gradients are normalised per token, once, over the whole minibatch."""
    part = recomputed_part(model, on_gpu=torch.cuda.is_available())
    with warnings.catch_warnings():
        if part == "core_attn":  # Megatron warns about fused attention, which is not used here
            warnings.filterwarnings("ignore", message="If you are using transformer_engine as the transformer")
        return _transformer_config(shape, model, parallel, **_RECOMPUTE[part], **fp8_options(model.fp8))


def _transformer_config(
    shape: ModelShape, model: ModelSection, parallel: ParallelSection, **options: Any
) -> TransformerConfig:
    on_gpu = torch.cuda.is_available()
    dtype = MODEL_DTYPES[model.dtype]
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.virtual_pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights always come from a checkpoint, but initialising is what marks parameters as sharded: without it the
        # gradient norm under tensor parallelism would leave all shards but the first out.
        perform_initialization=True,
        use_cpu_initialization=not on_gpu,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # gloo has no batched point-to-point, and interleaving over it corrupts outputs that are deallocated.
        batch_p2p_comm=on_gpu,
        deallocate_pipeline_outputs=on_gpu,
        # Fused kernels are CUDA's, or need Apex or Transformer Engine. The latter's RoPE is one kernel for all
        # sequences, with angles in float32; Megatron's own reads lengths from the device and goes through sequences.
        # Weight gradients are fused by `data_parallel`: turned on here, the output layer would ask for Apex.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=uses_transformer_engine(model),
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        **options,
    )


def _with_bias(linear: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a class of linear layers that always has a bias.

    Megatron has one switch for the biases of the attention's output and of the MLP; models have only the former.
    """

    class WithBias(linear):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": True})

    return WithBias


def _layer_spec(shape: ModelShape, model: ModelSection) -> tuple[ModuleSpec, Any]:
    """(specification of a layer, class of the final norm)."""
    if uses_transformer_engine(model):
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm), TENorm
        attention = layer.submodules.self_attention.submodules
    else:
        layer, norm = get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm"), RmsNorm
        layer.submodules.input_layernorm = RmsNorm
        layer.submodules.pre_mlp_layernorm = RmsNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = ContextParallelAttention
        if shape.qk_norm:
            attention.q_layernorm = attention.k_layernorm = RmsNorm
    if shape.output_bias:
        attention.linear_proj = _with_bias(attention.linear_proj)
    return layer, norm


def build_model(
    shape: ModelShape,
    model: ModelSection,
    parallel: ParallelSection,
    ranks: ParallelGroups,
    head: Head[Any] | None = None,
) -> list[nn.Module]:
    """This rank's model chunks, without weights: one, or one for each virtual pipeline stage.

    They share one TransformerConfig.

    Args:
        head: the model's head; None gives the model the language model's output layer and nothing else.
    """
    config = transformer_config(shape, model, parallel)
    layer, norm = _layer_spec(shape, model)
    has_output_layer = head is None or head.uses_output_layer
    chunks: list[nn.Module] = []
    for stage in range(parallel.virtual_pp or 1):
        vp_stage = stage if parallel.virtual_pp else None
        first, last = is_stage_edge(ranks, stage, parallel.virtual_pp or 1)
        block = TransformerBlockSubmodules(
            layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm
        )
        chunk = HiddenStateModel(
            config,
            block,
            vocab_size=shape.padded_vocab_size(parallel.tp),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=first,
            post_process=last,
            parallel_output=True,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            share_embeddings_and_output_weights=shape.tied_embeddings and has_output_layer,
            vp_stage=vp_stage,
        )
        if last and head is not None:
            _end_in(chunk, head, config)
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def _end_in(chunk: HiddenStateModel, head: Head[Any], config: TransformerConfig) -> None:
    """Give the model's last chunk its head's parameters, and take away an output layer that the head does not read."""
    if not head.uses_output_layer:
        chunk.remove_output_layer()
    own = head.own_module(config)
    if own is not None:
        chunk.add_module(HEAD, own)


def packed_sequence_params(cu_seqlens_padded: Tensor, cu_seqlens_on_host: Tensor) -> PackedSeqParams:
    """Megatron's description of packed sequences; cumulative lengths are global, not this rank's. Reads no device.

    Padding counts as tokens of its sequence: it stands at the end, where causal attention lets no other token see it.
    Transformer Engine is given one and the same tensor for the lengths with and without padding: with two tensors, even
    equal ones, it would not use FlashAttention 2 and, before 2.20, would wait for the GPU twice in each layer.

    Args:
        cu_seqlens_padded: int32 [S + 1] on the model's device.
        cu_seqlens_on_host: the same numbers on the CPU.
    """
    assert cu_seqlens_on_host.device.type == "cpu", "lengths on a device cost a wait for it"
    longest = _rounded_longest(cu_seqlens_on_host)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens_padded,
        cu_seqlens_kv=cu_seqlens_padded,
        cu_seqlens_q_padded=cu_seqlens_padded,
        cu_seqlens_kv_padded=cu_seqlens_padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    params.cu_seqlens_on_host = cu_seqlens_on_host  # for ContextParallelAttention
    return params


def _rounded_longest(cu_seqlens: Tensor) -> int:
    """The longest sequence's tokens, rounded up to a multiple of LENGTH_MULTIPLE.

    Megatron keeps the rotary angles of the lengths that it was last asked for, so it must be asked for few different
    ones.
    """
    return -(-int(cu_seqlens.diff().max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
