"""Loading, validation and the resolved configuration."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.config import (
    ALGORITHMS,
    Config,
    ConfigError,
    DataSourceConfig,
    ShadowConfig,
    TrainSection,
    load_config,
    log_prob_chunk_tokens,
    microbatch_token_multiple,
    read_model_config,
    required_pad_multiple,
    save_resolved,
    shadow_objectives,
    updates_per_step,
    validate,
    validate_model_layout,
    warnings_for,
    with_absolute_paths,
)
from megatron_fipo.config.errors import NOT_SHOWN, Problem, choice_problem, shown_value

SOUND = """
model:
  path: some/model
data:
  train:
    chain: {kind: chain_arithmetic, verifier: chain_arithmetic, params: {num_steps: 3}}
  evaluation:
    held_out: {kind: chain_arithmetic, verifier: chain_arithmetic, num_prompts: 64, seed: 1000}
rollout: {num_prompts: 8, max_prompt_tokens: 100, max_response_tokens: 50}
batch: {max_tokens_per_microbatch: 400}
"""


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.yaml"
    path.write_text(SOUND)
    return path


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def message_of(path: Path | None, *overrides: str, world_size: int | None = None) -> str:
    """The error that a configuration gives, at loading or at validation."""
    with pytest.raises(ConfigError) as caught:
        validate(load_config(path, overrides), world_size)
    return str(caught.value)


def problems_in(config: Config, world_size: int | None = None) -> tuple[Problem, ...]:
    """What validation finds, as data."""
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size)
    return caught.value.problems


def value_at(config: Config, problem: Problem) -> object:
    """The value of a problem's key; of a rule such as train.stop_when the metric, where that is what is wrong."""
    value: Any = dataclasses.asdict(config)
    for part in problem.key.split("."):
        value = value[part]
    return value.split()[0] if problem.key == "train.stop_when" and problem.value == value.split()[0] else value


# --- loading ---------------------------------------------------------------------------------------------------------


def test_the_sound_configuration_is_sound(sound: Path) -> None:
    config = load_config(sound)
    validate(config, world_size=4)
    assert config.data.train["chain"] == DataSourceConfig(
        kind="chain_arithmetic", verifier="chain_arithmetic", params={"num_steps": 3}
    )


def test_precedence_is_defaults_preset_file_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "algorithm: grpo\nobjective: {clip_ratio_high: 0.3}\ntrain: {num_steps: 7}\n")
    config = load_config(path, ["train.num_steps=5", "train.num_steps=6"])
    assert config.sampling.dynamic is False  # the preset beats the default
    assert config.objective.dual_clip is None
    assert config.objective.clip_ratio_high == 0.3  # the file beats the preset
    assert config.train.num_steps == 6  # the last override beats the file
    assert config.objective.clip_ratio_low == 0.2  # a default that nobody touched


def test_the_algorithm_comes_from_the_last_layer_that_names_it(tmp_path: Path) -> None:
    path = write(tmp_path, "algorithm: grpo\n")
    assert load_config(path).sampling.dynamic is False
    assert load_config(path, ["algorithm=dapo"]).sampling.dynamic is True
    assert load_config(path, ["algorithm=dapo"]).objective.future_kl is False
    assert load_config(None).objective.future_kl is True


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_preset_names_known_keys(algorithm: str) -> None:
    config = load_config(None, [f"algorithm={algorithm}"])
    for section, values in ALGORITHMS[algorithm].items():
        for name, value in values.items():
            assert getattr(getattr(config, section), name) == value


def test_overrides_reach_into_sources_and_make_new_ones(sound: Path) -> None:
    overrides = ["data.evaluation.gsm8k.num_prompts=20", "data.train.chain.params.num_steps=9"]
    config = load_config(sound, overrides)
    assert config.data.evaluation["gsm8k"].num_prompts == 20
    assert config.data.evaluation["held_out"].num_prompts == 64
    assert config.data.train["chain"].params == {"num_steps": 9}
    assert config.data.train["chain"].kind == "chain_arithmetic"


def test_shadow_objectives_come_from_the_file_and_from_overrides(tmp_path: Path) -> None:
    text = SOUND + "objective: {influence_max: 1.5, shadow: {tau_8: {half_life_tokens: 8}, plain: {}}}\n"
    overrides = ["objective.shadow.tau_8.influence_min=0.5", "objective.shadow.wide.influence_max=.inf"]
    config = load_config(write(tmp_path, text), overrides)
    validate(config, world_size=4)
    assert config.objective.shadow == {
        "tau_8": ShadowConfig(half_life_tokens=8.0, influence_min=0.5),
        "plain": ShadowConfig(),
        "wide": ShadowConfig(influence_max=float("inf")),
    }
    whole = shadow_objectives(config.objective)
    own = dataclasses.replace(config.objective, shadow={})
    assert whole == {
        "tau_8": dataclasses.replace(own, half_life_tokens=8.0, influence_min=0.5),
        "plain": own,
        "wide": dataclasses.replace(own, influence_max=float("inf")),
    }
    assert load_config(save_resolved(config, tmp_path)).objective == config.objective
    assert load_config(tmp_path / "config.yaml", ["objective.shadow={}"]).objective == own
    assert load_config(None).objective.shadow == {}


