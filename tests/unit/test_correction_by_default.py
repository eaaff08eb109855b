"""Where nobody names a correction, stale tokens get one; what somebody names stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fipo.config import (
    Config,
    ConfigError,
    load_config,
    resolved_yaml,
    save_resolved,
    validate,
    warnings_for,
)

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart/fipo.yaml"
STREAMING = "sampling.streaming=true"
STALE = [STREAMING, "sampling.max_surplus_age_steps=0", "rollout.max_staleness_steps=2"]


def correction_of(config: Config) -> str:
    """The correction, which the resolved configuration must show, too."""
    value = config.objective.rollout_correction
    assert f"\n  rollout_correction: {value}\n" in resolved_yaml(config)
    return value


def test_stale_tokens_are_corrected_for() -> None:
    assert correction_of(load_config(QUICKSTART)) == "none"
    assert correction_of(load_config(QUICKSTART, [STREAMING])) == "none", "on-policy"
    stale = load_config(QUICKSTART, STALE)
    assert correction_of(stale) == "token_truncated"
    validate(stale)
    assert warnings_for(stale) == warnings_for(load_config(QUICKSTART))
    assert correction_of(load_config(QUICKSTART, [*STALE, "objective.dual_clip=5"])) == "token_truncated"
    assert correction_of(load_config(QUICKSTART, [*STALE, "algorithm=dapo"])) == "token_truncated"


def test_the_last_layer_says_whether_tokens_may_be_stale(tmp_path: Path) -> None:
    in_file = tmp_path / "run.yaml"
    in_file.write_text("sampling: {streaming: true}\nrollout: {max_staleness_steps: 1}\n")
    assert correction_of(load_config(in_file)) == "token_truncated"
    assert correction_of(load_config(in_file, ["rollout.max_staleness_steps=0"])) == "none"


@pytest.mark.parametrize("named", ["none", "token_masked"])
def test_a_correction_that_somebody_names_stays_in_every_layer(tmp_path: Path, named: str) -> None:
    in_file = tmp_path / "run.yaml"
    in_file.write_text(f"objective: {{rollout_correction: {named}}}\n")
    config = load_config(in_file, STALE)
    assert correction_of(config) == named
    assert correction_of(load_config(None, [*STALE, f"objective.rollout_correction={named}"])) == named
    assert correction_of(load_config(None, [*STALE, f"objective={{rollout_correction: {named}}}"])) == named
    again = load_config(save_resolved(config, tmp_path / "run"), ["rollout.max_staleness_steps=3"])
    assert correction_of(again) == named


def test_references_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "train: {num_epochs: 2}\nsampling: {streaming: true}\nrollout: {max_staleness_steps: '${train.num_epochs}'}\n"
        "run: {name: 'with_${objective.rollout_correction}'}\n"
    )
    config = load_config(path)
    assert config.rollout.max_staleness_steps == 2
    assert correction_of(config) == "token_truncated"
    assert config.run.name == "with_token_truncated"


def test_the_engines_own_log_probs_have_nothing_to_correct() -> None:
    overrides = [*STALE, "algorithm=dapo", "objective.old_log_probs=rollout"]
    config = load_config(QUICKSTART, overrides)
    assert correction_of(config) == "none"
    validate(config)
    assert not [text for text in warnings_for(config) if "objective.rollout_correction" in text]
    named = load_config(QUICKSTART, [*overrides, "objective.rollout_correction=token_truncated"])
    with pytest.raises(ConfigError, match="there is nothing to correct"):
        validate(named)


def test_stale_tokens_without_a_correction_are_warned_about() -> None:
    none = "objective.rollout_correction=none"
    usual = warnings_for(load_config(QUICKSTART))
    assert warnings_for(load_config(QUICKSTART, [none])) == usual
    found = [text for text in warnings_for(load_config(QUICKSTART, [*STALE, none])) if text not in usual]
    assert [text.startswith(f"{none} with rollout.max_staleness_steps=2") for text in found] == [True]
