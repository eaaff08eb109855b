"""Rules between keys: every rule that takes the values of two keys or more, and no other.

Each module has one part of the configuration; `cross_problems` asks them all. The rules for a value by itself stand
where its key is declared.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_fipo.config.cross_rules.milestones import milestone_problems
from megatron_fipo.config.cross_rules.servers import server_problems
from megatron_fipo.config.cross_rules.training import layout_problems, training_problems
from megatron_fipo.config.errors import Problem
from megatron_fipo.config.sections import Config


def cross_problems(config: Config, world_size: int | None, *, is_for_training: bool) -> Iterator[Problem]:
    """Rules between keys that are broken, sources apart (`sources`). Each value must be sound by itself.

    Args:
        world_size: number of processes; None skips the rules that need it.
        is_for_training: false skips the rules for training alone.
    """
    yield from server_problems(config)
    if is_for_training:
        yield from training_problems(config)
        yield from layout_problems(config, world_size)
        yield from milestone_problems(config)