def test_as_many_shadows_as_are_allowed(sound: Path) -> None:
    validate(load_config(sound, [f"objective.shadow.a{number}={{}}" for number in range(16)]), world_size=4)


def test_dapo_with_fipo_as_a_shadow(sound: Path) -> None:
    config = load_config(sound, ["algorithm=dapo", "objective.shadow.fipo={}"])
    validate(config, world_size=4)
    assert config.objective.future_kl is False
    assert shadow_objectives(config.objective) == {"fipo": load_config(sound).objective}
    (warning,) = warnings_for(dataclasses.replace(config, train=TrainSection(num_minibatches=1)))
    assert "objective.shadow shows nothing: with one update per step" in warning


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("optimizer.learning_rate=5e-5", lambda c: c.optimizer.learning_rate, 5e-5),
        ("optimizer.learning_rate=1", lambda c: c.optimizer.learning_rate, 1.0),
        ("objective.influence_max=.inf", lambda c: c.objective.influence_max, float("inf")),
        ("metrics.wandb=off", lambda c: c.metrics.wandb, "off"),  # YAML 1.1 would make it false
        ("run.name=no", lambda c: c.run.name, "no"),
        ("run.name=12", lambda c: c.run.name, "12"),
        ("run.name=a=b", lambda c: c.run.name, "a=b"),
        ("train.resume=false", lambda c: c.train.resume, False),
        ("train.resume=off", lambda c: c.train.resume, False),
        ("parallel.virtual_pp=null", lambda c: c.parallel.virtual_pp, None),
        ("data.train.chain.system_prompt=", lambda c: c.data.train["chain"].system_prompt, ""),
        ("rollout={top_p: 0.5, temperature: 2}", lambda c: (c.rollout.top_p, c.rollout.num_prompts), (0.5, 8)),
        ("objective.sequence_sum_tokens=${rollout.max_response_tokens}", lambda c: c.objective.sequence_sum_tokens, 50),
    ],
)
def test_override_values(sound: Path, override: str, read: Any, expected: Any) -> None:
    value = read(load_config(sound, [override]))
    assert value == expected
    assert type(value) is type(expected)


def test_the_run_name_fills_the_output_folder() -> None:
    assert load_config(None, ["run.name=mine"]).run.output_dir == "outputs/mine"


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    empty = load_config(write(tmp_path, "# nothing\n"))
    assert empty == dataclasses.replace(Config(), run=dataclasses.replace(Config().run, output_dir="outputs/fipo"))


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("train.num_step=5", "train.num_step", "Did you mean train.num_steps?"),
        ("paralel.cp=2", "paralel", "Did you mean parallel?"),
        ("data.train.chain.num_promts=3", "data.train.chain.num_promts", "Did you mean data.train.chain.num_prompts?"),
        (
            "objective.shadow.tau.half_life=8",
            "objective.shadow.tau.half_life",
            "Did you mean objective.shadow.tau.half_life_tokens?",
        ),
        ("data.evaluation.new.kin=jsonl", "data.evaluation.new.kin", "Did you mean data.evaluation.new.kind?"),
        ("train.learning_rate=1", "train.learning_rate", "Did you mean optimizer.learning_rate?"),
        ("model.log_prob_chunk_tokens=512", "model.log_prob_chunk_tokens", "Did you mean model.log_prob_chunk_mib?"),
        ("temperatur=1", "temperatur", "Did you mean rollout.temperature or evaluation.temperature?"),
        ("train.xyzzy=1", "train.xyzzy", "Known here: num_steps, num_minibatches, num_epochs, stop_when, resume."),
    ],
)
def test_an_unknown_key_names_itself_its_place_and_the_nearest(sound: Path, override: str, key: str, hint: str) -> None:
    message = message_of(sound, override)
    assert message == f"unknown key {key} in override {override!r}. {hint}"


