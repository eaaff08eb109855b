"""The analysis of a run's folder: which files are read, what they add up to, and the command that shows it."""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo.analysis import command, of_run
from megatron_fipo.analysis.measures import ENDS, Totals, add_response, end_of, rechecks_of
from megatron_fipo.analysis.names import NAMES
from megatron_fipo.analysis.of_run import Point, analyse_run
from megatron_fipo.analysis.patterns import lowered
from megatron_fipo.analysis.rechecks import FOR_BETTER
from megatron_fipo.analysis.responses import EVALUATION, TRAINING, Batch, Response, batches_of, read_batch
from megatron_fipo.analysis.table import print_analysis
from megatron_fipo.analysis.words import Words
from megatron_fipo.report.metrics_file import read_metrics
from megatron_fipo.run.samples import TrainingSample, write_samples
from megatron_fipo.traces.files import write_trace
from megatron_fipo.traces.schema import ENVIRONMENT, IN_LOSS, TracedResponse


def sample(**fields: Any) -> TrainingSample:
    given: dict[str, Any] = {
        **{"step": 0, "source": "chains", "prompt_id": 0, "sample_index": 0, "prompt": "12-5=", "reference": "7"},
        **{"response": "12-5=8?7;#7", "answer": "7", "score": 1.0, "reward": 1.0, "advantage": 0.5, "trained_on": True},
        **{"why_not": "", "tokens": 12, "finish_reason": "stop", "error": "", "created_at_step": 0},
    }
    return TrainingSample(**(given | fields))


def problem(responses: Sequence[str], **fields: Any) -> dict[str, Any]:
    count = len(responses)
    return {
        **{"source": "held_out", "prompt_id": 0, "prompt": "12-5=", "reference": "7", "responses": list(responses)},
        **{
            "correct": [True] * count,
            "scores": [1.0] * count,
            "answers": ["7"] * count,
            "response_tokens": [9] * count,
        },
        **{"finish_reasons": ["stop"] * count, "errors": [""] * count},
    } | fields


def write_evaluation(run: Path, when: str, *rows: dict[str, Any], source: str = "held_out") -> Path:
    path = run / "evaluation" / f"{when}_{source}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_metrics(run: Path, *rows: dict[str, Any]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def traced(texts: Sequence[str], **fields: Any) -> TracedResponse:
    count = len(texts)
    floats = np.zeros(count, np.float32)
    given: dict[str, Any] = {
        **{"step": 0, "update": 0, "num_updates": 2, "source": "chains", "prompt_id": 0, "sample_index": 0},
        **{"created_at_step": 0, "prompt": "12-5=", "response": "".join(texts), "reference": "7", "answer": "7"},
        **{"score": 1.0, "reward": 1.0, "advantage": 0.5, "finish_reason": "stop", "error": "", "left_out": ""},
        **{"token_ids": np.zeros(count, np.int32), "texts": list(texts), "segments": np.zeros(count, np.int16)},
        **{"policy_versions": np.zeros(count, np.int32), "rollout_log_probs": floats, "old_log_probs": floats},
        **{"log_probs": floats, "log_prob_shifts": floats, "participates": np.ones(count, bool), "future_kl": floats},
        **{"influence_weights": floats, "token_losses": floats, "correction_weights": floats, "entropies": floats},
        "left_out_tokens": [IN_LOSS] * count,
    }
    return TracedResponse(**(given | fields))


def values(run: Path, where: str, step: int, source: str) -> dict[str, float]:
    (point,) = (one for one in analyse_run(run).points if (one.where, one.step, one.source) == (where, step, source))
    return dict(point.values)


# --- which files are read ---------------------------------------------------------------------------------------------


def test_the_steps_of_evaluations(tmp_path: Path) -> None:
    """An evaluation is of the weights after so many steps: none before, all after; metrics tell how many all are."""
    for when in ("before", "step_000002", "after"):
        write_evaluation(tmp_path, when, problem(["12-5=7;#7"]))
    (tmp_path / "evaluation/before.json").write_text("{}")
    (tmp_path / "evaluation/notes.jsonl").write_text("nothing of ours")
    write_metrics(
        tmp_path,
        {"step": 0, "evaluation/held_out/avg@1": 1.0},
        *({"step": step, "reward/mean": 1.0} for step in range(4)),
        {"step": 4, "evaluation/held_out/avg@1": 1.0},
    )
    assert [(point.where, point.step) for point in analyse_run(tmp_path).points] == [
        (EVALUATION, step) for step in (0, 2, 4)
    ]


