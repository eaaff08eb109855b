"""What may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_fipo.config import Config, check_resume, load_config, numbers_fingerprint

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart/fipo.yaml"


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, overrides)


def test_nothing_changed() -> None:
    check = check_resume(asdict(config()), config(), is_mid_step=True)
    assert (check.refused, check.shown, check.same_numbers) == ((), (), True)


@pytest.mark.parametrize("override", ["parallel.cp=1", "train.num_steps=99", "run.output_dir=elsewhere",
    "batch.max_tokens_per_microbatch=99999", "evaluation.temperature=0.5", "checkpoint.keep_last=7",
    "data.evaluation.held_out.num_prompts=3", "model.recompute=full",
    "model.log_prob_chunk_mib=64.0"])  # fmt: skip
@pytest.mark.parametrize("is_mid_step", [False, True])
def test_what_leaves_the_numbers_alone_is_shown(override: str, is_mid_step: bool) -> None:
    check = check_resume(asdict(config()), config(override), is_mid_step=is_mid_step)
    assert check.refused == ()
    assert check.same_numbers
    assert numbers_fingerprint(config()) == numbers_fingerprint(config(override))
    key, _, value = override.partition("=")
    (line,) = check.shown
    assert line.startswith(f"{key}: ")
    assert line.endswith(f"-> {value}") or line.endswith(f'-> "{value}"')


def test_another_shadow_objective_leaves_the_numbers_alone() -> None:
    changed = config("objective.shadow.wide.influence_max=1.5")
    check = check_resume(asdict(config()), changed, is_mid_step=True)
    assert check.refused == ()
    assert check.same_numbers
    assert "objective.shadow.wide.influence_max: (not there) -> 1.5" in check.shown
    assert numbers_fingerprint(config()) == numbers_fingerprint(changed)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.learning_rate=0.5",
        "rollout.temperature=0.9",
        "rollout.too_stale=mask",
        "objective.influence_max=1.9",
    ],
)
def test_what_decides_the_numbers_is_shown_between_steps_and_refused_within_one(override: str) -> None:
    check = check_resume(asdict(config()), config(override), is_mid_step=False)
    assert check.refused == ()
    assert len(check.shown) == 1
    assert not check.same_numbers
    assert numbers_fingerprint(config()) != numbers_fingerprint(config(override))
    (line,) = check_resume(asdict(config()), config(override), is_mid_step=True).refused
    assert "saved between the updates of a step" in line


def test_how_stale_tokens_may_be_decides_which_are_written() -> None:
    before, now = config("sampling.streaming=true"), config("sampling.streaming=true", "rollout.max_staleness_steps=1")
    assert numbers_fingerprint(before) != numbers_fingerprint(now)
    check = check_resume(asdict(before), now, is_mid_step=False)
    assert (check.refused, check.same_numbers) == ((), False)
    assert "rollout.max_staleness_steps: 0 -> 1" in check.shown
    assert check_resume(asdict(before), now, is_mid_step=True).refused


def test_the_number_of_steps_decides_the_numbers_where_the_learning_rate_falls_towards_it() -> None:
    falling = ("optimizer.schedule=cosine",)
    before, now = config(*falling), config(*falling, "train.num_steps=99")
    assert numbers_fingerprint(before) != numbers_fingerprint(now)
    assert not check_resume(asdict(before), now, is_mid_step=False).same_numbers
    fixed = (*falling, "optimizer.num_decay_steps=20")
    assert numbers_fingerprint(config(*fixed)) == numbers_fingerprint(config(*fixed, "train.num_steps=99"))


def test_keys_that_an_earlier_version_did_not_know_change_nothing_at_their_defaults() -> None:
    saved = asdict(config())
    for key in ("schedule", "min_learning_rate", "num_decay_steps"):
        del saved["optimizer"][key]
    del saved["data"]["train"]["chains"]["deduplicate"]
    check = check_resume(saved, config(), is_mid_step=True)
    assert (check.refused, check.same_numbers) == ((), True)
    assert 'optimizer.schedule: (not there) -> "constant"' in check.shown
    assert check_resume(saved, config("optimizer.schedule=linear"), is_mid_step=True).refused


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("run.seed=5", "order of the prompts"),
        ("data.train.chains.weight=3", "order of the prompts"),
        ("data.train.chains.params.num_terms=5", "order of the prompts"),
        ("model.dtype=bfloat16", "optimizer's state is laid out"),
        ("optimizer.distributed=false", "optimizer's state is laid out"),
    ],
)
def test_what_would_corrupt_is_refused(override: str, reason: str) -> None:
    before = asdict(config())
    check = check_resume(before, config(override), is_mid_step=False)
    assert check.shown == ()
    (line,) = check.refused
    assert line.startswith(override.partition("=")[0])
    assert reason in line


def test_a_source_that_comes_or_goes_is_refused() -> None:
    before = asdict(config())
    before["data"]["train"]["another"] = dict(before["data"]["train"]["chains"])
    check = check_resume(before, config(), is_mid_step=False)
    assert any("data.train.another.kind" in line and "(not there)" in line for line in check.refused)


def test_a_key_that_a_newer_version_adds_is_shown() -> None:
    before = asdict(config())
    del before["rollout"]["top_p"]
    check = check_resume(before, config(), is_mid_step=False)
    assert check.shown == ("rollout.top_p: (not there) -> 1.0",)


def test_a_checkpoint_whose_chunks_were_counted_in_tokens_goes_on_mid_step() -> None:
    before = asdict(config())
    del before["model"]["log_prob_chunk_mib"]
    before["model"]["log_prob_chunk_tokens"] = 512
    check = check_resume(before, config(), is_mid_step=True)
    assert check.refused == ()
    assert check.same_numbers
    assert len(check.shown) == 2


def test_a_key_that_the_checkpoint_does_not_know_changes_nothing_at_its_default() -> None:
    before = asdict(config())
    for key in ("subset", "split", "revision"):
        del before["data"]["train"]["chains"][key]
    del before["model"]["revision"]
    check = check_resume(before, config(), is_mid_step=True)
    assert (check.refused, check.same_numbers) == ((), True)
    named = check_resume(before, config("data.train.chains.split=test"), is_mid_step=True)
    assert "data.train.chains.split" in named.refused[0]
