"""`megatron-fipo conformance`: right implementations pass, each mistake fails, and what cannot be called is told."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo import cli, padded_policy_loss
from megatron_fipo.conformance import implementation
from megatron_fipo.conformance.comparison import QUANTITIES, TOLERANCE, Comparison, compare
from megatron_fipo.conformance.recording import FILES, Recording, load
from tests.unit import plain_fipo

SHOWS_IN_PARTS_ALONE = ("no clamp of the shift",)
"""All that is clamped is far beyond the clips of ratio and weight."""
RECORDINGS = [load(path) for path in FILES]


def failures(loss: Callable[..., Any], until: frozenset[str] = frozenset()) -> set[str]:
    """Quantities in which an implementation differs from a recording; once all of `until` are among them, no more."""
    found: set[str] = set()
    for recorded in RECORDINGS:
        rows = compare(recorded, implementation.results("it", loss, recorded))
        found |= {row.quantity for row in rows if not row.passes}
        if until and until <= found:
            break
    return found


# --- what passes and what fails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [padded_policy_loss, plain_fipo.loss], ids=["ours", "an L x L matrix"])
def test_right_implementations_pass(loss: Callable[..., Any]) -> None:
    rows = [row for recorded in RECORDINGS for row in compare(recorded, implementation.results("it", loss, recorded))]
    assert [row for row in rows if not row.passes] == []
    assert {row.quantity for row in rows} == set(QUANTITIES)
    assert len({row.case for row in rows}) == len(FILES) == 10


@pytest.mark.parametrize("mistake", plain_fipo.MISTAKES)
def test_each_mistake_fails(mistake: str) -> None:
    expected = plain_fipo.MISTAKES[mistake]
    found = failures(partial(plain_fipo.loss, mistake=mistake), until=frozenset({expected, "gradient"}))
    assert expected in found, found
    # A trainer may be able to return the loss alone.
    assert ("gradient" in found) == (mistake not in SHOWS_IN_PARTS_ALONE), found


def test_what_lies_where_nothing_counts_is_free() -> None:
    def loss(*arguments: Any) -> dict[str, Tensor]:
        found = plain_fipo.loss(*arguments)
        for name in ("future_kl", "influence_weights", "token_loss"):
            found[name] = torch.where(found["final_mask"], found[name], torch.nan)
        return found

    assert failures(loss) == set()


def test_a_bound_is_a_bound() -> None:
    (recorded,) = [recorded for recorded in RECORDINGS if recorded.case == "recipe_7b"]

    def off_by(amount: float) -> Comparison:
        return compare(recorded, {"loss": torch.tensor(recorded.loss + amount, dtype=torch.float64)})[0]

    assert off_by(0.9 * TOLERANCE).passes
    assert not off_by(1.1 * TOLERANCE).passes
    assert off_by(-0.25).difference == pytest.approx(0.25)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes their_trainer.py into the current folder, and forgets it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "their_trainer", raising=False)

    def write(text: str) -> None:
        (tmp_path / "their_trainer.py").write_text(text)

    yield write
    sys.modules.pop("their_trainer", None)


HEAD = "import torch\nfrom tests.unit import plain_fipo\n"
RIGHT = f"{HEAD}def loss(*of):\n    return plain_fipo.loss(*of)['loss']\n"


def test_the_command_passes_a_loss_alone_and_says_what_it_did_not_see(
    module: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    module(RIGHT)
    assert cli.main(["conformance", "their_trainer:loss"]) == 0
    said = capsys.readouterr().out
    assert said.count(" pass") == 2 * len(FILES)
    assert "FAIL" not in said
    assert "Not returned, and so not compared: normalizer, final_mask, future_kl, influence_weights" in said
    assert "their_trainer:loss agrees with all 10 recordings." in said


def test_the_command_fails_a_mistake_by_case_and_quantity(
    module: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    module(f"{HEAD}def loss(*of):\n    return plain_fipo.loss(*of, mistake='no sequence filter')\n")
    assert cli.main(["conformance", "their_trainer:loss"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any(line[:1] == ["final_mask"] and line[-1:] == ["FAIL"] for line in lines)
    assert any(line[:1] == ["on_policy"] and line[-1:] == ["pass"] for line in lines), "nothing is extreme there"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("loss", RIGHT, "'loss' names no function. Write package.module:function"),
        ("their trainer:loss", RIGHT, "names no function"),
        ("their_trainer:", RIGHT, "names no function"),
        ("no_such_trainer:loss", RIGHT, "no module 'no_such_trainer' in this environment, nor in"),
        ("their_trainer.part:loss", RIGHT, "no module 'their_trainer.part'|'their_trainer' is not a package"),
        ("their_trainer:los", RIGHT, "has no function 'los'. Did you mean 'their_trainer:loss'?"),
        ("their_trainer:loss", "import no_such_package", "needs the module 'no_such_package', which is not there"),
        ("their_trainer:loss", "raise SystemExit(0)", "importing their_trainer raised SystemExit: 0"),
        ("their_trainer:loss", "1 / 0", r"raised ZeroDivisionError: division by zero \(.*their_trainer.py, line 1\)"),
        ("their_trainer:loss", "def loss(:", r"raised SyntaxError: .*\(their_trainer.py, line 1\)\.$"),
        ("their_trainer:loss", "loss = 5", "is a int and no function. It is called as loss\\(log_probs, old_log_probs"),
        (
            "their_trainer:loss",
            "def loss(logits): pass",
            r"TypeError: loss\(\) takes 1 .* given\. It is",
        ),
        ("their_trainer:loss", "def loss(*of): raise KeyError('gamma')", r"KeyError: 'gamma' \(.*, line 1\)"),
        ("their_trainer:loss", "def loss(*of): pass", "it returned a NoneType. Return the loss, or a dict of loss,"),
        (
            "their_trainer:loss",
            "def loss(x, *of): return x",
            r"loss as \(\d+, \d+\); it must .* shape \(\)",
        ),
        ("their_trainer:loss", "def loss(x, *of): return {'los': x.sum()}", "returned 'los', which is compared with"),
        ("their_trainer:loss", "def loss(x, *of): return {'loss_sum': x.sum()}", "returned no loss. Return its mean"),
        (
            "their_trainer:loss",
            "def loss(x, *of): return {'loss': x.sum(), 'future_kl': x[0]}",
            "returned future_kl as",
        ),
        (
            "their_trainer:loss",
            "def loss(x, *of): return {'loss': x.sum(), 'token_loss': 1.5}",
            "token_loss as a fl",
        ),
        ("their_trainer:loss", "def loss(x, *of): return x.sum().detach()", "does not depend on log_probs: it has no"),
        (
            "their_trainer:loss",
            "def loss(x, *of): return {'loss': 0.5}",
            "does not depend on log_probs: it has no graph",
        ),
        (
            "their_trainer:loss",
            "import torch\ndef loss(*of): return torch.ones((), requires_grad=True) * 2",
            "the loss has a graph without log_probs",
        ),
        ("their_trainer:loss", "def loss(x, *of): return x.sum() * float('nan')", "loss holds 1 numbers that are NaN"),
        (
            "their_trainer:loss",
            "def loss(x, *of): return {'loss': x.sum(), 'influence_weights': x / 0}",
            r"influence_weights holds \d+ numbers that are NaN or infinite",
        ),
        ("their_trainer:loss", "def loss(x, *of): return (x - x.detach()).sqrt().sum()", r"gradient holds \d+ numbers"),
    ],
)
def test_what_cannot_be_compared_is_told(
    name: str, text: str, words: str, module: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    module(text)
    assert cli.main(["conformance", name]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("megatron-fipo conformance: ")
    assert "Traceback" not in output.err
    assert re.search(words, output.err), output.err


def test_inputs_that_theirs_changes_are_copies() -> None:
    recorded: Recording = RECORDINGS[0]
    before = recorded.old_log_probs.clone(), recorded.response_mask.clone()

    def loss(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: Any) -> Tensor:
        old.zero_()
        mask.zero_()
        return log_probs.sum()

    implementation.results("it", loss, recorded)
    assert torch.equal(recorded.old_log_probs, before[0])
    assert torch.equal(recorded.response_mask, before[1])
