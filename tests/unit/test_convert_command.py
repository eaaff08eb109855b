"""The command lines: what they print, their exit codes, and disks that are full or may not be written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_fipo.checkpoint.folder import describe_files, file_names, write_manifest
from megatron_fipo.cli import main
from megatron_fipo.convert.offline.command import add_hf_to_megatron, add_megatron_to_hf, add_verify, run
from tests.models import save_random_model

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).parents[2] / "tools" / "convert"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model") / "hf", "qwen2")


def test_the_commands_of_the_readme(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    megatron, back, sums = (str(tmp_path / name) for name in ("megatron", "back", "sums.json"))
    assert run(add_hf_to_megatron, [str(model), megatron]) == 0
    assert run(add_megatron_to_hf, [megatron, back, "--shard-size", "80KB"]) == 0
    assert run(add_verify, [str(model), megatron, back, "--write-checksums", sums]) == 0
    assert run(add_verify, [back, "--checksums", sums]) == 0
    shown = capfd.readouterr()
    assert f"wrote {megatron}: 10 tensors" in shown.out
    assert f"wrote {back}: 51 tensors" in shown.out
    assert "of memory at the highest" in shown.out
    assert shown.err == ""
    assert len(list(Path(back).glob("*.safetensors"))) > 1


@pytest.mark.parametrize("tool", ["hf_to_megatron", "megatron_to_hf", "verify"])
def test_each_tool_is_a_program(tool: str) -> None:
    shown = subprocess.run(
        [sys.executable, TOOLS / f"{tool}.py", "--help"], capture_output=True, text=True, check=True, timeout=120
    )
    assert shown.stdout.startswith(f"usage: {tool}.py")


def test_the_same_as_commands_of_megatron_fipo(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "hf-to-megatron", str(model), str(tmp_path / "megatron")]) == 0
    assert main(["convert", "megatron-to-hf", str(tmp_path / "megatron"), str(tmp_path / "back")]) == 0
    assert main(["convert", "verify", str(model), str(tmp_path / "back")]) == 0
    capfd.readouterr()
    assert main(["convert", "verify", str(tmp_path / "nothing")]) == 1
    assert capfd.readouterr().err.startswith(f"error: {tmp_path}/nothing/config.json cannot be read: No such file")


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert run(add_hf_to_megatron, [str(model), str(target), "--dry-run", "--file-size", "100KB"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "decoder.layers.mlp.linear_fc1.weight  4 x 128 x 32  float32  0.07 MB" in lines
    assert [line for line in lines if ".distcp" in line] == [
        f"{target}/__0_0.distcp  0.10 MB",
        f"{target}/__1_0.distcp  0.08 MB",
    ]
    # 128 padded rows x 32, twice; the final norm; 4 layers of 2 norms, qkv with bias, proj, fc1 and fc2: 182,400 bytes.
    total = 4 * (2 * 128 * 32 + 32 + 4 * (2 * 32 + 64 * 32 + 64 + 32 * 32 + 128 * 32 + 32 * 64))
    assert lines[-1].startswith(f"10 tensors, 0.18 MB ({total} bytes) in ")
    assert lines[-1].endswith("of memory at the highest. Nothing was written.")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_from_the_config_alone(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    target = str(tmp_path.parent / f"{tmp_path.name}-out")
    assert run(add_hf_to_megatron, [str(tmp_path), target, "--dry-run"]) == 0
    assert run(add_megatron_to_hf, [str(tmp_path), target, "--dry-run", "--dtype", "bfloat16"]) == 0
    assert "lm_head.weight  20 x 32  bfloat16" in capfd.readouterr().out
    assert run(add_megatron_to_hf, [str(tmp_path), target]) == 2
    assert "is no whole torch_dist checkpoint" in capfd.readouterr().err
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(add_hf_to_megatron, [str(tmp_path), target, "--dry-run"]) == 2
    assert "states no dtype and there are no weights. Give one with --dtype." in capfd.readouterr().err


@pytest.fixture
def run_folder(model: Path, tmp_path: Path) -> Path:
    """A run's folder with two checkpoints, as a run leaves them: without config and tokenizer."""
    folder = tmp_path / "outputs" / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model:\n  path: {model}\n")
    for step in (1, 2):
        checkpoint = folder / "checkpoints" / f"step_00000{step}"
        assert run(add_hf_to_megatron, [str(model), str(checkpoint)]) == 0
        for file in checkpoint.glob("*config.json"):
            file.unlink()
        write_manifest(checkpoint, describe_files(checkpoint, file_names(checkpoint)))
    (folder / "checkpoints" / "latest").write_text("step_000002\n")
    return folder


