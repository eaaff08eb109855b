"""Who judges a data source's responses: one verifier by name, or several with weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from megatron_fipo.config.declaration import declaration_of, problems_of
from megatron_fipo.config.errors import NOT_SHOWN, ConfigError, Problem
from megatron_fipo.config.sections import DataSourceConfig

_DECLARED = next(declaration_of(item) for item in fields(DataSourceConfig) if item.name == "verifier")


def verifier_names(source: DataSourceConfig) -> list[str]:
    """Names of a source's verifiers, in its order; empty where they are no names."""
    names = [source.verifier] if isinstance(source.verifier, str) else source.verifier
    is_sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return list(names) if is_sound else []


def verifier_weights(source: DataSourceConfig) -> dict[str, float]:
    """Weight of each of a source's verifiers, in the order in which it names them.

    Raises:
        ValueError: if they cannot be read; `cross_rules.sources` gives the full message.
    """
    assert _DECLARED.check is not None, "it has one"
    if rule := _DECLARED.check(source.verifier):
        raise ConfigError.of([Problem("verifier", source.verifier, rule)])
    if problems := list(weight_problems("", source)):
        raise ConfigError.of(problems)
    names = verifier_names(source)
    return dict(zip(names, source.verifier_weights or [1.0] * len(names), strict=True))


def weight_problems(prefix: str, source: DataSourceConfig) -> Iterator[Problem]:
    """What is wrong between a source's verifiers and their weights; `prefix` stands before its keys in messages."""
    names, weights = verifier_names(source), source.verifier_weights
    if isinstance(source.verifier, str) and weights:
        yield Problem(
            f"{prefix}verifier_weights",
            weights,
            f"the one verifier {source.verifier} has nothing to be weighed against",
            f"Remove them, or name several: {prefix}verifier=[{source.verifier}, my_rewards:format]",
        )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        yield Problem(
            f"{prefix}verifier",
            NOT_SHOWN,
            f"{', '.join(repeated)} is named twice",
            "Name it once, with the sum of its weights",
        )
    if isinstance(source.verifier, str) or not weights:
        return
    if names and len(weights) != len(names):
        yield Problem(
            f"{prefix}verifier_weights",
            weights,
            f"one for each of the {len(names)} verifiers was expected ({', '.join(names)})",
        )
    elif names and not any(weights):
        yield Problem(f"{prefix}verifier_weights", weights, "no verifier counts", "Give at least one a weight above 0")


def require_verifier_name(name: str) -> None:
    """Refuse what cannot stand for a verifier, without importing anything.

    Raises:
        ConfigError: if it is neither built in, nor a function of one's own, nor the address of a reward model.
    """
    if problems := list(problems_of("verifier", name, Any, _DECLARED)):
        raise ConfigError.of(problems)
