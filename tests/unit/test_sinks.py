"""Metrics on disk: what is written, what a resumed run keeps, what a missing package says."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import Config, MetricsSection
from megatron_fipo.metrics.sinks import JsonlSink, SinkGroup, TensorBoardSink, WandbSink, open_sinks
from megatron_fipo.metrics.tables import Table
from megatron_fipo.system.disk import DiskError
from tests.unit import wandb_file


def config_with(**metrics: Any) -> Config:
    return dataclasses.replace(Config(), metrics=MetricsSection(**metrics))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resumed_step=0)
    sink.write(0, {"reward/mean": 0.1, "a": math.nan, "b": math.inf, "c": -math.inf})
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 0, "reward/mean": 0.1, "a": None, "b": None, "c": None}]
    sink.close()


def test_jsonl_keeps_every_digit(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resumed_step=0)
    value = 0.1 + 0.2
    sink.write(1, {"x": value})
    sink.close()
    assert lines_of(tmp_path / "metrics.jsonl")[0]["x"] == value


def test_jsonl_resumes_where_the_checkpoint_stands(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path, resumed_step=0)
    for step in range(5):
        first.write(step, {"x": float(step)})
    first.close()
    second = JsonlSink(path, resumed_step=3)
    assert [line["step"] for line in lines_of(path)] == [0, 1, 2]
    second.write(3, {"x": 30.0})
    second.close()
    assert [(line["step"], line["x"]) for line in lines_of(path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_jsonl_starting_afresh_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "x": 1.0}\n')
    JsonlSink(path, resumed_step=0).close()
    assert path.read_text() == ""


def test_jsonl_drops_a_torn_last_line_and_refuses_a_torn_middle(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "x": 1.0}\n{"step": 1, "x"')
    JsonlSink(path, resumed_step=9).close()
    assert [line["step"] for line in lines_of(path)] == [0]
    path.write_text('{"step": 0, "x"\n{"step": 1, "x": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is no line of metrics"):
        JsonlSink(path, resumed_step=9)


def test_a_metric_cannot_hide_the_step(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resumed_step=0)
    with pytest.raises(ValueError, match="'step'"):
        sink.write(3, {"step": 4.0})
    sink.close()


def tensorboard_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    if name not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_scalars_and_resuming(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path, resumed_step=0)
    for step in range(4):
        first.write(step, {"reward/mean": step / 4, "gap": math.nan})
    first.close()
    assert tensorboard_scalars(tmp_path, "reward/mean") == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert tensorboard_scalars(tmp_path, "gap") == []
    second = TensorBoardSink(tmp_path, resumed_step=2)
    second.write(2, {"reward/mean": 5.0})
    second.close()
    assert tensorboard_scalars(tmp_path, "reward/mean") == [(0, 0.0), (1, 0.25), (2, 5.0)]


HOSTILE = "a | b\n**c** _d_ `e` <script>alert(1)</script> [f](g) # h \\n \u202e &lt; 3*4*5"


class _Cells(HTMLParser):
    """Texts of a table's cells, and which marks stand in them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.marks: set[str] = set()

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.marks.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "br":
            self.rows[-1][-1] += "\n"

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_tensorboard_shows_a_table_whose_texts_stand_for_themselves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    sink = TensorBoardSink(tmp_path, resumed_step=0)
    sink.write_table(3, "samples", Table(("response", "score"), [[HOSTILE, 0.5], ["", None]]))
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 3
    cells = _Cells()
    cells.feed(markdown_to_safe_html(event.tensor_proto.string_val[0]))
    header, first, second = ([cell.strip() for cell in row if cell.strip()] for row in cells.rows)
    assert (header, first, second) == (["response", "score"], [HOSTILE.replace("\u202e", "\\u202e"), "0.5"], [])
    assert cells.marks == {"table", "thead", "tbody", "tr", "th", "td", "br"}


def test_long_texts_lose_their_middle() -> None:
    table = Table(("response", "tokens"), [["a" * 1000 + "b" * 5000 + "c" * 1000, 7000]]).shortened()
    assert table.rows == [["a" * 1000 + " … 5000 characters … " + "c" * 1000, 7000]]
    assert Table(("x",), [["a" * 2000]]).shortened().rows == [["a" * 2000]]


