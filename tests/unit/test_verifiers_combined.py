"""Several verifiers on one source, and the checks of verifiers before anything is generated."""

from __future__ import annotations

import asyncio
import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from megatron_fipo.config import Config, ConfigError, DataSourceConfig, load_config, validate, verifier_weights
from megatron_fipo.data.records import read_records
from megatron_fipo.environments.verifier_probes import VerifierProbes
from megatron_fipo.rl.dynamic_sampling import BatchNotFilledError, DynamicSampler
from megatron_fipo.rl.judged import failures_by_kind, graded_scores
from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.rl.trajectory import Prompt
from megatron_fipo.verifiers.check import Findings, inspect_own
from megatron_fipo.verifiers.combined import combine, judge_combined
from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.verdict import RAISED, Verdict, VerifierJob, combined_name, split_name
from tests.unit.rl_samples import make_group, make_judged

WEIGHTS = {"math": 1.0, "judges:format": 0.2}
SOUND = ["model.path=m", "data.train.a.kind=jsonl", "data.train.a.path=p.jsonl"]


def config_of(verifier: str, *more: str) -> Config:
    config = load_config(None, [*SOUND, f"data.train.a.verifier={verifier}", *more])
    validate(config)
    return config


# ------------------------------------------------------------------------------------------------------- configuration


def test_one_name_a_list_and_weights() -> None:
    def weights(*overrides: str) -> dict[str, float]:
        return verifier_weights(config_of(*overrides).data.train["a"])

    assert weights("math") == {"math": 1.0}
    assert weights("[math, judges:format]") == {"math": 1.0, "judges:format": 1.0}
    assert weights("[math, judges:format]", "data.train.a.verifier_weights=[1.0, 0.2]") == WEIGHTS
    # The last override counts, whatever the form of the earlier one.
    assert weights("[math, judges:format]", "data.train.a.verifier=exact") == {"exact": 1.0}
    assert weights("exact", "data.train.a.verifier=[math]") == {"math": 1.0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("[math, maths]",), r"data.train.a.verifier=maths: must be one of .* Did you mean math"),
        (("[math, math]",), "math is named twice"),
        (("[]",), "data.train.a.verifier is empty: a verifier's name, or a list of several"),
        (("[math, 3]",), "or a list of several"),
        (("{math: 1}",), "a text or a list of texts was expected"),
        (("[math, exact]", "data.train.a.verifier_weights=[1]"), r"verifier_weights=\[1.0\]: one for each of the 2"),
        (("[math, exact]", "data.train.a.verifier_weights=[1, -1]"), "each number must be at least 0 and finite"),
        (("[math, exact]", "data.train.a.verifier_weights=[0, 0]"), "no verifier counts"),
        (("math", "data.train.a.verifier_weights=[1]"), "has nothing to be weighed against"),
        (("[math, reasoning_gym]",), "judges entries of kind=reasoning_gym"),
    ],
)
def test_what_cannot_be_weighed_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(*overrides)


def test_names_with_weights_travel_as_one() -> None:
    for weights in ({"math": 1.0}, WEIGHTS, {"http://h/a+b?c=1*2": 1 / 3, "exact": 0.0}):
        assert split_name(combined_name(weights)) == weights


# --------------------------------------------------------------------------------------------------------- the verdict


def test_the_score_is_the_weighted_mean_and_right_only_if_all_that_count_are() -> None:
    half = combine(WEIGHTS, [Verdict(1.0), Verdict(0.5, "found", parts={"length": 3.0})])
    assert half.score == pytest.approx(1.1 / 1.2)
    assert half.answer == "found"
    assert half.parts == {"math": 1.0, "judges:format": 0.5, "judges:format.length": 3.0}
    assert combine(WEIGHTS, [Verdict(1.0, "first"), Verdict(1.0, "second")]) == Verdict(
        1.0, "first", "", {"math": 1.0, "judges:format": 1.0}
    )
    third = dict.fromkeys(("a", "b", "c"), 0.1)
    assert combine(third, [Verdict(1.0)] * 3).correct, "0.1 + 0.1 + 0.1 is not 0.3"
    nearly = combine({"a": 1.0, "b": 1e-20}, [Verdict(1.0), Verdict(0.0)])
    assert not nearly.correct
    assert nearly.score > 0.999
    assert combine({"a": 1.0, "shown": 0.0}, [Verdict(1.0), Verdict(0.0)]).correct


def test_an_error_of_one_is_an_error_of_the_verdict() -> None:
    verdict = combine(WEIGHTS, [Verdict(1.0, "4"), Verdict(0.0, error="raised", fault=RAISED)])
    assert verdict == Verdict(0.0, "4", "raised", {"math": 1.0}, RAISED)


def test_the_pool_judges_under_each_name() -> None:
    async def judge(pool: VerifierPool) -> list[Verdict]:
        name = combined_name({"chain_arithmetic": 3.0, "exact": 1.0})
        jobs = [VerifierJob(name, "#4", "4"), VerifierJob("chain_arithmetic", "#4", "4")]
        return [await judge_combined(pool, job) for job in jobs]

    with VerifierPool(verifiers=["chain_arithmetic", "exact"]) as pool:
        both, one = asyncio.run(judge(pool))
    assert both.score == 0.75
    assert both.parts == {"chain_arithmetic": 1.0, "exact": 0.0}
    assert one == Verdict(1.0, "4")


# --------------------------------------------------------------------------------------------------------- the row


