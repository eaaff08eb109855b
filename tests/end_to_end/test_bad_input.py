"""What cannot be used is refused before anything is trained: exit code 2, one message on one rank, no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_fipo.train import EXIT_BAD_INPUT
from tests.end_to_end.runs import quickstart_with, train


@dataclass(frozen=True)
class BadInput:
    """What is wrong, and what the message must say of it."""

    overrides: tuple[str, ...] = ()
    rows: tuple[dict[str, Any], ...] | None = None
    """Rows of a prompt file to train on; None keeps the quick-start's own task."""
    said: tuple[str, ...] = ()


GOOD_ROW = {"prompt": "3+4=", "answer": "7"}
CASES = {
    "unknown key": BadInput(("objective.half_live_tokens=8",), said=("objective.half_live_tokens", "half_life_tokens")),
    "wrong type": BadInput(("train.num_steps=many",), said=("train.num_steps", "many")),
    "impossible layout": BadInput(("parallel.cp=3",), said=("2 processes", "cp=3", "multiple of 3")),
    "model does not divide": BadInput(
        ("parallel.cp=1", "parallel.pp=2", "model.path={odd}"), said=("parallel.pp=2", "num_hidden_layers=3")
    ),
    "no model folder": BadInput(
        ("model.path=./nowhere/model",),
        said=("model.path=./nowhere/model", "from the current folder", "from the folder of fipo.yaml"),
    ),
    "no weights": BadInput(("model.path={bare}",), said=("{bare}", "safetensors")),
    "a weight that is NaN": BadInput(
        ("model.path={nan}",), said=("{nan}", "NaN or infinity", "model.norm.weight in nan/model.safetensors")
    ),
    "a layout key of 0": BadInput(("model.path={zero}",), said=("{zero}", "num_attention_heads", "from 1 on")),
    "rollout log-probs for FIPO": BadInput(
        ("objective.old_log_probs=rollout",), said=("objective.old_log_probs=rollout", "future_kl", "=actor")
    ),
    "no constant length": BadInput(
        ("algorithm=dr_grpo",), said=("objective.sequence_sum_tokens", "max_response_tokens")
    ),
    "no prompt file": BadInput(("data.train.source.path=nowhere.jsonl",), (GOOD_ROW,), ("source", "nowhere.jsonl")),
    "empty prompt file": BadInput(rows=(), said=("source", "{file}", "no prompts")),
    "missing column": BadInput(
        rows=(GOOD_ROW, {"question": "1+1=", "answer": "2"}), said=("{file}:2", "'prompt'", "question", "prompt_field")
    ),
    "over-long prompt": BadInput(
        rows=(GOOD_ROW, {"prompt": "1+" * 10 + "1=", "answer": "11"}),
        said=("{file}:2", "22 tokens", "rollout.max_prompt_tokens=16", "data.overlong_prompts=skip"),
    ),
    "prompt outside the vocabulary": BadInput(
        rows=({"prompt": "What?", "answer": "7"},), said=("{file}:1", "does not know 'W'")
    ),
}


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str], str]:
    """Fills in the names of this test's files."""
    names = {name: tmp_path / name for name in ("bare", "odd", "nan", "zero")}
    for folder in names.values():
        folder.mkdir()
        for file in Path("examples/quickstart/base").glob("*.json"):
            (folder / file.name).write_text(file.read_text())
    odd = json.loads((names["odd"] / "config.json").read_text())
    (names["odd"] / "config.json").write_text(json.dumps(odd | {"num_hidden_layers": 3}))
    (names["zero"] / "config.json").write_text(json.dumps(odd | {"num_attention_heads": 0}))
    tensors = load_file("examples/quickstart/base/model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, names["nan"] / "model.safetensors", metadata={"format": "pt"})
    return lambda text: text.format(file=tmp_path / "prompts.jsonl", **names)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(name: str, place: Callable[[str], str], tmp_path: Path) -> None:
    case = CASES[name]
    keywords: dict[str, Any] = {}
    if case.rows is not None:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.rows))
        source = {"kind": "jsonl", "path": str(tmp_path / "prompts.jsonl"), "verifier": "exact"}
        keywords["config"] = quickstart_with(tmp_path / "config.yaml", source)
    outcomes = train(tmp_path / "run", *map(place, case.overrides), expected=EXIT_BAD_INPUT, timeout_s=120, **keywords)
    messages = [outcome.output for outcome in outcomes if outcome.output.strip()]
    assert len(messages) == 1, "one rank speaks"
    assert messages[0].startswith("error: ")
    assert "Traceback" not in messages[0]
    for text in map(place, case.said):
        assert text in messages[0]
    assert not (tmp_path / "run").exists(), "nothing is written for a run that cannot be"