def test_unknown_keys_of_a_file_are_all_reported_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {steps: 3}\nparallel: {tpp: 2}\n")
    message = message_of(path)
    assert message.startswith(f"2 problems in {path}:")
    assert f"unknown key train.steps in {path}. Did you mean train.num_steps?" in message
    assert f"unknown key parallel.tpp in {path}. Did you mean parallel.tp?" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.num_steps=x", "train.num_steps='x' in override 'train.num_steps=x': a whole number was expected."),
        ("train.num_steps=1.5", "train.num_steps=1.5 in override 'train.num_steps=1.5': a whole number was expected."),
        (
            "train.num_steps=true",
            "train.num_steps=True in override 'train.num_steps=true': a whole number was expected.",
        ),
        ("train.resume=maybe", "train.resume='maybe' in override 'train.resume=maybe': true or false was expected."),
        (
            "objective.dual_clip=a",
            "objective.dual_clip='a' in override 'objective.dual_clip=a': a number or null was expected.",
        ),
        (
            "data.train.chain.weight=heavy",
            "data.train.chain.weight='heavy' in override 'data.train.chain.weight=heavy': a whole number was expected.",
        ),
        (
            "servers.gpus=0,1",
            "servers.gpus='0,1' in override 'servers.gpus=0,1': a list of whole numbers, such as [0,1], was expected.",
        ),
    ],
)
def test_a_wrong_type_names_key_value_and_type(sound: Path, override: str, expected: str) -> None:
    assert message_of(sound, override) == expected


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("train=3", "train=3 in override 'train=3': a section was expected"),
        ("data.train=[1]", "data.train=[1] in override 'data.train=[1]': sources by name were expected"),
        ("data.train.chain=null", "data.train.chain=null in override 'data.train.chain=null': a section was expected"),
        (
            "objective.shadow=[8]",
            "objective.shadow=[8] in override 'objective.shadow=[8]': settings by name were expected "
            "(objective.shadow.<name>.half_life_tokens)",
        ),
        (
            "objective.shadow.tau=8",
            "objective.shadow.tau=8 in override 'objective.shadow.tau=8': a section was expected",
        ),
        ("train.num_steps", "override 'train.num_steps' is not of the form section.key=value"),
        ("train..num_steps=3", "is not of the form section.key=value"),
        ("servers.gpus=[1", "override 'servers.gpus=[1' is not valid YAML"),
        ("train.num_steps=${run.nme}", "train.num_steps=${run.nme}: Interpolation key 'run.nme' not found."),
        ("train.num_steps=${run.name}", "could not be converted to Integer"),
        ("algorithm=fippo", "algorithm=fippo: must be one of fipo, dapo,"),
        ("algorithm=fippo", "Did you mean fipo?"),
        ("algorithm=[1]", "algorithm=[1]: must be one of"),
    ],
)
def test_malformed_input(sound: Path, override: str, fragment: str) -> None:
    assert fragment in message_of(sound, override)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("train: {num_steps: 1}\ntrain: {num_steps: 2}\n", "train is given twice"),
        ("train: [1\nrun: 2\n", "is not valid YAML"),
        ("- train\n", "holds a list; sections such as 'train:' were expected"),
        ("train:\n", "train=null"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, fragment: str) -> None:
    path = write(tmp_path, text)
    message = message_of(path)
    assert fragment in message
    assert str(path) in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in message_of(tmp_path / "none.yaml")


# --- validation ------------------------------------------------------------------------------------------------------

