"""The pinned environments for GPUs, and the installer of the trainer's: what can be known of them without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools" / "engines"


def load(name: str) -> ModuleType:
    """One of the tools, anew."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def resolver() -> ModuleType:
    return load("resolve")


@pytest.fixture
def installer() -> ModuleType:
    return load("trainer_gpu")


# --- pins -------------------------------------------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.parametrize("name", ["trainer", "sglang-gpu", "vllm-gpu"])
def test_pinned_versions_are_all_that_is_needed(resolver: ModuleType, name: str) -> None:
    """For CPython 3.12 on Linux, from the metadata of what is published."""
    assert resolver.problems(resolver.ENVIRONMENTS[name]) == []


@pytest.mark.ci
def test_a_pin_that_is_missing_superfluous_or_impossible_is_noticed(resolver: ModuleType, tmp_path: Path) -> None:
    whole = resolver.ENVIRONMENTS["trainer"]
    lines = whole.file.read_text(encoding="utf-8").splitlines()
    environment = resolver.Environment(tmp_path / "pins.txt", whole.requirements, True, whole.title, whole.installer)
    kept = [line for line in lines if not line.startswith("nvidia-cuda-crt==")]
    environment.file.write_text("\n".join([*kept, "colorama==0.4.6"]))
    found = resolver.problems(environment)
    assert len(found) == 2
    assert re.fullmatch(r"nvidia-cuda-crt==13\.0\.\S+ is missing", found[0])
    assert found[1] == "colorama==0.4.6 is needed by nothing"
    other = [re.sub(r"^(nvidia-nccl-cu13)==.*", r"\1==2.30.7", line) for line in lines]
    environment.file.write_text("\n".join(other))
    with pytest.raises(SystemExit, match=r"(?s)pins\.txt does not resolve:.*nvidia-nccl-cu13"):
        resolver.problems(environment)


def test_trainer_and_transformer_engine_are_pinned_once_and_alike(resolver: ModuleType, installer: ModuleType) -> None:
    pins, gpu = resolver.read_pins(ROOT / "constraints.txt"), resolver.read_pins(ROOT / "constraints-gpu.txt")
    assert not pins.keys() & gpu.keys(), "each package stands in one file"
    assert pins["megatron-core"] == "0.19.2", "on Python 3.12"
    parts = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")
    assert {f"=={gpu[part]}" for part in parts} == {installer.TRANSFORMER_ENGINE.partition("]")[2]}
    assert installer.TRANSFORMER_ENGINE in resolver.ENVIRONMENTS["trainer"].requirements
    assert f'version = "{gpu["transformer-engine-torch"]}"' in (TOOLS / "uv.toml").read_text(encoding="utf-8")
    assert set(installer.HEADERS.values()) <= gpu.keys()


def test_the_documentation_names_the_nccl_that_is_pinned(resolver: ModuleType) -> None:
    page = (ROOT / "docs" / "rollout_engines.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| .*?`([\w/.-]+-gpu\.txt)` \| ([\d.]+ \| [\d.]+) \|$", page, re.MULTILINE))
    expected = {}
    trainer = resolver.read_pins(ROOT / "constraints.txt") | resolver.read_pins(ROOT / "constraints-gpu.txt")
    for file in ("constraints-gpu.txt", "tools/engines/sglang-gpu.txt", "tools/engines/vllm-gpu.txt"):
        pins = trainer if file == "constraints-gpu.txt" else resolver.read_pins(ROOT / file)
        expected[file] = f"{pins['torch']} | {pins['nvidia-nccl-cu13']}"
    assert rows == expected
    sglang = resolver.read_pins(TOOLS / "sglang-gpu.txt")
    assert f"pip install --no-deps nvidia-nccl-cu13=={sglang['nvidia-nccl-cu13']}\n" in page


