"""Which files of a folder are read: those that transformers takes, whatever else lies beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.convert.hf_folder import CheckpointReader
from megatron_fipo.convert.inspection import check_weights, inspect_folder
from megatron_fipo.convert.offline.command import add_verify, run
from megatron_fipo.convert.weight_files import find_weight_files, is_buffer
from tests.models import save_random_model

INDEX = "model.safetensors.index.json"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
LAST_OF_LAYERS = "model.layers.3.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """new/, old/ and tied/, of one size and different numbers."""
    root = tmp_path_factory.mktemp("models")
    save_random_model(root / "new", "llama", seed=1)
    save_random_model(root / "old", "llama", seed=2)
    save_random_model(root / "tied", "llama", seed=3, tie_word_embeddings=True)
    return root


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def put(folder: Path, tensors: dict[str, Tensor], name: str) -> None:
    save_file({key: value.clone() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})


def shards(folder: Path, tensors: dict[str, Tensor], count: int, *, index: bool = True) -> dict[str, str]:
    """Replace model.safetensors by several files; what the index says."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names, owner_of = sorted(tensors), {}
    for number in range(count):
        file, part = f"model-{number + 1:05d}-of-{count:05d}.safetensors", names[number::count]
        put(folder, {name: tensors[name] for name in part}, file)
        owner_of |= dict.fromkeys(part, file)
    if index:
        write_index(folder, owner_of)
    return owner_of


