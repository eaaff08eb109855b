"""Checks that a configuration can run."""

from __future__ import annotations

from dataclasses import replace

from megatron_fipo.config.cross_rules import cross_problems
from megatron_fipo.config.cross_rules.sources import data_problems, source_problems
from megatron_fipo.config.cross_rules.training import objective_problems
from megatron_fipo.config.errors import ConfigError
from megatron_fipo.config.sections import Config, DataSourceConfig, FipoConfig
from megatron_fipo.config.values import section_problems


def validate(config: Config, world_size: int | None = None, *, is_for_training: bool = True) -> None:
    """Refuse what cannot run, before any model is built.

    Args:
        config: as `load_config` returned it.
        world_size: number of processes; None skips the rules that need it.
        is_for_training: false skips the rules for training alone: its data, batches, objective and layout.

    Raises:
        ConfigError: naming for every problem the key, its value, the rule and what to do.
    """
    problems = list(section_problems(config, ""))
    are_values_sound = not problems
    problems += data_problems(config, is_for_training=is_for_training)
    if are_values_sound:  # combinations divide by values that must be sound first
        problems += cross_problems(config, world_size, is_for_training=is_for_training)
    if problems:
        raise ConfigError.of(problems)


def require_source(source: DataSourceConfig) -> None:
    """Refuse a data source that cannot be used, as far as that can be known without reading files.

    Raises:
        ConfigError: naming for every problem the key of the source, its value, the rule and what to do.
    """
    if problems := list(source_problems("", source)):
        raise ConfigError.of(problems, where="the data source")


def check_objective(objective: FipoConfig) -> None:
    """Refuse an objective that a run would refuse, for whoever builds one without a run's configuration.

    Raises:
        ConfigError: see `validate`.
    """
    problems = list(section_problems(objective, "objective."))
    if problems := problems or list(objective_problems(replace(Config(), objective=objective))):
        raise ConfigError.of(problems, "the objective")