def test_the_last_steps_own_evaluation_is_not_counted_twice(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"step": 3, "reward/mean": 1.0}, {"step": 4, "evaluation/held_out/avg@1": 1.0})
    for when in ("step_000004", "after"):
        write_evaluation(tmp_path, when, problem(["12-5=7;#7"] * 3))
    write_evaluation(tmp_path, "after", problem(["12-5=7;#7"], source="more"), source="more")
    points = analyse_run(tmp_path).points
    assert [(point.step, point.source, point.num_responses) for point in points] == [(4, "held_out", 3), (4, "more", 1)]


def test_a_last_evaluation_without_metrics_is_refused(tmp_path: Path) -> None:
    write_evaluation(tmp_path, "after", problem(["12-5=7;#7"]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not tell how many steps .* delete .* after_"):
        analyse_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x"\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not tell .* Mend the line"):
        analyse_run(tmp_path)


def test_evaluations_of_weights_that_were_given_up_are_left_out(tmp_path: Path) -> None:
    """A run ended after 4 steps, was resumed with more of them before step 6, and writes a line just now: its files
    after_… and step_000008 are of earlier times, which the newer metrics do not know."""
    for when in ("before", "step_000002", "step_000006", "step_000008", "after"):
        write_evaluation(tmp_path, when, problem(["12-5=7;#7"]))
    write_evaluation(tmp_path, "after", problem(["12-5=7;#7"], source="more"), source="more")
    score = {"evaluation/held_out/avg@1": 1.0}
    lines = [{"step": 0, **score}, *({"step": step, "reward/mean": 1.0} for step in range(6)), {"step": 5, **score}]
    write_metrics(tmp_path, *lines)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward/m')
    assert [point.step for point in analyse_run(tmp_path).points] == [0, 2, 6]


def test_steps_are_those_of_the_report(tmp_path: Path) -> None:
    """A step is, here and there, the number of steps behind the policy that wrote the responses."""
    score = {"evaluation/held_out/avg@1": 1.0}
    training = [{"step": step, "reward/mean": 1.0} for step in range(4)]
    write_metrics(
        tmp_path, {"step": 0, **score}, *training[:2], {"step": 1, **score}, *training[2:], {"step": 4, **score}
    )
    for when in ("before", "step_000002", "after"):
        write_evaluation(tmp_path, when, problem(["12-5=7;#7"]))
    for step in range(4):
        write_samples(tmp_path / "samples", step, [sample(step=step)])
    points, metrics = analyse_run(tmp_path).points, read_metrics(tmp_path / "metrics.jsonl")
    steps = {where: tuple(point.step for point in points if point.where == where) for where in (EVALUATION, TRAINING)}
    assert steps == {EVALUATION: metrics.evaluated_steps, TRAINING: metrics.training_steps}
    assert steps == {EVALUATION: (0, 2, 4), TRAINING: (0, 1, 2, 3)}


def test_a_response_in_a_trace_is_not_read_again(tmp_path: Path) -> None:
    """It is in the trace of each update that saw it, too."""
    for update in (0, 1):
        write_trace(tmp_path / "traces", [traced(["12-5", "=7;", "#7"], update=update)], {})
    write_samples(tmp_path / "samples", 0, [sample(response="12-5=7;#7"), sample(sample_index=1)])
    (batch,) = batches_of(tmp_path)
    assert batch.where == TRAINING
    found = list(read_batch(tmp_path, batch))
    assert [one.text for one in found] == ["12-5=7;#7", "12-5=8?7;#7"]
    assert [one.token_texts for one in found] == [["12-5", "=7;", "#7"], None]


def test_no_folder_and_no_responses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder here"):
        analyse_run(tmp_path / "missing")
    assert analyse_run(tmp_path).points == []
    with pytest.raises(ValueError, match="holds no responses"):
        call(tmp_path)


# --- what they add up to ----------------------------------------------------------------------------------------------


def test_values_by_hand(tmp_path: Path) -> None:
    """Three chains: two re-checks, of which one goes from wrong to right and one from right to wrong; none."""
    write_samples(
        tmp_path / "samples",
        3,
        [
            sample(step=3, response="12-5=8?7;#7"),  # 9 characters of thinking, 2 of answer
            sample(step=3, sample_index=1, response="12-5=7?8;#8", score=0.0, answer="8"),
            sample(step=3, sample_index=2, response="12-5", tokens=6, score=0.0, answer="", finish_reason="length"),
        ],
    )
    found = values(tmp_path, TRAINING, 3, "chains")
    expected = {
        "length/tokens": 10.0,
        "length/tokens_right": 12.0,
        "length/tokens_wrong": 9.0,
        "length/characters": 26 / 3,
        "length/thinking_characters": 22 / 3,
        "length/answer_characters": 4 / 3,
        "length/thinking_share": 22 / 26,
        "recheck/per_response": 2 / 3,
        "recheck/share": 2 / 3,
        "recheck/per_1000_tokens": 2000 / 30,
        "recheck/told_share": 1.0,
        "recheck/changed_share": 1.0,
        "recheck/for_better_share": 0.5,
        "recheck/for_worse_share": 0.5,
        "recheck/for_better_per_response": 1 / 3,
        "right/with_recheck": 0.5,
        "right/without_recheck": 0.0,
        "check/per_response": 2 / 3,
        "truncated/share": 1 / 3,
        "end/right": 1 / 3,
        "end/wrong_answer": 1 / 3,
        "end/cut_without_answer": 1 / 3,
        "end/not_judged": 0.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "length/thinking_tokens" not in found
    assert "repetition/word4_share" not in found


def test_changes_for_better_and_for_worse_are_told_apart(tmp_path: Path) -> None:
    """Five re-checks: two from wrong to right, one from right to wrong, one to another wrong value, one unchanged."""
    write_samples(
        tmp_path / "samples",
        0,
        [sample(response="12-5=8?7;1+1=3?2;2+1=3?4;#4"), sample(sample_index=1, response="12-5=8?9;1+1=2?2;#2")],
    )
    found = values(tmp_path, TRAINING, 0, "chains")
    expected = {
        "recheck/per_response": 2.5,
        "recheck/told_share": 1.0,
        "recheck/changed_share": 0.8,
        "recheck/for_better_share": 0.4,
        "recheck/for_worse_share": 0.2,
        "recheck/for_better_per_response": 1.0,
        "recheck/for_worse_per_response": 0.5,
        "check/per_response": 2.5,
        "check/share": 1.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_marks_in_code_and_in_what_is_quoted_from_the_prompt_do_not_count(tmp_path: Path) -> None:
    prompt = "Read it.\nWait, that is not the way to the station, said the old man."
    quoting = f"The text says:\n{prompt[9:]}\nSo 5."
    texts = ["Wait, no.\n#### 7", "A\n```\nwait, no.\n```\n#### 7", quoting]
    write_samples(
        tmp_path / "samples",
        0,
        [sample(source="m", sample_index=place, response=text, prompt=prompt) for place, text in enumerate(texts)],
    )
    assert values(tmp_path, TRAINING, 0, "m")["doubt/per_response"] == pytest.approx(1 / 3)


def test_a_response_that_could_not_be_judged_is_not_right(tmp_path: Path) -> None:
    late = "verifier math took longer than verifier.timeout_s=10 and was killed"
    write_samples(tmp_path / "samples", 0, [sample(), sample(sample_index=1, tokens=20, error=late, score=1.0)])
    found = values(tmp_path, TRAINING, 0, "chains")
    assert found["right/with_recheck"] == 0.5
    assert (found["length/tokens_right"], found["length/tokens_wrong"]) == (12, 20)


@pytest.mark.parametrize("fields", [{"answer": ""}, {"error": "verifier math took longer than …"}])
def test_without_a_verdict_on_an_answer_the_reference_says_what_is_right(fields: dict[str, str]) -> None:
    text = "The answer is 5. Wait, no. The answer is 6."
    response = replace(Response("s", "p", text, "6", "6", 0.0, 9, "stop", ""), **fields)
    lower = lowered(text)
    rechecks, kinds = rechecks_of(response, lower, Words(lower))
    assert [one.outcome for one in rechecks] == [FOR_BETTER]
    assert kinds == {"doubt": 1}


def test_sources_are_told_apart(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", 0, [sample(), sample(source="math", response="Wait, no.\n#### 7")])
    assert values(tmp_path, TRAINING, 0, "math")["doubt/per_response"] == 1.0
    assert values(tmp_path, TRAINING, 0, "chains")["doubt/per_response"] == 0.0
    (point,) = (point for point in analyse_run(tmp_path).points if point.source == "math")
    assert point.marks == {"en_wait": 1}


def test_tokens_of_parts_from_a_trace(tmp_path: Path) -> None:
    """The end-of-text token belongs to the whole, though its verifier did not see it; a tool's answer is nobody's."""
    texts = ["<think>", "a", "b", "</think>", "c", "<eos>"]
    out = [IN_LOSS, IN_LOSS, ENVIRONMENT, IN_LOSS, IN_LOSS, IN_LOSS]
    write_trace(tmp_path / "traces", [traced(texts, response="<think>ab</think>c", left_out_tokens=out)], {})
    found = values(tmp_path, TRAINING, 0, "chains")
    assert (found["length/thinking_tokens"], found["length/answer_tokens"], found["length/code_tokens"]) == (3, 2, 0)


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"score": 1.0}, "right"),
        ({"score": 0.5}, "partly_right"),
        ({"score": 0.0}, "wrong_answer"),
        ({"score": 0.0, "answer": ""}, "no_answer"),
        ({"score": 0.0, "answer": "", "finish_reason": "length"}, "cut_without_answer"),
        ({"score": 0.0, "finish_reason": "length"}, "wrong_answer"),
        ({"score": 1.0, "error": "verifier math took longer than …"}, "not_judged"),
    ],
)
def test_ends(fields: dict[str, Any], end: str) -> None:
    response = replace(Response("s", "p", "5", "5", "5", 1.0, 1, "stop", ""), **fields)
    assert end_of(response) == end
    assert end in ENDS


