"""Hugging Face -> Megatron -> Hugging Face without a changed bit; what a killed conversion leaves; what is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_fipo.convert.families import stored_rows
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.convert.hf_writer import partial_of
from megatron_fipo.convert.offline.megatron_source import MegatronSource
from megatron_fipo.convert.offline.to_hugging_face import plan_to_hugging_face
from megatron_fipo.convert.offline.to_megatron import plan_to_megatron
from megatron_fipo.convert.offline.verification import verify_weights
from megatron_fipo.convert.plan import being_written
from megatron_fipo.convert.problems import ProblemsError
from megatron_fipo.convert.torch_dist import TorchDistReader
from tests.models import load, save_random_model

pytestmark = pytest.mark.slow

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 with bias": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama with bias": ("llama", {"attention_bias": True}),
}
SMALL = 60_000
"""Bytes of a file, so that a tiny model has several."""


def ignore(num_bytes: int) -> None:
    """Progress that nobody watches."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def recast(folder: Path, dtype: torch.dtype) -> Path:
    """The folder with its weights, and its config, in another dtype."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return folder


def to_megatron(source: Path, target: Path, **options: Any) -> Path:
    plan_to_megatron(source, target, file_bytes=SMALL, **options).write(ignore)
    return target


def to_hugging_face(source: Path, target: Path, **options: Any) -> Path:
    plan_to_hugging_face(source, target, shard_bytes=SMALL, **options).write(ignore)
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer's and a licence's files; not to be changed."""
    folder = save_random_model(tmp_path_factory.mktemp("model") / "hf", "qwen3", head_dim=16)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 19}}}))
    (folder / "LICENSE").write_text("a licence")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_again(tmp_path: Path, name: str, tied: bool, dtype: torch.dtype) -> None:
    family, changes = FAMILIES[name]
    source = recast(save_random_model(tmp_path / "hf", family, tie_word_embeddings=tied, **changes), dtype)
    checkpoint = to_megatron(source, tmp_path / "megatron")
    back = to_hugging_face(checkpoint, tmp_path / "back")
    before, after = tensors_of(source), tensors_of(back)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == dtype
        assert torch.equal(after[key], tensor), key
    assert verify_weights(source, [checkpoint, back], on_done=ignore).problems == []


def test_what_belongs_to_the_model_travels_with_it(model: Path, tmp_path: Path) -> None:
    checkpoint = to_megatron(model, tmp_path / "megatron")
    back = to_hugging_face(checkpoint, tmp_path / "back")
    for file in ("config.json", "generation_config.json", "tokenizer.json", "LICENSE"):
        assert (checkpoint / file).is_file()
        assert (back / file).is_file()
    assert (back / "LICENSE").read_text() == "a licence"
    left = {path.name for path in back.iterdir() if not path.name.startswith("model")}
    assert left == {"config.json", "generation_config.json", "tokenizer.json", "LICENSE"}
    assert {path.name for path in tmp_path.iterdir()} == {"megatron", "back"}


def test_the_index_names_every_tensors_file(model: Path, tmp_path: Path) -> None:
    back = to_hugging_face(to_megatron(model, tmp_path / "megatron"), tmp_path / "back")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        held = load_file(back / file)
        assert sum(tensor.nbytes for tensor in held.values()) <= SMALL
        assert {name for name, owner in index["weight_map"].items() if owner == file} == held.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(model).values())
    assert {(back / file).stat().st_mode & 0o777 for file in files} == {(back / "config.json").stat().st_mode & 0o777}


def test_transformers_computes_the_same_from_what_comes_back(model: Path, tmp_path: Path) -> None:
    back = to_hugging_face(to_megatron(model, tmp_path / "megatron"), tmp_path / "back")
    tokens = torch.arange(1, 18)[None]
    with torch.no_grad():
        assert torch.equal(load(back)(tokens).logits, load(model)(tokens).logits)


def test_a_small_model_is_one_file_without_an_index(model: Path, tmp_path: Path) -> None:
    checkpoint = to_megatron(model, tmp_path / "megatron")
    plan_to_hugging_face(checkpoint, tmp_path / "back").write(ignore)
    assert [path.name for path in (tmp_path / "back").glob("model*")] == ["model.safetensors"]


def test_another_dtype_is_that_of_the_numbers_and_of_the_config(model: Path, tmp_path: Path) -> None:
    checkpoint = to_megatron(model, tmp_path / "megatron", dtype=torch.bfloat16)
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "bfloat16"
    back = to_hugging_face(checkpoint, tmp_path / "back", dtype=torch.float32)
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensors_of(back)[name], tensor.to(torch.bfloat16).float())
    assert verify_weights(model, [checkpoint], dtype=torch.bfloat16, on_done=ignore).problems == []
    kinds = {problem.kind for problem in verify_weights(model, [checkpoint, back], on_done=ignore).problems}
    assert kinds == {"dtype", "different"}


