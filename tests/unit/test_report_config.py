"""A report shows no secret that stands in a configuration."""

from __future__ import annotations

import time
from typing import Any

import pytest

from megatron_fipo.report.written_config import LEFT_OUT, flat_values, without_credentials, written_config

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


def test_every_value_has_a_dotted_key() -> None:
    config = {"a": {"b": [1, {"c": 2}], "d": {}, "e": []}, "f": None}
    assert flat_values(config) == {"a.b.0": 1, "a.b.1.c": 2, "a.d": "{}", "a.e": "[]", "f": None}
