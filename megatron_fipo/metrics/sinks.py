"""The sinks of a step's metrics besides the console: JSONL, TensorBoard, Weights & Biases.

A sink takes the step and a flat dict of floats, or a table of texts. A number that is not finite stands for "nothing to
measure" (the mean over no tokens, the maximum of nothing): JSONL writes null, the trackers leave a gap.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from megatron_fipo.config import Config, written_values
from megatron_fipo.metrics.tables import Table
from megatron_fipo.system.disk import append_whole, write_text_whole, write_whole, writing


class Sink(Protocol):
    """Takes metrics in one call or more for each step; steps never descend."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        ...

    def write_table(self, step: int, name: str, table: Table) -> None:
        """Record a table of texts of a step; long ones are cut."""
        ...

    def close(self) -> None:
        """Flush and release; the sink takes no metrics afterwards."""
        ...


class JsonlSink:
    """One JSON object a line, `{"step": 3, "reward/mean": 0.25}`, on disk as soon as it is written."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Open for appending.

        Args:
            path: the file; lines of steps from `resumed_step` on are dropped from it, since they will be written anew.
            resumed_step: first step that this run records; 0 starts afresh.

        Raises:
            ValueError: if a line before the last is no metrics line.
            DiskError: if the file cannot be written.
        """
        self._path = path
        with writing(path):
            _drop_lines_from(path, resumed_step)
            self._file: IO[bytes] = path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if "step" in metrics:
            raise ValueError(f"{self._path}: a metric named 'step' would hide the step itself; rename it.")
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append_whole(self._file, json.dumps({"step": step, **line}, allow_nan=False).encode() + b"\n", self._path)

    def write_table(self, step: int, name: str, table: Table) -> None:
        """Do nothing: texts have files of their own in the run's folder."""

    def close(self) -> None:
        self._file.close()


def _drop_lines_from(path: Path, resumed_step: int) -> None:
    """Keep the lines of earlier steps. A crash here leaves the file as it was."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            break  # a killed run tore its last line
        try:
            record = json.loads(line)
            step = record["step"] if isinstance(record, dict) else None
        except (ValueError, KeyError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
            raise _no_metrics(path, number, repr(error)) from error
        if type(step) is not int:
            raise _no_metrics(path, number, f"its step is {step!r}")
        if step < resumed_step:
            kept.append(line)
    write_whole(path, b"".join(kept))


def _no_metrics(path: Path, number: int, reason: str) -> ValueError:
    return ValueError(
        f"{path}, line {number} is no line of metrics ({reason}). Repair or remove the file, or give the run another "
        "run.output_dir."
    )


class TensorBoardSink:
    """Scalars for TensorBoard. On resuming, what an earlier run recorded from `resumed_step` on is hidden."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds of imports that only rank 0 needs

        self._folder = folder
        with writing(folder):
            self._writer = SummaryWriter(str(folder), purge_step=resumed_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with writing(self._folder):  # errors of its thread are raised here, a step later
            for name, value in metrics.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, global_step=step)

    def write_table(self, step: int, name: str, table: Table) -> None:
        with writing(self._folder):
            self._writer.add_text(name, table.shortened().markdown(), global_step=step)

    def close(self) -> None:
        with writing(self._folder):
            self._writer.close()


class WandbSink:
    """A run on Weights & Biases, online or offline. A resumed run continues under the same id.

    Charts take `step` as their axis instead of W&B's own counter, which refuses to go back; steps that a resumed run
    repeats appear twice there.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"metrics.wandb={config.metrics.wandb}: the package wandb is not installed. Install it with "
                "pip install 'megatron-fipo[wandb]', or set metrics.wandb=off."
            ) from error

        self._wandb = wandb
        id_file = folder / "wandb_run_id"
        if not id_file.exists():
            write_text_whole(id_file, secrets.token_hex(8))
        self._run: Any = wandb.init(
            project=config.metrics.wandb_project,
            name=config.run.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=config.metrics.wandb,
            dir=str(folder),
            config=written_values(config),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{name: value for name, value in metrics.items() if math.isfinite(value)}})

    def write_table(self, step: int, name: str, table: Table) -> None:
        cut = table.shortened()
        made = self._wandb.Table(columns=list(cut.columns), data=[list(row) for row in cut.rows])
        self._run.log({"step": step, name: made})

    def close(self) -> None:
        self._run.finish()


class SinkGroup:
    """Several sinks as one; use it as a context manager so that every sink is closed, also on an error."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def write_table(self, step: int, name: str, table: Table) -> None:
        for sink in self._sinks:
            sink.write_table(step, name, table)

    def close(self) -> None:
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> SinkGroup:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_sinks(config: Config, folder: str | Path, resumed_step: int, enabled: bool = True) -> SinkGroup:
    """Open the sinks that the configuration asks for.

    Args:
        config: `config.metrics` says which.
        folder: the run's folder; made if need be. metrics.jsonl, tensorboard/ and wandb/ lie in it.
        resumed_step: first step that will be recorded; see each sink for an earlier run's records from there on.
        enabled: false on all ranks but the first; the group is then empty and nothing is touched.

    Raises:
        ValueError: if wandb is asked for and not installed, or an existing metrics.jsonl is damaged.
        DiskError: if the folder cannot be written to.
    """
    group: list[Sink] = []
    sinks = SinkGroup(group)
    if not enabled:
        return sinks
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        if config.metrics.jsonl:
            group.append(JsonlSink(folder / "metrics.jsonl", resumed_step))
        if config.metrics.tensorboard:
            group.append(TensorBoardSink(folder / "tensorboard", resumed_step))
        if config.metrics.wandb != "off":
            group.append(WandbSink(config, folder))
    except BaseException:
        sinks.close()
        raise
    return sinks
