"""Weights go from a Hugging Face folder into any layout and out again without a bit changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import ParallelSection
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.convert.hf_folder import CheckpointReader
from megatron_fipo.convert.mapping import GatedMlp, GroupedQkv
from megatron_fipo.convert.stream import export_folder
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.batch import build_minibatches
from tests.models import load, save_random_model
from tests.parallel.layouts import (
    MODELS,
    PAD_TOKEN,
    TEMPERATURE,
    Case,
    Outcome,
    config_of,
    groups_of_step,
    layout,
    save_models,
    train_step,
)
from tests.parallel.ranks import RankError, run_ranks

P = ParallelSection

LAYOUTS: dict[int, list[ParallelSection]] = {
    1: [P()],
    4: [P(tp=2), P(tp=2, pp=2), P(pp=2, virtual_pp=2), P(pp=4), P(tp=2, cp=2, sequence_parallel=True), P(pp=2, cp=2)],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def _stream_is_the_file(layouts: list[ParallelSection], folders: dict[str, str]) -> int:
    """Assert on every rank, for every model and layout, that the weights are those of the file, bit for bit."""
    count = 0
    for parallel in layouts:
        for model, folder in folders.items():
            expected = load_file(Path(folder) / "model.safetensors")
            with layout(parallel) as ranks:
                actor = Actor(config_of(Case("", model, parallel), folder), ranks)
                names = []
                for name, tensor in actor.weights():
                    assert torch.equal(tensor, expected[name]), f"{model} {parallel}: {name}"
                    names.append(name)
            assert sorted(names) == sorted(expected), f"{model} {parallel}"
            count += 1
    return count


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_what_comes_out_is_what_went_in(models: dict[str, str], world_size: int) -> None:
    counts = run_ranks(_stream_is_the_file, world_size, LAYOUTS[world_size], models, timeout_s=180)
    assert counts == [len(LAYOUTS[world_size]) * len(MODELS)] * world_size


def _stream_of_a_broken_table(breakage: str, folder: str) -> None:
    """The check above, with a layout primitive that is its own inverse no more."""

    def queries_first(self: Any, shards: list[Tensor], shape: Any) -> list[Tensor]:
        heads = shape.num_attention_heads * shape.head_dim
        kv = shape.num_query_groups * shape.head_dim
        return list(torch.cat(shards).split([heads, kv, kv]))

    def shards_in_one_piece(self: Any, shards: list[Tensor], shape: Any) -> list[Tensor]:
        return list(torch.cat(shards).chunk(2))

    patches = {
        "queries first": mock.patch.object(GroupedQkv, "to_whole", queries_first),
        "gate and up not taken apart by rank": mock.patch.object(GatedMlp, "to_whole", shards_in_one_piece),
    }
    with patches[breakage]:
        _stream_is_the_file([P(tp=2)], {"qwen2": folder})


@pytest.mark.parametrize("breakage", ["queries first", "gate and up not taken apart by rank"])
def test_a_wrong_layout_is_noticed(models: dict[str, str], breakage: str) -> None:
    with pytest.raises(RankError, match=r"AssertionError: qwen2 .*model\.layers\.0\."):
        run_ranks(_stream_of_a_broken_table, 2, breakage, models["qwen2"], timeout_s=120)


# --- export ----------------------------------------------------------------------------------------------------------


def _train_and_export(case: Case, folder: str, target: str) -> dict[int, Tensor]:
    """One step, then export; the actor's log-probs of the next step's samples: sample -> [P + R - 1]."""
    config = config_of(case, folder)
    with layout(case.parallel) as ranks:
        actor = Actor(config, ranks)
        train_step(actor, config, 0, Outcome())
        for _ in range(2):  # the second replaces the first
            export_folder(actor.weights(), folder, target, is_writer=dist.get_rank() == 0, dtype=torch.float32)
        exchange.barrier(ranks.world)
        own = {}
        for microbatches in build_minibatches(groups_of_step(1), config, ranks, PAD_TOKEN):
            for batch, log_probs in zip(microbatches, actor.log_probs(microbatches), strict=ranks.is_last_stage):
                for row, index in enumerate(batch.sample_indices):
                    if index >= 0:
                        start = int(batch.layout.cu_seqlens_padded[row])
                        length = int(batch.layout.cu_seqlens.diff()[row])
                        own[index] = log_probs[start : start + length - 1].clone()
        return {index: part for parts in exchange.all_gather_objects(own, ranks.world) for index, part in parts.items()}


@pytest.mark.parametrize("case", [Case("", "qwen2", P(tp=2)), Case("", "llama", P(pp=2))], ids=["qwen2", "llama"])
def test_an_export_is_the_actor_in_transformers(models: dict[str, str], tmp_path: Path, case: Case) -> None:
    base = tmp_path / "base"
    shutil.copytree(models[case.model], base)
    (base / "tokenizer.json").write_text("{}")
    target = tmp_path / "exported"
    log_probs = run_ranks(_train_and_export, 2, case, str(base), str(target), timeout_s=120)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "exported"]
    assert (target / "tokenizer.json").is_file()
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    model, before = load(target), load(Path(models[case.model]))
    samples = [sample for group in groups_of_step(1) for sample in group.samples]
    assert log_probs.keys() == set(range(len(samples)))
    worst = distance = 0.0
    for index, sample in enumerate(samples):
        tokens = torch.cat([sample.prompt_ids, sample.response_ids])
        for network in (model, before):
            with torch.no_grad():
                log_p = F.log_softmax(network(tokens[None]).logits[0, :-1] / TEMPERATURE, dim=-1)
            difference = float((log_p.gather(-1, tokens[1:, None]).squeeze(-1) - log_probs[index]).abs().max())
            if network is model:
                worst = max(worst, difference)
            else:
                distance = max(distance, difference)
    assert worst <= 1e-5
    assert distance > 1e-2, "the model did not move, so the comparison could not fail"


def test_an_export_in_bfloat16_says_so(models: dict[str, str], tmp_path: Path) -> None:
    stream = iter(load_file(Path(models["llama"]) / "model.safetensors").items())
    export_folder(stream, models["llama"], tmp_path / "half", is_writer=True, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_holds_one_file_at_a_time(models: dict[str, str], tmp_path: Path) -> None:
    """Each file is on the disk before the tensors of the next are asked for."""
    tensors = load_file(Path(models["llama"]) / "model.safetensors")
    partial, target = tmp_path / "out.partial", tmp_path / "out"
    given = [0]

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            written = sum(t.nbytes for file in partial.glob("*.safetensors") for t in load_file(file).values())
            assert given[0] - written <= 40_000
            given[0] += tensor.nbytes
            yield name, tensor

    export_folder(stream(), models["llama"], target, is_writer=True, dtype=torch.float32, shard_bytes=40_000)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 3
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    reader = CheckpointReader(target, read_model_shape(target))
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    tokens = torch.arange(1, 18)[None]
    with torch.no_grad():
        assert torch.equal(load(target)(tokens).logits, load(Path(models["llama"]))(tokens).logits)


def test_an_export_that_fails_leaves_what_was_there(models: dict[str, str], tmp_path: Path) -> None:
    tensors = load_file(Path(models["llama"]) / "model.safetensors")
    export_folder(iter(tensors.items()), models["llama"], tmp_path / "out", is_writer=True, dtype=torch.float32)

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors.items())[:30]
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        export_folder(
            failing(), models["llama"], tmp_path / "out", is_writer=True, dtype=torch.bfloat16, shard_bytes=40_000
        )
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    export_folder(iter(tensors.items()), models["llama"], tmp_path / "out", is_writer=True, dtype=torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_an_export_does_not_hold_the_models_own_memory(models: dict[str, str], tmp_path: Path) -> None:
    """The model trains on while a file is still being filled."""
    tensors = load_file(Path(models["llama"]) / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in tensors.items()}

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            yield name, tensor
            tensor.zero_()

    export_folder(stream(), models["llama"], tmp_path / "out", is_writer=True, dtype=torch.float32)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in before.items())


def test_only_the_writer_writes_but_every_rank_drains(models: dict[str, str], tmp_path: Path) -> None:
    stream = iter(load_file(Path(models["llama"]) / "model.safetensors").items())
    export_folder(stream, models["llama"], tmp_path / "none", is_writer=False, dtype=torch.float32)
    assert next(stream, None) is None
    assert not (tmp_path / "none").exists()


# --- folders that do not fit -----------------------------------------------------------------------------------------


def _changed(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


NORM = "model.layers.3.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"Missing: {NORM}; unexpected: none"),
        (lambda t: t.update(extra=torch.zeros(1)), "Missing: none; unexpected: extra"),
        (lambda t: t.update({NORM: torch.zeros(31)}), rf"{NORM} has shape \(31,\); config.json implies \(32,\)"),
        (lambda t: [t.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(4)], "and 1 more; unexpected: none"),
        (lambda t: t.pop("lm_head.weight"), r"Missing: lm_head\.weight"),
    ],
    ids=["missing", "unexpected", "misshapen", "many missing", "untied without output layer"],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    folder = save_random_model(tmp_path / "model", "llama")
    shape = read_model_shape(folder)
    CheckpointReader(folder, shape)
    with pytest.raises(ValueError, match=message):
        CheckpointReader(_changed(folder, change), shape)


def test_a_tied_model_may_carry_its_output_layer_too(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    shape = read_model_shape(folder)

    def add_output(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert CheckpointReader(_changed(folder, add_output), shape).has("lm_head.weight")


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "model", "llama")
    shape = read_model_shape(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors file"):
        CheckpointReader(folder, shape)


def test_weights_in_several_files_are_read_as_one(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "model", "qwen2")
    shape, tensors = read_model_shape(folder), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    owner_of: dict[str, str] = {}
    for part in range(2):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[part::2]}, folder / file)
        owner_of |= dict.fromkeys(names[part::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owner_of}))
    reader = CheckpointReader(folder, shape)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
