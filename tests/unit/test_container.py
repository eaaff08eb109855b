"""The container recipes: they parse, name what exists and what is pinned, and do the same."""

from __future__ import annotations

import json
import re
import subprocess
from io import BytesIO
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "container"
HOME = "/opt/megatron_fipo"


def docker(text: str) -> list[tuple[str, str]]:
    """(instruction, value) of a Dockerfile, without comments."""
    parser = DockerfileParser(fileobj=BytesIO(text.encode()))
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


def apptainer(text: str) -> dict[str, list[str]]:
    """Lines by section of a definition file; its header is under ""."""
    sections: dict[str, list[str]] = {"": []}
    current = sections[""]
    for line in text.splitlines():
        if match := re.fullmatch(r"%(\w+)", line):
            current = sections.setdefault(match[1], [])
        elif (words := line.strip()) and not words.startswith("#"):
            current.append(words)
    return sections


DOCKER = docker((RECIPES / "Dockerfile").read_text(encoding="utf-8"))
APPTAINER = apptainer((RECIPES / "apptainer.def").read_text(encoding="utf-8"))


def copied(steps: list[tuple[str, str]]) -> list[str]:
    return [source for name, value in steps if name == "COPY" for source in value.split()[:-1]]


def test_only_known_instructions_stand_in_the_dockerfile() -> None:
    assert {name for name, _ in DOCKER} == {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "CMD"}
    assert DOCKER[0][0] == "FROM"
    command = next(value for name, value in DOCKER if name == "CMD")
    assert json.loads(command) == ["bash"]
    continued = docker("FROM a\nRUN one \\\n    # why\n    two\n")
    assert [name for name, _ in continued] == ["FROM", "RUN"]


def test_both_recipes_have_one_base_and_it_is_pinned() -> None:
    base = DOCKER[0][1]
    assert APPTAINER[""] == ["Bootstrap: docker", f"From: {base}"]
    assert re.fullmatch(r"nvidia/cuda:13\.0\.3-devel-ubuntu24\.04(@sha256:[0-9a-f]{64})?", base)
    pins = (ROOT / "constraints-gpu.txt").read_text(encoding="utf-8")
    assert "\ncuda-toolkit==13.0.3.0\n" in pins, "the base's CUDA is the one that torch was built with"


def stages(commands: list[str]) -> list[str]:
    return [match[1] for command in commands if (match := re.search(r"install\.sh (\w+)$", command))]


def test_both_recipes_install_the_same() -> None:
    in_docker = stages([value for name, value in DOCKER if name == "RUN"])
    assert in_docker == stages(APPTAINER["post"]) == ["system", "trainer", "servers"]
    assert len([name for name, _ in DOCKER if name == "RUN"]) == len(APPTAINER["post"]) == 3, "and nothing else"
    environment = dict(word.split("=", 1) for name, value in DOCKER if name == "ENV" for word in value.split())
    exported = dict(line.removeprefix("export ").split("=", 1) for line in APPTAINER["environment"])
    assert environment == exported


def test_what_they_copy_exists() -> None:
    sources = [line.split() for line in APPTAINER["files"]]
    assert all(target == f"{HOME}/{source}" for source, target in sources)
    missing = [name for name in [*copied(DOCKER), *(source for source, _ in sources)] if not (ROOT / name).exists()]
    assert missing == []
    assert ("WORKDIR", HOME) in DOCKER


def test_nothing_that_an_installation_reads_is_copied_after_it() -> None:
    """A layer sees only what was copied before it."""
    position = next(place for place, (_, value) in enumerate(DOCKER) if value.endswith("install.sh trainer"))
    before = copied(DOCKER[:position])
    needed = ["constraints.txt", "constraints-gpu.txt", "setup.py", "pyproject.toml", "tools/engines"]
    assert set(needed) <= set(before)
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    read = set(re.findall(r'ROOT / "([^"]+)"', setup)) - {"README.md"}  # which may be missing
    assert read <= set(before)


def test_the_image_has_all_that_a_run_needs() -> None:
    """Docker takes the folder, less what is ignored; Apptainer takes what is listed."""
    tracked = {path.partition("/")[0] for path in git_files()}
    listed = {line.split()[0] for line in APPTAINER["files"]}
    left_out = tracked - listed
    assert left_out == {
        *(".ci", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile"),
        *("docs", "mkdocs.yml"),
    }
    ignored = (RECIPES / "Dockerfile.dockerignore").read_text(encoding="utf-8").split("\n")
    patterns = {line.removeprefix("**/") for line in ignored if line and not line.startswith("#")}
    assert not patterns & tracked
    assert {".venv*", "outputs", "__pycache__"} <= patterns


def git_files() -> list[str]:
    return subprocess.check_output(["git", "-C", str(ROOT), "ls-files"], text=True).split("\n")[:-1]


def test_every_version_is_in_a_pinned_file_and_none_in_the_recipe() -> None:
    script = (RECIPES / "install.sh").read_text(encoding="utf-8")
    assert "pip install" not in script
    assert "==" not in script
    assert re.findall(r"tools/engines/(\w+\.py)\"?( [\w-]+)?", script) == [
        ("trainer_gpu.py", ""),
        ("install.py", " sglang-gpu"),
    ]
    assert (ROOT / "tools/engines/sglang-gpu.txt").exists()
    assert set(re.findall(r"^(\w+)\)$", script, re.MULTILINE)) == {"system", "trainer", "servers"}


@pytest.mark.parametrize("argument", [[], ["everything"]])
def test_the_script_is_bash_and_refuses_an_unknown_stage(argument: list[str]) -> None:
    command = ["bash", str(RECIPES / "install.sh"), *argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: install.sh system | trainer | servers\n")


def test_pages_say_that_it_has_not_been_built() -> None:
    for name in ("README.md", "Dockerfile", "apptainer.def"):
        assert re.search(r"(Not|Neither has been) built yet", (RECIPES / name).read_text(encoding="utf-8")), name