def test_classes_of_errors_are_shares(tmp_path: Path) -> None:
    late = "verifier math took longer than verifier.timeout_s=10 and was killed"
    write_samples(tmp_path / "samples", 0, [sample(), sample(sample_index=1, error=late, score=0.0)])
    found = values(tmp_path, TRAINING, 0, "chains")
    assert (found["error/time_out"], found["error/other"], found["end/not_judged"]) == (0.5, 0.0, 0.5)


HOSTILE = (
    *("", " ", "\x00", "\ud800\udfff", "a" * 1_000_000, " " * 1_000_000, "\n" * 100_000, "等" * 1_000_000),
    *("`" * 10_000, "```" * 10_000, "\\boxed{" * 10_000, "answer " * 20_000, "$" * 10_000, "1" * 300_000),
    *("=1" * 50_000, "1+1=2?" * 20_000, "wait, " * 20_000, "İ" * 10_000, "<think>" * 1000, "#" * 10_000),
    *("(" * 10_000 + "=1. Wait, " + "(" * 10_000 + "=1", "\u202eevil\x1b[31m", "17*3=" * 5000 + "1. Wait, 17*3=2"),
)


@pytest.mark.parametrize("text", HOSTILE, ids=[f"{number}" for number in range(len(HOSTILE))])
def test_hostile_texts(text: str) -> None:
    totals = Totals()
    add_response(totals, Response("s", text[:1000], text, text[:100], text[:100], 0.0, 0, "length", text[:1000]))
    found = totals.means()
    assert all(math.isfinite(value) for value in found.values())
    assert set(found) <= set(NAMES)
    assert totals.num_responses == 1


