"""A layout certificate: the same FIPO updates under every layout, compared with one process.

What is certified is the training computation from rollouts to weights: packing, the sharded model, log-probs, Future-KL
across context-parallel ranks, the loss and its normalisation, the optimizer. It starts its own processes: over gloo
where there is no GPU, on GPUs where there are.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.certify.comparison import QUANTITIES, breaches
from megatron_fipo.certify.controls import CONTROLS, Control
from megatron_fipo.certify.layouts import DEFAULT_LAYOUTS, Layout, parse_layout
from megatron_fipo.certify.runner import LEARNING_RATE, Options, Runner
from megatron_fipo.config import Config
from megatron_fipo.system.exit_codes import EXIT_FAULT

PIPE_WIDTH = 150
"""Columns of output that goes to no terminal."""
_MISSING = "–"


def certify(config: Config, options: Options, console: Console | None = None) -> int:
    """Certify a configuration, and print the certificate.

    Returns:
        0, or EXIT_FAULT if a layout breaches a bound or a deliberate mistake is not caught.

    Raises:
        ValueError: if the model cannot be read, or a layout is malformed or fits neither model nor machine.
        RankError: if a computation fails.
    """
    console = console or _default_console()
    started = time.monotonic()
    layouts, left_out = _choose(options.layouts)
    controls = [c for c in CONTROLS if config.objective.future_kl or not c.needs_future_kl]
    if not options.negative_controls:
        controls = []
    with tempfile.TemporaryDirectory(prefix="megatron-fipo-certify-") as folder:
        control_layouts = [parse_layout(control.layout) for control in controls]
        runner = Runner(config, options, [*layouts, *control_layouts], Path(folder))
        console.print(_description(runner, options))
        num_breaches = certify_layouts(runner, layouts, options.dtype, console)
        for layout in left_out:
            console.print(
                f"not run: {layout.name} needs {layout.world_size} GPUs, {torch.cuda.device_count()} are here."
            )
        num_missed = try_controls(runner, controls, options.dtype, console) if controls else 0
    console.print(_conclusion(len(layouts), num_breaches, len(controls), num_missed, time.monotonic() - started))
    return EXIT_FAULT if num_breaches or num_missed else 0


def _default_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def _choose(names: Sequence[str]) -> tuple[list[Layout], list[Layout]]:
    """(layouts to run, those of the default ones for which there are too few GPUs)."""
    layouts = [parse_layout(name) for name in names or DEFAULT_LAYOUTS]
    if not torch.cuda.is_available():
        return layouts, []
    num_gpus = torch.cuda.device_count()
    too_large = [layout for layout in layouts if layout.world_size > num_gpus]
    if too_large and names:
        raise ValueError(
            f"layout {too_large[0].name!r} needs {too_large[0].world_size} GPUs; {num_gpus} are here. Leave it out of "
            "--layouts, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to certify a small model on the CPU."
        )
    return [layout for layout in layouts if layout not in too_large], too_large


def _description(runner: Runner, options: Options) -> str:
    shape, objective = runner.shape, runner.config.objective
    where = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "CPU, gloo"
    switches = [
        "tied embeddings" if shape.tied_embeddings else "untied embeddings",
        "GQA" if shape.num_query_groups < shape.num_attention_heads else "MHA",
        "attention bias" if shape.qkv_bias else "no attention bias",
    ]
    kind = "the configuration's model" if options.as_is else "small random model of the configuration's kind"
    method = f"Future-KL, half-life {objective.half_life_tokens:g}" if objective.future_kl else "no Future-KL"
    return (
        f"[bold]Layout certificate[/] · {where}, {options.dtype}, torch {torch.__version__}\n"
        f"{kind}: {shape.family}, {', '.join(switches)}, {shape.num_layers} layers, hidden {shape.hidden_size}, "
        f"vocabulary {shape.vocab_size:,}\n"
        f"objective: algorithm={runner.config.algorithm}, {method}, {objective.loss_aggregation}; "
        f"{options.num_steps} steps of {options.num_updates} updates at learning rate {LEARNING_RATE:g}, "
        f"responses of 1 to {options.longest_response} tokens\n"
        "each quantity is the difference from one process that takes every minibatch whole:\n"
        + "\n".join(f"  {quantity.heading}: {quantity.meaning}" for quantity in QUANTITIES)
    )


def certify_layouts(runner: Runner, layouts: Sequence[Layout], dtype: str, console: Console) -> int:
    """Run and print all layouts; the number of those that breach a bound."""
    table = _table("layout", "ranks", "micro-\nbatches", dtype=dtype)
    worst: list[float | None] = [None] * len(QUANTITIES)
    num_breaches = 0
    with console.status("one process") as status:
        runner.compute_reference()
        for layout in layouts:
            status.update(layout.name)
            measured = runner.measure(layout)
            is_broken = bool(breaches(measured.values, dtype))
            num_breaches += is_broken
            worst = [_largest(pair) for pair in zip(worst, measured.values, strict=True)]
            verdict = "[bold red]BREACH[/]" if is_broken else "[green]holds[/]"
            size = (str(layout.world_size), str(measured.num_microbatches))
            table.add_row(layout.name, *size, *_cells(measured.values, dtype), verdict)
    table.add_section()
    table.add_row("largest difference", "", "", *_cells(worst, dtype), "")
    console.print(table)
    return num_breaches


def try_controls(runner: Runner, controls: Sequence[Control], dtype: str, console: Console) -> int:
    """Run and print the deliberate mistakes; the number of those that were not caught."""
    table = _table("deliberate mistake", "layout", dtype=dtype)
    num_missed = 0
    with console.status("negative controls") as status:
        for control in controls:
            status.update(control.name)
            measured = runner.measure_control(control)
            is_caught = bool(breaches(measured.values, dtype))
            num_missed += not is_caught
            verdict = "[green]caught[/]" if is_caught else "[bold red]NOT CAUGHT[/]"
            table.add_row(control.name, control.layout, *_cells(measured.values, dtype), verdict)
    console.print(table)
    for control in controls:
        console.print(f"  {control.name}: {control.mistake} ({control.seam})", highlight=False)
    return num_missed


def _table(*headings: str, dtype: str) -> Table:
    """An empty table of the quantities, its first row their bounds."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right" if heading[0] in "rm" else "left")
    for quantity in QUANTITIES:
        table.add_column(quantity.heading.replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    bounds = [f"≤ {quantity.bounds[dtype]:.0e}" for quantity in QUANTITIES]
    table.add_row("bound", *[""] * (len(headings) - 1), *bounds, "", style="bold")
    table.add_section()
    return table


def _cells(values: Sequence[float | None], dtype: str) -> list[str]:
    broken = breaches(list(values), dtype)
    cells = []
    for quantity, value in zip(QUANTITIES, values, strict=True):
        text = _MISSING if value is None else f"{value:.1e}" if math.isfinite(value) else str(value)
        cells.append(f"[red]{text}[/]" if quantity in broken else text)
    return cells


def _largest(values: Sequence[float | None]) -> float | None:
    """The largest, not a number if one is none; None where there are none."""
    numbers = [value for value in values if value is not None]
    return math.nan if any(map(math.isnan, numbers)) else max(numbers, default=None)


def _conclusion(num_layouts: int, num_breaches: int, num_controls: int, num_missed: int, seconds: float) -> str:
    parts = [
        f"[bold red]{num_breaches} of {num_layouts} layouts breach a bound[/]"
        if num_breaches
        else f"[green]all {num_layouts} layouts hold[/]"
    ]
    if num_controls:
        parts.append(
            f"[bold red]{num_missed} of {num_controls} deliberate mistakes were NOT CAUGHT[/]"
            if num_missed
            else f"[green]all {num_controls} deliberate mistakes caught[/]"
        )
    return f"{'; '.join(parts)} · {seconds:.0f} s"