REFUSED = {
    "run.name=a\x1b[31m": ("run.name", "Remove it"),
    f"run.output_dir=out/{'x' * 256}": ("run.output_dir", "Shorten it"),
    "rollout.num_samples_per_prompt=9999999999999999999": ("rollout.num_samples_per_prompt", "Lower it"),
    "parallel.timeout_s=1e15": ("parallel.timeout_s", "23 days"),
    "data.train.a={kind: jsonl, path: x, verifier: math, seed: 1}": ("data.train.a.seed", "Remove it"),
    "optimizer.min_learning_rate=1e-8": ("optimizer.min_learning_rate", "optimizer.schedule to linear or cosine"),
    "checkpoint={every_num_steps: 5, keep_every_num_steps: 7}": (
        "checkpoint.keep_every_num_steps",
        "checkpoint.every_num_steps=5",
    ),
    "checkpoint.keep_every_num_steps=7": ("checkpoint.keep_every_num_steps", "checkpoint.every_num_steps=0"),
    "checkpoint.export_with_checkpoints=true": ("checkpoint.export_with_checkpoints", "checkpoint.every_num_steps=0"),
    "model.path=": ("model.path", "owner/name"),
    "model.dtype=bfloat": ("model.dtype", "Did you mean bfloat16?"),
    "model.recompute=some": ("model.recompute", ""),
    "model.log_prob_chunk_mib=0": ("model.log_prob_chunk_mib", ""),
    "model.transformer_engine=on": ("model.transformer_engine", ""),
    "run.name=": ("run.name", "Set run.output_dir"),
    "run.name=../../x": ("run.name", "Set run.output_dir"),
    "run.name=..": ("run.name", "Set run.output_dir"),
    "run.seed=-1": ("run.seed", ""),
    "data.overlong_prompts=drop": ("data.overlong_prompts", ""),
    "data.train.a.kind=parquet": ("data.train.a.verifier", "package.module:function"),
    "data.evaluation.held_out.kind=reasoning_gym": (
        "data.evaluation.held_out.verifier",
        "data.evaluation.held_out.verifier=reasoning_gym",
    ),
    "data.train.chain.verifier=mine:1st": ("data.train.chain.verifier", "package.module:function"),
    "data.train.chain.verifier=maths": ("data.train.chain.verifier", "Did you mean math?"),
    "data.train.chain.kind=json": ("data.train.chain.kind", "Did you mean jsonl?"),
    "data.train.chain.kind=jsonl": ("data.train.chain.path", "kind=jsonl reads a file"),
    "data.train.hub.kind=hub": ("data.train.hub.path", "openai/gsm8k"),
    "data.train.set={kind: hub, path: ./a, split: x}": ("data.train.set.path", "kind=jsonl"),
    "data.train.set={kind: hub, path: a/b}": ("data.train.set.split", "data.train.set.split=train"),
    "data.train.chain.subset=main": ("data.train.chain.subset", "set kind=hub"),
    "data.train.chain.split=train": ("data.train.chain.split", "set kind=hub"),
    "data.train.chain.revision=v1": ("data.train.chain.revision", "set kind=hub"),
    "data.train.chain.revision=''": ("data.train.chain.revision", ""),
    "model.revision=''": ("model.revision", ""),
    "checkpoint.push_to_hub=mine": ("checkpoint.push_to_hub", "such as me/my-model"),
    "checkpoint={push_to_hub: a/b, export_huggingface: false}": (
        "checkpoint.push_to_hub",
        "checkpoint.export_huggingface=false",
    ),
    "data.train.chain.path=x.jsonl": ("data.train.chain.path", "change the kind"),
    "data.train.chain.kind=reasoning_gym": ("data.train.chain.task", "task=chain_sum"),
    "data.train.chain.task=chain_sum": ("data.train.chain.task", "Remove it"),
    "data.train.chain.verifier=reasoning_gym": ("data.train.chain.verifier", "this kind is chain_arithmetic"),
    "data.train.chain.prompt_template=Solve": ("data.train.chain.prompt_template", "{prompt}"),
    "data.train.chain.system_prompt=Hello": ("data.train.chain.system_prompt", "data.train.chain.chat_template=true"),
    "data.train.chain.weight=0": ("data.train.chain.weight", ""),
    "data.train.a/b.weight=1": ("data.train", "Use letters"),
    "data.evaluation.held_out.seed=null": ("data.evaluation.held_out", "Set data.evaluation.held_out.seed"),
    "data.evaluation.held_out.num_prompts=null": (
        "data.evaluation.held_out",
        "Set data.evaluation.held_out.num_prompts",
    ),
    "rollout.engine=sglan": ("rollout.engine", "Did you mean sglang?"),
    "rollout.num_samples_per_prompt=1": ("rollout.num_samples_per_prompt", "advantages compare"),
    "rollout.temperature=0": ("rollout.temperature", "evaluation.temperature=0"),
    "rollout.temperature=.nan": ("rollout.temperature", "evaluation.temperature=0"),
    "rollout.top_p=0": ("rollout.top_p", ""),
    "rollout.top_p=1.01": ("rollout.top_p", ""),
    "verifier.timeout_s=0": ("verifier.timeout_s", ""),
    "verifier.trusted=[judges:verify]": ("verifier.trusted", "these are chain_arithmetic"),
    "reward.correct=-1": ("reward.correct", "reward.incorrect=-1.0"),
    "reward.overlong_buffer_tokens=50": ("reward.overlong_buffer_tokens", "rollout.max_response_tokens=50"),
    "sampling.max_generation_rounds=0": ("sampling.max_generation_rounds", ""),
    "sampling={streaming: true, max_surplus_age_steps: 1}": (
        "sampling.max_surplus_age_steps",
        "must be 0 with sampling.streaming",
    ),
    "rollout.max_staleness_steps=-1": ("rollout.max_staleness_steps", ""),
    "rollout.max_staleness_steps=1": ("rollout.max_staleness_steps", "sampling.streaming=true"),
    "rollout.in_flight=in_place": ("rollout.in_flight", "rollout.overlap=true"),
    "rollout.overlap=true": ("rollout.overlap", "rollout.max_staleness_steps=1"),
    "rollout.too_stale=keep": ("rollout.too_stale", "drop, mask"),
    "rollout.too_stale=mask": ("rollout.too_stale", "rollout.max_staleness_steps=0"),
    "advantages.estimator=gae": ("advantages.estimator", ""),
    "objective.clip_ratio_low=1.5": ("objective.clip_ratio_low", ""),
    "objective.dual_clip=1": ("objective.dual_clip", "or null to turn it off"),
    "objective.dual_clip=null": ("objective.dual_clip", "objective.dual_clip=10"),
    "objective.old_log_probs=rollout": ("objective.old_log_probs", "objective.old_log_probs=actor"),
    "objective.future_kl_reference=rollout": ("objective.future_kl_reference", "proximal, behaviour"),
    "objective.rollout_correction=icepop": ("objective.rollout_correction", "geometric_masked"),
    "objective.rollout_ratio_min=1": ("objective.rollout_ratio_min", ""),
    "objective.rollout_ratio_max=1": ("objective.rollout_ratio_max", ""),
    "objective.half_life_tokens=0": ("objective.half_life_tokens", ""),
    "objective.influence_min=1.3": ("objective.influence_min", "objective.influence_max=1.2"),
    "objective.loss_aggregation=sequence_sum": ("objective.sequence_sum_tokens", "rollout.max_response_tokens=50"),
    "objective.future_kl=false": ("objective.future_kl", "algorithm=dapo"),
    "objective.shadow.tau.half_life_tokens=0": (
        "objective.shadow.tau.half_life_tokens",
        "or null to take the objective",
    ),
    "objective.shadow.tau.dual_clip=1": ("objective.shadow.tau.dual_clip", ""),
    "objective.shadow.a/b.half_life_tokens=8": ("objective.shadow", "Use letters"),
    "objective.shadow.a.influence_max=0.5": ("objective.shadow.a.influence_max", "objective.influence_min=1.0"),
    "objective.shadow.a.influence_min=1.3": ("objective.shadow.a.influence_min", "objective.influence_max=1.2"),
    "objective.shadow={a: {influence_min: 0.5, influence_max: 0.4}}": (
        "objective.shadow.a.influence_min",
        "objective.shadow.a.influence_max=0.4",
    ),
    "objective={dual_clip: null, shadow: {a: {half_life_tokens: 8}}}": (
        "objective.shadow.a.dual_clip",
        "objective.shadow.a.filter_extreme_ratios=false",
    ),
    "objective={old_log_probs: rollout, shadow: {a: {}}}": ("objective.shadow", "objective.shadow={}"),
    f"objective.shadow={{{', '.join(f'a{i}: {{}}' for i in range(17))}}}": ("objective.shadow", "at most 16"),
    "train.num_minibatches=3": ("train.num_minibatches", "one of 1, 2, 4, 8"),
    "train.num_minibatches=16": ("train.num_minibatches", "one of 1, 2, 4, 8"),
    "optimizer.num_warmup_steps=-1": ("optimizer.num_warmup_steps", ""),
    "optimizer.schedule=step": ("optimizer.schedule", ""),
    "optimizer.num_decay_steps=5": ("optimizer.num_decay_steps", "optimizer.schedule to linear or cosine"),
    "optimizer.min_learning_rate=-1": ("optimizer.min_learning_rate", ""),
    "train.stop_when=avg@4 > 0.9": ("train.stop_when", "must be a metric, >= or <=, and a number"),
    "train.stop_when=evaluation/held/avg@4 >= 0.9": ("train.stop_when", "Did you mean evaluation/held_out/avg@32?"),
    "checkpoint.keep_best=evaluation/held_out/avg@5": (
        "checkpoint.keep_best",
        "Did you mean evaluation/held_out/avg@32?",
    ),
    "optimizer.adam_beta2=1": ("optimizer.adam_beta2", ""),
    "parallel.sequence_parallel=true": ("parallel.sequence_parallel", "parallel.tp above 1"),
    "model.fp8=delayed": ("model.fp8", ""),
    "model.fp8=tensorwise": ("model.fp8", "model.dtype=bfloat16"),
    "parallel.virtual_pp=2": ("parallel.virtual_pp", "parallel.pp above 1"),
    "parallel.virtual_pp=1": ("parallel.virtual_pp", "or null for the plain schedule"),
    "parallel.cp=3": ("parallel", "4 processes cannot hold whole copies of the model"),
    "batch.max_tokens_per_microbatch=149": ("batch.max_tokens_per_microbatch", "at least 150"),
    "batch.pad_multiple=500": ("batch.max_tokens_per_microbatch", "at least 500"),
    "evaluation.top_p=2": ("evaluation.top_p", ""),
    "metrics.num_samples_per_step=-1": ("metrics.num_samples_per_step", ""),
    "metrics.trace_every_num_steps=-1": ("metrics.trace_every_num_steps", "at least 0"),
    "metrics.num_traced_groups=0": ("metrics.num_traced_groups", "at least 1"),
    "metrics.max_traced_tokens=0": ("metrics.max_traced_tokens", "at least 1"),
    "metrics.wandb=on": ("metrics.wandb", ""),
    "checkpoint.keep_last=0": ("checkpoint.keep_last", ""),
}
"""Override -> key of the problem, and words of its rule or remedy; none where the declaration alone is broken."""


