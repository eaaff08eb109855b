"""The installer of the servers' environments, with real pip on small wheels made here."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

INSTALLER = Path(__file__).resolve().parents[2] / "tools" / "engines" / "install.py"
WHEELS = {"torch": "2.13.0", "transformers": "5.0", "xgrammar": "0.2", "sglang_router": "0.3", "sglang": "0.5"}


@pytest.fixture
def installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, its requirements and its cache in a folder of the test's, and pip kept to that folder's wheels."""
    spec = importlib.util.spec_from_file_location("install", INSTALLER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, version in WHEELS.items():
        make_wheel(wheels, name, version)
    pins = [f"{name.replace('_', '-')}=={version}" for name, version in WHEELS.items()]
    (tmp_path / "sglang.txt").write_text("# every package\n" + "\n".join(pins) + "\n")
    monkeypatch.setattr(module, "REQUIREMENTS", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(wheels), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return module


def make_wheel(
    folder: Path, name: str, version: str, content: str | None = None, requires: str = "not-to-be-had"
) -> None:
    """A package that only says its version, or has this content. It needs one that is nowhere, unless it is torch."""
    info = f"{name}-{version}.dist-info"
    needed = "" if name == "torch" or not requires else f"Requires-Dist: {requires}\n"
    files = {
        f"{name}/__init__.py": f"version = {version!r}\n" if content is None else content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
        wheel.writestr(f"{info}/RECORD", record)


@pytest.mark.ci
def test_an_environment_is_built_once_and_a_broken_one_again(
    installer: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "wheels" / "xgrammar-0.2-py3-none-any.whl"
    hidden = wheel.rename(tmp_path / "hidden.whl")
    with pytest.raises(SystemExit, match=r"(?s)Could not install sglang \(exit status 1\).*--no-deps --requirement"):
        installer.install("sglang")
    assert "No matching distribution found for xgrammar==0.2" in capfd.readouterr().err
    folder = installer.environment_folder("sglang")
    assert folder.exists()
    assert not installer.is_installed(folder)

    hidden.rename(wheel)
    leftover = folder / "leftover"
    leftover.touch()
    python = installer.install("sglang")
    assert not leftover.exists(), "what is half built is built anew"
    versions = "import sglang, torch; print(sglang.version, torch.version)"
    assert subprocess.check_output([python, "-c", versions], text=True).split() == ["0.5", "2.13.0"]
    assert subprocess.run([python, "-c", "import megatron_fipo"], cwd=tmp_path, check=False, stderr=-3).returncode == 1

    capfd.readouterr()
    for file in (tmp_path / "wheels").iterdir():
        file.unlink()
    assert installer.install("sglang") == python, "the second call needs nothing"
    assert capfd.readouterr() == ("", "")


def test_other_requirements_are_another_environment(installer: ModuleType, tmp_path: Path) -> None:
    folder = installer.environment_folder("sglang")
    assert folder.parent == tmp_path / "cache" / "megatron_fipo"
    with (tmp_path / "sglang.txt").open("a") as file:
        file.write("another==1.0\n")
    assert installer.environment_folder("sglang") != folder


def test_the_command_prints_the_path_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    where = [sys.executable, str(INSTALLER), "vllm", "--where"]
    missing = subprocess.run(where, capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert re.fullmatch(r"vllm is not installed\. Run: python \S*tools/engines/install\.py vllm\n", missing.stderr)
    spec = importlib.util.spec_from_file_location("install", INSTALLER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = module.environment_folder("vllm")
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert subprocess.run(where, capture_output=True, check=False).returncode == 1, "there is no mark yet"
    (folder / module.MARK).touch()
    for command in (where, where[:-1]):
        assert subprocess.check_output(command, text=True) == f"{python}\n"


def test_an_environment_for_gpus_needs_the_python_that_it_is_pinned_for(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sglang.txt").rename(tmp_path / "sglang-gpu.txt")
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    with pytest.raises(SystemExit, match=r"sglang-gpu needs Python 3\.12; this is .* Call install\.py with such"):
        installer.install("sglang-gpu")
    assert not (tmp_path / "cache").exists()


@pytest.mark.ci
def test_an_environment_for_gpus_with_a_torch_for_the_cpu_is_refused(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sglang.txt").rename(tmp_path / "sglang-gpu.txt")
    monkeypatch.setattr(installer, "GPU_PYTHONS", (sys.version_info[:2],))
    for cuda, words in ((None, "torch 2.13.0 is a build for the CPU"), ("13.0", "")):
        content = f"__version__ = '2.13.0'\nclass version:\n    cuda = {cuda!r}\n"
        make_wheel(tmp_path / "wheels", "torch", "2.13.0", content)
        if words:
            with pytest.raises(SystemExit, match=r"Could not import sglang-gpu \(exit status 1\)"):
                installer.install("sglang-gpu")
            assert words in capfd.readouterr().err
        else:
            assert installer.is_installed(installer.install("sglang-gpu").parents[1])


TRAINERS_TORCH = "the same as the trainer's, with which it meets in process groups"


@pytest.mark.parametrize(
    ("engine", "torch", "why"),
    [
        ("sglang", "2.13.0", TRAINERS_TORCH),
        ("vllm", "2.13.0", TRAINERS_TORCH),
        ("sglang-gpu", "2.14.1", "what SGLang 0.5.23 names; docs/rollout_engines.md says what follows for NCCL"),
        ("vllm-gpu", "2.13.0", TRAINERS_TORCH),
    ],
)
def test_every_version_is_pinned(engine: str, torch: str, why: str) -> None:
    lines = (INSTALLER.parent / f"{engine}.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in pins), pins
    assert f"torch=={torch}" in pins, why
    names = [re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in pins]
    assert len(set(names)) == len(names)