def test_what_is_too_large_for_a_dtype_is_refused(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = r"not finite: model\.layers\.1\.mlp\.up_proj\.weight in .*in float16, the first, inf, at \[3, 4\]"
    with pytest.raises(ProblemsError, match=message):
        to_megatron(folder, tmp_path / "half", dtype=torch.float16)
    checkpoint = to_megatron(folder, tmp_path / "megatron")
    with pytest.raises(ProblemsError, match=message):
        to_hugging_face(checkpoint, tmp_path / "back", dtype=torch.float16)
    assert not (tmp_path / "half").exists()
    assert not (tmp_path / "back").exists()


def test_plans_are_what_is_written(model: Path, tmp_path: Path) -> None:
    there = plan_to_megatron(model, tmp_path / "megatron", file_bytes=SMALL)
    seen: list[int] = []
    there.write(seen.append)
    reader = TorchDistReader(tmp_path / "megatron")
    assert {tensor.name: tensor.shape for tensor in there.plan.tensors} == {
        key: reader.shape(key) for key in reader.keys
    }
    assert sum(seen) == there.plan.num_bytes == sum(size for _, size in there.plan.files)
    assert {name for name, _ in there.plan.files} == {path.name for path in (tmp_path / "megatron").glob("*.distcp")}
    back = plan_to_hugging_face(tmp_path / "megatron", tmp_path / "back", shard_bytes=SMALL)
    seen.clear()
    back.write(seen.append)
    written = tensors_of(tmp_path / "back")
    assert {tensor.name: tensor.shape for tensor in back.plan.tensors} == {
        name: tuple(tensor.shape) for name, tensor in written.items()
    }
    assert sum(seen) == back.plan.num_bytes == sum(tensor.nbytes for tensor in written.values())
    for name, size in back.plan.files:
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / "back" / name).values()) == size


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    """The 32B model, by arithmetic: 32,763,876,352 parameters in bfloat16."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen2",
                "num_hidden_layers": 64,
                "hidden_size": 5120,
                "intermediate_size": 27648,
                "num_attention_heads": 40,
                "num_key_value_heads": 8,
                "vocab_size": 152064,
                "dtype": "bfloat16",
            }
        )
    )
    target = tmp_path.parent / f"{tmp_path.name}-megatron"
    there = plan_to_megatron(tmp_path, target, needs_weights=False)
    assert there.plan.num_bytes == 2 * 32_763_876_352
    assert there.plan.peak_bytes < there.plan.num_bytes / 10
    back = plan_to_hugging_face(tmp_path, target, needs_weights=False)
    assert back.plan.num_bytes == 2 * 32_763_876_352
    assert back.plan.peak_bytes < back.plan.num_bytes / 10
    assert len(back.plan.tensors) == 64 * 12 + 3
    assert not target.exists()
    with pytest.raises(ProblemsError, match=r"missing: model\.embed_tokens\.weight"):
        plan_to_megatron(tmp_path, target)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_tensors_are_read_when_their_turn_comes(model: Path, tmp_path: Path) -> None:
    """Never more than one parameter's source tensors are held: the reads of one precede those of the next."""
    from megatron_fipo.convert.offline import to_megatron as module

    events: list[str] = []
    read = module._read

    def noting(stored: Any, *rest: Any) -> Tensor:
        events.append("read")
        return read(stored, *rest)

    with mock.patch.object(module, "_read", noting):
        conversion = plan_to_megatron(model, tmp_path / "megatron", file_bytes=SMALL)
        original = torch.save

        def saving(data: Any, *rest: Any, **options: Any) -> None:
            if isinstance(data, Tensor):
                events.append("write")
            original(data, *rest, **options)

        with mock.patch.object(torch, "save", saving):
            conversion.write(ignore)
    assert len(events) > 20
    assert all(event == ("read", "write")[index % 2] for index, event in enumerate(events))


# --- kills and full disks --------------------------------------------------------------------------------------------


def write_until_killed(conversion: Any, count: int) -> None:
    """Convert in a process that kills itself, as kill -9 would, when it has `count` tensors behind it."""
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def on_written(num_bytes: int) -> None:
            if next(calls) > count:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            conversion.write(on_written)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


class Killed(BaseException):
    """Stands for a kill at a place that no callback reaches."""


@contextmanager
def counting(target: Any, name: str) -> Iterator[list[Any]]:
    calls: list[Any] = []
    original = getattr(target, name)

    def noting(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return original(*args, **options)

    with mock.patch.object(target, name, noting):
        yield calls


@pytest.mark.parametrize("count", [0, 1, 11, 25])
def test_a_killed_conversion_to_megatron_goes_on(model: Path, tmp_path: Path, count: int) -> None:
    from megatron_fipo.convert.offline import to_megatron as module

    whole = to_megatron(model, tmp_path / "whole")
    target = tmp_path / "megatron"
    write_until_killed(plan_to_megatron(model, target, file_bytes=SMALL), count)
    assert not target.exists()
    assert not (partial_of(target) / ".metadata").exists()
    with pytest.raises(ValueError, match="no whole torch_dist checkpoint"):
        TorchDistReader(partial_of(target))
    with counting(module, "_read") as reads:
        plan_to_megatron(model, target, file_bytes=SMALL).write(ignore)
    assert len(reads) < len(stored_rows(read_model_shape(model))) or count < 2
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in whole.iterdir())
    for file in whole.glob("*.distcp"):
        assert (target / file.name).read_bytes() == file.read_bytes()
    assert verify_weights(model, [target], on_done=ignore).problems == []
    assert not partial_of(target).exists()


