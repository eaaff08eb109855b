"""What the console prints, and that it prints nothing that it should not."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from itertools import count

import pytest

from megatron_fipo.config import Config, load_config
from megatron_fipo.console.console import Console
from megatron_fipo.console.samples import ShownSample
from megatron_fipo.console.step_lines import HEADER_EVERY_LINES

METRICS = {
    "reward/mean": -0.25,
    "rollout/accuracy/mean": 0.375,
    "rollout/response_tokens/mean": 1234.4,
    "policy/entropy/mean": 0.41234,
    "policy/kl/mean": 0.00012,
    "optim/grad_norm": 0.3333,
    "fipo/influence_weight/mean": 1.012,
    "fipo/influence_weight/std": 0.034,
    "fipo/influence_weight/clipped_share": 0.125,
    "perf/tokens_per_s": 5678.0,
}


def printed(*overrides: str, width: int | None = None) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(load_config(None, ["model.path=some/model", *overrides]), file=out, width=width), out


def test_a_step_is_one_aligned_line_with_every_number() -> None:
    console, out = printed()
    console.step_line(7, METRICS)
    console.step_line(100, {})
    lines = out.getvalue().splitlines()[1:]
    assert len(lines) == 4  # two of heading, two steps
    cells = ["7/100", "-0.250", "37.5%", "1,234", "0.4123", "1.2e-04", "0.3333", "1.012 ± 0.034", "12.5%", "5,678"]
    assert [cell.strip() for cell in lines[2].split("  ") if cell.strip()] == cells
    assert lines[3].split() == ["100/100", *["–"] * 9]
    assert {len(line) for line in lines} == {len(lines[2])}
    assert len(lines[2]) <= 130


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_a_dash(value: float) -> None:
    console, out = printed()
    console.step_line(1, {**METRICS, "fipo/influence_weight/std": value})
    assert "1.012" not in out.getvalue()
    assert out.getvalue().splitlines()[-1].count("–") == 1


def test_without_future_kl_there_are_no_influence_columns() -> None:
    console, out = printed("algorithm=dapo")
    console.step_line(1, METRICS)
    assert "influence" not in out.getvalue()
    assert "5,678" in out.getvalue()


def test_what_comes_again_and_again_is_told_with_a_count() -> None:
    console, out = printed()
    for step in range(12):
        console.warning(f"step {step}: flood", kind="flood")
        console.warning("one of its own")
    text = " ".join(out.getvalue().split())
    assert text.count("flood") == 2
    assert "step 0: flood" in text
    assert "step 9: flood (this is the 10th time in this run that it could be said)" in text
    assert text.count("one of its own") == 12


def test_the_heading_comes_back() -> None:
    console, out = printed()
    for step in range(1, HEADER_EVERY_LINES + 2):
        console.step_line(step, METRICS)
    assert out.getvalue().count("reward") == 2


@pytest.mark.parametrize("width", [20, 60, 80, 100, 130])
def test_a_narrow_terminal_loses_columns_rather_than_wrapping(width: int) -> None:
    console, out = printed(width=width)
    console.step_line(1, METRICS)
    lines = out.getvalue().splitlines()[1:]
    assert len(lines) == 3
    assert max(map(len, lines)) <= width
    assert "-0.250" in lines[2]  # the reward stays


def test_other_ranks_are_silent() -> None:
    out = io.StringIO()
    console = Console(Config(), enabled=False, file=out)
    console.banner(1)
    console.step_line(1, METRICS)
    console.warning("x")
    console.info("x")
    console.samples("x", [ShownSample("p", "r", "1", "1", 1.0, 3)])
    console.evaluation_table("x", {"a": 1.0})
    console.closing({"metrics": "x"}, "chat")
    with console.rollout_progress(1, 10) as progress:
        progress.advance(5)
    assert out.getvalue() == ""


def seconds(every: float) -> Iterator[float]:
    return (step * every for step in count())


def test_a_pipe_hears_of_long_phases_now_and_then() -> None:
    out = io.StringIO()
    ticks = seconds(10)
    console = Console(Config(), file=out, clock=lambda: next(ticks))
    with console.rollout_progress(4, 12) as progress:
        for _ in range(6):
            progress.advance(2)
    assert out.getvalue().splitlines() == [
        "  · step 4  rollout: 6/12 responses, 30 s",
        "  · step 4  rollout: 12/12 responses, 60 s",
    ]


def test_a_pipe_hears_nothing_of_short_phases() -> None:
    out = io.StringIO()
    ticks = seconds(0.1)
    console = Console(Config(), file=out, clock=lambda: next(ticks))
    with console.update_progress(1, 100) as progress:
        for _ in range(100):
            progress.advance()
    assert out.getvalue() == ""


def test_no_text_reaches_the_terminal_raw() -> None:
    console, out = printed()
    evil = "\x1b[31mred\x1b]0;title\x07 [bold]not markup[/bold] \x9b2J"
    console.samples("Before", [ShownSample(evil, evil, evil, evil, 0.0, 9, truncated=True)])
    console.warning(evil)
    console.info(evil)
    console.closing({"metrics": evil})
    console.banner(1, {"fact": evil})
    assert not {"\x1b", "\x07", "\x9b"} & set(out.getvalue())
    assert "[bold]not markup[/bold]" in out.getvalue()
    assert "cut at the length limit" in out.getvalue()


def test_a_long_response_shows_its_end() -> None:
    console, out = printed()
    text = "\n".join(f"line {number}" for number in range(100))
    console.samples("After", [ShownSample("p", text, "1", "1", 1.0, 9)])
    shown = out.getvalue()
    assert "line 0" in shown
    assert "line 99" in shown
    assert "line 50" not in shown
    assert "… 93 lines …" in shown


def test_evaluation_before_and_after() -> None:
    console, out = printed()
    console.evaluation_table("Held-out", {"held_out/avg@4": 0.25, "gone": 1.0}, {"held_out/avg@4": 0.75})
    rows = {line.split()[0]: line.split()[1:] for line in out.getvalue().splitlines() if line.strip()}
    assert rows["held_out/avg@4"] == ["0.250", "0.750", "+0.500"]
    assert rows["gone"] == ["1.000", "–", "–"]


def test_the_banner_says_what_will_run() -> None:
    console, out = printed("run.name=mine", "parallel.cp=2", "train.num_minibatches=8", "train.num_epochs=2")
    console.banner(4, {"parameters": "0.76 M"})
    text = out.getvalue()
    for fragment in (
        "FIPO on Megatron-Core",
        "some/model, float32",
        "100 steps × 16 updates",
        "outputs/mine",
        "0.76 M",
    ):
        assert fragment in text
    assert "4 = tp 1 × pp 1 × cp 2 × dp 2" in text
    assert "half-life 32 tokens, influence weights in [1, 1.2]" in text


def test_a_long_command_can_be_copied() -> None:
    console, out = printed(width=40)
    command = "megatron-fipo chat " + "a/very/long/folder/" * 6
    console.closing({"metrics": "outputs/metrics.jsonl"}, command)
    assert f"  {command}" in out.getvalue().splitlines()


def test_the_closing_proposes_prompts_that_cannot_touch_the_terminal() -> None:
    console, out = printed()
    console.closing({"metrics": "x"}, "megatron-fipo chat m", ["3+9-5=", "1+\x1b[31m2="])
    last = out.getvalue().rstrip().splitlines()[-1]
    assert last == "  Try: 3+9-5=   1+\\x1b[31m2="
    console, out = printed()
    console.closing({"metrics": "x"}, "megatron-fipo chat m")
    assert "Try:" not in out.getvalue()


def test_an_ascii_log_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    console = Console(Config(), file=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.banner(1)
    console.step_line(1, {})
    assert b"FIPO on Megatron-Core" in raw.getvalue()
