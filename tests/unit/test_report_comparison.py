"""Groups, scores and differences of several runs, against numbers that were computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.evaluation.scores import ProblemResult
from megatron_fipo.report.axes import flops_before, tokens_before
from megatron_fipo.report.comparison import compare, config_differences, run_groups
from megatron_fipo.report.run_data import RunData, read_run
from megatron_fipo.report.written_config import written_config
from tests.unit.report_runs import judged, scores_line, training_lines, write_run

AVG = "evaluation/held_out/avg@2"


def made(folder: Path, name: str, avg: float, problems: list[ProblemResult] | None = None, **changes: Any) -> RunData:
    """A finished run of one step."""
    lines = [{"step": 0, "reward/mean": avg}, scores_line(1, avg)]
    settings = {
        "run.name": name,
        "train.num_steps": 1,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    evaluations = None if problems is None else {"after_held_out": problems}
    return read_run(write_run(folder / name, lines, settings, problems=evaluations))


def compared(runs: list[RunData]) -> dict[str, Any]:
    comparison = compare(runs, [written_config(run.config) for run in runs])
    assert comparison is not None
    return comparison


def score(comparison: dict[str, Any], metric: str = AVG) -> dict[str, Any]:
    return next(row for row in comparison["scores"] if row["metric"] == metric)


def test_runs_that_differ_in_their_seed_alone_are_a_group(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, "a", 0.5, run__seed=0),
        made(tmp_path, "b", 0.5, run__seed=0, algorithm="dapo", objective__future_kl=False),
        made(
            tmp_path,
            "c",
            0.5,
            run__seed=1,
            run__output_dir="elsewhere",
            train__resume=True,
            evaluation__every_num_steps=5,
        ),
        made(tmp_path, "d", 0.5, run__seed=1, objective__half_life_tokens=128.0),
    ]
    groups = [(group.label, group.runs) for group in run_groups(runs, [run.config for run in runs])]
    assert groups == [("fipo, half_life_tokens=32.0", (0, 2)), ("dapo", (1,)), ("fipo, half_life_tokens=128.0", (3,))]


def test_labels_are_short_and_show_no_secret(tmp_path: Path) -> None:
    """The objective's keys first, of paths their names, and names of runs where nothing else tells groups apart."""
    runs = [
        made(tmp_path, "a", 0.5, model__path="/x/base", train__num_steps=1),
        made(tmp_path, "b", 0.5, model__path="/y/base", train__num_steps=1),
        made(tmp_path, "c", 0.5, model__path="/y/larger", objective__half_life_tokens=8.0, batch__tokens="A" * 99),
        made(tmp_path, "d", 0.5, train__api_key="sesame", objective__half_life_tokens=8.0),
    ]
    labels = [group.label for group in run_groups(runs, [written_config(run.config) for run in runs])]
    assert labels[0] == "fipo, half_life_tokens=32.0, path=base (a)"
    assert labels[1] == "fipo, half_life_tokens=32.0, path=base (b)"
    assert labels[2] == "fipo, half_life_tokens=8.0, path=larger"
    assert labels[3] == "fipo, half_life_tokens=8.0, path=folder"
    two = run_groups([runs[0], runs[3]], [{"a.b": "A" * 99}, {"a.b": "(left out)"}])
    assert [group.label for group in two] == [f"fipo, b={'A' * 24}…", "fipo, b=(left out)"]


def test_a_single_run_is_compared_with_nothing(tmp_path: Path) -> None:
    assert compare([made(tmp_path, "a", 0.5)], [{}]) is None