@pytest.mark.parametrize("count", [0, 1, 11, 40])
def test_a_killed_conversion_to_hugging_face_goes_on(model: Path, tmp_path: Path, count: int) -> None:
    checkpoint = to_megatron(model, tmp_path / "megatron")
    whole = to_hugging_face(checkpoint, tmp_path / "whole")
    target = tmp_path / "back"
    write_until_killed(plan_to_hugging_face(checkpoint, target, shard_bytes=SMALL), count)
    assert not target.exists()
    assert not list(partial_of(target).glob("model*"))
    resumed = plan_to_hugging_face(checkpoint, target, shard_bytes=SMALL)
    with counting(MegatronSource, "read") as reads:
        seen: list[int] = []
        resumed.write(seen.append)
    assert len(reads) < len(stored_rows(read_model_shape(model))) or count < 12
    assert sum(seen) >= resumed.plan.num_bytes
    for file in whole.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes()
    assert not partial_of(target).exists()


def test_a_kill_between_the_last_names_is_survived(model: Path, tmp_path: Path) -> None:
    checkpoint = to_megatron(model, tmp_path / "megatron")
    whole = to_hugging_face(checkpoint, tmp_path / "whole")
    target = tmp_path / "back"
    rename, calls = Path.rename, itertools.count()

    def failing(path: Path, to: Path) -> Path:
        if path.name.startswith("part-") and path.suffix == ".safetensors" and next(calls) == 1:
            raise Killed
        return rename(path, to)

    with mock.patch.object(Path, "rename", failing), pytest.raises(Killed):
        to_hugging_face(checkpoint, target)
    assert len(list(partial_of(target).glob("model-*"))) == 1
    to_hugging_face(checkpoint, target)
    for file in whole.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes()


def test_another_source_starts_over(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    other = save_random_model(tmp_path / "other", "qwen3", seed=1, head_dim=16)
    write_until_killed(plan_to_megatron(other, target, file_bytes=SMALL), 20)
    assert list(partial_of(target).glob("written-*"))
    to_megatron(model, target)
    assert verify_weights(model, [target], on_done=ignore).problems == []


def test_two_conversions_to_one_folder_are_refused(model: Path, tmp_path: Path) -> None:
    plan = plan_to_megatron(model, tmp_path / "megatron").plan
    with (
        being_written(plan),
        pytest.raises(ValueError, match="another conversion is writing"),
    ):
        to_megatron(model, tmp_path / "megatron")


def test_a_disk_without_room_is_noticed_before_it_is_full(model: Path, tmp_path: Path) -> None:
    free = mock.Mock(free=1000)
    with (
        mock.patch("shutil.disk_usage", return_value=free),
        pytest.raises(OSError, match=r"No space left|more are needed there and 0\.00 MB are free"),
    ):
        to_megatron(model, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_a_replaced_folder_is_there_until_the_new_one_is(model: Path, tmp_path: Path) -> None:
    target = to_megatron(model, tmp_path / "megatron")
    (target / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"exists\. Choose another folder, delete it, or replace it with --overwrite"):
        plan_to_megatron(model, target)
    write_until_killed(plan_to_megatron(model, target, overwrite=True), 3)
    assert (target / "mine.txt").is_file()
    plan_to_megatron(model, target, overwrite=True).write(ignore)
    assert not (target / "mine.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"megatron"}


def test_what_no_conversion_wrote_is_left_alone(model: Path, tmp_path: Path) -> None:
    for name in ("mine", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"mine holds no model \(no config\.json\), so --overwrite leaves it alone"):
        plan_to_megatron(model, tmp_path / "mine", overwrite=True)
    with pytest.raises(ValueError, match=r"other\.partial is no unfinished conversion to resume"):
        to_megatron(model, tmp_path / "other")
    assert len(list(tmp_path.glob("*/thesis.txt"))) == 2


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_the_result_must_not_lie_in_its_source(model: Path, place: str) -> None:
    with pytest.raises(ValueError, match="the target must not lie inside the source"):
        plan_to_megatron(model, model / place, overwrite=True)


def test_without_a_config_the_base_is_asked_for(model: Path, tmp_path: Path) -> None:
    checkpoint = to_megatron(model, tmp_path / "megatron")
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json.*--base"):
        plan_to_hugging_face(checkpoint, tmp_path / "back")
    back = to_hugging_face(checkpoint, tmp_path / "back", base=model)
    assert (back / "LICENSE").is_file()
    assert verify_weights(model, [back, checkpoint], on_done=ignore).problems == []