def test_rows_come_where_they_are_asked_for(tmp_path: Path) -> None:
    row = {"prompt": "2+2=", "answer": "4", "level": 3, "source": {"book": "B", "pages": [1, 2]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    jsonl = DataSourceConfig(kind="jsonl", path=str(tmp_path / "rows.jsonl"), verifier="judges:f")
    assert read_records(jsonl).records[0].row is None
    assert read_records(jsonl, with_rows=True).records[0].row == row

    typed = {**row, "day": datetime.date(2026, 1, 2), "price": Decimal("1.50"), "image": b"\x00\xff"}
    parquet.write_table(pa.Table.from_pylist([typed]), tmp_path / "rows.parquet")
    table = DataSourceConfig(kind="parquet", path=str(tmp_path / "rows.parquet"), verifier="judges:f")
    assert read_records(table).records[0].row is None
    with_rows = read_records(table, with_rows=True).records[0].row
    assert with_rows == {**row, "day": "2026-01-02", "price": "1.50", "image": "AP8="}
    json.dumps(with_rows)


# --------------------------------------------------------------------------------------------------- before the start

JUDGES = """
import time
def sound(response, row): return {"score": response == "4", "level": row["level"]}
def only_empty(response, reference): return 1 / len(response) <= 1
def never(response): raise KeyError(response)
def minus(response): return -1.0
def nothing(response): pass
def slow(response): time.sleep(60)
"""


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judges.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)


def probed(pool: VerifierPool, verifier: str) -> Findings:
    prompt = Prompt(0, "a", "2+2=", (1, 2), verifier, "4", {"level": 3})
    return VerifierProbes(pool, {"data.train.a": prompt}).findings()


@pytest.mark.usefixtures("judges")
def test_a_first_call_tells_mistakes_from_odd_responses() -> None:
    names = [f"judges:{name}" for name in ("sound", "only_empty", "never", "minus", "nothing", "slow")]
    with VerifierPool(num_workers=2, timeout_s=1.0, verifiers=[*names, "exact"]) as pool:
        found = {name: probed(pool, name) for name in names}
        both = probed(pool, combined_name({"exact": 1.0, "judges:minus": 1.0}))
    assert found["judges:sound"] == Findings()
    (warning,) = found["judges:only_empty"].warnings
    assert "raised ZeroDivisionError" in warning
    assert "with the source's first row and an empty response" in warning
    assert not found["judges:only_empty"].problems
    (never,) = found["judges:never"].problems
    assert never.startswith("data.train.a.verifier=judges:never: verifier judges:never raised KeyError")
    assert "raised with an empty response as well as the response '4'" in never
    assert "returned the score -1.0; a score lies in [0, 1]" in found["judges:minus"].problems[0]
    assert "returned None" in found["judges:nothing"].problems[0]
    assert "took longer than" in found["judges:slow"].warnings[0]
    assert both.problems[0].startswith("data.train.a.verifier=judges:minus: ")
    with pytest.raises(ValueError, match="returned None"):
        found["judges:nothing"].raise_problems()


@pytest.mark.usefixtures("judges")
def test_what_cannot_be_loaded_is_named_with_its_key_and_rows_are_asked_for() -> None:
    held_out = "data.evaluation.b={kind: jsonl, path: q, verifier: 'judges:sound'}"
    found = inspect_own(config_of("[math, judges:sond]", held_out))
    assert found.row_readers == {"judges:sound"}
    (problem,) = found.problems
    assert problem.startswith("data.train.a.verifier: verifier 'judges:sond': ")
    assert "Did you mean 'judges:sound'?" in problem
    assert inspect_own(config_of("math")) == Findings()


# ------------------------------------------------------------------------------------------------ what the user hears


def test_failures_are_told_by_kind_with_a_count() -> None:
    groups = [make_judged(index, (0.0, 1.0), error=f"took {index} s over 'x{index}'") for index in range(48)]
    groups += [make_judged(90, (0.0, 1.0), error="raised KeyError"), make_judged(91, (0.0, 1.0))]
    many, one = failures_by_kind(groups)
    assert str(many) == (
        "dropped 48 groups that could not be judged, for one kind of reason; first: arithmetic prompt 0: took 0 s "
        "over 'x0'"
    )
    assert str(one) == "dropped a group that could not be judged: arithmetic prompt 90: raised KeyError"


def test_scores_in_between_are_told_with_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_group(0, (0.9, 0.25, 0.0, 0.0))
    for sample in whole.samples:
        sample.parts = {"math": 1.0, "judges:format": sample.accuracy}
    graded = JudgedGroup.of(whole)
    (scores,) = graded_scores([graded, make_judged(1, (0.0, 0.0))])
    assert str(scores).startswith(
        "2 of 6 responses of source arithmetic were given a score between 0 and 1 by verifier exact, the largest 0.9; "
        "0 were given 1. Only 1 counts as right"
    )
    assert "Means by verifier: math 1, judges:format 0.287" in str(scores)
    assert graded_scores([make_judged(1, (0.0, 1.0))]) == []

    from megatron_fipo.config import SamplingSection

    sampler = DynamicSampler(1, SamplingSection(max_generation_rounds=1))
    sampler.start_step(0)
    failed: list[Any] = [make_judged(index, (0.0, 1.0), error=f"reason {'abcde'[index]}") for index in range(5)]
    sampler.add_round([graded, *[make_judged(10 + i, (0.5, 0.0)) for i in range(8)], *failed])
    with pytest.raises(BatchNotFilledError) as raised:
        sampler.take()
    account = str(raised.value)
    assert "graded: 10 of 25 responses" in account
    assert "the largest 0.9" in account
    assert "Remedy: have the verifier return 1 for what is to count as right" in account
    assert account.count("failed: arithmetic prompt") == 3
    assert "failed: 2 more groups, for 2 other kinds of reason" in account
