"""The environment that CUDA starts in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.cuda_start import set_max_connections, use_torchs_cudnn

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, first in PATH; what it prints is written into the file that is returned."""
    answer = tmp_path / "answer"
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$1" = --query-gpu=compute_cap ] && cat {answer}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return answer


@pytest.mark.parametrize(
    ("answer", "environment", "expected"),
    [
        ("9.0\n9.0\n", {}, "1"),
        ("8.9\n", {}, "1"),
        ("10.0\n", {}, None),  # Blackwell keeps the order by itself
        ("12.0\n8.0\n", {}, "1"),
        ("No devices were found\n", {}, None),
        ("9.0\n", {VARIABLE: "8"}, "8"),  # the user's
        ("9.0\n", {"CUDA_VISIBLE_DEVICES": ""}, None),  # no GPU is to be used
        ("9.0\n", {"CUDA_VISIBLE_DEVICES": "0"}, "1"),
    ],
)
def test_one_queue_before_blackwell(
    nvidia_smi: Path, answer: str, environment: dict[str, str], expected: str | None
) -> None:
    nvidia_smi.write_text(answer)
    set_max_connections(environment)
    assert environment.get(VARIABLE) == expected


def test_nothing_is_set_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    environment: dict[str, str] = {}
    set_max_connections(environment)
    assert environment == {}


def test_the_trainer_sets_it_before_anything_that_starts_cuda(nvidia_smi: Path) -> None:
    """When Megatron, and with it Transformer Engine, is imported, it is there."""
    nvidia_smi.write_text("9.0\n")
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('megatron', 'transformer_engine', 'transformers'):\n"
        f"            print(name, os.environ.get({VARIABLE!r}))\n"
        "            raise SystemExit\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import megatron_fipo.train\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert run.stdout.split()[1:] == ["1"], run.stdout + run.stderr


CUDNN_PARTS = ("libcudnn.so.9", "libcudnn_graph.so.9")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins of Transformer Engine and of NVIDIA's package with cuDNN's libraries, which can be loaded."""
    folder = tmp_path / "packages"
    libraries = folder / "nvidia" / "cudnn" / "lib"
    libraries.mkdir(parents=True)
    for name in CUDNN_PARTS:
        source = tmp_path / "source.c"
        source.write_text("int version(void) { return 9; }\n")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", libraries / name, source], check=True)
    (folder / "transformer_engine").mkdir()
    (folder / "transformer_engine" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def loaded() -> set[str]:
    """Paths of the libraries in this process."""
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}


def test_one_process_has_torchs_cudnn(packages: Path) -> None:
    environment: dict[str, str] = {}
    expected = {str(packages / "nvidia" / "cudnn" / "lib" / name) for name in CUDNN_PARTS}
    assert not expected & loaded()
    use_torchs_cudnn(environment)
    assert environment == {"CUDNN_HOME": str(packages / "nvidia" / "cudnn")}
    assert expected <= loaded(), "the dynamic loader would take the system's parts"


@pytest.mark.parametrize("variable", ["CUDNN_HOME", "CUDNN_PATH"])
def test_the_users_cudnn_stays(packages: Path, variable: str) -> None:
    environment = {variable: "/opt/cudnn"}
    use_torchs_cudnn(environment)
    assert environment == {variable: "/opt/cudnn"}
    assert not any(str(packages) in path for path in loaded())


@pytest.mark.parametrize("missing", ["transformer_engine", "nvidia"])
def test_no_cudnn_is_loaded_where_one_of_the_two_is_missing(packages: Path, missing: str) -> None:
    shutil.rmtree(packages / missing)
    environment: dict[str, str] = {}
    use_torchs_cudnn(environment)
    assert environment == {}
