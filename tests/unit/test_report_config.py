"""A report shows no secret that stands in a configuration."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.analysis.of_run import analyse_run
from megatron_fipo.report.report_data import make_report
from megatron_fipo.report.run_data import read_measured_runs
from megatron_fipo.report.written_config import LEFT_OUT, flat_values, without_credentials, written_config
from tests.unit.report_runs import training_lines, write_run

SECRET = "Zq7-hidden-value"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("servers.api_key", SECRET),
        ("data.train.a.params.hubToken", SECRET),
        ("data.train.a.params.token", 1234567),
        ("data.train.a.params.password", SECRET),
        ("data.train.a.params.db_passwd", SECRET),
        ("data.train.a.params.client-secret", SECRET),
        ("data.train.a.params.Authorization", f"Basic {SECRET}"),
        ("data.train.a.params.credentials", SECRET),
        ("data.train.a.params.cookie", SECRET),
        ("data.train.a.params.AWS_SECRET_ACCESS_KEY", SECRET),
        ("data.train.a.verifier", f"https://judge.example/v1?key={SECRET}"),
        ("data.train.a.verifier", f"https://user:{SECRET}@judge.example/v1"),
        ("data.train.a.verifier", f"https://user:a/b@{SECRET}@judge.example/v1"),
        ("data.train.a.verifier", f"https://judge.example/v1#{SECRET}"),
        ("data.train.a.verifier", f"https://{SECRET}@judge.example"),
        ("servers.urls", [f"http://a:1/?token={SECRET}", "http://b:2"]),
        ("servers.extra_args", ["--api-key", SECRET, "--tp", "2"]),
        ("servers.extra_args", [f"--api-key={SECRET}"]),
        ("servers.extra_args", [f"HF_TOKEN={SECRET}"]),
        ("servers.extra_args", [f"--tp 2 --api-key {SECRET} --dp 2"]),
        ("servers.extra_args", [f"--verbose --api-key '{SECRET} {SECRET}'"]),
        ("servers.extra_args", ["--header", f"X-API-Key: {SECRET}"]),
        ("servers.extra_args", ["--header", f"Authorization: Basic {SECRET}"]),
        ("data.train.a.params.command", f"env HF_TOKEN={SECRET} judge"),
        ("data.train.a.params.options", f"temperature=1,api_key={SECRET}"),
        ("model.path", "hf_abcdefghijklmnopqrstuv"),
        ("data.train.a.prompt_template", "use sk-abcdefghijklmnopqrstuvwx now"),
        ("data.train.a.prompt_template", f"Bearer {SECRET}"),
    ],
)
def test_a_secret_is_left_out(key: str, value: Any) -> None:
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    shown = written_config(flat_values(nested))
    text = str(shown)
    for hidden in (SECRET, "1234567", "hf_abc", "sk-abc"):
        assert hidden not in text
    assert LEFT_OUT in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("objective.half_life_tokens", 32.0),
        ("rollout.max_response_tokens", 96),
        ("objective.sequence_sum_tokens", None),
        ("batch.max_tokens_per_microbatch", 16384),
        ("run.seed", 0),
        ("train.resume", False),
        ("data.train.a.prompt_field", "prompt"),
        ("data.train.a.prompt_template", "{prompt} Let's think: 3 < 4 & 5 @ 6?"),
        ("data.train.a.prompt_template", "Answer key: {prompt} = 5, where x=3 --- no token here"),
        ("servers.extra_args.0", "--tp 2 --mem-fraction=0.8"),
        ("data.train.a.params.command", "judge --api-key ${oc.env:JUDGE_KEY}"),
        ("data.train.a.params.command", "judge --use-token --tp 2"),
        ("data.train.a.verifier", "https://judge.example/v1/score"),
        ("data.train.a.verifier", "${oc.env:JUDGE_KEY}"),
        ("servers.api_key", ""),
        ("model.path", "/models/Qwen2.5-7B"),
        ("metrics.wandb", "off"),
    ],
)
def test_what_is_no_secret_is_shown(key: str, value: Any) -> None:
    assert written_config({key: value}) == {key: value}


def test_a_urls_place_is_shown() -> None:
    text = "first https://u:p@judge.example:8000/v1?key=1 then http://b/c"
    assert without_credentials(text) == f"first https://judge.example:8000/v1 {LEFT_OUT} then http://b/c"


@pytest.mark.parametrize(
    "piece", ["a", "eyJ-", "eyJaaaaaaaaaaaa.", "a://", "-a ", "--a-", "a_", "a=", "http://u:p@", "sk-"]
)
def test_a_long_text_takes_no_long_time(piece: str) -> None:
    """Where the time grows with the square of the length, these 400,000 characters take minutes."""
    before = time.process_time()
    assert isinstance(written_config({"a": piece * (400_000 // len(piece))})["a"], str)
    assert time.process_time() - before < 20


def test_a_value_that_looks_like_an_option_is_left_out_whole() -> None:
    text = "a=1 api_key=token=5 b=2,hub_token=6 c=3"
    assert written_config({"a": text}) == {"a": f"a=1 api_key={LEFT_OUT} b=2,hub_token={LEFT_OUT} c=3"}


def test_every_value_has_a_dotted_key() -> None:
    config = {"a": {"b": [1, {"c": 2}], "d": {}, "e": []}, "f": None}
    assert flat_values(config) == {"a.b.0": 1, "a.b.1.c": 2, "a.d": "{}", "a.e": "[]", "f": None}


def test_no_secret_of_a_run_reaches_its_page(tmp_path: Path) -> None:
    """Wherever a value of the configuration or of the provenance is repeated: in labels, in notes."""
    hidden = {
        "model.path": "hf_abcdefghijklmnopqrstuv",
        "servers.api_key": SECRET,
        "objective.note": f"--token {SECRET}",
    }
    folders = [
        write_run(
            tmp_path / name, training_lines(reward__mean=[0.0]), {**hidden, "train.url": f"http://u:{SECRET}@{name}/"}
        )
        for name in ("a", "b")
    ]
    for folder in folders:
        (folder / "provenance.json").write_text(
            json.dumps({"model": {"url": f"https://u:{SECRET}@hub.example/m", "files": ["hf_abcdefghijklmnopqrstuv"]}})
        )
    runs = read_measured_runs([str(folder) for folder in folders])
    report = make_report(runs, [analyse_run(folder) for folder in folders], 1000)
    text = json.dumps([report.data, report.tokens])
    assert SECRET not in text
    assert "hf_abc" not in text
    assert "hub.example" in text