def test_evaluation_on_nothing_is_refused(sound: Path) -> None:
    message = message_of(sound, "data.evaluation={}", "evaluation.every_num_steps=5")
    assert "evaluation.every_num_steps=5: data.evaluation is empty" in message


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_run_is_refused(sound: Path, override: str) -> None:
    key, words = REFUSED[override]
    config = load_config(sound, [override])
    found = [
        problem
        for problem in problems_in(config, world_size=4)
        if problem.key == key and words in f"{problem.rule}. {problem.remedy}"
    ]
    assert len(found) == 1
    assert found[0].value is NOT_SHOWN or shown_value(found[0].value) == shown_value(value_at(config, found[0]))


def test_training_needs_a_source(tmp_path: Path) -> None:
    assert "data.train is empty" in message_of(write(tmp_path, "model: {path: x}\n"))


def test_all_problems_are_reported_together(sound: Path) -> None:
    message = message_of(sound, "model.dtype=int8", "train.num_epochs=0", "rollout.num_prompts=0")
    assert message.startswith("3 problems in the configuration:\n  - model.dtype=int8")
    assert "train.num_epochs=0" in message
    assert "rollout.num_prompts=0" in message


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["algorithm=dapo", "objective.future_kl=true"], "objective.future_kl=true: contradicts algorithm=dapo"),
        (["algorithm=dapo", "objective.future_kl=true"], "take algorithm=fipo."),
        (
            ["algorithm=dapo", "objective.old_log_probs=rollout", "objective.rollout_correction=token_masked"],
            "rollout_correction=token_masked: with objective.old_log_probs=rollout the old policy is the engine's",
        ),
        (["algorithm=rloo", "advantages.estimator=group_std"], "contradicts algorithm=rloo"),
        (
            ["algorithm=grpo_sequence_mean", "objective.loss_aggregation=token_mean"],
            "contradicts algorithm=grpo_sequence",
        ),
        (["algorithm=dr_grpo"], "objective.sequence_sum_tokens=null"),
    ],
)
def test_an_algorithm_is_what_its_name_says(sound: Path, overrides: list[str], fragment: str) -> None:
    assert fragment in message_of(sound, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm=dapo"],
        ["algorithm=grpo", "objective.old_log_probs=rollout", "objective.clip_ratio_high=0.28"],
        ["algorithm=dr_grpo", "objective.sequence_sum_tokens=50"],
        ["algorithm=rloo"],
        ["sampling.streaming=true", "rollout.max_staleness_steps=2", "rollout.too_stale=mask"],
        ["sampling.streaming=true", "rollout.max_staleness_steps=1", "rollout.overlap=true", "rollout.engine=vllm"],
        ["objective.influence_min=0", "objective.influence_max=.inf"],
        ["objective.half_life_tokens=256", "objective.filter_extreme_ratios=false", "objective.clip_ratio_high=0.4"],
        ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=2"],
        ["parallel.pp=2", "parallel.virtual_pp=2"],
        ["batch.max_tokens_per_microbatch=150"],
        ["data.train.chain.verifier=my_package.judges:judge"],
        ["evaluation.temperature=0", "evaluation.max_response_tokens=5000"],
    ],
)
def test_what_can_run_is_accepted(sound: Path, overrides: list[str]) -> None:
    validate(load_config(sound, overrides), world_size=4)


