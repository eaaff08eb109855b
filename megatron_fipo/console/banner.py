"""The first and the last thing that a run says: what will run, and where everything lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megatron_fipo.config import Config, updates_per_step
from megatron_fipo.console.terminal import printable


def banner(config: Config, world_size: int, further_facts: Mapping[str, str]) -> Panel:
    """What will run.

    Args:
        world_size: number of processes.
        further_facts: lines by label, such as {"parameters": "0.76 M"}.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in {**_facts(config, world_size), **further_facts}.items():
        grid.add_row(label, Text(printable(text)))
    title = Text.assemble((_title(config), "bold"), " on Megatron-Core")
    return Panel(grid, title=title, title_align="left", box=box.ROUNDED, border_style="cyan", padding=(0, 1))


def closing_lines(places: Mapping[str, str], chat_command: str | None, prompts_to_try: Sequence[str]) -> Iterator[Text]:
    """Where things lie, and how to talk to the model. No line may be wrapped: paths and commands are to be copied."""
    width = max((len(label) for label in places), default=0)
    for label, place in places.items():
        yield Text.assemble((f"  {label:<{width}}  ", "dim"), printable(place))
    if chat_command is None:
        return
    yield Text()
    yield Text("  Talk to it:", style="dim")
    yield Text(f"  {chat_command}", style="bold cyan")
    if prompts_to_try:
        shown = "   ".join(map(printable, prompts_to_try))
        yield Text.assemble(("  Try: ", "dim"), (shown, "bold"))


def _title(config: Config) -> str:
    names = {"fipo": "FIPO", "dapo": "DAPO", "grpo": "GRPO", "dr_grpo": "Dr. GRPO", "rloo": "RLOO"}
    return names.get(config.algorithm, config.algorithm)


def _facts(config: Config, world_size: int) -> dict[str, str]:
    rollout, train, objective, parallel = config.rollout, config.train, config.objective, config.parallel
    data_parallel = world_size // (parallel.tp * parallel.pp * parallel.cp)
    facts = {
        "model": f"{config.model.path}, {config.model.dtype}",
        "prompts": ", ".join(f"{name} ({source.kind})" for name, source in config.data.train.items()),
        "rollout": (
            f"{rollout.num_prompts} prompts × {rollout.num_samples_per_prompt} responses a step, "
            f"up to {rollout.max_response_tokens:,} tokens, temperature {rollout.temperature:g}"
        ),
        "training": (
            f"{train.num_steps:,} steps × {updates_per_step(config)} updates, learning rate "
            f"{config.optimizer.learning_rate:g}, seed {config.run.seed}"
        ),
        "objective": (
            f"{objective.loss_aggregation}, ratio clipped to "
            f"[{1 - objective.clip_ratio_low:g}, {1 + objective.clip_ratio_high:g}]"
        ),
        "processes": f"{world_size} = tp {parallel.tp} × pp {parallel.pp} × cp {parallel.cp} × dp {data_parallel}",
        "output": config.run.output_dir,
    }
    if objective.future_kl:
        facts["objective"] += (
            f", Future-KL with half-life {objective.half_life_tokens:g} tokens, "
            f"influence weights in [{objective.influence_min:g}, {objective.influence_max:g}]"
        )
    return facts
