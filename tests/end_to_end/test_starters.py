"""The first minutes of a user without a clone: what `init` wrote is trained, looked at, scored and talked to."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fipo.run.samples import read_samples
from tests.end_to_end.runs import ROOT, SHORT, metric_lines, step_lines

TIMEOUT_S = 240.0
SMALL = (
    "train.num_steps=1",
    "train.num_minibatches=2",
    "train.num_epochs=1",
    "rollout.num_prompts=4",
    "data.evaluation.held_out.num_prompts=4",
    "metrics.tensorboard=false",
)
SCORED_SMALL = ("data.evaluation.held_out.num_prompts=4",)

Shell = Callable[..., str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel holds it, with nothing of the clone around it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "megatron_fipo", folder / "megatron_fipo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples/quickstart", folder / "examples/quickstart")
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "installed"]
    subprocess.run(build, cwd=folder, check=True, timeout=TIMEOUT_S, capture_output=True)
    return folder / "installed"


@pytest.fixture
def shell(built: Path, tmp_path: Path) -> Shell:
    """Types a command in an empty folder; its output. `more` goes behind it."""

    def typed(command: str, *more: str, folder: Path = tmp_path) -> str:
        words = shlex.split(command)
        assert words[0] == "megatron-fipo"
        run = subprocess.run(
            [sys.executable, "-m", "megatron_fipo.cli", *words[1:], *more],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(built), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert run.returncode == 0, f"{command}\n{run.stdout[-3000:]}{run.stderr[-3000:]}"
        return run.stdout + run.stderr

    return typed


def tutorial_commands() -> list[str]:
    """Of the tutorial's section on data of one's own, those of its first block."""
    section = (ROOT / "docs/tutorial.md").read_text().split("\n## 2. ")[1].split("\n## 3. ")[0]
    first = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[0]
    return [line for line in first.splitlines() if line.strip()]


def test_the_tutorials_commands_work_as_typed(shell: Shell, tmp_path: Path) -> None:
    commands = tutorial_commands()
    assert [shlex.split(command)[1] for command in commands] == [
        *("init", "validate", "train", "samples", "evaluate", "chat"),
    ]
    said = {}
    for command in commands:
        name = shlex.split(command)[1]
        said[name] = shell(command, *{"train": SMALL, "evaluate": SCORED_SMALL}.get(name, ()))
    assert "is valid" in said["validate"]
    printed = [shlex.split(line) for line in said["init"].splitlines() if line.startswith("  megatron-fipo")]
    typed = [shlex.split(command) for command in commands]
    assert printed == [words[:-1] if "--wrong" in words else words[:5] if "evaluate" in words else words
                       for words in typed if words[1] not in ("init", "validate")]  # fmt: skip
    run = tmp_path / "outputs/own_data"
    (line,) = step_lines(run)
    assert line["rollout/accuracy/mean"] > 0, "the verifier of the example accepts what is right"
    assert any("evaluation/held_out/avg@4" in line for line in metric_lines(run))
    assert "✗ wrong" in said["samples"]
    assert "✓ correct" not in said["samples"]
    for sample in read_samples(run):
        assert sample.is_right == (sample.answer == sample.reference)
        assert sample.prompt.endswith("=")
        assert sample.trained_on == (sample.advantage is not None)
    assert (tmp_path / "scores/after/metrics.json").is_file()
    assert re.search(r"[0-9+\-=;?#]+$", said["chat"].strip())


def test_the_quickstart_trains_without_a_clone_and_goes_on_from_anywhere(shell: Shell, tmp_path: Path) -> None:
    shell("megatron-fipo init")
    shell("megatron-fipo train quickstart/fipo.yaml parallel.cp=1", *SMALL, *SHORT)
    shell("megatron-fipo samples outputs/quickstart --step 0 --full")
    (tmp_path / "elsewhere").mkdir()
    more = ("train.resume=true", "train.num_steps=2")
    again = shell("megatron-fipo train ../outputs/quickstart/config.yaml", *more, folder=tmp_path / "elsewhere")
    assert "resumed from" in again
    assert "run.output_dir" not in again
    assert "changed since the checkpoint: train.num_steps: 1 -> 2" in " ".join(again.split())
    assert [line["step"] for line in step_lines(tmp_path / "outputs/quickstart")] == [0, 1]
