"""What a person sees while a run goes on: banner, progress bars, one line a step, evaluation, samples, closing.

On a terminal the bars are live and vanish when their phase is over, so that what stays is one line a step. Into a pipe
or a CI log there are no bars; a phase that takes long says how far it is every half minute. Only the first rank
prints: elsewhere the console is made with enabled=False and every method does nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from megatron_fipo.config import Config
from megatron_fipo.console.banner import banner, closing_lines
from megatron_fipo.console.progress import PhaseProgress, PipeProgress, SilentProgress, live_bar
from megatron_fipo.console.samples import ShownSample, print_samples_on
from megatron_fipo.console.scores_table import scores_table
from megatron_fipo.console.step_lines import StepLines
from megatron_fipo.console.terminal import is_live, open_terminal, printable


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
        self._rich = open_terminal(file, width, enabled=enabled)
        self._live = is_live(self._rich)
        self._step_lines = StepLines(config, self._rich)
        self._num_told: Counter[str] = Counter()

    def banner(self, world_size: int, facts: Mapping[str, str] | None = None) -> None:
        """Say what will run.

        Args:
            world_size: number of processes.
            facts: further lines by label, such as {"parameters": "0.76 M"}.
        """
        self._rich.print()
        self._rich.print(banner(self._config, world_size, facts or {}))

    def closing(
        self, places: Mapping[str, str], chat_command: str | None = None, prompts_to_try: Sequence[str] = ()
    ) -> None:
        """Say where things lie, {"metrics": "outputs/…/metrics.jsonl"}, and how to talk to the model, about what."""
        self._rich.print()
        self._rich.print(Rule(Text("Done", style="bold green"), align="left", style="green"))
        for line in closing_lines(places, chat_command, prompts_to_try):
            self._rich.print(line, soft_wrap=True)

    def step_line(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for a finished step; what is missing or not finite shows as –."""
        self._step_lines.print(step, metrics)

    def evaluation_table(
        self, title: str, before: Mapping[str, float], after: Mapping[str, float] | None = None
    ) -> None:
        """Numbers by name, such as {"held_out/avg@4": 0.31}; with `after`, both and the change."""
        self._rich.print()
        self._rich.print(scores_table(title, before, after))

    def samples(self, title: str, items: Sequence[ShownSample]) -> None:
        """Show responses with their prompts and verdicts.

        Text that a model wrote is shown as it is, but control characters cannot reach the terminal.
        """
        if items:
            print_samples_on(self._rich, title, items, full=False)

    @contextmanager
    def rollout_progress(self, step: int, total: int) -> Iterator[PhaseProgress]:
        """Progress of a step's generation, in responses."""
        with self._progress(f"step {step}  rollout", total, "responses") as progress:
            yield progress

    @contextmanager
    def update_progress(self, step: int, total: int) -> Iterator[PhaseProgress]:
        """Progress of a step's optimizer steps."""
        with self._progress(f"step {step}  train", total, "updates") as progress:
            yield progress

    @contextmanager
    def evaluation_progress(self, total: int) -> Iterator[PhaseProgress]:
        """Progress of an evaluation, in responses."""
        with self._progress("evaluation", total, "responses") as progress:
            yield progress

    def info(self, text: str) -> None:
        """One line of what goes on, such as a checkpoint that was written."""
        self._rich.print(Text.assemble(("  · ", "cyan"), printable(text)))

    def command(self, introduction: str, command: str) -> None:
        """A command to type, on a line of its own that is never wrapped: it is there to be copied."""
        self.info(introduction)
        self._rich.print(Text(f"    {printable(command)}", style="bold cyan"), soft_wrap=True)

    def warning(self, text: str, kind: str = "") -> None:
        """Something that the user should know, in full sentences.

        Args:
            kind: names a warning that may come again and again. It is told the first, tenth, hundredth … time, with a
                count.
        """
        if kind:
            self._num_told[kind] += 1
            count = self._num_told[kind]
            if count > 1:
                if not _is_power_of_ten(count):
                    return
                text = f"{text} (this is the {count:,}th time in this run that it could be said)"
        line = Text.assemble(("Warning: ", "bold yellow"), (printable(text), "yellow"))
        self._rich.print(Padding(line, (0, 0, 0, 2), expand=False))

    @contextmanager
    def _progress(self, label: str, total: int, unit: str) -> Iterator[PhaseProgress]:
        if not self._enabled:
            yield SilentProgress()
        elif self._live:
            with live_bar(self._rich, label, total, unit) as progress:
                yield progress
        else:
            yield PipeProgress(self.info, self._clock, label, total, unit)


def _is_power_of_ten(count: int) -> bool:
    return str(count).strip("0") == "1"