def test_scores_have_intervals_over_seeds(tmp_path: Path) -> None:
    """0.4, 0.5, 0.6: mean 0.5, standard deviation 0.1, ± 4.303 · 0.1 / sqrt(3)."""
    fipo = [made(tmp_path, f"f{seed}", avg, run__seed=seed) for seed, avg in enumerate((0.4, 0.5, 0.6))]
    dapo = [made(tmp_path, "d", 0.3, run__seed=7, algorithm="dapo")]
    found = score(compared([*fipo, *dapo]))
    assert found["groups"][0] == {
        "label": "fipo",
        "mean": pytest.approx(0.5),
        "low": pytest.approx(0.5 - 0.24842, abs=1e-4),
        "high": pytest.approx(0.5 + 0.24842, abs=1e-4),
        "values": [0.4, 0.5, 0.6],
    }
    assert found["groups"][1] == {"label": "dapo", "mean": 0.3, "low": None, "high": None, "values": [0.3]}
    (difference,) = found["differences"]
    assert difference == {
        "a": "fipo",
        "b": "dapo",
        "mean": pytest.approx(0.2),
        "low": None,
        "high": None,
        "paired_by": "nothing",
        "num_pairs": 1,
    }


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Differences 0.1, 0.2, 0.3, of seeds in another order: 0.2 ± 0.2484; unpaired they would be ± 0.3 and more."""
    fipo = [made(tmp_path, f"f{seed}", avg, run__seed=seed) for seed, avg in ((0, 0.3), (1, 0.6), (2, 0.9))]
    dapo = [
        made(tmp_path, f"d{seed}", avg, run__seed=seed, algorithm="dapo")
        for seed, avg in ((2, 0.6), (0, 0.2), (1, 0.4))
    ]
    (difference,) = score(compared([*fipo, *dapo]))["differences"]
    assert (difference["paired_by"], difference["num_pairs"]) == ("seed", 3)
    assert difference["mean"] == pytest.approx(0.2)
    assert difference["low"] == pytest.approx(0.2 - 0.24842, abs=1e-4)
    assert difference["high"] == pytest.approx(0.2 + 0.24842, abs=1e-4)


def test_a_seed_that_was_run_twice_is_no_second_seed(tmp_path: Path) -> None:
    """Seed 0 came to 0.4 and 0.6, seed 1 to 0.7: the seeds' means are 0.5 and 0.7, 0.6 ± 12.706 · 0.1414 / sqrt(2)."""
    runs = [
        made(tmp_path, f"f{place}", avg, run__seed=seed)
        for place, (seed, avg) in enumerate([(0, 0.4), (0, 0.6), (1, 0.7)])
    ]
    (group,) = score(compared(runs))["groups"]
    assert group["values"] == [0.4, 0.6, 0.7]
    assert group["mean"] == pytest.approx(0.6)
    assert group["high"] == pytest.approx(0.6 + 1.2706, abs=1e-3)
    others = [made(tmp_path, f"d{seed}", 0.4, run__seed=seed, algorithm="dapo") for seed in (0, 1)]
    (difference,) = score(compared([*runs, *others]))["differences"]
    assert (difference["paired_by"], difference["num_pairs"]) == ("seed", 2)
    assert difference["mean"] == pytest.approx(0.2)


def test_runs_without_a_seed_stand_for_themselves(tmp_path: Path) -> None:
    runs = [made(tmp_path, f"f{place}", avg, run__seed=None) for place, avg in enumerate((0.4, 0.6))]
    (group,) = score(compared(runs))["groups"]
    assert group["high"] == pytest.approx(0.5 + 12.706 * 0.1, abs=1e-3)
    other = made(tmp_path, "d", 0.4, run__seed=None, algorithm="dapo")
    (difference,) = score(compared([*runs, other]))["differences"]
    assert difference["paired_by"] == "nothing"


def test_one_shared_seed_among_several_makes_no_pair(tmp_path: Path) -> None:
    """The others would be lost, and a single pair has no interval."""
    fipo = [made(tmp_path, f"f{seed}", avg, run__seed=seed) for seed, avg in ((0, 0.5), (1, 0.6))]
    dapo = [made(tmp_path, f"d{seed}", avg, run__seed=seed, algorithm="dapo") for seed, avg in ((1, 0.3), (2, 0.4))]
    (difference,) = score(compared([*fipo, *dapo]))["differences"]
    assert (difference["paired_by"], difference["num_pairs"]) == ("nothing", 2)
    assert difference["mean"] == pytest.approx(0.2)
    assert difference["low"] is not None


def test_two_shared_seeds_among_three_are_pairs(tmp_path: Path) -> None:
    fipo = [made(tmp_path, f"f{seed}", avg, run__seed=seed) for seed, avg in ((0, 0.9), (1, 0.5), (2, 0.6))]
    dapo = [
        made(tmp_path, f"d{seed}", avg, run__seed=seed, algorithm="dapo")
        for seed, avg in ((1, 0.3), (2, 0.2), (3, 0.9))
    ]
    (difference,) = score(compared([*fipo, *dapo]))["differences"]
    assert (difference["paired_by"], difference["num_pairs"]) == ("seed", 2)
    assert difference["mean"] == pytest.approx(0.3)


def test_the_newest_scores_are_compared(tmp_path: Path) -> None:
    steps = training_lines(reward__mean=[0.0] * 2)
    lines = [scores_line(0, 0.1), steps[0], scores_line(0, 0.5), steps[1], scores_line(2, 0.9)]
    runs = [read_run(write_run(tmp_path / str(seed), lines, {"run.seed": seed})) for seed in (0, 1)]
    assert score(compared(runs))["groups"][0]["values"] == [0.9, 0.9]


