"""Keys of TRL, verl and slime: the table, the page made of it, and the hints it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fipo.config import ConfigError, load_config
from megatron_fipo.config.foreign_keys import FRAMEWORKS, foreign_hint
from megatron_fipo.config.foreign_keys.entry import ForeignKey, key
from megatron_fipo.config.keys import _known_keys
from tools.docs import migration

ENTRIES = [entry for topics in FRAMEWORKS.values() for entries in topics.values() for entry in entries]


def names_of(trainer: str) -> list[str]:
    return [entry.name for entries in FRAMEWORKS[trainer].values() for entry in entries]


def unknown_targets(entry: ForeignKey) -> list[str]:
    known = set(_known_keys())
    return [name for name in entry.keys if name not in known]


@pytest.mark.parametrize(("trainer", "least"), [("TRL", 45), ("verl", 60), ("slime", 50)])
def test_the_table_is_broad_and_names_each_key_once(trainer: str, least: int) -> None:
    names = names_of(trainer)
    assert len(names) >= least
    assert len(set(names)) == len(names)


def test_every_key_of_ours_exists_and_every_other_says_what_there_is() -> None:
    assert [entry for entry in ENTRIES if unknown_targets(entry)] == []
    assert [entry for entry in ENTRIES if not entry.keys and not entry.note] == []
    assert [entry for entry in ENTRIES if entry.note and not entry.note.endswith((".", ".)"))] == []


def test_a_key_that_does_not_exist_is_noticed() -> None:
    assert unknown_targets(key("--lr", "optimizer.learning_rate optimizer.lr")) == ["optimizer.lr"]


def test_the_page_is_up_to_date() -> None:
    assert migration.TARGET.read_text(encoding="utf-8") == migration.page(), "run python tools/docs/migration.py"


def test_the_page_has_every_entry() -> None:
    page = migration.TARGET.read_text(encoding="utf-8")
    assert [name for trainer in FRAMEWORKS for name in names_of(trainer) if f"| `{name}` | " not in page] == []


def message_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        (
            "lr=1",
            "lr",
            "Did you mean optimizer.learning_rate (verl's actor_rollout_ref.actor.optim.lr, slime's --lr, NeMo-RL's "
            "policy.optimizer.kwargs.lr, ms-swift's lr)?",
        ),
        (
            "grpo={num_prompts_per_step: 32}",
            "grpo.num_prompts_per_step",
            "Did you mean rollout.num_prompts (NeMo-RL's grpo.num_prompts_per_step)? Both count prompts.",
        ),
        (
            "fipo_decay_rate=32",
            "fipo_decay_rate",
            "Did you mean objective.half_life_tokens (ms-swift's fipo_decay_rate)? The distance at which influence has "
            "halved, as there.",
        ),
        ("parallel.tensor_parallel=2", "parallel.tensor_parallel", "Did you mean parallel.tp?"),
        ("model.name=x", "model.name", "Did you mean model.path?"),
        (
            "train.num_generations=8",
            "train.num_generations",
            "Did you mean rollout.num_samples_per_prompt (TRL's num_generations)?",
        ),
        (
            "actor.ppo_mini_batch_size=64",
            "actor.ppo_mini_batch_size",
            "Did you mean train.num_minibatches (verl's actor_rollout_ref.actor.ppo_mini_batch_size)? verl gives "
            "prompts in a minibatch, we give the number of minibatches: data.train_batch_size / ppo_mini_batch_size.",
        ),
        (
            "algorithm.filter_groups.enable=true",
            "algorithm.filter_groups.enable",
            "Did you mean sampling.dynamic (verl's algorithm.filter_groups.enable)? On here with fipo and dapo.",
        ),
        (
            "critic.optim.lr=1e-5",
            "critic.optim.lr",
            "Nothing here is set by verl's critic.*. There is no critic: advantages are those of groups.",
        ),
        (
            "parallel.tensor_model_parallel_size=2",
            "parallel.tensor_model_parallel_size",
            "Did you mean parallel.tp (verl's actor_rollout_ref.actor.megatron.tensor_model_parallel_size, slime's "
            "--tensor-model-parallel-size, NeMo-RL's policy.megatron_cfg.tensor_model_parallel_size, ms-swift's "
            "tensor_model_parallel_size)?",
        ),
        (
            "async_training.staleness_threshold=0.5",
            "async_training.staleness_threshold",
            "Did you mean rollout.max_staleness_steps (verl's async_training.staleness_threshold)? verl's is the share "
            "of a batch that may be generated ahead, ours a bound in steps on every token; verl's 1 is about ours. "
            "Generation and training take turns here.",
        ),
        (
            "partial_rollout=true",
            "partial_rollout",
            "Did you mean sampling.streaming or rollout.max_staleness_steps (verl's async_training.partial_rollout, "
            "slime's --partial-rollout)?",
        ),
        (
            "rollout.n=4",
            "rollout.n",
            "Did you mean rollout.num_samples_per_prompt (verl's actor_rollout_ref.rollout.n)?",
        ),
    ],
)
def test_a_foreign_key_is_answered_with_ours(override: str, key: str, hint: str) -> None:
    assert message_of(override) == f"unknown key {key} in override {override!r}. {hint}"


def test_our_own_names_come_first() -> None:
    assert "Did you mean train.num_epochs?" in message_of("train.num_epoch=2")  # not slime's --num-epoch
    assert "Did you mean rollout.temperature or evaluation.temperature?" in message_of("temperature=1")
    assert "Did you mean train?" in message_of("trainer.num_steps=2")
    assert "Did you mean" not in message_of("train.xyzzy=1")


def test_each_key_of_a_foreign_section_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "verl.yaml"
    path.write_text("actor_rollout_ref:\n  actor: {ppo_epochs: 1, brand_new: 2}\n  rollout: {n: 8, temperature: 1.0}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [])
    message = str(caught.value)
    assert "actor_rollout_ref.actor.ppo_epochs" in message
    assert "Did you mean train.num_epochs" in message
    assert f"unknown key actor_rollout_ref.actor.brand_new in {path}. docs/migration.md has no counterpart" in message
    assert "Did you mean rollout.num_samples_per_prompt" in message
    assert "Did you mean rollout.temperature (" in message


def test_every_foreign_key_written_out_finds_itself_and_ours() -> None:
    hints = {entry: foreign_hint(entry.name.replace("*", "anything")) or "" for entry in ENTRIES}
    assert [entry for entry, hint in hints.items() if entry.name not in hint] == []
    assert [entry for entry, hint in hints.items() if any(name not in hint for name in entry.keys)] == []


@pytest.mark.parametrize("name", ["name", "optimizer.name", "enable", "servers.mode", "train.n", "run.path", ""])
def test_what_could_be_anything_gives_no_hint(name: str) -> None:
    assert foreign_hint(name) is None
