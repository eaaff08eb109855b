"""What a person sees while a run goes on: banner, progress bars, one line a step, evaluation, samples, closing.

On a terminal the bars are live and vanish when their phase is over, so that what stays is one line a step. Into a pipe
or a CI log there are no bars; a phase that takes long says how far it is every half minute. Only the first rank
prints: elsewhere the console is made with enabled=False and every method does nothing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from typing import IO

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from megatron_fipo.config import Config, updates_per_step, without_secrets

MISSING = "–"
PIPE_WIDTH = 130
"""Columns of output that goes to no terminal."""
PIPE_PROGRESS_EVERY_S = 30.0
HEADER_EVERY_LINES = 25


@dataclass(frozen=True)
class Column:
    """One number of the step line."""

    heading: tuple[str, str]
    """Two lines of heading."""
    width: int
    metrics: tuple[str, ...]
    """Names of the metrics that the cell shows."""
    format: Callable[..., str]
    """From the metrics' values, all finite, to text."""
    style: str = ""
    rank: int = 0
    """Where the terminal is too narrow, columns of the highest rank go first."""


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _compact(value: float) -> str:
    """Three or four digits that say something, also for 0.00042 and 123456."""
    if value != 0 and not 0.001 <= abs(value) < 1000:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


COLUMNS = (
    Column(("", "reward"), 7, ("reward/mean",), _signed, style="bold"),
    Column(("", "accuracy"), 8, ("rollout/accuracy/mean",), _percent, style="bold green", rank=1),
    Column(("response", "tokens"), 8, ("rollout/response_tokens/mean",), _count, rank=3),
    Column(("", "entropy"), 8, ("policy/entropy/mean",), _compact, rank=4),
    Column(("policy", "KL"), 8, ("policy/kl/mean",), _compact, rank=5),
    Column(("gradient", "norm"), 8, ("optim/grad_norm",), _compact, rank=6),
)
FUTURE_KL_COLUMNS = (
    Column(
        ("influence", "weight"),
        15,
        ("fipo/influence_weight/mean", "fipo/influence_weight/std"),
        lambda mean, std: f"{mean:.3f} ± {std:.3f}",
        style="magenta",
        rank=2,
    ),
    Column(("weights", "clipped"), 8, ("fipo/influence_weight/clipped_share",), _percent, style="magenta", rank=7),
)
TOKENS_PER_S = Column(("tokens", "per s"), 8, ("perf/tokens_per_s",), _count, style="dim", rank=8)


@dataclass(frozen=True)
class ShownSample:
    """A response to show."""

    prompt: str
    response: str
    reference: str
    """The right answer."""
    answer: str
    """What the verifier took the response to answer; empty if nothing."""
    accuracy: float
    """The verifier's score; 1 is correct."""
    num_tokens: int
    truncated: bool = False
    note: str = ""
    """What else there is to say of it, in a line."""


class PhaseProgress:
    """How far a phase of the step is."""

    def __init__(self, advance: Callable[[int], None], set_total: Callable[[int], None], note: Callable[[str], None]):
        self._advance, self._set_total, self._note = advance, set_total, note

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._advance(count)

    def set_total(self, total: int) -> None:
        """There will be so many in all; dynamic sampling learns only as it goes."""
        self._set_total(total)

    def note(self, text: str) -> None:
        """A word at the end of the bar, such as "round 2: 11 of 16 groups"."""
        self._note(text)


def print_samples(title: str, items: Sequence[ShownSample], *, full: bool = False, file: IO[str] | None = None) -> None:
    """Show responses outside a run, in the way of `Console.samples`.

    Args:
        full: every line of them, whatever their length.
        file: where to print; standard output by default.
    """
    _print_samples(_rich_console(file), title, items, None if full else 8)


def _print_samples(rich: RichConsole, title: str, items: Sequence[ShownSample], max_lines: int | None) -> None:
    rich.print()
    rich.print(Rule(Text(_printable(title), style="bold"), align="left", style="dim"))
    for item in items:
        rich.print(_sample(item, max_lines))