def test_shadow_objectives_change_nothing_that_is_learnt(tmp_path: Path) -> None:
    plain = made(tmp_path, "a", 0.5, run__seed=0)
    shadowed = made(tmp_path, "b", 0.5, run__seed=1, objective__shadow={"tau_8": {"half_life_tokens": 8.0}})
    comparison = compared([plain, shadowed])
    assert [group["runs"] for group in comparison["groups"]] == [[0, 1]]
    assert comparison["config_differences"] == []


def test_scores_of_other_numbers_of_samples_are_not_paired(tmp_path: Path) -> None:
    """avg@2 of one run is not compared with avg@4 of another under either name."""
    problems = judged([1, 1], [0, 0])
    one = made(tmp_path, "a", 0.5, problems, run__seed=0)
    lines = [{"step": 0, "reward/mean": 0.5}, scores_line(1, 0.75, k=4)]
    settings = {"run.seed": 0, "algorithm": "dapo", "train.num_steps": 1}
    files = {"after_held_out": judged([1, 1, 1, 1], [0, 0, 1, 1])}
    other = read_run(write_run(tmp_path / "b", lines, settings, problems=files))
    comparison = compared([one, other])
    assert score(comparison)["differences"] == []
    assert score(comparison, "evaluation/held_out/avg@4")["differences"] == []


def test_scores_that_were_not_measured_alike_are_told(tmp_path: Path) -> None:
    def note(name: str, **changes: Any) -> str:
        return str(compared([made(tmp_path, f"{name}_a", 0.5), made(tmp_path, f"{name}_b", 0.5, **changes)])["note"])

    assert note("same", optimizer__learning_rate=1.0, run__seed=3) == ""
    assert note("data", data__evaluation__held_out__path="other.jsonl") == (
        "The runs' held-out scores are not of like evaluations, for these differ: data.evaluation.held_out.path."
    )
    assert "evaluation.temperature" in note("temperature", evaluation__temperature=0.5)
    assert note("often", evaluation__every_num_steps=7) == ""
    assert note("more", data__evaluation__more={"kind": "jsonl"}) == "", "the others have no such scores"
    assert note("reward", reward__incorrect=0.0, data__train__chains__path="x") == (
        "The runs' rewards in training are not of like data and rules, for these differ: data.train.chains.path, "
        "reward.incorrect."
    )
    many = note("many", **{f"evaluation__{letter}": 1 for letter in "abcdef"})
    assert many.endswith("evaluation.a, evaluation.b, evaluation.c, evaluation.d and 2 more.")


def test_newest_scores_of_other_steps_are_told(tmp_path: Path) -> None:
    steps = training_lines(reward__mean=[0.0] * 4)
    runs = [
        read_run(
            write_run(
                tmp_path / str(after),
                [*steps[:after], scores_line(after - 1, 0.5), *steps[after:]],
                {"run.seed": after},
            )
        )
        for after in (2, 3)
    ]
    assert compared(runs)["note"] == "The newest held-out scores are of 2 and 3 steps of training."


def test_differences_are_paired_by_problem(tmp_path: Path) -> None:
    """Means over seeds: fipo 1, 3/4, 1/2, 1/4; dapo 1/2, 3/4, 0, 0. Differences 1/2, 0, 1/2, 1/4: mean 0.3125, standard
    deviation 0.23936, ± 3.1824 · 0.23936 / 2."""
    fipo = [
        made(tmp_path, "f0", 0.5, judged([1, 1], [1, 1], [0, 1], [0, 0]), run__seed=0),
        made(tmp_path, "f1", 0.5, judged([1, 1], [0, 1], [1, 0], [0, 1]), run__seed=1),
    ]
    dapo = [made(tmp_path, "d", 0.5, judged([1, 0], [1, 1], [0, 0], [0, 0]), run__seed=5, algorithm="dapo")]
    dapo += [made(tmp_path, "d1", 0.5, judged([0, 1], [0, 1], [0, 0], [0, 0]), run__seed=6, algorithm="dapo")]
    unpaired, by_problem = score(compared([*fipo, *dapo]))["differences"]
    assert unpaired["paired_by"] == "nothing"
    assert (by_problem["paired_by"], by_problem["num_pairs"]) == ("problem", 4)
    assert by_problem["mean"] == pytest.approx(0.3125)
    assert by_problem["low"] == pytest.approx(0.3125 - 0.38088, abs=1e-4)
    assert by_problem["high"] == pytest.approx(0.3125 + 0.38088, abs=1e-4)


