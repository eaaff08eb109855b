"""Rules for shadow objectives: their names, each one's values, and what these demand of each other."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_fipo.config.derived import shadow_objectives
from megatron_fipo.config.errors import NOT_SHOWN, Problem
from megatron_fipo.config.sections import FipoConfig, ShadowConfig
from megatron_fipo.config.values import section_problems

MOST_SHADOWS = 16
"""Each costs a suffix sum over all tokens in every update."""


def shadow_problems(objective: FipoConfig) -> Iterator[Problem]:
    """What is wrong with the shadow objectives, their values by themselves included."""
    if not objective.shadow:
        return
    if len(objective.shadow) > MOST_SHADOWS:
        yield Problem(
            "objective.shadow",
            NOT_SHOWN,
            f"there are {len(objective.shadow)} shadow objectives, and at most {MOST_SHADOWS} are measured: each "
            "costs a sum over all tokens in every update",
            "Remove some",
        )
    if objective.old_log_probs == "rollout":
        yield Problem(
            "objective.shadow",
            NOT_SHOWN,
            "needs objective.old_log_probs=actor: against the rollout's log-probs Future-KL sums up the engine's "
            "numerical differences over many tokens",
            "Set that, or objective.shadow={}",
        )
    for name, settings in objective.shadow.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield Problem(
                "objective.shadow",
                NOT_SHOWN,
                f"the name {name!r} goes into metric names",
                "Use letters, digits, _ and - only",
            )
            continue
        if not isinstance(settings, ShadowConfig):  # of a library's caller; the loader makes no others
            yield Problem(f"objective.shadow.{name}", settings, "a ShadowConfig was expected", "Make one of it")
            continue
        by_itself = list(section_problems(settings, f"objective.shadow.{name}."))
        yield from by_itself or _combination_problems(name, objective)


def _combination_problems(name: str, objective: FipoConfig) -> Iterator[Problem]:
    key, given, whole = f"objective.shadow.{name}", objective.shadow[name], shadow_objectives(objective)[name]
    if whole.influence_min > whole.influence_max:
        if given.influence_min is None:
            rule = f"must not be below objective.influence_min={whole.influence_min}, since it sets no other"
            yield Problem(f"{key}.influence_max", whole.influence_max, rule, f"Raise it, or set {key}.influence_min")
        else:
            place = "objective" if given.influence_max is None else key
            rule = f"must not be above {place}.influence_max={whole.influence_max}"
            yield Problem(f"{key}.influence_min", whole.influence_min, rule, f"Lower it, or set {key}.influence_max")
    if whole.filter_extreme_ratios and whole.dual_clip is None:
        yield Problem(
            f"{key}.dual_clip",
            None,
            "Future-KL leaves out tokens with a ratio above dual_clip and needs a number, and objective.dual_clip is "
            "null as well",
            f"Set {key}.dual_clip=10, or {key}.filter_extreme_ratios=false",
        )