def test_a_runs_folder_stands_for_its_newest_checkpoint(
    model: Path, run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    newest = run_folder / "checkpoints" / "step_000002"
    for number, source in enumerate((run_folder, run_folder / "checkpoints", newest)):
        back = tmp_path / f"back-{number}"
        assert main(["convert", "megatron-to-hf", str(source), str(back)]) == 0
        said = capfd.readouterr().err
        assert (f"newest checkpoint: {newest}\n" in said) == (source != newest)
        assert run(add_verify, [str(model), str(back)]) == 0
    data = newest / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    assert main(["convert", "megatron-to-hf", str(run_folder), str(tmp_path / "older")]) == 0
    said = capfd.readouterr().err
    assert f"warning: {newest}: __0_0.distcp has" in said
    assert f"newest checkpoint: {newest.with_name('step_000001')}" in said


def test_a_run_whose_model_is_elsewhere_asks_for_the_base(
    model: Path, run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "config.yaml").write_text("model:\n  path: ./nowhere/model\n")
    back = str(tmp_path / "back")
    assert main(["convert", "megatron-to-hf", str(run_folder), back]) == 2
    said = capfd.readouterr().err
    assert "names model.path=nowhere/model, which holds no config.json here" in said
    assert "--base" in said
    (run_folder / "config.yaml").write_text("model:\n  path: nowhere/model\n")  # a name on the hub
    assert main(["convert", "megatron-to-hf", str(run_folder), back]) == 2
    said = capfd.readouterr().err
    assert f"{run_folder / 'config.yaml'} names model.path=nowhere/model: no folder" in said
    assert "--base" in said
    assert main(["convert", "megatron-to-hf", str(run_folder), back, "--base", str(model)]) == 0
    (run_folder / "checkpoints" / "step_000001" / "manifest.json").write_text("{}")
    (run_folder / "checkpoints" / "step_000002" / "manifest.json").unlink()
    assert main(["convert", "megatron-to-hf", str(run_folder), f"{back}2"]) == 2
    assert "no checkpoint in" in capfd.readouterr().err


@pytest.mark.parametrize("size", ["2 TB", "GB", "0", "-1GB", ""])
def test_a_size_that_is_none(model: Path, size: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(add_hf_to_megatron, [str(model), "out", f"--file-size={size}"])
    assert "is no size; write 500MB or 2GB" in capfd.readouterr().err


# --- disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """Writing beyond fails in the middle of a file, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_is_explained_and_gone_on_from(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    for arguments, command in (
        ([str(model), str(megatron), "--file-size", "100KB"], add_hf_to_megatron),
        ([str(megatron), str(back), "--shard-size", "100KB"], add_megatron_to_hf),
    ):
        with files_no_larger_than(60_000):
            assert run(command, arguments) == 3
        lines = capfd.readouterr().err.splitlines()
        assert lines[0].startswith("error: ")
        assert "File too large" in lines[0]
        assert arguments[1] in lines[0]
        assert lines[1].startswith(f"{arguments[1]} is as it was before.")
        assert not Path(arguments[1]).exists()
        assert run(command, arguments) == 0
    assert run(add_verify, [str(model), str(megatron), str(back)]) == 0


def test_what_is_replaced_outlives_a_write_that_fails(model: Path, tmp_path: Path) -> None:
    megatron = str(tmp_path / "megatron")
    assert run(add_hf_to_megatron, [str(model), megatron]) == 0
    with files_no_larger_than(60_000):
        assert run(add_hf_to_megatron, [str(model), megatron, "--overwrite"]) == 3
    assert run(add_verify, [str(model), megatron]) == 0


def test_a_target_that_cannot_be_made(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(add_hf_to_megatron, [str(model), str(tmp_path / "file" / "out")]) == 2
    assert "Not a directory" in capfd.readouterr().err
    assert run(add_hf_to_megatron, [str(model), str(tmp_path / "file")]) == 2
    assert "is a file. Name a folder that is to be made." in capfd.readouterr().err
    assert run(add_hf_to_megatron, [str(model), "/proc/nothing/out"]) == 2  # a folder that not even root may write
    assert "error: [Errno 2] No such file or directory: '/proc/nothing'" in capfd.readouterr().err