def test_no_page_or_message_sends_to_an_extra_that_pip_cannot_install_alone() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8").partition("extras_require=")[2]
    extras = set(re.findall(r'^        "(\w+)": \[', setup, re.MULTILINE))
    by_script = {"gpu", "sglang", "vllm"}
    assert extras == {"slurm", "wandb", "smollm2", "dev"} | by_script
    places = [*ROOT.glob("*.md"), *ROOT.glob("*.txt"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
    places += [*ROOT.glob("megatron_fipo/**/*.py"), ROOT / "Makefile"]
    named = {
        (str(place.relative_to(ROOT)), extra)
        for place in places
        for extra in re.findall(
            r"(?:install|-e|--editable)\b.*?(?:\.|megatron[-_]fipo)\[(\w+)\]", place.read_text("utf-8")
        )
    }
    assert len(named) >= 3
    assert {(place, extra) for place, extra in named if extra not in extras - by_script} == set()


# --- the trainer's installer ------------------------------------------------------------------------------------------


def test_commands_use_the_pins_and_the_torch_that_is_there(installer: ModuleType, tmp_path: Path) -> None:
    torch, project = installer.torch_step().command, installer.project_step().command
    (engine,) = installer.transformer_engine_steps(None, num_jobs=7)
    for command in (torch, project, engine.command):
        assert command[:2] == [sys.executable, "-m"]
        pins = [command[place + 1] for place, word in enumerate(command) if word == "--constraint"]
        assert pins == [str(ROOT / "constraints.txt"), str(ROOT / "constraints-gpu.txt")]
    assert "--no-build-isolation" in engine.command
    assert "--no-build-isolation" not in torch + project, "their builds need tools that are nowhere yet"
    assert {"setuptools", "wheel", "ninja"} <= set(torch), "the build looks for them in this environment"
    assert engine.environment["MAX_JOBS"] == "7"
    scripts = Path(engine.environment["PATH"].partition(os.pathsep)[0])
    assert scripts == Path(sys.executable).parent, "ninja is found without activating the environment"
    build, install = installer.transformer_engine_steps(tmp_path, num_jobs=1)
    assert {"--no-index", "--no-deps", str(tmp_path)} <= set(build.command) & set(install.command)
    assert "--constraint" not in build.command + install.command


def test_headers_are_found_in_every_folder_of_the_namespace(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one/nvidia/cu13/include", "two/nvidia/nccl/include", "two/nvidia/nccl/lib"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "one"), str(tmp_path / "two"), *sys.path])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    importlib.invalidate_caches()
    found = [folder for folder in installer.include_folders() if tmp_path in folder.parents]
    assert found == [tmp_path / "one/nvidia/cu13/include", tmp_path / "two/nvidia/nccl/include"]
    assert str(found[1]) in installer.build_variables(1)["CPATH"].split(os.pathsep)


@pytest.mark.parametrize(
    ("cuda", "headers", "compiler", "words"),
    [
        ("13.0", True, True, ""),
        ("13.0", True, False, r"needs a C\+\+ compiler, and no-such-compiler is not on PATH"),
        ("12.8", True, True, r"torch 2\.13\.0 of .* is a build for CUDA 12\.8\. Uninstall it"),
        ("", True, True, r"is a build for the CPU\. Uninstall it"),
        ("13.0", False, True, r"the headers nccl\.h, and no .* has them\. They are in nvidia-nccl-cu13: pip install"),
    ],
)
def test_a_build_that_must_fail_is_refused(
    installer: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cuda: str,
    headers: bool,
    compiler: bool,
    words: str,
) -> None:
    for name in installer.HEADERS:
        if headers or name != "nccl.h":
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    monkeypatch.setattr(installer, "include_folders", lambda: [tmp_path])
    monkeypatch.setattr(installer, "torch_versions", lambda: ("2.13.0", cuda))
    monkeypatch.setenv("CXX", sys.executable if compiler else "no-such-compiler")
    if words:
        with pytest.raises(SystemExit, match=words):
            installer.check_build()
    else:
        installer.check_build()


def test_this_machines_torch_is_told_apart(installer: ModuleType) -> None:
    import torch

    assert installer.torch_versions() == (torch.__version__, torch.version.cuda or "")


def test_another_python_is_refused_before_anything_is_installed(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    monkeypatch.setattr(installer, "run", lambda step: pytest.fail(f"ran {step}"))
    monkeypatch.setattr(sys, "argv", ["trainer_gpu.py"])
    with pytest.raises(SystemExit, match=r"pinned for Python 3\.12; this is"):
        installer.main()
    monkeypatch.setattr(sys, "version_info", (3, 12, 3))
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    with pytest.raises(SystemExit, match="belongs to no virtual environment"):
        installer.main()


def test_the_dry_run_prints_what_would_run() -> None:
    command = [sys.executable, str(TOOLS / "trainer_gpu.py"), "--dry-run", "--jobs", "3"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line for line in said.splitlines() if line.startswith("# ")] == [
        "# torch, CUDA's headers, build tools",
        "# this project",
        "# Transformer Engine, compiled for this torch",
        "# does it load?",
    ]
    assert "MAX_JOBS=3" in said
    assert (
        shutil.which("bash") is None
        or subprocess.run(["bash", "-n"], input=said, text=True, check=False).returncode == 0
    )