def test_wandb_itself_takes_numbers_and_tables_offline(tmp_path: Path) -> None:
    """The real package without a network: what it would send lies in its own file."""
    sink = WandbSink(config_with(wandb="offline", wandb_project="mine"), tmp_path)
    sink.write(3, {"reward/mean": 0.25, "gap": math.nan})
    sink.write_table(3, "samples", Table(("response", "score"), [[HOSTILE, 0.5], ["", None]]))
    sink.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    numbers, table = wandb_file.logged(file)
    assert numbers == {"step": 3, "reward/mean": 0.25}
    assert table["step"] == 3
    assert (table["samples|_type"], table["samples|nrows"]) == ("table-file", 2)
    (written,) = tmp_path.glob(f"wandb/offline-run-*/files/{table['samples|path']}")
    assert json.loads(written.read_text()) == {"columns": ["response", "score"], "data": [[HOSTILE, 0.5], ["", None]]}


class FakeWandb(types.ModuleType):
    """Records what the sink asks of the package."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> FakeWandb:
        self.inits.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = config_with(wandb="offline", wandb_project="mine")
    for _ in range(2):
        sink = WandbSink(config, tmp_path)
        sink.write(3, {"x": 1.0, "gap": math.nan})
        sink.close()
    first, second = fake.inits
    assert first["id"] == second["id"] != ""
    assert (first["project"], first["mode"], first["resume"], first["dir"]) == (
        "mine",
        "offline",
        "allow",
        str(tmp_path),
    )
    assert first["config"]["objective"]["half_life_tokens"] == 32.0
    assert fake.logged == [{"step": 3, "x": 1.0}] * 2
    assert fake.axes[0] == ("*", "step")
    assert fake.finished == 2


def test_wandb_that_is_not_installed_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ValueError, match=r"metrics\.wandb=online: the package wandb is not installed\. Install it with"
    ):
        open_sinks(config_with(wandb="online", tensorboard=False), tmp_path, resumed_step=0)


def test_open_sinks_opens_what_is_asked_for(tmp_path: Path) -> None:
    with open_sinks(config_with(tensorboard=False), tmp_path / "a", resumed_step=0) as sinks:
        sinks.write(1, {"x": 2.0})
    assert sorted(item.name for item in (tmp_path / "a").iterdir()) == ["metrics.jsonl"]
    assert lines_of(tmp_path / "a" / "metrics.jsonl") == [{"step": 1, "x": 2.0}]
    with open_sinks(config_with(jsonl=False), tmp_path / "b", resumed_step=0) as sinks:
        sinks.write(1, {"x": 2.0})
    assert tensorboard_scalars(tmp_path / "b" / "tensorboard", "x") == [(1, 2.0)]
    assert not (tmp_path / "b" / "metrics.jsonl").exists()


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    with open_sinks(Config(), tmp_path / "run", resumed_step=0, enabled=False) as sinks:
        sinks.write(1, {"x": 2.0})
    assert not (tmp_path / "run").exists()


class BrokenSink:
    def __init__(self) -> None:
        self.closed = False

    def write(self, step: int, metrics: Any) -> None:
        raise OSError("disk full")

    def close(self) -> None:
        self.closed = True


def test_every_sink_is_closed_after_an_error() -> None:
    sinks = [BrokenSink(), BrokenSink()]
    with pytest.raises(OSError, match="disk full"), SinkGroup(list(sinks)) as group:
        group.write(0, {})
    assert [sink.closed for sink in sinks] == [True, True]


def test_a_full_disk_and_a_deleted_file_are_told_in_words(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resumed_step=0)
    sink.write(0, {"x": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
    try:
        with pytest.raises(DiskError, match=r"metrics\.jsonl cannot be written: File too large .*free there"):
            sink.write(1, {"x" * 100: 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 0, "x": 1.0}], "no half of a line"
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(DiskError, match=r"metrics\.jsonl was deleted or replaced while the run was writing there"):
        sink.write(2, {"x": 1.0})
    sink.close()


@pytest.mark.parametrize("line", [b"[]", b"7", b'{"step": "1"}', b'{"step": null}', b'{"step": true}', b"{}", b"\xff"])
def test_a_line_of_something_else_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no line of metrics"):
        JsonlSink(path, resumed_step=9)