def test_each_evaluation_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each pair of groups: their files may have hundreds of megabytes."""
    read, problems = [], RunData.problems

    def noted(run: RunData, when: str, source: str) -> list[ProblemResult] | None:
        read.append(run.name)
        return problems(run, when, source)

    monkeypatch.setattr(RunData, "problems", noted)
    runs = [
        made(tmp_path, name, 0.5, judged([1, 1], [0, place % 2]), optimizer__learning_rate=float(place))
        for place, name in enumerate("abcd")
    ]
    differences = score(compared(runs))["differences"]
    assert [row["paired_by"] for row in differences].count("problem") == 6
    assert sorted(read) == ["a", "b", "c", "d"]


def test_other_problems_are_not_paired(tmp_path: Path) -> None:
    one = made(tmp_path, "a", 0.5, judged([1, 1], [0, 0]), run__seed=0)
    other = made(tmp_path, "b", 0.5, judged([1, 1]), run__seed=0, algorithm="dapo")
    assert [row["paired_by"] for row in score(compared([one, other]))["differences"]] == ["seed"]
    renamed = [replace(problem, prompt=f"another {problem.prompt}") for problem in judged([1, 1], [0, 1])]
    third = made(tmp_path, "c", 0.5, renamed, run__seed=0, algorithm="dapo")
    assert [row["paired_by"] for row in score(compared([one, third]))["differences"]] == ["seed"]


def test_training_is_compared_by_its_last_third(tmp_path: Path) -> None:
    rewards = [[0.0, 0.0, 0.0, 0.0, 0.2, 0.4], [0.0, 0.0, 0.0, 0.0, 0.1, 0.1]]
    runs = [
        read_run(write_run(tmp_path / str(seed), training_lines(reward__mean=row), {"run.seed": seed}))
        for seed, row in enumerate(rewards)
    ]
    (group,) = score(compared(runs), "reward/mean")["groups"]
    assert group["values"] == pytest.approx([0.3, 0.1])


def test_differences_of_configurations(tmp_path: Path) -> None:
    configs = [{"a.b": 1, "run.seed": 0, "c": 2.0}, {"a.b": 1, "run.seed": 1, "c": 3.0, "d": None}]
    assert config_differences(configs) == [
        {"key": "c", "values": [2.0, 3.0]},
        {"key": "d", "values": ["(missing)", None]},
    ]


def test_runs_that_have_come_unequally_far_are_told(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / str(length), training_lines(reward__mean=[0.0] * length), {"run.seed": length}))
        for length in (3, 5)
    ]
    assert compared(runs)["note"] == "The runs have trained 3 and 5 steps: their scores are of these."
    assert compared([runs[0], made(tmp_path, "x", 0.1)])["note"]
    assert compared([made(tmp_path, "y", 0.1), made(tmp_path, "z", 0.1, run__seed=1)])["note"] == ""


# --- what a step costs ------------------------------------------------------------------------------------------------

COSTS = {
    "policy__response_tokens": [80.0, 160.0],
    "perf__tokens": [60.0, 100.0],
    "rollout__batch_groups": [2.0, 2.0],
    "rollout__generated_groups": [4.0, 3.0],
    "rollout__response_tokens__mean": [5.0, 10.0],
}


def test_costs_stand_before_the_step_that_causes_them(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [*training_lines(**COSTS), scores_line(2, 0.5)]))
    assert tokens_before(run) == [0.0, 80.0, 240.0]
    flops, reason = flops_before(run)
    assert flops is None
    assert "model.path=/no/such/folder is no folder here" in reason


def test_operations_of_a_step(tmp_path: Path) -> None:
    """One layer of width 4 with 2 heads, an MLP of 8, 10 words: 2 for each weight and token, and attention.

    Step 0 trains 8 responses of 60 / 8 = 7.5 tokens, 5 of them after the prompt: 1 pass of old log-probs and 3 for each
    of 2 epochs. It generates 16 responses of 2.5 + 5 tokens.
    """
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 4, '
        '"intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 10, '
        '"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "rope_theta": 10000.0}'
    )
    run = read_run(write_run(tmp_path / "run", training_lines(**COSTS), {"model.path": str(model)}))
    flops, reason = flops_before(run)
    weights = 4 * 4 * 4 + 3 * 4 * 8 + 4 * 10
    sequence = 2 * weights * 7.5 + 2 * 1 * 2 * 2 * 7.5**2
    assert reason == ""
    assert flops == [0.0, pytest.approx((8 * 7 + 16) * sequence)]


def test_a_step_without_lengths_has_no_operations(tmp_path: Path) -> None:
    columns = {**COSTS, "perf__tokens": [60.0, None]}
    run = read_run(write_run(tmp_path / "run", training_lines(**columns), {"model.path": str(tmp_path)}))
    assert flops_before(run)[0] is None
