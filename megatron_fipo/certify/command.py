"""`megatron-fipo certify`: the same FIPO updates under every layout, compared with one process.

Without GPUs it runs over gloo on a small model of the same kind; with GPUs on the configuration's own model. It starts
its own processes. What is certified is the training computation from rollouts to weights: packing, the sharded model,
log-probs, Future-KL across context-parallel ranks, the loss, its normalisation, the optimizer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.certify.comparison import QUANTITIES, Comparison, breaches, measure
from megatron_fipo.certify.computation import Job, Record, run_rank
from megatron_fipo.certify.controls import CONTROLS
from megatron_fipo.certify.layouts import DEFAULT_LAYOUTS, Layout, configure, one_process, parse_layout
from megatron_fipo.certify.synthetic import LONGEST_PROMPT, shrunken_config, write_random_model
from megatron_fipo.config import Config, read_model_config
from megatron_fipo.convert.hf_config import model_shape
from megatron_fipo.parallel.local_ranks import RankError, run_local_ranks

LEARNING_RATE = 1e-4
"""Of the certified updates. The recipes' 1e-6 moves float32 weights by so few of their last bits that ||p - start||
would measure rounding."""
PIPE_WIDTH = 160
"""Columns of output that goes to no terminal."""
_PRELOAD = ("megatron_fipo.certify.preload",)


@dataclass(frozen=True)
class Options:
    """What the command line chooses.

    Attributes:
        layouts: names; empty for DEFAULT_LAYOUTS, less those that need more GPUs than there are.
        as_is: whether to take the configuration's own model, which is the rule with GPUs.
        negative_controls: whether to make deliberate mistakes as well, each of which must be noticed.
        num_steps, num_updates: optimizer steps are their product.
        longest_response: tokens of the longest synthetic response.
        dtype: float32 or bfloat16; bounds differ.
        timeout_s: for each layout.
    """

    layouts: tuple[str, ...] = ()
    as_is: bool = False
    negative_controls: bool = False
    num_steps: int = 3
    num_updates: int = 8
    longest_response: int = 120
    dtype: str = "float32"
    timeout_s: float = 900.0


def run(config: Config, options: Options, console: Console | None = None) -> int:
    """Certify a configuration, and print the certificate.

    Returns:
        0, or 1 if a layout breaches a bound or a negative control is not caught.

    Raises:
        ValueError: if the model cannot be read, or a layout is malformed or does not fit model or machine.
        RankError: if a computation fails.
    """
    console = console or _console()
    if min(options.num_steps, options.num_updates, options.longest_response) < 1:
        raise ValueError("--steps, --updates and --longest-response must be at least 1.")
    with tempfile.TemporaryDirectory(prefix="megatron-fipo-certify-") as folder:
        certifier = _Certifier(config, options, Path(folder), console)
        return certifier.run()


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


class _Certifier:
    """One run of the command."""

    def __init__(self, config: Config, options: Options, folder: Path, console: Console) -> None:
        self.options, self.folder, self.console = options, folder, console
        raw = read_model_config(config.model.path)
        if not options.as_is:
            raw = shrunken_config(raw)
            write_random_model(folder / "model", raw, config.run.seed)
            config = replace(config, model=replace(config.model, path=str(folder / "model"), log_prob_chunk_tokens=48))
        self.raw = raw
        self.shape = model_shape(raw, f"{config.model.path}/config.json")
        self.config = replace(
            config,
            model=replace(config.model, dtype=options.dtype),
            train=replace(config.train, num_minibatches=options.num_updates),
            optimizer=replace(config.optimizer, learning_rate=LEARNING_RATE, num_warmup_steps=0),
        )
        self.layouts, self.left_out = self._choose_layouts()
        # Whatever cannot run is refused before anything does.
        for layout in [one_process(), *self.layouts, *self._control_layouts()]:
            self._configure(layout)

    def run(self) -> int:
        self._describe()
        reference = self._compute(one_process())
        start = self._start_weights(reference)
        table, worst, num_breaches = self._table("Layouts"), [0.0] * len(QUANTITIES), 0
        for layout in self.layouts:
            record = self._compute(layout)
            values = measure(Comparison(record, reference, start, self.config.objective))
            broken = breaches(values, self.options.dtype)
            worst = [max(a, b or 0.0) for a, b in zip(worst, values, strict=True)]
            num_breaches += bool(broken)
            verdict = "[bold red]BREACH[/]" if broken else "[green]holds[/]"
            table.add_row(
                layout.name, str(layout.world_size), str(record.num_microbatches), *self._cells(values), verdict
            )
        table.add_section()
        measured = [value if quantity_applies else None for value, quantity_applies in self._applicable(worst)]
        table.add_row("largest", "", "", *self._cells(measured), "", style="bold")
        self.console.print(table)
        for name, needed in self.left_out:
            self.console.print(f"not run: {name} needs {needed} GPUs, {torch.cuda.device_count()} are here")
        missed = self._run_controls(reference, start) if self.options.negative_controls else 0
        self._conclude(num_breaches, missed)
        return 1 if num_breaches or missed else 0

    # --- computing --------------------------------------------------------------------------------------------------

    def _choose_layouts(self) -> tuple[list[Layout], list[tuple[str, int]]]:
        """(layouts to run, (name, processes) of default layouts for which there are too few GPUs)."""
        layouts = [parse_layout(name) for name in self.options.layouts or DEFAULT_LAYOUTS]
        if not torch.cuda.is_available():
            return layouts, []
        num_gpus = torch.cuda.device_count()
        too_large = [layout for layout in layouts if layout.world_size > num_gpus]
        if too_large and self.options.layouts:
            raise ValueError(
                f"layout {too_large[0].name!r} needs {too_large[0].world_size} GPUs; {num_gpus} are here. Leave it out "
                "of --layouts, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to certify a small model on the CPU."
            )
        return (
            [layout for layout in layouts if layout not in too_large],
            [(layout.name, layout.world_size) for layout in too_large],
        )

    def _control_layouts(self) -> list[Layout]:
        if not self.options.negative_controls:
            return []
        return [parse_layout(name) for name in dict.fromkeys(control.layout for control in CONTROLS)]

    def _configure(self, layout: Layout) -> Config:
        return configure(self.config, layout, LONGEST_PROMPT + self.options.longest_response, self.raw)

    def _compute(self, layout: Layout, control: str | None = None) -> Record:
        """Run a layout in processes of its own."""
        output = self.folder / "record.pt"
        # A mistake shows in the first update.
        num_steps, num_updates = (1, self.options.num_updates) if control else (self.options.num_steps, 0)
        job = Job(
            self._configure(layout),
            num_steps,
            num_updates or self.options.num_updates,
            self.options.longest_response,
            output,
            control,
        )
        with self.console.status(f"{layout.name}{f', {control}' if control else ''}"):
            run_local_ranks(
                run_rank, layout.world_size, job, preload=_PRELOAD, timeout_s=self.options.timeout_s
            )
        record = torch.load(output, weights_only=False)
        assert isinstance(record, Record)
        output.unlink()
        return record

    def _start_weights(self, reference: Record) -> dict[str, Tensor]:
        weights = {}
        for file in Path(self.config.model.path).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                weights |= {name: tensors.get_tensor(name).float() for name in reference.weights.keys() & tensors.keys()}
        return weights
