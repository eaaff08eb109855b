"""A converted checkpoint is the one that the actor saves, loads in any layout, and computes what transformers does.

Round trips alone would pass with a mistake that is made alike in both directions; logits and the actor's own
checkpoints do not.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from megatron_fipo.actor.actor import Actor
from megatron_fipo.checkpoint.torch_dist import Keeping, begin_checkpoint
from megatron_fipo.config import ParallelSection
from megatron_fipo.convert.mapping import GatedMlp, GroupedQkv
from megatron_fipo.convert.offline.command import add_verify, run
from megatron_fipo.convert.offline.logits import compare_logits, load_torch_dist
from megatron_fipo.convert.offline.to_hugging_face import plan_to_hugging_face
from megatron_fipo.convert.offline.to_megatron import plan_to_megatron
from megatron_fipo.convert.offline.verification import verify_weights
from megatron_fipo.convert.torch_dist import TorchDistReader
from megatron_fipo.parallel import exchange
from tests.models import save_random_model
from tests.parallel.layouts import Case, Outcome, config_of, layout, train_step
from tests.parallel.ranks import run_ranks

P = ParallelSection

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 with bias": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama with bias": ("llama", {"attention_bias": True}),
}
LAYOUTS = {1: [P()], 4: [P(tp=2, pp=2), P(tp=2, cp=2), P(pp=4), P(pp=2, virtual_pp=2)]}
ALPHABET = 256


def ignore(num_bytes: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<name>/hf, with a tokenizer of bytes, and <name>/megatron of every model."""
    root = tmp_path_factory.mktemp("converted")
    for name, (family, changes) in MODELS.items():
        folder = save_random_model(root / name / "hf", family, **({"vocab_size": 300} | changes))
        vocabulary = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
        tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        plan_to_megatron(folder, root / name / "megatron", file_bytes=50_000).write(ignore)
    return root


def actor_of(folder: str, parallel: ParallelSection, ranks: Any) -> Actor:
    return Actor(config_of(Case("", "", parallel), folder), ranks)


# --- against the actor's own -----------------------------------------------------------------------------------------


def _save_as_the_actor_does(
    folders: dict[str, str], target: str, parallel: ParallelSection, num_steps: int
) -> dict[str, dict[str, torch.Tensor]]:
    """Save every model, after some training, in <target>/<name>; the actors' weights by Hugging Face name."""
    weights = {}
    for name, folder in folders.items():
        with layout(parallel) as ranks:
            actor = actor_of(folder, parallel, ranks)
            for step in range(num_steps):
                train_step(actor, config_of(Case("", "", parallel, max_tokens=400), folder), step, Outcome())
            begin_checkpoint(actor, f"{target}/{name}", 1, {"next_step": 1}, Keeping(), asynchronous=False).finish()
            weights[name] = {key: tensor.clone() for key, tensor in actor.weights()}
            exchange.barrier(ranks.world)
    return weights if dist.get_rank() == 0 else {}


@pytest.mark.parametrize("parallel", [P(), P(tp=2)], ids=["tp1", "tp2"])
def test_what_is_stored_is_what_the_actor_stores(folders: Path, tmp_path: Path, parallel: ParallelSection) -> None:
    sources = {name: str(folders / name / "hf") for name in MODELS}
    run_ranks(_save_as_the_actor_does, parallel.tp, sources, str(tmp_path), parallel, 0)
    for name in MODELS:
        own = TorchDistReader(tmp_path / name / "step_000001")
        converted = TorchDistReader(folders / name / "megatron")
        keys = {key for key in own.keys if not key.startswith("optimizer.")}
        assert keys == set(converted.keys), name
        for key in keys:
            ours, theirs = converted.read(key), own.read(key)
            if key in ("embedding.word_embeddings.weight", "output_layer.weight"):  # padded for the layout
                assert not ours[300:].any()
                ours, theirs = ours[:300], theirs[:300]
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), f"{name}: {key}"
        objects = {key for key, _ in own._storage if "_extra_state" in key}
        assert objects
        assert objects <= {key for key, _ in converted._storage}


@pytest.mark.parametrize("parallel", [P(tp=2, pp=2), P(pp=2, virtual_pp=2)], ids=["tp2 pp2", "pp2 vpp2"])
def test_a_training_checkpoint_becomes_a_folder(folders: Path, tmp_path: Path, parallel: ParallelSection) -> None:
    """Its weights are those that the actor had, and not those that it started from."""
    name = "qwen3 with bias"
    source, checkpoint = folders / name / "hf", tmp_path / name / "step_000001"
    weights = run_ranks(_save_as_the_actor_does, 4, {name: str(source)}, str(tmp_path), parallel, 1)[0][name]
    plan_to_hugging_face(checkpoint, tmp_path / "hf", base=source).write(ignore)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[key], tensor) for key, tensor in weights.items())
    assert verify_weights(tmp_path / "hf", [checkpoint], on_done=ignore).problems == []
    different = verify_weights(source, [checkpoint], on_done=ignore).problems
    assert {problem.kind for problem in different} == {"different"}
    assert len({problem.tensor for problem in different}) == len(weights)


# --- into any layout -------------------------------------------------------------------------------------------------


def _load(layouts: list[ParallelSection], root: str) -> int:
    """Load every model in every layout into an actor with other weights; those are then the file's, bit for bit."""
    count = 0
    for parallel in layouts:
        for name in MODELS:
            folder = Path(root) / name
            expected = load_file(folder / "hf" / "model.safetensors")
            with layout(parallel) as ranks:
                actor = actor_of(str(folder / "hf"), parallel, ranks)
                for load in (load_torch_dist, _load_with_extra_states):
                    with torch.no_grad():
                        for model in actor.models:
                            for parameter in model.parameters():
                                parameter.fill_(7.0)
                    load(actor.models, folder / "megatron", ranks)
                    found = dict(actor.weights())
                    assert found.keys() == expected.keys()
                    for key, tensor in expected.items():
                        assert torch.equal(found[key], tensor), f"{name} {parallel}: {key}"
                    count += 1
    return count