def write_index(folder: Path, owner_of: Any, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": owner_of}))


def same_as_transformers(folder: Path) -> bool:
    reader = CheckpointReader(folder, read_model_shape(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return all(torch.equal(reader.read(name), tensor) for name, tensor in theirs.items())


def beside(*names: str) -> Callable[[Path, Path], list[str]]:
    def change(folder: Path, old: Path) -> list[str]:
        for name in names:
            put(folder, tensors_of(old), name)
        return sorted(names)

    return change


def earlier_save(folder: Path, old: Path) -> list[str]:
    shards(folder, tensors_of(old), 3, index=False)
    shards(folder, tensors_of(folder.parent / "new.source"), 2)
    return [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def adapter(folder: Path, old: Path) -> list[str]:
    put(folder, {"base_model.model.lora_A.weight": torch.ones(2, 2)}, "adapter_model.safetensors")
    return ["adapter_model.safetensors"]


def another_index(folder: Path, old: Path) -> list[str]:
    put(folder, tensors_of(old), "old.safetensors")
    write_index(folder, dict.fromkeys(tensors_of(old), "old.safetensors"), "old.safetensors.index.json")
    return ["old.safetensors"]


def an_index_of_the_one_file(folder: Path, old: Path) -> list[str]:
    write_index(folder, dict.fromkeys(tensors_of(folder), "model.safetensors"))
    return beside("zzz.safetensors")(folder, old)


LEFT_OVER: dict[str, Callable[[Path, Path], list[str]]] = {
    "model_old": beside("model_old.safetensors"),
    "pytorch_model": beside("pytorch_model.safetensors"),
    "consolidated": beside("consolidated.safetensors"),
    "two": beside("a.safetensors", "model.fp16.safetensors"),
    "an earlier save of more shards": earlier_save,
    "an adapter": adapter,
    "another index": another_index,
    "an index of the one file": an_index_of_the_one_file,
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_left_over_files_are_never_read_and_told_of(
    models: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(models / "new", tmp_path / "new")
    shutil.copytree(models / "new", tmp_path / "new.source")
    left = LEFT_OVER[name](folder, models / "old")
    assert same_as_transformers(folder)
    files = find_weight_files(folder)
    assert list(files.left_over) == left
    assert left[0] in files.warning()
    assert "not read" in files.warning()
    assert check_weights(folder) == files.warning()
    assert run(add_verify, [str(folder), str(models / "new")]) == 0, "verify takes the same files"
    assert "warning: " in capfd.readouterr().err


def test_the_comparison_with_transformers_can_fail(models: Path, tmp_path: Path) -> None:
    """What the reader did before: all files, the last name winning."""
    folder = shutil.copytree(models / "new", tmp_path / "new")
    reader = CheckpointReader(folder, read_model_shape(folder))
    put(folder, tensors_of(models / "old"), "model_old.safetensors")
    reader._file_of = dict.fromkeys(reader._file_of, folder / "model_old.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert not all(torch.equal(reader.read(name), tensor) for name, tensor in theirs.items())


def both(folder: Path) -> None:
    tensors = tensors_of(folder)
    shards(folder, tensors, 2)
    put(folder, tensors, "model.safetensors")


def no_index(folder: Path) -> None:
    shards(folder, tensors_of(folder), 2, index=False)


def renamed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")


def reindexed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        owner_of: dict[str, Any] = dict(shards(folder, tensors_of(folder), 2))
        change(owner_of)
        write_index(folder, owner_of)

    return apply


def outside(folder: Path) -> None:
    put(folder.parent, tensors_of(folder), "model.safetensors")
    reindexed(lambda owner_of: owner_of.update({EMBEDDING: "../model.safetensors"}))(folder)


def file_gone(folder: Path) -> None:
    shards(folder, tensors_of(folder), 2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def in_two_files(folder: Path) -> None:
    tensors = tensors_of(folder)
    owner_of = shards(folder, tensors, 2)
    other = next(file for file in sorted(set(owner_of.values())) if file != owner_of[EMBEDDING])
    held = load_file(folder / other) | {EMBEDDING: torch.zeros_like(tensors[EMBEDDING])}
    put(folder, held, other)


REFUSED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "one file and an index of others": ("transformers would take the one, rollout engines the other", both),
    "shards without an index": ("neither model.safetensors nor model.safetensors.index.json", no_index),
    "one file of another name": ("rename it to model.safetensors", renamed),
    "a path out of the folder": ("'../model.safetensors', which is no", outside),
    "a number for a file": ("assigned to 7, which is no", reindexed(lambda owner_of: owner_of.update({EMBEDDING: 7}))),
    "a file that is gone": ("model-00002-of-00002.safetensors, which is not there", file_gone),
    "a tensor in two files": (f"holds {EMBEDDING}, which", in_two_files),
    "a tensor that is elsewhere": (
        "puts into model-0000",
        reindexed(lambda of: of.update({EMBEDDING: of[OUTPUT], OUTPUT: of[EMBEDDING]})),
    ),
    "a tensor that the index lacks": ("does not name", reindexed(lambda owner_of: owner_of.pop(EMBEDDING))),
    "a tensor that no file has": (
        "has no such tensor",
        reindexed(lambda owner_of: owner_of.update({"more": "model-00001-of-00002.safetensors"})),
    ),
    "no map": ("is no index of weight files", lambda folder: (folder / INDEX).write_text("{}")),
    "a list for an index": ("is no index of weight files", lambda folder: (folder / INDEX).write_text("[]")),
    "an index that is no text": ("is no index of weight files", lambda folder: (folder / INDEX).write_bytes(b"\xff{}")),
    "an empty map": ("names no tensor", lambda folder: write_index(folder, {})),
    "eight bits": (
        "quantized weights",
        lambda folder: put(folder, {**tensors_of(folder), EMBEDDING: torch.ones(20, 32).char()}, "model.safetensors"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_does_not_say_what_is_meant_is_refused(models: Path, tmp_path: Path, name: str) -> None:
    words, change = REFUSED[name]
    folder = shutil.copytree(models / "new", tmp_path / "new")
    change(folder)
    with pytest.raises(ValueError, match=r".") as caught:
        CheckpointReader(folder, read_model_shape(folder))
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert run(add_verify, [str(folder)]) == 1, "verify refuses what the trainer refuses"


# --- buffers, tied layers, numbers -----------------------------------------------------------------------------------


def test_buffers_of_early_files_are_left_out(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "new", tmp_path / "new")
    attention = "model.layers.0.self_attn."
    buffers = {
        f"{attention}rotary_emb.inv_freq": torch.ones(4),
        f"{attention}rotary_emb.cos_cached": torch.ones(4),
        f"{attention}masked_bias": torch.tensor(-1e4),
        "model.layers.1.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.embeddings.position_ids": torch.arange(4),
    }
    put(folder, tensors_of(folder) | buffers, "model.safetensors")
    assert same_as_transformers(folder)
    assert inspect_folder(folder)[1] == []
    names = tensors_of(models / "new")
    assert not [name for name in names if is_buffer(name)], "no weight is taken for one"
    assert not is_buffer(f"{attention}q_proj.bias")
    assert not is_buffer(f"{attention}o_proj.bias")


def test_a_tied_model_with_another_output_layer_is_refused_when_it_is_opened(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "tied", tmp_path / "tied")
    shape, tensors = read_model_shape(folder), tensors_of(folder)
    put(folder, tensors | {OUTPUT: tensors[EMBEDDING]}, "model.safetensors")
    assert CheckpointReader(folder, shape).has(OUTPUT)
    assert inspect_folder(folder)[1] == []
    other = tensors[EMBEDDING].clone()
    other[4, 2] += 1
    put(folder, tensors | {OUTPUT: other}, "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings=true.*1 of 640 elements differ, the first at \[4, 2\]"):
        CheckpointReader(folder, shape)
    (problem,) = inspect_folder(folder)[1]
    assert (problem.kind, problem.tensor) == ("different", OUTPUT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_found(models: Path, tmp_path: Path, value: float) -> None:
    folder = shutil.copytree(models / "new", tmp_path / "new")
    tensors = tensors_of(folder)
    tensors[LAST_OF_LAYERS][3, 1] = value
    put(folder, tensors, "model.safetensors")
    with pytest.raises(ValueError, match="weights hold NaN or infinity") as caught:
        check_weights(folder)
    assert f"not finite: {LAST_OF_LAYERS} in new/model.safetensors: 1 of 512 elements" in str(caught.value)
    assert check_weights(models / "new") == ""