@pytest.mark.parametrize("where", ["rollout.engine=in_process", "servers.placement=colocated"])
def test_overlap_needs_devices_of_its_own(sound: Path, where: str) -> None:
    overrides = [
        "sampling.streaming=true",
        "rollout.max_staleness_steps=1",
        "rollout.overlap=true",
        "rollout.engine=vllm",
    ]
    with pytest.raises(
        ConfigError, match=f"rollout.overlap=true: needs servers with devices of their own: with {where}"
    ):
        validate(load_config(sound, [*overrides, where]), world_size=4)


@pytest.mark.parametrize(
    ("tp", "cp", "sequence_parallel", "expected"),
    [
        (1, 1, False, 1),
        (4, 1, False, 1),
        (1, 2, False, 4),
        (1, 4, False, 8),
        (4, 1, True, 4),
        (2, 2, True, 4),
        (4, 2, True, 8),  # a context-parallel rank holds T / 2 tokens, which 4 must divide: lcm(4, 4) = 4 would not do
        (3, 2, True, 12),
    ],
)
def test_required_pad_multiple(tp: int, cp: int, sequence_parallel: bool, expected: int) -> None:
    overrides = [
        f"parallel.tp={tp}",
        f"parallel.cp={cp}",
        f"parallel.sequence_parallel={str(sequence_parallel).lower()}",
    ]
    assert required_pad_multiple(load_config(None, overrides)) == expected


def test_evaluation_alone_needs_no_data_to_train_on(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.yaml"
    training = "  train:\n    chain: {kind: chain_arithmetic, verifier: chain_arithmetic, params: {num_steps: 3}}\n"
    assert training in SOUND
    path.write_text(SOUND.replace(training, ""))
    validate(load_config(path), is_for_training=False)
    assert message_of(path).startswith("data.train is empty: a run needs at least one source")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 1),
        (["parallel.cp=2"], 4),
        (["model.fp8=tensorwise"], 16),
        (["model.fp8=mxfp8", "parallel.tp=4"], 32),
        (["model.fp8=tensorwise", "parallel.cp=4"], 64),
        (["model.fp8=blockwise", "parallel.tp=8", "parallel.cp=4", "parallel.sequence_parallel=true"], 4096),
        (["model.fp8=tensorwise", "batch.pad_multiple=24"], 48),
    ],
)
def test_fp8_wants_whole_blocks_of_rows_on_every_rank(overrides: list[str], expected: int) -> None:
    assert microbatch_token_multiple(load_config(None, overrides)) == expected


def test_a_microbatch_must_hold_the_longest_sequence_in_whole_blocks(sound: Path) -> None:
    precise = ("model.dtype=bfloat16", "model.fp8=blockwise")
    validate(load_config(sound, [*precise, "batch.max_tokens_per_microbatch=256"]))
    message = message_of(sound, *precise, "batch.max_tokens_per_microbatch=255")
    assert "takes 256 tokens with padding" in message


