"""Rewards as people write them, in runs: several verifiers with weights, and what is refused before it costs much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_fipo.train import EXIT_BAD_INPUT
from tests.end_to_end.runs import quickstart_with, step_lines, train

OWN = "tests.end_to_end.verifiers"


def _source(folder: Path, **keys: Any) -> dict[str, Any]:
    """A source of 64 prompts whose rows have a column more, 0 to 3."""
    rows = [
        {"prompt": f"{first}+{second}-1+4+6-2=", "answer": "7", "level": (first + second) % 4}
        for first in range(1, 9)
        for second in range(1, 9)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "jsonl", "path": str(folder / "prompts.jsonl"), **keys}


def test_a_float_and_a_row_reader_judge_together(tmp_path: Path) -> None:
    """One function returns a float, the other an awaited dict with the row's column; only the first one counts."""
    several = {"verifier": [f"{OWN}:half_by_hash", f"{OWN}:as_the_row_says"], "verifier_weights": [1.0, 0.0]}
    path = quickstart_with(tmp_path / "config.yaml", _source(tmp_path, **several))
    config = yaml.safe_load(path.read_text())
    config["data"]["evaluation"] = {"held_out": _source(tmp_path, verifier=several["verifier"])}
    path.write_text(yaml.safe_dump(config))
    (outcome,) = train(
        tmp_path / "run",
        "train.num_steps=1",
        "data.evaluation.held_out.num_prompts=8",
        "evaluation.num_samples_per_prompt=2",
        config=path,
        world_size=1,
        expected=0,
    )
    (line,) = step_lines(tmp_path / "run")
    first, second = (f"reward/verifier/{OWN}:{name}/mean" for name in ("half_by_hash", "as_the_row_says"))
    assert line[first] == line["rollout/accuracy/mean"], "only the first counts"
    assert 0.0 < line[first] < 1.0
    assert line[second] == pytest.approx(line[f"reward/verifier/{OWN}:as_the_row_says.level/mean"] / 4)
    assert line["optim/grad_norm"] > 0

    problems = [
        json.loads(text) for text in (tmp_path / "run/evaluation/before_held_out.jsonl").read_text().splitlines()
    ]
    levels = [1 + 1, 1 + 2, 1 + 3, 1 + 4, 1 + 5, 1 + 6, 1 + 7, 1 + 8]
    for problem, level in zip(problems, levels, strict=True):
        for score, part in zip(problem["scores"], problem["parts"], strict=True):
            by_hash, by_row = part[f"{OWN}:half_by_hash"], part[f"{OWN}:as_the_row_says"]
            assert by_row == level % 4 / 4, "each prompt is judged by its own row"
            assert score == pytest.approx((by_hash + by_row) / 2)
        assert problem["errors"] == ["", ""]
        assert problem["answers"] == (problem["responses"] if level % 4 == 0 else ["", ""])
    evaluated = json.loads((tmp_path / "run/evaluation/before.json").read_text())
    assert evaluated[f"evaluation/held_out/verifier/{OWN}:as_the_row_says/mean"] == pytest.approx(0.375)
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize(
    ("verifier", "said"),
    [
        ([f"{OWN}:half_by_hsh", "exact"], (f"source.verifier: verifier '{OWN}:half_by_hsh'", "half_by_hash'?")),
        (f"{OWN}:from_minus_1", ("returned the score -1; a score lies in [0, 1]", "(reward + 1) / 2", "first row")),
        ("http://127.0.0.1:9/score?key=secret", ("http://127.0.0.1:9/score?… did not answer", "Connection refused")),
    ],
)  # fmt: skip
def test_a_verifier_that_cannot_judge_stops_before_anything_is_generated(
    verifier: Any, said: tuple[str, ...], tmp_path: Path
) -> None:
    source = _source(tmp_path, verifier=verifier)
    outcomes = train(
        tmp_path / "run",
        "verifier.timeout_s=2",
        config=quickstart_with(tmp_path / "config.yaml", source),
        world_size=2,
        expected=EXIT_BAD_INPUT,
        timeout_s=120,
    )
    messages = [outcome.output for outcome in outcomes if outcome.output.strip()]
    assert len(messages) == 1, "one rank speaks"
    assert messages[0].startswith("error: ")
    for text in said:
        assert text in messages[0]
    assert "Traceback" not in messages[0]
    assert "secret" not in messages[0]
    assert not (tmp_path / "run").exists(), "nothing is written for a run that cannot be"
