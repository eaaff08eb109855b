"""Layouts by name: `tp2+sp`, `dp2+cp2`, `tp2+pp2+cp2`, `small-microbatches`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_fipo.config import Config, ParallelSection, microbatch_token_multiple, validate_model_layout
from megatron_fipo.rl.packed_layout import round_up

ONE_PROCESS = "one process"
"""Name of the layout that the others are compared with."""

_WHOLE_MINIBATCH = 2**31
"""Token budget that is never reached."""
_SIZE = re.compile(r"(dp|tp|pp|vpp|cp)([1-9]\d*)")


@dataclass(frozen=True)
class Layout:
    """One way of running the same computation.

    Attributes:
        name: as the user writes it.
        parallel: sizes; what they leave of `world_size` is data parallel.
        world_size: number of processes.
        recompute: none, selective or full.
        distributed_optimizer: whether the optimizer is sharded.
        small_microbatches: whether a microbatch has room for the longest sequence only.
    """

    name: str
    parallel: ParallelSection
    world_size: int
    recompute: str = "none"
    distributed_optimizer: bool = True
    small_microbatches: bool = False


_SWITCHES: dict[str, Callable[[Layout], Layout]] = {
    "sp": lambda layout: replace(layout, parallel=replace(layout.parallel, sequence_parallel=True)),
    "recompute-full": lambda layout: replace(layout, recompute="full"),
    "recompute-selective": lambda layout: replace(layout, recompute="selective"),
    "plain-optimizer": lambda layout: replace(layout, distributed_optimizer=False),
    "small-microbatches": lambda layout: replace(layout, small_microbatches=True),
}

DEFAULT_LAYOUTS = (
    "tp2",
    "tp2+sp",
    "pp2",
    "pp2+vpp2",
    "cp2",
    "cp4",
    "dp2",
    "dp2+plain-optimizer",
    "dp2+cp2",
    "dp2+cp2+small-microbatches",
    "tp2+sp+cp2",
    "tp2+pp2+cp2",
    "recompute-full",
    "recompute-selective",
    "small-microbatches",
)
"""Layouts that are certified if the user names none."""


def parse_layout(name: str) -> Layout:
    """A layout from its name: parts joined by +, each a size (tp2, pp2, vpp2, cp4, dp2) or a switch.

    Raises:
        ValueError: naming the part that is unknown, or given twice.
    """
    sizes: dict[str, int] = {}
    layout = Layout(name, ParallelSection(), world_size=1)
    for part in name.split("+"):
        match = _SIZE.fullmatch(part)
        if match:
            if match[1] in sizes:
                raise ValueError(f"layout {name!r} gives {match[1]} twice. Give each size once.")
            sizes[match[1]] = int(match[2])
        elif part in _SWITCHES:
            layout = _SWITCHES[part](layout)
        else:
            raise ValueError(
                f"layout {name!r}: {part!r} is neither a size (tp2, pp2, vpp2, cp2, dp2) nor one of "
                f"{', '.join(_SWITCHES)}. Join parts by +, such as tp2+sp or dp2+cp2."
            )
    tp, pp, cp, dp = (sizes.get(kind, 1) for kind in ("tp", "pp", "cp", "dp"))
    parallel = replace(layout.parallel, tp=tp, pp=pp, cp=cp, virtual_pp=sizes.get("vpp"))
    return replace(layout, parallel=parallel, world_size=tp * pp * cp * dp)


def one_process() -> Layout:
    """The layout that all others are compared with: no parallelism, one microbatch a minibatch, no recomputation."""
    return Layout(ONE_PROCESS, ParallelSection(), world_size=1, distributed_optimizer=False)


def configure(config: Config, layout: Layout, longest_tokens: int, model_config: Mapping[str, Any]) -> Config:
    """The configuration with a layout's settings in it.

    The microbatch budget is a parameter of the layout: one process takes a whole minibatch at once, every layout cuts
    it in two or more.

    Args:
        longest_tokens: tokens of the longest sequence, prompt included.
        model_config: config.json of the model.

    Raises:
        ValueError: if the model does not divide into the layout, or the switches contradict each other.
    """
    parallel = replace(layout.parallel, timeout_s=config.parallel.timeout_s)
    if parallel.sequence_parallel and parallel.tp == 1:
        raise ValueError(f"layout {layout.name!r}: sp needs tp above 1, such as tp2+sp.")
    if parallel.virtual_pp and parallel.pp == 1:
        raise ValueError(f"layout {layout.name!r}: vpp needs pp above 1, such as pp2+vpp2.")
    configured = replace(
        config,
        parallel=parallel,
        model=replace(config.model, recompute=layout.recompute),
        optimizer=replace(config.optimizer, distributed=layout.distributed_optimizer),
        batch=replace(config.batch, pad_multiple=None),
    )
    validate_model_layout(configured, model_config)
    multiple = microbatch_token_multiple(configured)
    longest = round_up(longest_tokens, multiple)
    budget = longest if layout.small_microbatches else 2 * longest
    if layout.name == ONE_PROCESS:
        budget = _WHOLE_MINIBATCH
    return replace(configured, batch=replace(configured.batch, max_tokens_per_microbatch=budget))
