"""Every way in which weights can be wrong has a name, and verify finds it: folders corrupted on purpose."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_fipo.convert.inspection import inspect_folder
from megatron_fipo.convert.offline.command import add_verify, run
from megatron_fipo.convert.offline.to_hugging_face import plan_to_hugging_face
from megatron_fipo.convert.offline.to_megatron import plan_to_megatron
from megatron_fipo.convert.offline.verification import read_checksums, verify_weights, write_checksums
from megatron_fipo.convert.problems import Problem
from megatron_fipo.convert.torch_dist import TorchDistReader
from tests.models import save_random_model

LAYER = "model.layers.2."
UP, GATE = f"{LAYER}mlp.up_proj.weight", f"{LAYER}mlp.gate_proj.weight"
QUERY, KEY = f"{LAYER}self_attn.q_proj.weight", f"{LAYER}self_attn.k_proj.weight"
OUTPUT, NORM = f"{LAYER}self_attn.o_proj.weight", f"{LAYER}input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def ignore(num_bytes: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, megatron/ and back/ of one model, every q, k and o square; to be copied before they are changed."""
    root = tmp_path_factory.mktemp("folders")
    model = save_random_model(root / "hf", "qwen3", num_key_value_heads=4, head_dim=8)
    vocabulary = {f"token{number}": number for number in range(20)}
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    plan_to_megatron(model, root / "megatron", file_bytes=30_000).write(ignore)
    plan_to_hugging_face(root / "megatron", root / "back", shard_bytes=60_000).write(ignore)
    return root


def file_of(folder: Path, name: str) -> Path:
    return next(file for file in sorted(folder.glob("*.safetensors")) if name in load_file(file))


def changed(folder: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> str:
    """Change the file that holds a tensor; its name."""
    file = file_of(folder, name)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file.name


def config_of(folder: Path, **changes: Any) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file.name


def cut(file: Path, num_bytes: int) -> str:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - num_bytes)
    return file.name


def overwritten(file: Path, offset: int, data: bytes) -> str:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)
    return file.name


def index_of(folder: Path, changes: dict[str, str | None]) -> str:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {k: v for k, v in (index["weight_map"] | changes).items() if v is not None}
    file.write_text(json.dumps(index))
    return file.name


def set_nan(tensors: dict[str, Tensor]) -> None:
    tensors[UP][3, 5] = torch.nan


def set_infinity(tensors: dict[str, Tensor]) -> None:
    tensors[UP][0, 1] = -torch.inf


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def put(folder: Path, name: str, make: Callable[[Tensor], Tensor]) -> str:
    return changed(folder, name, lambda tensors: tensors.update({name: make(tensors[name]).contiguous()}))


def tokenizer_of(folder: Path, *added: tuple[str, int]) -> str:
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["added_tokens"] = [{"content": content, "id": number} for content, number in added]
    file.write_text(json.dumps(raw))
    return file.name


