"""Where the files that a configuration names are looked for, and what is recorded of them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_fipo.config import (
    Config,
    ConfigError,
    check_resume,
    is_hub_name,
    load_config,
    numbers_fingerprint,
    require_inputs,
    save_resolved,
    with_absolute_paths,
)

TEXT = """
model: {path: base}
data:
  train: {mine: {kind: jsonl, path: rows/train.jsonl, verifier: exact}}
  evaluation: {held_out: {kind: jsonl, path: held_out.jsonl, verifier: exact}}
"""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration with its model and data beside it; the current folder is another one."""
    folder = tmp_path / "example"
    for name in ("example/base", "example/rows", "here"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("rows/train.jsonl", "held_out.jsonl"):
        (folder / name).write_text("{}\n")
    (folder / "run.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path / "here")
    return folder / "run.yaml"


def paths(config: Config) -> tuple[str, ...]:
    sources = (*config.data.train.values(), *config.data.evaluation.values())
    return (config.model.path, *(source.path for source in sources))


def test_what_the_current_folder_lacks_is_found_beside_the_configuration(example: Path) -> None:
    beside = tuple(str(example.parent / name) for name in ("base", "rows/train.jsonl", "held_out.jsonl"))
    assert paths(load_config(example)) == beside
    relative = Path("../example/run.yaml")
    assert paths(load_config(relative))[0] == "../example/base"
    require_inputs(load_config(relative), relative)


def test_the_current_folder_comes_first(example: Path) -> None:
    Path("base").mkdir()
    config = load_config(example)
    assert paths(config)[0] == "base"
    assert paths(config)[1] == str(example.parent / "rows/train.jsonl")


def test_other_paths_stay_as_they_are(example: Path) -> None:
    overrides = ["model.path=owner/name", "data.train.mine.path=/nowhere/x.jsonl", "servers.python=python3"]
    config = load_config(example, [*overrides, "run.output_dir=rows"])
    assert paths(config)[:2] == ("owner/name", "/nowhere/x.jsonl")
    assert (config.servers.python, config.run.output_dir) == ("python3", "rows"), "no program's name, and no output"
    assert with_absolute_paths(config).model.path == "owner/name"


HUB = ["data.train.mine={kind: hub, path: rows/train, split: train, verifier: exact}", "model.path=owner/name"]


def test_names_on_the_hub_are_no_paths(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example.parent / "rows/train").mkdir()
    for folder in (Path.cwd(), example.parent):  # the data set's name stays one, even where a folder is called like it
        monkeypatch.chdir(folder)
        config = load_config(example, HUB)
        require_inputs(config, example)
        assert paths(config)[:2] == ("owner/name", "rows/train")
        assert paths(with_absolute_paths(config))[:2] == ("owner/name", "rows/train")


def test_a_typing_error_beside_the_configuration_is_no_name_on_the_hub(example: Path) -> None:
    (example.parent / "owner/name").mkdir(parents=True)
    assert paths(load_config(example, HUB))[0] == str(example.parent / "owner/name")
    (lost, *_) = paths(load_config(example, [*HUB, "model.path=owner/nmae"]))
    assert lost == str(example.parent / "owner/nmae")
    assert not is_hub_name(lost)
    assert is_hub_name(paths(load_config(example, [*HUB, "model.path=other/nmae"]))[0])


def test_an_interpreter_is_found_as_well(example: Path) -> None:
    (example.parent / "bin").mkdir()
    (example.parent / "bin/python").touch()
    config = load_config(example, ["rollout.engine=sglang", "servers.python=bin/python"])
    assert config.servers.python == str(example.parent / "bin/python")
    unused = load_config(example, ["servers.python=bin/lost"])
    require_inputs(unused, example)
    with pytest.raises(ConfigError, match=r"servers\.python=bin/lost"):
        require_inputs(load_config(example, ["rollout.engine=vllm", "servers.python=bin/lost"]), example)


def test_a_path_that_neither_has_names_both_places(example: Path) -> None:
    config = load_config(example, ["model.path=bass", "data.train.mine.path=lost.jsonl"])
    with pytest.raises(ConfigError) as caught:
        require_inputs(config, example)
    message = str(caught.value)
    for name in ("bass", "lost.jsonl"):
        assert str(Path.cwd() / name) in message
        assert str(example.parent / name) in message
    assert "model.path=bass" in message
    assert "data.train.mine.path=lost.jsonl" in message
    assert "held_out" not in message
    require_inputs(config, example, unread=("model.path", "data.train."))


def test_what_is_recorded_is_the_same_from_anywhere(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(example.parent)
    config = load_config("run.yaml", ["run.output_dir=out"])
    assert paths(config)[0] == "base"
    saved = save_resolved(config, "out").absolute()
    monkeypatch.chdir(tmp_path)
    again = load_config(saved)
    assert paths(again) == tuple(str(example.parent / name) for name in ("base", "rows/train.jsonl", "held_out.jsonl"))
    assert again.run.output_dir == str(example.parent / "out")


def test_another_spelling_is_no_other_model(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = load_config(example)
    (example.parent / "link").symlink_to("base")
    monkeypatch.chdir(example.parent)
    for spelling in ("base", "./base", "rows/../base", "link"):
        config = load_config("run.yaml", [f"model.path={spelling}"])
        assert config.model.path == spelling
        assert numbers_fingerprint(config) == numbers_fingerprint(beside)
        for saved in (asdict(beside), asdict(with_absolute_paths(config)), asdict(config)):
            assert check_resume(saved, beside, is_mid_step=True).refused == ()
            assert check_resume(saved, config, is_mid_step=True).shown == ()
    Path("other").mkdir()
    other = replace(beside, model=replace(beside.model, path="other"))
    assert numbers_fingerprint(other) != numbers_fingerprint(beside)
    assert check_resume(asdict(beside), other, is_mid_step=True).refused