def test_hostile_texts_pass_through_files(tmp_path: Path) -> None:
    text = "\ud800 Wait, no.\x00 首都"
    write_samples(tmp_path / "samples", 0, [sample(response=text, source="a\x1b[31m", prompt=text)])
    write_evaluation(tmp_path, "before", problem([text]))
    assert [point.num_responses for point in analyse_run(tmp_path).points] == [1, 1]
    shown = io.StringIO()
    print_analysis("a run", analyse_run(tmp_path), shown)
    assert "\x1b[31m" not in shown.getvalue()


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 is no judged problem: Expecting"),
        ("[]", "an object was expected"),
        (json.dumps({"source": "held_out"}), "prompt is missing"),
        (json.dumps(problem(["a"], prompt=5)), "prompt=5 is no text"),
        (json.dumps(problem(["a"], scores=["1"])), "scores is no list of numbers"),
        (json.dumps(problem(["a"], answers=None)), "answers is no list of texts"),
        (json.dumps(problem(["a", "b"], errors=[""])), "errors has 1 entries for 2 responses"),
        ("[" * 100_000, "is no judged problem"),
    ],
)
def test_a_damaged_evaluation(tmp_path: Path, line: str, reason: str) -> None:
    path = write_evaluation(tmp_path, "before", problem(["a"]))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"before_held_out\.jsonl, line 2") as raised:
        analyse_run(tmp_path)
    assert reason in str(raised.value)
    assert "damaged or edited; evaluate again, or remove it" in str(raised.value)