def _rich_console(file: IO[str] | None, width: int | None = None, *, enabled: bool = True) -> RichConsole:
    """A console as wide as the terminal, or as a log wants it."""
    rich = RichConsole(file=file, width=width, highlight=False, quiet=not enabled)
    if not _is_live(rich) and width is None:
        rich.width = PIPE_WIDTH
    if enabled and isinstance(rich.file, TextIOWrapper):
        rich.file.reconfigure(errors="replace")  # a log in ASCII must not end the run over a dash
    return rich


def _is_live(rich: RichConsole) -> bool:
    return rich.is_interactive and rich.file.isatty()  # colours may be forced, bars may not


class Console:
    """The run's voice. Every method may be called on every rank."""

    def __init__(
        self,
        config: Config,
        enabled: bool = True,
        file: IO[str] | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to print.

        Args:
            config: says what will run and which columns a step line has.
            enabled: false silences it altogether.
            file: where to print; standard output by default.
            width: columns; by default the terminal's, or 130 where there is none.
            clock: seconds, for the progress lines of output that goes to no terminal.
        """
        self._config = config
        self._enabled = enabled
        self._clock = clock
        self._rich = _rich_console(file, width, enabled=enabled)
        self._live = _is_live(self._rich)
        self._num_lines = 0
        self._num_told: Counter[str] = Counter()
        self._step_width = max(5, 2 * len(str(config.train.num_steps)) + 1)

    # --- before and after -------------------------------------------------------------------------------------------

    def banner(self, world_size: int, facts: Mapping[str, str] | None = None) -> None:
        """Say what will run.

        Args:
            world_size: number of processes.
            facts: further lines by label, such as {"parameters": "0.76 M"}.
        """
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in {**_facts(self._config, world_size), **(facts or {})}.items():
            grid.add_row(label, Text(_printable(text)))
        title = Text.assemble((_title(self._config), "bold"), " on Megatron-Core")
        self._rich.print()
        self._rich.print(
            Panel(grid, title=title, title_align="left", box=box.ROUNDED, border_style="cyan", padding=(0, 1))
        )

    def evaluation_table(
        self, title: str, before: Mapping[str, float], after: Mapping[str, float] | None = None
    ) -> None:
        """Numbers by name, such as {"held_out/avg@4": 0.31}; with `after`, both and the change."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
        table.add_column(Text(title, style="not dim bold"))
        for heading in ["value"] if after is None else ["before", "after", "change"]:
            table.add_column(heading, justify="right", min_width=8)
        for name in dict.fromkeys([*before, *(after or {})]):
            old = before.get(name, math.nan)
            if after is None:
                table.add_row(name, _number(old))
                continue
            new = after.get(name, math.nan)
            table.add_row(
                name,
                _number(old),
                Text(_number(new), style="bold"),
                Text(_number(new - old, sign=True), style="bold cyan"),
            )
        self._rich.print()
        self._rich.print(Padding(table, (0, 0, 0, 2), expand=False))

    def samples(self, title: str, items: Sequence[ShownSample], max_lines: int = 8) -> None:
        """Show responses with their prompts and verdicts.

        Text that a model wrote is shown as it is, but control characters cannot reach the terminal.
        """
        if items:
            _print_samples(self._rich, title, items, max_lines)

    def closing(
        self, places: Mapping[str, str], chat_command: str | None = None, prompts_to_try: Sequence[str] = ()
    ) -> None:
        """Say where things lie, {"metrics": "outputs/…/metrics.jsonl"}, and how to talk to the model, about what."""
        self._rich.print()
        self._rich.print(Rule(Text("Done", style="bold green"), align="left", style="green"))
        width = max((len(label) for label in places), default=0)
        lines = [Text.assemble((f"  {label:<{width}}  ", "dim"), _printable(place)) for label, place in places.items()]
        if chat_command is not None:
            lines += [Text(), Text("  Talk to it:", style="dim"), Text(f"  {chat_command}", style="bold cyan")]
            if prompts_to_try:
                shown = "   ".join(map(_printable, prompts_to_try))
                lines.append(Text.assemble(("  Try: ", "dim"), (shown, "bold")))
        for line in lines:  # never wrapped: a path or a command is there to be copied
            self._rich.print(line, soft_wrap=True)

    # --- one step ---------------------------------------------------------------------------------------------------

    @contextmanager
    def rollout_progress(self, step: int, total: int, unit: str = "responses") -> Iterator[PhaseProgress]:
        """Progress of a step's generation."""
        with self._progress(f"step {step}  rollout", total, unit) as progress:
            yield progress

    @contextmanager
    def update_progress(self, step: int, total: int, unit: str = "updates") -> Iterator[PhaseProgress]:
        """Progress of a step's optimizer steps."""
        with self._progress(f"step {step}  train", total, unit) as progress:
            yield progress

    @contextmanager
    def evaluation_progress(self, total: int, unit: str = "responses") -> Iterator[PhaseProgress]:
        """Progress of an evaluation."""
        with self._progress("evaluation", total, unit) as progress:
            yield progress

    def step_line(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for a finished step; what is missing or not finite shows as –."""
        columns = self._columns()
        if self._num_lines % HEADER_EVERY_LINES == 0:
            self._rich.print()
            for row in (0, 1):
                cells = [f"{'' if row == 0 else 'step':>{self._step_width}}"]
                cells += [f"{column.heading[row]:>{column.width}}" for column in columns]
                self._rich.print(Text("  ".join(cells), style="dim" if row == 0 else "dim underline"), soft_wrap=True)
        self._num_lines += 1
        label = f"{step}/{self._config.train.num_steps}"
        line = Text(f"{label:>{self._step_width}}", style="dim")
        for column in columns:
            values = [metrics.get(name, math.nan) for name in column.metrics]
            text = column.format(*values) if all(map(math.isfinite, values)) else MISSING
            line.append("  ")
            line.append(f"{text:>{column.width}}", style="not dim " + column.style if text != MISSING else "")
        self._rich.print(line, soft_wrap=True)

    # --- in between -------------------------------------------------------------------------------------------------

    def info(self, text: str) -> None:
        """One line of what goes on, such as a checkpoint that was written."""
        self._rich.print(Text.assemble(("  · ", "cyan"), _printable(text)))

    def command(self, introduction: str, command: str) -> None:
        """A command to type, on a line of its own that is never wrapped: it is there to be copied."""
        self.info(introduction)
        self._rich.print(Text(f"    {_printable(command)}", style="bold cyan"), soft_wrap=True)

    def warning(self, text: str, kind: str = "") -> None:
        """Something that the user should know, in full sentences.

        Args:
            kind: what may come again and again. It is told the first, tenth, hundredth … time, with a count.
        """
        if kind:
            self._num_told[kind] += 1
            count = self._num_told[kind]
            if count > 1:
                if not _is_power_of_ten(count):
                    return
                text = f"{text} (this is the {count:,}th time in this run that it could be said)"
        line = Text.assemble(("Warning: ", "bold yellow"), (_printable(text), "yellow"))
        self._rich.print(Padding(line, (0, 0, 0, 2), expand=False))

    # ----------------------------------------------------------------------------------------------------------------

    def _columns(self) -> list[Column]:
        columns = list(COLUMNS)
        if self._config.objective.future_kl:
            columns += FUTURE_KL_COLUMNS
        columns.append(TOKENS_PER_S)
        while len(columns) > 1 and self._step_width + sum(column.width + 2 for column in columns) > self._rich.width:
            columns.remove(max(columns, key=lambda column: column.rank))
        return columns

    @contextmanager
    def _progress(self, label: str, total: int, unit: str) -> Iterator[PhaseProgress]:
        if not self._enabled:
            yield PhaseProgress(lambda count: None, lambda total: None, lambda text: None)
        elif self._live:
            with _live_bar(self._rich, label, total, unit) as progress:
                yield progress
        else:
            yield _PipeProgress(self.info, self._clock, label, total, unit).handle()


@contextmanager
def _live_bar(rich: RichConsole, label: str, total: int, unit: str) -> Iterator[PhaseProgress]:
    columns = (
        TextColumn("  [cyan]{task.description:<18}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn(f"{unit}"),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        RemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=rich, transient=True, refresh_per_second=5) as bars:
        task: TaskID = bars.add_task(label, total=total, note="")
        yield PhaseProgress(
            advance=lambda count: bars.advance(task, count),
            set_total=lambda total: bars.update(task, total=total),
            note=lambda text: bars.update(task, note=text),
        )


class _PipeProgress:
    """Says now and then how far a long phase is; a short one stays silent."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float], label: str, total: int, unit: str
    ) -> None:
        self._say, self._clock, self._label, self._unit = say, clock, label, unit
        self._done, self._total, self._note = 0, total, ""
        self._start = self._last = clock()

    def handle(self) -> PhaseProgress:
        return PhaseProgress(self._advance, self._set_total, self._set_note)

    def _advance(self, count: int) -> None:
        self._done += count
        now = self._clock()
        if now - self._last >= PIPE_PROGRESS_EVERY_S:
            self._last = now
            note = f", {self._note}" if self._note else ""
            self._say(f"{self._label}: {self._done}/{self._total} {self._unit}, {now - self._start:.0f} s{note}")

    def _set_total(self, total: int) -> None:
        self._total = total

    def _set_note(self, text: str) -> None:
        self._note = text


def _is_power_of_ten(count: int) -> bool:
    return str(count).strip("0") == "1"


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


def _sample(item: ShownSample, max_lines: int | None) -> Padding:
    correct = item.accuracy >= 1
    mark = Text("✓ correct" if correct else "✗ wrong", style="bold green" if correct else "bold red")
    score = f" (score {item.accuracy:.2f})" if 0 < item.accuracy < 1 else ""
    cut = ", cut at the length limit" if item.truncated else ""
    answer = _printable(item.answer) or "nothing"
    verdict = Text.assemble(
        mark,
        (f"{score}  answered {answer}, expected {_printable(item.reference)}; {item.num_tokens} tokens{cut}", "dim"),
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("prompt", Text(_shorten(item.prompt, max_lines)))
    grid.add_row("response", Text(_shorten(item.response, max_lines), style="cyan"))
    notes = [Text(_printable(item.note), style="dim")] if item.note else []
    return Padding(Group(grid, verdict, *notes), (0, 0, 1, 2), expand=False)


def _shorten(text: str, max_lines: int | None) -> str:
    """Leave out the middle of a long text: the end of a response holds its answer. None leaves out nothing."""
    lines = _printable(text).strip("\n").split("\n")
    if max_lines is None:
        return "\n".join(lines)
    if len(lines) > max_lines:
        head = max_lines // 2
        tail = max_lines - head - 1
        lines = [*lines[:head], f"… {len(lines) - head - tail} lines …", *lines[-tail:]]
    return "\n".join(line if len(line) <= 600 else f"{line[:300]} … {line[-300:]}" for line in lines)


def _printable(text: str) -> str:
    """Escape control characters, so that no text can move the cursor or colour the terminal; secrets as references."""
    text = without_secrets(text).replace("\r\n", "\n").expandtabs(4)
    return "".join(char if char == "\n" or char.isprintable() else repr(char)[1:-1] for char in text)


def _number(value: float, sign: bool = False) -> str:
    if not math.isfinite(value):
        return MISSING
    return f"{value:{'+' if sign else ''},.{3 if abs(value) < 10 else 1}f}"