def _load_with_extra_states(models: Any, checkpoint: Path, ranks: Any) -> None:
    """As a training checkpoint's weights are loaded: all that a model asks for is there."""
    states = {
        f"model{number}": model.sharded_state_dict(metadata={"dp_cp_group": ranks.dp_cp})
        for number, model in enumerate(models)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = dist_checkpointing.load(states, str(checkpoint))
    for number, model in enumerate(models):
        model.load_state_dict(loaded[f"model{number}"])


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_a_converted_checkpoint_loads_in_any_layout(folders: Path, world_size: int) -> None:
    counts = run_ranks(_load, world_size, LAYOUTS[world_size], str(folders))
    assert counts == [2 * len(LAYOUTS[world_size]) * len(MODELS)] * world_size


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [
        ("qwen3", 1, 1),
        ("qwen3", 2, 1),
        ("qwen3", 1, 2),
        ("qwen3 with bias", 2, 2),
        ("llama with bias", 2, 1),
        ("qwen2 tied", 1, 2),
    ],
)
def test_the_actors_logits_are_transformers(folders: Path, name: str, tp: int, pp: int) -> None:
    folder = folders / name
    found = compare_logits(folder / "hf", folder / "megatron", tp=tp, pp=pp)
    assert found.agrees, str(found)
    assert found.largest_difference <= 1e-5 * found.largest_logit, str(found)
    assert found.same_best_token == found.num_tokens > 500


def test_the_actors_logits_from_the_folder_that_training_loads(folders: Path) -> None:
    assert compare_logits(folders / "qwen3" / "hf", None, tp=2, pp=1).agrees


def test_logits_in_bfloat16(folders: Path) -> None:
    found = compare_logits(folders / "qwen3" / "hf", folders / "qwen3" / "megatron", tp=2, pp=1, dtype="bfloat16")
    assert found.agrees, str(found)
    assert found.largest_difference > 1e-5 * found.largest_logit, "it was not computed in bfloat16"


def _up_then_gate(layout_class: type[GatedMlp]) -> Any:
    """gate and up exchanged, in both directions alike."""
    to_shard, to_whole = layout_class.to_shard, layout_class.to_whole
    return mock.patch.multiple(
        layout_class,
        to_shard=lambda self, whole, *rest: to_shard(self, whole[::-1], *rest),
        to_whole=lambda self, shards, shape: to_whole(self, shards, shape)[::-1],
    )


def _heads_not_interleaved(layout_class: type[GroupedQkv]) -> Any:
    """All of q, then all of k, then all of v, in both directions alike."""

    def to_whole(self: Any, shards: Any, shape: Any) -> Any:
        kv = shape.num_query_groups * shape.head_dim
        return list(shards[0].split([shape.num_attention_heads * shape.head_dim, kv, kv]))

    return mock.patch.multiple(
        layout_class, to_shard=lambda self, whole, *rest: torch.cat(list(whole)), to_whole=to_whole
    )


@pytest.mark.parametrize(
    "breakage", [_up_then_gate(GatedMlp), _heads_not_interleaved(GroupedQkv)], ids=["gate and up", "q, k and v"]
)
def test_a_mistake_made_alike_in_both_directions_is_noticed(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], breakage: Any
) -> None:
    """The bits come back, and still the checkpoint is wrong: verify says so by the logits."""
    source = folders / "qwen3" / "hf"
    with breakage:
        plan_to_megatron(source, tmp_path / "megatron").write(ignore)
        plan_to_hugging_face(tmp_path / "megatron", tmp_path / "back").write(ignore)
        assert verify_weights(source, [tmp_path / "megatron", tmp_path / "back"], on_done=ignore).problems == []
        found = compare_logits(source, tmp_path / "megatron", tp=1, pp=1)
        assert not found.agrees
        assert found.largest_difference > 0.1 * found.largest_logit
        assert run(add_verify, [str(source), str(tmp_path / "megatron"), "--logits"]) == 1
    assert "error: different: the actor and transformers do not compute the same logits" in capfd.readouterr().err


def test_norms_of_q_and_k_matter(folders: Path, tmp_path: Path) -> None:
    """Negative control of the comparison: exchanged, they change few numbers, and the logits tell."""
    folder = shutil.copytree(folders / "qwen3" / "hf", tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    query, key = (f"model.layers.1.self_attn.{part}_norm.weight" for part in "qk")
    tensors[query], tensors[key] = tensors[key] * torch.linspace(0.5, 2, 16), tensors[query]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert not compare_logits(folder, folders / "qwen3" / "megatron", tp=1, pp=1).agrees


def test_what_logits_cannot_be_compared_of_is_said(folders: Path, tmp_path: Path) -> None:
    source = folders / "qwen3" / "hf"
    with pytest.raises(ValueError, match="--tp 3: must divide the model's num_attention_heads=4"):
        compare_logits(source, None, tp=3, pp=1)
    with pytest.raises(ValueError, match="--pp 3: 3 stages must divide the model's num_hidden_layers=4"):
        compare_logits(source, None, tp=1, pp=3)
    without = shutil.copytree(source, tmp_path / "hf", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(ValueError, match=r"has no tokenizer: tokenizer_config\.json is missing"):
        compare_logits(without, None, tp=1, pp=1)