def test_pad_multiple_must_suit_the_layout(sound: Path) -> None:
    message = message_of(sound, "parallel.cp=2", "batch.pad_multiple=6")
    assert message.startswith("batch.pad_multiple=6: cp=2, tp=1 and sequence_parallel=false need")
    assert "Set it to 4" in message
    assert "takes 152 tokens" in message_of(sound, "parallel.cp=2", "batch.max_tokens_per_microbatch=151")
    validate(load_config(sound, ["parallel.cp=2", "batch.pad_multiple=12"]))


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (Problem("a.b", 3, "must be even", "Double it"), "a.b=3: must be even. Double it."),
        (Problem("a.b", 3, "must be even"), "a.b=3: must be even."),
        (Problem("a.b", None, "a number is needed"), "a.b=null: a number is needed."),
        (Problem("a.b", True, "needs c"), "a.b=true: needs c."),
        (Problem("a.b", "", "a file is read", "Set it"), "a.b is empty: a file is read. Set it."),
        (Problem("a.b", [], "GPUs are needed"), "a.b is empty: GPUs are needed."),
        (Problem("a.b", NOT_SHOWN, "is secret", "Remove it."), "a.b: is secret. Remove it."),
        (Problem("a.b", "x\x1b", "is odd"), "a.b='x\\x1b': is odd."),
        (Problem("a.b", "x" * 300, "is long"), f"a.b={'x' * 200}…: is long."),
        (choice_problem("a.b", "tw", ("one", "two")), "a.b=tw: must be one of one, two. Did you mean two?"),
        (choice_problem("a.b", "q", ("one", "two")), "a.b=q: must be one of one, two."),
    ],
)
def test_a_problem_is_one_sentence_and_a_remedy(problem: Problem, sentence: str) -> None:
    assert str(problem) == sentence


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.num_epochs=0", "train.num_epochs=0: must be at least 1."),
        ("servers.base_port=80", "servers.base_port=80: must be between 1024 and 65535, or null."),
        ("parallel.virtual_pp=1", "parallel.virtual_pp=1: must be at least 2, or null for the plain schedule."),
        (
            "rollout.temperature=0",
            "rollout.temperature=0.0: must be above 0 and finite: training samples its responses. "
            "evaluation.temperature=0 evaluates greedily.",
        ),
        (
            "data.train.chain.verifier_weights=[1.0,-1.0]",
            "data.train.chain.verifier_weights=[1.0, -1.0]: each number must be at least 0 and finite: 0 shows a "
            "verifier's score without counting it.",
        ),
        ("servers.gpus=[0,0]", "servers.gpus=[0, 0]: must be different numbers from 0 on."),
        (
            "data.train.chain.verifier=[]",
            "data.train.chain.verifier is empty: a verifier's name, or a list of several, was expected, such as "
            "[math, my_rewards:format] with verifier_weights=[1.0, 0.2].",
        ),
    ],
)
def test_what_a_broken_declaration_says(sound: Path, override: str, sentence: str) -> None:
    assert message_of(sound, override) == sentence


def test_what_a_source_is_refused_for_by_itself_is_said_once(sound: Path) -> None:
    (problem,) = problems_in(load_config(sound, ["data.train.chain.schema=gsm"]))
    assert problem == choice_problem(
        "data.train.chain.schema", "gsm", ("columns", "dapo_math", "aime", "gsm8k", "humaneval", "mbpp")
    )


# --- the model's layout ----------------------------------------------------------------------------------------------

MODEL = {"num_attention_heads": 12, "num_key_value_heads": 2, "num_hidden_layers": 6, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["parallel.tp=8"], "parallel.tp=8: must divide the model's num_attention_heads=12."),
        (["parallel.tp=3"], "parallel.tp=3: must divide the model's num_key_value_heads=2, or be a multiple of it."),
        (["parallel.tp=5"], "parallel.tp=5: must divide the model's intermediate_size=96."),
        (["parallel.pp=4"], "parallel.pp=4: 4 stages must divide the model's num_hidden_layers=6."),
        (["parallel.pp=2", "parallel.virtual_pp=2"], "parallel.pp=2: 4 stages (x parallel.virtual_pp=2) must divide"),
    ],
)
def test_layouts_that_the_model_does_not_divide_into(overrides: list[str], fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_model_layout(load_config(None, overrides), MODEL)
    assert fragment in str(caught.value)


@pytest.mark.parametrize("overrides", [[], ["parallel.tp=2"], ["parallel.tp=4", "parallel.pp=3"], ["parallel.pp=6"]])
def test_layouts_that_the_model_divides_into(overrides: list[str]) -> None:
    validate_model_layout(load_config(None, overrides), MODEL)


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["model.fp8=tensorwise"], ""),
        (["model.fp8=blockwise", "parallel.tp=4"], ""),
        (
            ["model.fp8=blockwise", "parallel.tp=8"],
            "model.fp8=blockwise: needs multiples of 128, and the model's intermediate_size / tp is 2368. Lower",
        ),
    ],
)
def test_fp8_wants_whole_blocks_of_columns(overrides: list[str], fragment: str) -> None:
    """Qwen2.5-7B, with 32 heads so that 8 divide them."""
    model = {"num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 28, "hidden_size": 4096}
    config = load_config(None, overrides)
    if not fragment:
        validate_model_layout(config, model | {"intermediate_size": 18944})
        return
    with pytest.raises(ConfigError, match=re.escape(fragment)):
        validate_model_layout(config, model | {"intermediate_size": 18944})


def test_a_model_without_grouped_queries_has_as_many_groups_as_heads() -> None:
    plain = {name: size for name, size in MODEL.items() if name != "num_key_value_heads"}
    validate_model_layout(load_config(None, ["parallel.tp=3"]), plain)


def test_a_model_config_without_sizes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.json has no whole number for num_hidden_layers"):
        validate_model_layout(load_config(None), {"num_attention_heads": 2, "intermediate_size": 8})


def test_read_model_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6')
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[6]")
    with pytest.raises(ConfigError, match="holds a list"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6}')
    assert read_model_config(tmp_path) == {"num_hidden_layers": 6}


# --- warnings --------------------------------------------------------------------------------------------------------


def test_one_update_per_step_makes_fipo_inert(sound: Path) -> None:
    inert = load_config(sound, ["train.num_minibatches=1"])
    assert updates_per_step(inert) == 1
    assert [text for text in warnings_for(inert) if text.startswith("FIPO is inert")]
    for overrides in (["train.num_minibatches=1", "train.num_epochs=2"], ["train.num_minibatches=1", "algorithm=dapo"]):
        assert not [text for text in warnings_for(load_config(sound, overrides)) if "inert" in text]
    assert updates_per_step(load_config(sound, ["train.num_minibatches=4", "train.num_epochs=3"])) == 12


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("rollout.top_p=0.9", "rollout.top_p=0.9 samples from a truncated distribution"),
        ("train.num_steps=9", "the learning rate never reaches 1e-06"),
        ("objective.influence_max=1", "influence weights cannot vary"),
        ("objective.future_kl_reference=behaviour", "objective.future_kl_reference=behaviour is an ablation"),
        ("objective.rollout_correction=geometric_masked", "hardly masks anything"),
        ("verifier.trusted=[chain_arithmetic]", "chain_arithmetic judges what the model writes with all rights"),
    ],
)
def test_warnings(sound: Path, override: str, fragment: str) -> None:
    assert warnings_for(load_config(sound)) == []
    found = warnings_for(load_config(sound, [override]))
    assert [fragment in text for text in found] == [True]