def test_damaged_samples_and_traces(tmp_path: Path) -> None:
    write_samples(tmp_path / "a/samples", 0, [sample()])
    (tmp_path / "a/samples/step_000000.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"step_000000\.jsonl, line 1 is no sample"):
        analyse_run(tmp_path / "a")
    (tmp_path / "b/traces").mkdir(parents=True)
    (tmp_path / "b/traces/step_000000_update_000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no trace, or is damaged"):
        analyse_run(tmp_path / "b")


def test_a_file_that_is_deleted_meanwhile(tmp_path: Path) -> None:
    path = write_evaluation(tmp_path, "before", problem(["a"]))
    (batch,) = batches_of(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot be read: No such file.*start the same command again"):
        list(read_batch(tmp_path, batch))


# --- going on, and in several processes -------------------------------------------------------------------------------


def test_only_what_is_new_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    analyse_batch = of_run.analyse_batch

    def noted(run: Path, batch: Batch) -> list[Point]:
        read.append(batch.step)
        return analyse_batch(run, batch)

    monkeypatch.setattr(of_run, "analyse_batch", noted)
    for step in (0, 1):
        write_samples(tmp_path / "samples", step, [sample(step=step)])
    first = analyse_run(tmp_path)
    write_samples(tmp_path / "samples", 1, [sample(step=1), sample(step=1, sample_index=1)])
    write_samples(tmp_path / "samples", 2, [sample(step=2)])
    second = analyse_run(tmp_path, first)
    assert read == [0, 1, 1, 2]
    assert [point.num_responses for point in second.points] == [1, 2, 1]
    assert second.points == analyse_run(tmp_path).points


@pytest.mark.slow
def test_several_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(4):
        write_samples(tmp_path / "samples", step, [sample(step=step, response="Wait, no. " * (step + 1))])
    alone = analyse_run(tmp_path)
    monkeypatch.setattr(of_run, "BYTES_OF_ONE_PROCESS", 0)
    monkeypatch.setattr(of_run.os, "sched_getaffinity", lambda _: {0, 1})
    assert analyse_run(tmp_path).points == alone.points
    (tmp_path / "samples/step_000003.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"step_000003\.jsonl, line 1 is no sample"):
        analyse_run(tmp_path)


# --- what is shown and written ----------------------------------------------------------------------------------------


def call(*arguments: Path | str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, response in ((0, "12-5=8;#8"), (1, "12-5=8?7;#7"), (2, "12-5=8?7;7+1=8?8;#8")):
        write_samples(tmp_path / "run/samples", step, [sample(step=step, response=response)])
    write_evaluation(tmp_path / "run", "before", problem(["12-5=7;#7"]))
    return tmp_path / "run"


def test_the_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run) == 0
    shown = capsys.readouterr().out
    (rechecks,) = (line.split() for line in shown.splitlines() if "Re-checks per response" in line)
    assert rechecks[-3:] == ["0.000", "2.000", "+2.000"]
    assert "chains, training" in shown
    assert "held_out, evaluation" in shown
    assert "3 steps have responses" in shown
    assert "Restarts" not in shown, "what is 0 throughout has no line"


def test_the_json_file(run: Path, tmp_path: Path) -> None:
    assert call(run, run, "--json", tmp_path / "all.json") == 0
    content = json.loads((tmp_path / "all.json").read_text())
    assert content["format"] == 1
    assert [one["run"] for one in content["runs"]] == [str(run)] * 2
    points = content["runs"][0]["points"]
    assert [(point["where"], point["source"], point["step"]) for point in points] == [
        ("evaluation", "held_out", 0),
        *(("training", "chains", step) for step in (0, 1, 2)),
    ]
    assert [point["values"]["recheck/per_response"] for point in points] == [0, 0, 1, 2]
    assert points[0]["num_responses"] == 1
    assert points[0]["values"]["recheck/told_share"] is None, "there was no re-check to tell of"
    names = content["runs"][0]["names"]
    assert set(names) == set(points[0]["values"])
    assert names["recheck/per_response"]["title"] == "Re-checks per response"
    assert names["recheck/per_response"]["caption"].endswith(".")


def test_plain_is_json_without_nan(run: Path) -> None:
    plain = analyse_run(run).to_plain()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
