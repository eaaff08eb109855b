"""The script that packs for a bare machine, with real pip on small wheels made here; and the installer it writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import pack_for_gpu
from tests.unit.test_engine_environments import make_wheel

pytestmark = pytest.mark.slow

VERSIONS = {"megatron_core": "0.19.2", "omegaconf": "2.4.0"}


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder packed in pieces of 500 bytes, from an index that is a folder."""
    index = tmp_path / "index"
    index.mkdir()
    for name, version in VERSIONS.items():
        make_wheel(index, name, version, f"text = {'x' * 1000!r}\n", requires="")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(index), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr(pack_for_gpu, "MIB", 500)
    pack_for_gpu.pack(tmp_path / "packed", ["megatron-core", "omegaconf"], transformer_engine=False, trip_mib=1)
    for wheel in index.iterdir():
        wheel.unlink()
    return tmp_path / "packed"


def install(packed: Path, target: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "PIP_TARGET": str(target)}
    command = ["bash", str(packed / "install.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_pieces_are_joined_and_installed(packed: Path, tmp_path: Path) -> None:
    names = sorted(file.name for file in (packed / "wheels").iterdir())
    assert all(name.partition(".whl")[2].startswith(".piece-") for name in names), "each wheel exceeds a piece"
    assert all(file.stat().st_size <= 500 for file in (packed / "wheels").iterdir())
    done = install(packed, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert {f"{name}-{version}.dist-info" for name, version in VERSIONS.items()} <= {
        folder.name for folder in (tmp_path / "site").iterdir()
    }
    again = install(packed, tmp_path / "site")
    assert again.returncode == 0, "joined files do no harm"


def test_a_trip_that_is_missing_or_damaged_is_named_and_nothing_is_installed(packed: Path, tmp_path: Path) -> None:
    piece = packed / "wheels" / "megatron_core-0.19.2-py3-none-any.whl.piece-01"
    content = piece.read_bytes()
    piece.unlink()
    missing = install(packed, tmp_path / "site")
    assert missing.returncode != 0
    assert f"{piece.name}: FAILED open or read" in missing.stdout
    piece.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    damaged = install(packed, tmp_path / "site")
    assert damaged.returncode != 0
    assert f"{piece.name}: FAILED\n" in damaged.stdout
    assert not (tmp_path / "site").exists()
    piece.write_bytes(content)
    assert install(packed, tmp_path / "site").returncode == 0


def test_a_folder_that_exists_is_not_mixed_with_another(packed: Path) -> None:
    with pytest.raises(FileExistsError, match=r"packed exists\. Remove it, or name another folder with --out"):
        pack_for_gpu.pack(packed, ["omegaconf"], transformer_engine=False, trip_mib=1)


def test_a_package_that_is_pinned_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no-such-package: pinned neither in constraints\.txt nor in constraints-gpu"):
        pack_for_gpu.download_wheels(["no_such.package", "omegaconf"], tmp_path)


def test_all_that_is_packed_is_pinned_for_python_3_12() -> None:
    versions = pack_for_gpu.pinned_versions()
    names = [*pack_for_gpu.BENCHMARKS, *pack_for_gpu.TRANSFORMER_ENGINE_NEEDS, *pack_for_gpu.TRANSFORMER_ENGINE]
    assert {name for name in [*names, pack_for_gpu.TRANSFORMER_ENGINE_SOURCE] if name not in versions} == set()
    assert versions["megatron-core"] == VERSIONS["megatron_core"]
    assert versions["omegaconf"] == VERSIONS["omegaconf"]


def test_no_trip_exceeds_its_limit_and_nothing_is_left_behind(tmp_path: Path) -> None:
    files = []
    for number, size in enumerate((40, 60, 15, 60, 5, 30)):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(bytes(size))
    packed = pack_for_gpu.trips(files, 60)
    assert [[file.stat().st_size for file in trip] for trip in packed] == [[40, 15, 5], [60], [60], [30]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only-gpu", "9.0"], "add --transformer-engine"),
        (["--transformer-engine", "--only-gpu", "Hopper"], "Hopper is no compute capability such as 9.0"),
    ],
)
def test_kernels_of_no_known_gpu_are_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pack_for_gpu.py", *words])
    with pytest.raises(SystemExit):
        pack_for_gpu.main()
    assert said in capsys.readouterr().err


def test_what_the_machine_has_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def pack(
        folder: Path, needed: list[str], transformer_engine: bool, trip_mib: int, capability: None
    ) -> list[list[Path]]:
        asked.extend(needed)
        return []

    monkeypatch.setattr(pack_for_gpu, "pack", pack)
    words = ["--transformer-engine", "--without", "onnx", "PyYAML", "--also", "math_verify", "omegaconf"]
    monkeypatch.setattr(sys, "argv", ["pack_for_gpu.py", *words])
    pack_for_gpu.main()
    assert {"math-verify", "pydantic", "megatron-core"} <= set(asked)
    assert not {"onnx", "pyyaml"} & set(asked)
    assert len(set(asked)) == len(asked)


@pytest.mark.ci
def test_a_source_is_fetched_without_running_it(tmp_path: Path) -> None:
    """Transformer Engine's torch part: pip would run its setup, which ends without CUDA's torch."""
    pack_for_gpu.download_source(pack_for_gpu.TRANSFORMER_ENGINE_SOURCE, tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == f"transformer_engine_torch-{pack_for_gpu.pinned_versions()['transformer-engine-torch']}.tar.gz"
    assert file.stat().st_size > 100_000
