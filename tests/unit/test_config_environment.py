"""Values from environment variables: used, and written down as references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import (
    Config,
    ConfigError,
    check_resume,
    load_config,
    looks_secret,
    numbers_fingerprint,
    recorded_values,
    resolved_yaml,
    without_secrets,
    written_values,
)

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart/fipo.yaml"
URL = "data.train.chains.verifier=http://host:1/score?key=${oc.env:RM_KEY}"


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, overrides)


def written_down(settings: Config) -> str:
    """All that a run writes of its configuration."""
    return resolved_yaml(settings) + json.dumps(written_values(settings)) + json.dumps(recorded_values(settings))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RM_KEY", "s3cret/Value+1")
    monkeypatch.setenv("FIPO_TEST_DATA", "/data/of/the/test")
    monkeypatch.setenv("FIPO_TEST_PORT", "30123")


def test_a_secret_is_used_and_written_as_its_reference(tmp_path: Path) -> None:
    settings = config(URL)
    assert settings.data.train["chains"].verifier == "http://host:1/score?key=s3cret/Value+1"
    text = written_down(settings)
    assert "s3cret" not in text
    assert text.count("http://host:1/score?key=${oc.env:RM_KEY}") == 3
    path = tmp_path / "config.yaml"
    path.write_text(resolved_yaml(settings))
    assert load_config(path) == settings
    # The control: the same value without a reference is the configuration's own text.
    plain = config("data.train.chains.verifier=http://host:1/score?key=plainly_written")
    assert "plainly_written" in written_down(plain)


@pytest.mark.parametrize(
    "overrides",
    [
        ("run.name=${oc.env:RM_KEY}",),  # reaches run.output_dir, too
        ("data.train.chains.params.key=${oc.env:RM_KEY}",),
        ("data.train.chains.params={keys: [a, '${oc.env:RM_KEY}']}",),
        ("servers.extra_args=[--api-key, '${oc.env:RM_KEY}']",),
        ("run.name=${oc.env:RM_KEY}", "metrics.wandb_project=x-${run.name}", "model.path=${metrics.wandb_project}"),
        ("data.train.chains.params.a=${oc.env:RM_KEY}", "data.train.chains.params.b=x${.a}"),
        (
            "data.train.chains.params={a: {key: '${oc.env:RM_KEY}'}}",
            "data.evaluation.held_out.params=${data.train.chains.params.a}",
        ),
        ("data.train.chains.params.a=${oc.env:NOT_SET_ANYWHERE,${oc.env:RM_KEY}}",),
        ("data.train.chains.params.a=${oc.decode:${oc.env:RM_KEY}}",),
    ],
)
def test_wherever_it_stands(overrides: tuple[str, ...]) -> None:
    settings = config(*overrides)
    assert "s3cret" in repr(settings), "the control: it is used"
    assert "s3cret" not in written_down(settings)


def test_numbers_from_the_environment_are_written_as_references() -> None:
    settings = config("servers.base_port=${oc.env:FIPO_TEST_PORT}")
    assert settings.servers.base_port == 30123
    assert written_values(settings)["servers"]["base_port"] == "${oc.env:FIPO_TEST_PORT}"


def test_texts_show_the_reference_in_every_spelling() -> None:
    config(URL)
    for text in (
        "cannot reach http://host:1/score?key=s3cret/Value+1: refused",
        "GET /score?key=s3cret/Value%2B1",
        "GET /score?key=s3cret%2FValue%2B1",
    ):
        assert "s3cret" not in without_secrets(text)
        assert "${oc.env:RM_KEY}" in without_secrets(text)
    assert without_secrets("nothing of the kind") == "nothing of the kind"


def test_places_are_shown_in_texts_since_people_copy_them() -> None:
    settings = config("model.path=${oc.env:FIPO_TEST_DATA}/model")
    assert without_secrets("no folder /data/of/the/test/model") == "no folder /data/of/the/test/model"
    assert written_values(settings)["model"]["path"] == "${oc.env:FIPO_TEST_DATA}/model"


def test_a_rotated_key_is_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = config(URL)
    saved, fingerprint = recorded_values(before), numbers_fingerprint(before)
    monkeypatch.setenv("RM_KEY", "another-key-altogether")
    after = config(URL)
    check = check_resume(saved, after, is_mid_step=True)
    assert (check.refused, check.shown, check.same_numbers) == ((), (), True)
    assert numbers_fingerprint(after) == fingerprint
    # The control: another address is another reward model.
    moved = config(URL.replace("/score", "/judge"))
    assert check_resume(saved, moved, is_mid_step=True).refused
    assert numbers_fingerprint(moved) != fingerprint


def test_another_path_by_the_environment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    override = "model.path=${oc.env:FIPO_TEST_DATA}/model"
    before = config(override)
    saved, fingerprint = json.loads(json.dumps(recorded_values(before))), numbers_fingerprint(before)
    assert "/data/of/the/test" not in json.dumps(saved)
    assert check_resume(saved, config(override), is_mid_step=True).refused == ()
    monkeypatch.setenv("FIPO_TEST_DATA", "/data/elsewhere")
    check = check_resume(saved, config(override), is_mid_step=False)
    (line,) = check.shown
    assert line.startswith("model.path: ")
    assert "the environment variable has another value" in line
    assert not check.same_numbers
    assert numbers_fingerprint(config(override)) != fingerprint
    # The value written out is the same place, and so is the reference to whom had it written out.
    assert check_resume(saved, config("model.path=/data/of/the/test/model"), is_mid_step=True).refused == ()
    monkeypatch.setenv("FIPO_TEST_DATA", "/data/of/the/test")
    written_out = recorded_values(config("model.path=/data/of/the/test/model"))
    assert check_resume(written_out, config(override), is_mid_step=True).refused == ()


def test_an_older_checkpoint_that_holds_the_value_is_compared_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import asdict

    saved: dict[str, Any] = asdict(config(URL))
    assert check_resume(saved, config(URL), is_mid_step=True).refused == ()
    monkeypatch.setenv("RM_KEY", "another-key-altogether")
    (line,) = check_resume(saved, config(URL), is_mid_step=True).refused
    assert "s3cret" not in line
    assert "another-key" not in line


def test_a_variable_that_is_not_set_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RM_KEY")
    with pytest.raises(ConfigError, match=r"data\.train\.chains\.verifier=.*environment variable RM_KEY is not set"):
        config(URL)


@pytest.mark.parametrize(
    "name",
    [
        "DB_PASS",
        "GITHUB_PAT",
        "HF_AUTH",
        "MY_PWD",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "RM_KEY",
        "OPENAI_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "MYTOKEN",
        "dbPassword",
        "hfToken",
        "PGPASSWORD",
        "SSH_PASSPHRASE",
        "GOOGLE_CREDENTIALS",
        "APIKEY2",
        "TOKEN1",
        "AUTH",
        "SENTRY_DSN",
        "DB_CREDS",
        "JWT",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "PWD",
        "HOME",
        "NCCL_DEBUG",
        "TOKENIZERS_PARALLELISM",
        "MAX_TOKENS",
        "VLLM_MAX_NUM_BATCHED_TOKENS",
        "MONKEY",
        "PATIENCE",
        "AUTHOR",
        "PASSES",
        "KEYBOARD",
        "NCCL_SOCKET_IFNAME",
        "OMP_NUM_THREADS",
        "COMPASS",
    ],
)
def test_names_of_no_secrets(name: str) -> None:
    assert not looks_secret(name)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.num_steps=${oc.env:JUST_A_KEY}"],
        ["optimizer.learning_rate=${oc.env:JUST_A_KEY}"],
        ["train.resume=${oc.env:JUST_A_KEY}"],
        ["servers.urls=${oc.env:JUST_A_KEY}"],
        ["train.num_steps=${run.name}", "run.name=${oc.env:JUST_A_KEY}"],
        ["train.num_steps=${oc.env:NOT_SET_AT_ALL,${oc.env:JUST_A_KEY}}"],
        ["run.name=${oc.env:${oc.env:JUST_A_KEY}}"],
        ["train.num_steps=${${oc.env:JUST_A_KEY}}"],
    ],
)
def test_a_value_that_cannot_be_used_is_not_repeated(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("hunter2secret", "pw"):  # short ones too
        monkeypatch.setenv("JUST_A_KEY", value)
        with pytest.raises(ConfigError) as caught:
            load_config(None, overrides)
        assert value not in str(caught.value)
        assert "JUST_A_KEY" in str(caught.value)
        assert overrides[0].partition("=")[0] in str(caught.value)