CORRUPTIONS: dict[str, tuple[str, str, str, Callable[[Path], str]]] = {
    # name: kind, tensor, words of the detail, change of a Hugging Face folder that returns the file
    "missing": ("missing", NORM, "config.json implies it", lambda f: changed(f, NORM, lambda t: t.pop(NORM))),
    "missing file": (
        "missing",
        EMBEDDING,
        "config.json implies it",
        lambda f: (file_of(f, EMBEDDING).name, file_of(f, EMBEDDING).unlink())[0],
    ),
    "extra layer": (
        "extra",
        "model.layers.4.mlp.up_proj.weight",
        "describes a model without it",
        lambda f: changed(f, UP, lambda t: t.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(64, 32)})),
    ),
    "bias that is not there": (
        "extra",
        f"{LAYER}self_attn.q_proj.bias",
        "describes a model without it",
        lambda f: changed(f, UP, lambda t: t.update({f"{LAYER}self_attn.q_proj.bias": torch.zeros(32)})),
    ),
    "unmapped": (
        "unmapped",
        f"{LAYER}mlp.router.weight",
        "the qwen3 table has no row for it",
        lambda f: changed(f, UP, lambda t: rename(t, UP, f"{LAYER}mlp.router.weight")),
    ),
    "truncated": (
        "truncated",
        "model.norm.weight",
        "64 of its 128 bytes are there",
        lambda f: cut(file_of(f, "model.norm.weight"), 64),
    ),
    "damaged header": (
        "unreadable",
        "every tensor",
        "its header is damaged",
        lambda f: overwritten(file_of(f, UP), 20, b"\xff\xfe\x00"),
    ),
    "empty file": (
        "unreadable",
        "every tensor",
        "its header is damaged",
        lambda f: cut(file_of(f, UP), file_of(f, UP).stat().st_size),
    ),
    "not in the index": (
        "missing",
        UP,
        "model-00003-of-00004.safetensors has it",
        lambda f: index_of(f, {UP: None}),
    ),
    "elsewhere by the index": (
        "missing",
        UP,
        "but it is in model-00003-of-00004.safetensors",
        lambda f: (index_of(f, {UP: "model-00001-of-00004.safetensors"}), "model-00001-of-00004.safetensors")[1],
    ),
    "shape": (
        "shape",
        UP,
        r"it is \[32, 64\]; config.json implies \[64, 32\]",
        lambda f: put(f, UP, lambda t: t.T),
    ),
    "dtype": ("dtype", UP, "it is float16; config.json says float32", lambda f: put(f, UP, lambda t: t.half())),
    "quantized": (
        "dtype",
        UP,
        "it is I8; supported are float32, float16 and bfloat16",
        lambda f: put(f, UP, lambda t: t.to(torch.int8)),
    ),
    "NaN": (
        "not finite",
        UP,
        r"1 of 2048 elements are not finite in float32, the first, nan, at \[3, 5\]",
        lambda f: changed(f, UP, set_nan),
    ),
    "infinity": (
        "not finite",
        UP,
        r"the first, -inf, at \[0, 1\]",
        lambda f: changed(f, UP, set_infinity),
    ),
    "vocabulary of the embedding": (
        "vocabulary",
        EMBEDDING,
        "it has 19 rows; config.json says vocab_size=20",
        lambda f: put(f, EMBEDDING, lambda t: t[:19]),
    ),
    "vocabulary of the config": (
        "vocabulary",
        EMBEDDING,
        "it has 20 rows; config.json says vocab_size=24",
        lambda f: (config_of(f, vocab_size=24), file_of(f, EMBEDDING).name)[1],
    ),
    "vocabulary of the tokenizer": (
        "vocabulary",
        EMBEDDING,
        "token '<extra>' has the number 20; config.json says vocab_size=20",
        lambda f: tokenizer_of(f, ("<pad>", 0), ("<extra>", 20)),
    ),
    "a tokenizer of nothing": (
        "unreadable",
        "no tensor",
        "it holds no token",
        lambda f: ((f / "tokenizer.json").write_text("{}"), "tokenizer.json")[1],
    ),
    "end of text beyond the vocabulary": (
        "vocabulary",
        EMBEDDING,
        r"eos_token_id=\[1, 20\]",
        lambda f: config_of(f, eos_token_id=[1, 20]),
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_folder_is_named(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """As the source, and as the one that is compared, by the command: exit code 1, tensor and file named."""
    kind, tensor, detail, corrupt = CORRUPTIONS[name]
    folder = shutil.copytree(folders / "back", tmp_path / "corrupted")
    place = corrupt(folder)
    if name in ("missing",):  # the index still says where it should be
        assert place in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    for arguments in ([str(folder)], [str(folders / "hf"), str(folder)]):
        assert run(add_verify, arguments) == 1
        lines = capfd.readouterr().err.splitlines()
        expected = [line for line in lines if line.startswith(f"error: {kind}: {tensor} in ") and place in line]
        assert expected, lines
        assert any(re.search(detail, line) for line in expected), lines
        if name not in ("missing file", "unmapped", "vocabulary of the config"):  # which have several consequences
            consequences = [line for line in lines if not line.startswith(f"error: {kind}: ")]
            assert [line for line in consequences if "different" not in line] == []
    with pytest.raises(ValueError, match=tensor.replace(".", r"\.")):
        plan_to_megatron(folder, tmp_path / "converted").write(ignore)
    assert not (tmp_path / "converted").exists()


def test_a_damaged_index_is_named(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "back", tmp_path / "corrupted")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of weight files"):
        inspect_folder(folder)


def test_what_is_whole_passes(folders: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert inspect_folder(folders / "back")[1] == []
    arguments = [str(folders / "hf"), str(folders / "megatron"), str(folders / "back")]
    assert run(add_verify, arguments) == 0
    shown = capfd.readouterr()
    assert "47 qwen3 tensors" in shown.out
    assert f"the same in {folders / 'back'}" in shown.out
    assert shown.err == ""


def swap(first: str, second: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


DIFFERENCES: dict[str, tuple[set[str], Callable[[Path], Any]]] = {
    "transposed": ({OUTPUT}, lambda f: put(f, OUTPUT, lambda t: t.T)),
    "gate and up swapped": ({GATE, UP}, lambda f: changed(f, UP, swap(GATE, UP))),
    "q and k swapped": ({QUERY, KEY}, lambda f: changed(f, KEY, swap(QUERY, KEY))),
    "norms of two layers swapped": (
        {NORM, f"{LAYER}post_attention_layernorm.weight"},
        lambda f: changed(f, NORM, swap(NORM, f"{LAYER}post_attention_layernorm.weight")),
    ),
    "one bit": ({UP}, lambda f: put(f, UP, lambda t: flip_one_bit(t))),
}


def flip_one_bit(tensor: Tensor) -> Tensor:
    bits = tensor.view(torch.int32).clone()
    bits[2, 13] ^= 1
    return bits.view(torch.float32)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_other_numbers_are_found(folders: Path, tmp_path: Path, name: str) -> None:
    tensors, change = DIFFERENCES[name]
    folder = shutil.copytree(folders / "hf", tmp_path / "other")
    change(folder)
    assert inspect_folder(folder)[1] == []
    problems = verify_weights(folders / "hf", [folder], on_done=ignore).problems
    assert {problem.kind for problem in problems} == {"different"}
    assert {problem.tensor for problem in problems} == tensors
    checkpoint = tmp_path / "megatron"
    plan_to_megatron(folder, checkpoint).write(ignore)
    problems = verify_weights(folders / "hf", [checkpoint], on_done=ignore).problems
    assert {problem.tensor for problem in problems} == tensors
    assert all(problem.place == "megatron/__0_0.distcp" for problem in problems)


def test_zero_is_not_minus_zero(folders: Path, tmp_path: Path) -> None:
    plus = shutil.copytree(folders / "hf", tmp_path / "plus")
    minus = shutil.copytree(folders / "hf", tmp_path / "minus")
    for folder, zero in ((plus, 0.0), (minus, -0.0)):
        put(folder, NORM, lambda t, zero=zero: torch.full_like(t, zero))
    problems = verify_weights(plus, [minus], on_done=ignore).problems
    assert [(problem.kind, problem.tensor) for problem in problems] == [("different", NORM)]
    assert "32 of 32 elements differ, the first at [0]: -0.0 instead of 0.0" in problems[0].detail


def test_an_output_layer_that_is_not_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "hf", "llama", tie_word_embeddings=True)
    put(folder, EMBEDDING, lambda t: t)
    changed(folder, EMBEDDING, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    assert verify_weights(folder, [], on_done=ignore).problems == []
    changed(folder, EMBEDDING, lambda t: t["lm_head.weight"][4].neg_())
    (problem,) = verify_weights(folder, [], on_done=ignore).problems
    assert (problem.kind, problem.tensor) == ("different", "lm_head.weight")


# --- Megatron checkpoints --------------------------------------------------------------------------------------------


def metadata_changed(folder: Path, change: Callable[[Any], None]) -> None:
    """Rewrite a checkpoint's .metadata."""
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


FC1 = "decoder.layers.mlp.linear_fc1.weight"


def drop(metadata: Any) -> None:
    del metadata.state_dict_metadata[FC1]


def add_router(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.router.weight"] = metadata.state_dict_metadata[FC1]


def shrink(metadata: Any) -> None:
    entry = metadata.state_dict_metadata[FC1]
    entry.size = torch.Size([4, 128, 31])


def forget_a_layer(metadata: Any) -> None:
    entry = metadata.state_dict_metadata[FC1]
    entry.chunks = [chunk for chunk in entry.chunks if chunk.offsets[0] != 2]
    assert all(isinstance(chunk, ChunkStorageMetadata) for chunk in entry.chunks)


def claim_another_dtype(metadata: Any) -> None:
    entry = metadata.state_dict_metadata[FC1]
    entry.properties = replace(entry.properties, dtype=torch.float16)


def fewer_rows(metadata: Any) -> None:
    metadata.state_dict_metadata["embedding.word_embeddings.weight"].size = torch.Size([19, 32])


@pytest.mark.parametrize(
    ("kind", "tensor", "change"),
    [
        ("missing", FC1, drop),
        ("unmapped", "decoder.layers.mlp.router.weight", add_router),
        ("shape", FC1, shrink),
        ("dtype", FC1, claim_another_dtype),
        ("vocabulary", "embedding.word_embeddings.weight", fewer_rows),
        ("unreadable", f"{GATE}, {UP}", forget_a_layer),
    ],
    ids=["missing", "unmapped", "shape", "dtype", "vocabulary", "a layer missing"],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    folders: Path, tmp_path: Path, kind: str, tensor: str, change: Callable[[Any], None]
) -> None:
    checkpoint = shutil.copytree(folders / "megatron", tmp_path / "broken")
    metadata_changed(checkpoint, change)
    problems = verify_weights(folders / "hf", [checkpoint], on_done=ignore).problems
    assert [(problem.kind, problem.tensor) for problem in problems] == [(kind, tensor)]
    assert problems[0].place.startswith("broken/")
    with pytest.raises(ValueError, match=r"decoder\.layers\.mlp|embedding\.word_embeddings"):
        plan_to_hugging_face(checkpoint, tmp_path / "back").write(ignore)
    assert not (tmp_path / "back").exists()


def test_a_checkpoints_file_that_is_cut_off_or_gone(folders: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(folders / "megatron", tmp_path / "broken")
    file = TorchDistReader(checkpoint).files(FC1, 2)[0]
    whole = file.read_bytes()
    cut(file, 100)
    found = verify_weights(folders / "hf", [checkpoint], on_done=ignore).problems
    assert {(problem.kind, problem.place) for problem in found} == {("truncated", f"broken/{file.name}")}
    assert all(f"the file has {len(whole) - 100} bytes" in problem.detail for problem in found)
    file.unlink()
    found = verify_weights(folders / "hf", [checkpoint], on_done=ignore).problems
    assert FC1 in {problem.tensor for problem in found}
    assert all("the file is not there" in problem.detail for problem in found)
    file.write_bytes(whole)
    assert verify_weights(folders / "hf", [checkpoint], on_done=ignore).problems == []


def test_damaged_bytes_in_a_checkpoint_are_found(folders: Path, tmp_path: Path) -> None:
    """Wherever they lie: as numbers that differ, or as a tensor that cannot be read."""
    checkpoint = shutil.copytree(folders / "megatron", tmp_path / "broken")
    file = TorchDistReader(checkpoint).files(FC1, 2)[0]
    whole = bytearray(file.read_bytes())
    kinds = set()
    for place in range(64, len(whole), len(whole) // 12):
        damaged = bytearray(whole)
        for position in range(place, place + 64):
            damaged[position] ^= 0x55
        file.write_bytes(damaged)
        kinds |= {problem.kind for problem in verify_weights(folders / "hf", [checkpoint], on_done=ignore).problems}
    assert kinds <= {"different", "unreadable", "not finite"}
    assert "different" in kinds


def test_a_folder_that_is_neither_is_refused(folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run(add_verify, [str(folders / "hf"), str(tmp_path / "empty")]) == 1
    assert "is no whole torch_dist checkpoint" in capfd.readouterr().err
    assert run(add_verify, [str(tmp_path / "empty")]) == 1
    assert "config.json cannot be read: No such file" in capfd.readouterr().err


# --- what lies beside the weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["megatron", "back"])
def test_another_tokenizer_or_config_is_found(folders: Path, tmp_path: Path, other: str) -> None:
    folder = shutil.copytree(folders / other, tmp_path / "other")
    tokenizer_of(folder, ("token0", 0))
    (folder / "generation_config.json").unlink()
    config_of(folder, rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    problems = verify_weights(folders / "hf", [folder], on_done=ignore).problems
    assert {(problem.kind, problem.place) for problem in problems} == {
        ("different", "other/tokenizer.json"),
        ("missing", "other/generation_config.json"),
        ("different", "other/config.json"),
    }


# --- checksums -------------------------------------------------------------------------------------------------------


def test_checksums_find_what_changed(folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(folders / "hf", tmp_path / "hf")
    file = str(tmp_path / "sums.json")
    assert run(add_verify, [str(folder), "--write-checksums", file]) == 0
    assert run(add_verify, [str(folders / "back"), "--checksums", file]) == 0  # the same tensors in other files
    put(folder, UP, lambda t: t.roll(1, 0))
    capfd.readouterr()
    assert run(add_verify, [str(folder), "--checksums", file]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: different: {UP} in {folder}: its checksum is ")


def test_a_checksum_by_hand(folders: Path) -> None:
    tensor = load_file(folders / "hf" / "model.safetensors")[NORM]
    found = verify_weights(folders / "hf", [], on_done=ignore).checksums
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert found[NORM] == {"dtype": "float32", "shape": [32], "sha256": digest}


def test_checksums_of_other_tensors(folders: Path, tmp_path: Path) -> None:
    sums = verify_weights(folders / "hf", [], on_done=ignore).checksums
    write_checksums(tmp_path / "sums.json", {"gone": sums[NORM]} | {k: v for k, v in sums.items() if k != NORM})
    expected = read_checksums(tmp_path / "sums.json")
    problems = verify_weights(folders / "hf", [], expected=expected, on_done=ignore).problems
    assert [(problem.kind, problem.tensor) for problem in problems] == [("missing", "gone"), ("extra", NORM)]


def test_a_file_that_holds_no_checksums(tmp_path: Path) -> None:
    (tmp_path / "sums.json").write_text("[]")
    with pytest.raises(ValueError, match="is no file of checksums"):
        read_checksums(tmp_path / "sums.json")


def test_a_problem_reads_as_a_sentence() -> None:
    assert str(Problem("missing", "x", "f", "because")) == "missing: x in f: because"
