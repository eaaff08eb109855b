"""`megatron-fipo certify`: layouts hold, each deliberate mistake is caught, and what must not pass does not."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_fipo import cli
from megatron_fipo.certify.certificate import certify_layouts, try_controls
from megatron_fipo.certify.comparison import QUANTITIES, Comparison, breaches, measure
from megatron_fipo.certify.computation import Record, TokenRecord
from megatron_fipo.certify.controls import CONTROLS, Control
from megatron_fipo.certify.layouts import DEFAULT_LAYOUTS, Layout, configure, one_process, parse_layout
from megatron_fipo.certify.runner import Measured, Runner
from megatron_fipo.certify.synthetic import draw_groups, shrunken_config
from megatron_fipo.config import Config, FipoConfig
from megatron_fipo.convert.hf_config import model_shape
from megatron_fipo.parallel.local_ranks import RankError, run_local_ranks

RAW = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "tie_word_embeddings": True,
}
CONFIG = """
model: {path: MODEL}
data: {train: {sums: {kind: chain_arithmetic, verifier: chain_arithmetic}}}
objective: {influence_min: 0.8}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(RAW))
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG.replace("MODEL", str(tmp_path / "model")))
    return file


# --- the command ------------------------------------------------------------------------------------------------------


def test_layouts_hold_and_every_deliberate_mistake_is_caught(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--layouts", "cp2,tp2+sp", "--negative-controls", "--longest-response", "60"]
    arguments += ["--steps", "2", "--updates", "2"]
    status = cli.main(["certify", str(config_file), *arguments, "run.seed=3"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "all 2 layouts hold; all 6 deliberate mistakes caught" in printed
    assert [line.split()[-1] for line in printed.splitlines() if line.split()[:1] in (["cp2"], ["tp2+sp"])] == [
        "holds",
        "holds",
    ]
    rows = {control.name: line for control in CONTROLS for line in printed.splitlines() if f" {control.name} " in line}
    assert {name: row.split()[-1] for name, row in rows.items()} == {control.name: "caught" for control in CONTROLS}
    bound = next(line for line in printed.splitlines() if line.split()[:1] == ["bound"])
    assert bound.replace("≤", "").split()[1:] == ["1e-05", "1e-05", "1e-05", "2e-05", "2e-06", "1e-04"]


@pytest.mark.parametrize(
    ("layouts", "said"),
    [
        ("cp2+tp", "'tp' is neither a size"),
        ("cp2+cp4", "gives cp twice"),
        ("sp", "needs tp above 1"),
        ("vpp2", "needs pp above 1"),
        ("cp2,tp3", "num_attention_heads=4"),
    ],
)
def test_a_layout_that_cannot_run_is_refused_before_anything_does(
    config_file: Path, capsys: pytest.CaptureFixture[str], layouts: str, said: str
) -> None:
    assert cli.main(["certify", str(config_file), "--layouts", layouts]) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert output.out == ""


class FakeRunner:
    """Gives prepared values instead of computing."""

    def __init__(self, values: Sequence[list[float | None]]) -> None:
        self._values = iter(values)

    def compute_reference(self) -> None:
        pass

    def measure(self, layout: Layout) -> Measured:
        return Measured(1, next(self._values))

    def measure_control(self, control: Control) -> Measured:
        return Measured(1, next(self._values))


WITHIN: list[float | None] = [1e-5, 0.0, 1e-5, None, 2e-6, 1e-4]
BEYOND: list[float | None] = [1.0, 0.0, 0.0, 0.0, 0.0, None]


@pytest.mark.parametrize("beyond", [1.01e-5, math.inf, math.nan])
def test_a_breach_is_shown_and_counted(beyond: float) -> None:
    console = Console(file=io.StringIO(), width=150)
    runner: Any = FakeRunner([WITHIN, [0.0, beyond, 0.0, 0.0, 0.0, 0.0]])
    layouts = [parse_layout("cp2"), parse_layout("tp2")]
    assert certify_layouts(runner, layouts, "float32", console) == 1
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    verdicts = {line.split()[0]: line.split()[-1] for line in printed.splitlines() if line.split()}
    assert (verdicts["cp2"], verdicts["tp2"]) == ("holds", "BREACH")


def test_a_mistake_within_all_bounds_is_not_caught() -> None:
    console = Console(file=io.StringIO(), width=150)
    runner: Any = FakeRunner([WITHIN, [1.0, 0.0, 0.0, 0.0, 0.0, None]])
    assert try_controls(runner, CONTROLS[:2], "float32", console) == 1
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count("NOT CAUGHT") == 1
    assert f"{CONTROLS[1].layout} " in next(line for line in printed.splitlines() if line.rstrip().endswith(" caught"))


@pytest.mark.parametrize(("num_breaches", "num_missed", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
def test_the_exit_status_follows(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, num_breaches: int, num_missed: int, status: int
) -> None:
    of_a_layout, of_a_mistake = (BEYOND if num_breaches else WITHIN), (WITHIN if num_missed else BEYOND)
    monkeypatch.setattr(Runner, "compute_reference", lambda self: None)
    monkeypatch.setattr(Runner, "measure", lambda self, layout: Measured(1, of_a_layout))
    monkeypatch.setattr(Runner, "measure_control", lambda self, control: Measured(1, of_a_mistake))
    assert cli.main(["certify", str(config_file), "--negative-controls"]) == status


# --- layouts, model and rollouts --------------------------------------------------------------------------------------


def test_layout_names_say_what_they_are() -> None:
    layout = parse_layout("tp2+pp2+vpp2+cp2+dp3+sp+recompute-full+plain-optimizer")
    parallel = layout.parallel
    assert (parallel.tp, parallel.pp, parallel.virtual_pp, parallel.cp, parallel.sequence_parallel) == (
        2,
        2,
        2,
        2,
        True,
    )
    assert (layout.world_size, layout.recompute, layout.distributed_optimizer) == (24, "full", False)
    assert max(parse_layout(name).world_size for name in DEFAULT_LAYOUTS) == 8
    assert len(set(DEFAULT_LAYOUTS)) == len(DEFAULT_LAYOUTS) >= 10


def test_only_the_reference_takes_a_minibatch_whole() -> None:
    budgets = [
        configure(Config(), layout, 61, RAW | {"num_attention_heads": 4}).batch.max_tokens_per_microbatch
        for layout in (one_process(), parse_layout("cp2"), parse_layout("cp2+small-microbatches"))
    ]
    assert budgets == [2**31, 128, 64]


@pytest.mark.parametrize("changes", [{}, {"model_type": "llama", "tie_word_embeddings": False}])
def test_the_small_model_is_of_the_same_kind(changes: dict[str, Any]) -> None:
    for kv_heads, grouped in ((2, True), (8, False)):
        shape = model_shape(shrunken_config(RAW | changes | {"num_key_value_heads": kv_heads}), "here")
        assert shape.family == (changes.get("model_type") or "qwen2")
        assert shape.tied_embeddings == (not changes)
        assert (shape.num_query_groups < shape.num_attention_heads) == grouped
        assert shape.vocab_size % 128 != 0


def test_rollouts_exercise_what_is_to_be_certified() -> None:
    shape = model_shape(shrunken_config(RAW), "here")
    groups = draw_groups(Config(), shape, step=0, num_updates=8, longest_response=120)
    samples = [sample for group in groups for sample in group.samples]
    lengths = [len(sample.response_ids) for sample in samples]
    assert (min(lengths), max(lengths)) == (1, 120)
    assert len(set(lengths)) > 10
    assert {sample.advantage > 0 for sample in samples} == {True, False}
    num_clipped = [int((sample.rollout_log_probs.exp() > 10).sum()) for sample in samples if sample.advantage < 0]
    assert {0, 1, 3} <= set(num_clipped)  # one is kept by the sequence filter, three are not
    again = draw_groups(Config(), shape, step=0, num_updates=8, longest_response=120)
    assert torch.equal(again[3].samples[1].response_ids, groups[3].samples[1].response_ids)


# --- the comparison ---------------------------------------------------------------------------------------------------


def make_record() -> Record:
    """Three tokens of one sample; with half-life 1, F = (0.25 + 0/2, -0.5 + 1/2, 1)."""
    tokens = TokenRecord(
        places=torch.tensor([4, 5, 6]),
        log_prob_shift=torch.tensor([0.25, -0.5, 1.0]),
        influence_weights=torch.tensor([1.0, 1.1, 1.2]),
        future_kl=torch.tensor([0.25, 0.0, 1.0]),
        in_loss=torch.tensor([True, True, False]),
        token_loss=torch.tensor([-1.0, 3.0, 100.0]),
    )
    gradients = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1e-6])}
    weights = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([1.0])}
    return Record(tokens, loss=1.0, gradients=gradients, grad_norm=5.0, weights=weights, num_microbatches=1)


def compare(change: Any = None, objective: FipoConfig | None = None) -> dict[str, float | None]:
    layout = make_record()
    if change:
        change(layout)
    start = {"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([1.0])}
    objective = objective or FipoConfig(half_life_tokens=1.0)
    values = measure(Comparison(layout, make_record(), start, objective))
    return dict(zip([quantity.heading for quantity in QUANTITIES], values, strict=True))


def test_equal_records_do_not_differ() -> None:
    assert set(compare().values()) == {0.0}


@pytest.mark.parametrize(
    ("heading", "change", "expected"),
    [
        ("gradients", lambda r: r.gradients["a"].add_(torch.tensor([0.0, 0.5])), 0.1),
        # Beside a norm of 5 the tiny one counts as 0.005.
        ("gradients", lambda r: r.gradients["b"].add_(1e-6), 1e-6 / 5e-3),
        ("gradients", lambda r: r.gradients.pop("b"), math.inf),
        ("gradient norm", lambda r: setattr(r, "grad_norm", 5.5), 0.1),
        ("loss", lambda r: setattr(r, "loss", 1.5), 0.25),
        ("influence weights", lambda r: r.tokens.influence_weights.add_(torch.tensor([0.0, -0.25, 0.0])), 0.25),
        ("influence weights", lambda r: r.tokens.in_loss.logical_not_(), math.inf),
        # Beside sums of |x| of 0.75, 1 and 1.
        ("future_kl", lambda r: r.tokens.future_kl.add_(torch.tensor([0.0, 0.01, 0.0])), 0.01),
        ("future_kl", lambda r: r.tokens.future_kl.add_(torch.tensor([0.75, 0.0, 0.0])), 1.0),
        ("weights", lambda r: r.weights["a"].add_(torch.tensor([0.0, 0.5])), 0.25),
        ("weights", lambda r: r.weights.update(b=torch.tensor([2.0])), 0.5),
    ],
)
def test_each_quantity_sees_its_difference_alone(heading: str, change: Any, expected: float) -> None:
    values = compare(change)
    assert values.pop(heading) == pytest.approx(expected, rel=1e-6)
    assert set(values.values()) == {0.0}


def test_future_kl_counts_distance_in_positions_and_leaves_extreme_ratios_out() -> None:
    def change(record: Record) -> None:
        record.tokens.places = torch.tensor([4, 6, 7])  # a masked token between
        record.tokens.future_kl = torch.tensor([0.25 + (-0.5 + 0.5) / 4, 0.0, 1.0])

    assert compare(change)["future_kl"] == 0.0

    def shift_beyond(record: Record) -> None:
        record.tokens.log_prob_shift[2] = 3.0  # exp(3) > 10 takes no part
        record.tokens.future_kl = torch.tensor([0.0, -0.5, 0.0])

    assert compare(shift_beyond)["future_kl"] == 0.0


def test_without_future_kl_there_is_nothing_to_measure_of_it() -> None:
    values = compare(lambda r: setattr(r.tokens, "future_kl", None), FipoConfig(future_kl=False))
    assert values["future_kl"] is None
    assert values["influence weights"] is None


def test_a_bound_is_breached_beyond_it_and_by_what_is_no_number() -> None:
    bounds = [quantity.bounds["float32"] for quantity in QUANTITIES]
    assert breaches(list(bounds), "float32") == []
    assert breaches([None] * len(QUANTITIES), "float32") == []
    for index, quantity in enumerate(QUANTITIES):
        for value in (bounds[index] * 1.001, math.inf, math.nan):
            values = list(bounds)
            values[index] = value
            assert breaches(values, "float32") == [quantity]


# --- local ranks ------------------------------------------------------------------------------------------------------


def _rank_of_world(offset: int) -> tuple[int, int, int]:
    return int(os.environ["RANK"]) + offset, int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


def _fail_one_after_the_other(pid_file: Path) -> None:
    """Rank 0 fails of what rank 1 did, once rank 1 is gone."""
    if os.environ["RANK"] == "1":
        pid_file.with_suffix(".partial").write_text(str(os.getpid()))
        pid_file.with_suffix(".partial").rename(pid_file)
        raise LookupError("the cause")
    while not pid_file.exists():
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(int(pid_file.read_text()), 0)
            time.sleep(0.01)
    raise ConnectionError("the consequence")


def _die() -> None:
    os._exit(3)


def _wait_for_ever() -> None:
    while True:
        time.sleep(1)


def test_ranks_return_what_they_computed() -> None:
    assert run_local_ranks(_rank_of_world, 2, 10) == [(10, 0, 2), (11, 1, 2)]


def test_the_first_failure_is_shown_not_its_consequences(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2:.*_fail_one_after_the_other.*LookupError: the cause"):
        run_local_ranks(_fail_one_after_the_other, 2, tmp_path / "pid")


def test_a_dead_rank_and_a_late_one_are_named() -> None:
    with pytest.raises(RankError, match="rank 0 of 1:\nthe process died"):
        run_local_ranks(_die, 1)
    with pytest.raises(RankError, match=r"ranks \[0, 1\] of 2 did not end within 1 s"):
        run_local_ranks(_wait_for_ever, 2, timeout_s=1.0)