def test_the_ablation_is_warned_about_where_there_is_future_kl(sound: Path) -> None:
    """Beside a file with the key, algorithm=dapo still gives the comparison, and has nothing to warn about."""
    ablation = "objective.future_kl_reference=behaviour"
    config = load_config(sound, [ablation, "algorithm=dapo"])
    validate(config, world_size=4)
    assert warnings_for(config) == []
    message = message_of(sound, ablation, "objective.old_log_probs=rollout")
    assert "objective.old_log_probs=rollout: rollout log-probs as π_old are refused" in message


def test_corrections_that_do_not_suit_the_length(sound: Path) -> None:
    long = ["rollout.max_response_tokens=4096", "batch.max_tokens_per_microbatch=8192"]
    found = warnings_for(load_config(sound, [*long, "objective.rollout_correction=sequence_masked"]))
    assert [text for text in found if "multiplies ratios over whole responses" in text]
    for fitting in (
        ["objective.rollout_correction=sequence_masked"],
        [*long, "objective.rollout_correction=token_masked"],
        [*long, "objective.rollout_correction=geometric_masked", "objective.rollout_ratio_max=1.001"],
    ):
        assert warnings_for(load_config(sound, fitting)) == []


def test_greedy_samples_are_alike(sound: Path) -> None:
    found = warnings_for(load_config(sound, ["evaluation.temperature=0", "evaluation.num_samples_per_prompt=4"]))
    assert [text for text in found if "all 4 responses will be alike" in text]


def test_sequences_beyond_the_positions_of_the_model(sound: Path) -> None:
    config = load_config(sound)
    assert warnings_for(config, {"max_position_embeddings": 150}) == []
    assert "max_position_embeddings=149" in warnings_for(config, {"max_position_embeddings": 149})[0]


# --- the resolved configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_resolved_configuration_reads_back(sound: Path, tmp_path: Path, algorithm: str) -> None:
    config = load_config(sound, [f"algorithm={algorithm}", "objective.influence_max=.inf", "metrics.wandb=off"])
    path = save_resolved(config, tmp_path / "run" / "folder")
    assert path == tmp_path / "run" / "folder" / "config.yaml"
    assert load_config(path) == with_absolute_paths(config)


@settings(max_examples=30, deadline=None)
@given(
    st.one_of(
        st.text(alphabet="\\${}.ab: #'\"\n", max_size=12),
        st.sampled_from(
            ["no", "1e-6", "null", "0x7", "1_0", "${run.name}", "\\${x}", "1:30", "2026-01-01", "~", "", " a"]
        ),
    )
)
def test_texts_survive_the_resolved_configuration(text: str) -> None:
    source = DataSourceConfig(prompt_template=text, params={"nested": [text, {"x": text}], "number": 1e-6})
    defaults = load_config(None)
    config = dataclasses.replace(defaults, data=dataclasses.replace(defaults.data, train={"a": source}))
    with tempfile.TemporaryDirectory() as folder:
        assert load_config(save_resolved(config, folder)) == with_absolute_paths(config)


# --- derived numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk_mib", "rows", "tokens"),
    [
        (512.0, 152_064, 768),  # 882 fit
        (512.0, 19_072, 6_912),  # 7,037 fit
        (96.0, 49_152, 512),  # as many as fit
        (0.25, 128, 512),
        (64.0, 152_064, 96),  # 110 fit: whole tiles of 16
        (4.0, 152_064, 6),
        (0.1, 152_064, 1),
    ],
)
def test_tokens_of_a_log_prob_chunk(chunk_mib: float, rows: int, tokens: int) -> None:
    assert log_prob_chunk_tokens(chunk_mib, rows) == tokens
    assert tokens == 1 or tokens * rows * 4 <= chunk_mib * 2**20
