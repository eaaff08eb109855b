"""Which layers a model is built of, and the settings that its exactness hangs on."""

from __future__ import annotations

import contextlib
import io
import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from megatron.core.extensions import transformer_engine as extension
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fipo.actor import precision
from megatron_fipo.actor.model import packed_sequence_params, transformer_config
from megatron_fipo.config import FP8_ALIGNMENT, ModelSection, ParallelSection
from megatron_fipo.convert.hf_config import ModelShape
from tests.parallel.ranks import run_ranks

SHAPE = ModelShape("llama", 2, 64, 128, 4, 2, 16, 20, 512, 10000.0, 1e-6, False, False)


def test_the_loss_is_normalised_by_megatrons_per_token_path() -> None:
    config = transformer_config(SHAPE, ModelSection(), ParallelSection())
    assert config.calculate_per_token_loss
    assert config.finalize_model_grads_func is not None
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("recompute", "dtype", "on_gpu", "expected"),
    [
        ("none", "bfloat16", True, (None, None, None)),
        ("selective", "bfloat16", True, ("selective", ["mlp"], None)),
        ("selective", "float32", True, ("selective", ["core_attn"], None)),
        ("selective", "bfloat16", False, ("selective", ["core_attn"], None)),
        ("full", "bfloat16", True, ("full", None, 1)),
    ],
)
def test_recompute_drops_what_a_layer_keeps(
    recompute: str, dtype: str, on_gpu: bool, expected: tuple[str | None, list[str] | None, int | None]
) -> None:
    model = ModelSection(recompute=recompute, dtype=dtype)
    with warnings.catch_warnings(), mock.patch.object(torch.cuda, "is_available", return_value=on_gpu):
        # Megatron's warning that fused attention needs none: neither to be provoked nor to be silenced for all.
        warnings.filterwarnings("error", message="If you are using transformer_engine")
        config = transformer_config(SHAPE, model, ParallelSection())
    granularity, modules, num_layers = expected
    assert config.recompute_granularity == granularity
    assert config.recompute_num_layers == num_layers
    assert modules is None or config.recompute_modules == modules


def _told_of_fused_attention() -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, recompute_granularity="selective")
    return said.getvalue()


def test_megatrons_warning_of_fused_attention_is_heard() -> None:
    """What the test above counts on, with this project's silence in force: in a process that shows its warnings."""
    (said,) = run_ranks(_told_of_fused_attention, 1)
    assert "the core_attn is from transformer_engine and may be the fused version" in said


@pytest.mark.parametrize("has_engine", [True, False])
def test_rope_is_fused_where_layers_are_transformer_engines(has_engine: bool) -> None:
    fused = mock.Mock(name="Transformer Engine's kernel")
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(extension, "HAVE_TE", has_engine),
        mock.patch.multiple(rope_utils, fused_apply_rotary_pos_emb=fused, fused_apply_rotary_pos_emb_thd=fused),
    ):
        config = transformer_config(SHAPE, ModelSection(dtype="bfloat16"), ParallelSection())
        assert config.apply_rope_fusion is has_engine
        plain = transformer_config(SHAPE, ModelSection(dtype="float32"), ParallelSection())
        assert not plain.apply_rope_fusion, "these layers are Megatron's"


def test_the_layout_and_the_dtype_are_those_of_the_configuration() -> None:
    parallel = ParallelSection(tp=2, pp=2, virtual_pp=2, cp=2, sequence_parallel=True)
    shape = ModelShape("qwen2", 4, 64, 128, 4, 2, 16, 20, 512, 10000.0, 1e-6, False, True)
    config = transformer_config(shape, ModelSection(dtype="bfloat16"), parallel)
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (2, 2)
    assert (config.virtual_pipeline_model_parallel_size, config.context_parallel_size) == (2, 2)
    assert config.sequence_parallel
    assert config.add_qkv_bias
    assert (config.params_dtype, config.pipeline_dtype, config.bf16) == (torch.bfloat16, torch.bfloat16, True)


@pytest.mark.parametrize(
    ("recipe", "number_format"),
    [("none", None), ("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")],
)
def test_fp8_settings(recipe: str, number_format: str | None) -> None:
    config = transformer_config(SHAPE, ModelSection(dtype="bfloat16", fp8=recipe), ParallelSection())
    assert config.fp8 == number_format
    assert config.fp8 is None or config.fp8_recipe == recipe
    assert not config.fp8_param, "weights and the optimizer's state stay what they are"


def test_every_recipe_that_the_configuration_knows_is_known_to_the_actor() -> None:
    assert set(FP8_ALIGNMENT) - {"none"} == precision._RECIPES.keys()


@pytest.mark.parametrize(
    ("capability", "is_installed", "recipe", "words"),
    [
        (None, True, "tensorwise", "there is no GPU here. Set model.fp8=none"),
        ((9, 0), False, "tensorwise", r"not installed\. Run python tools/engines/trainer_gpu\.py"),
        ((8, 0), True, "tensorwise", "has compute capability 8.0. Set model.fp8=none"),
        ((9, 0), True, "mxfp8", "needs Blackwell .* has compute capability 9.0. Set model.fp8=blockwise"),
        ((9, 0), True, "blockwise", ""),
        (None, False, "none", ""),
    ],
)
def test_fp8_is_refused_where_it_cannot_be_computed(
    capability: tuple[int, int] | None, is_installed: bool, recipe: str, words: str
) -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=capability is not None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.cuda, "get_device_name", return_value="some GPU"),
        mock.patch.object(extension, "HAVE_TE", is_installed),
        pytest.raises(ValueError, match=words) if words else nullcontext(),
    ):
        precision.check_fp8(recipe)


def test_lengths_with_and_without_padding_are_one_tensor() -> None:
    """Transformer Engine looks whether they are the same object: only then it knows of no padding between sequences."""
    padded = torch.tensor([0, 4, 12], dtype=torch.int32)
    params = packed_sequence_params(padded, padded.long())
    assert params.qkv_format == "thd"
    assert params.cu_seqlens_q is params.cu_seqlens_kv is padded
    assert params.cu_seqlens_q_padded is params.cu_seqlens_kv_padded is padded


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([4, 8], 1024),
        ([1024, 8], 1024),
        ([1025, 8], 2048),
        ([1024], 1024),
        ([1000, 24], 1024),
        ([1500, 548], 2048),
    ],
)
def test_the_longest_length_is_rounded_up(lengths: list[int], expected: int) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    params = packed_sequence_params(cu_seqlens.int(), cu_seqlens)
    assert params.max_seqlen_q == params.max_seqlen_kv == expected


def test_lengths_on_a_device_are_refused() -> None:
    with pytest.raises(AssertionError, match="cost a wait"):
        packed_sequence_params(torch.empty(3, device="meta"), torch.empty(3, device="meta"))
