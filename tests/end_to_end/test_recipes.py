"""The recipes as a user starts them: dry runs both ways, one step for real, and every ablation."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_fipo.config import (
    FP8_ALIGNMENT,
    Config,
    load_config,
    microbatch_token_multiple,
    updates_per_step,
    validate,
    validate_model_layout,
)
from megatron_fipo.preflight.plan import Plan
from megatron_fipo.preflight.tables import Options, plan_of
from tests.end_to_end.runs import ROOT, step_lines

FOLDERS = ("examples/qwen2_5_32b", "examples/qwen2_5_7b_math")
SCRIPTS = [f"{folder}/run_{recipe}.sh" for folder in FOLDERS for recipe in ("fipo", "dapo")]
FIPO_32B = "examples/qwen2_5_32b/run_fipo.sh"
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
LAUNCHERS = {"bash": ["bash"], "torchrun": [TORCHRUN], "python": [sys.executable]}
NUM_GPUS = 128
TIMEOUT_S = 240.0

PAPER = {
    "32b dapo": (512, 16, 16, None, None, None, 20480, 4096),
    "32b fipo": (512, 16, 8, 32, (1.0, 1.2), 10, 20480, 4096),
    "7b dapo": (512, 16, 16, None, None, None, 8192, 4096),
    "7b fipo": (512, 32, 8, 32, (0.8, 1.2), 3, 10240, 2048),
}
"""Prompts, responses, updates a step, half-life, influence weights, safety ratio, longest response, overlong buffer."""


def recipe_of(script: str) -> str:
    """The file that a script runs."""
    return script.replace("run_", "").replace(".sh", ".yaml")


def execute(launcher: str, script: str, *arguments: str, **variables: str) -> tuple[int, str]:
    """(exit status, output) of a script started from the project's folder."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | variables
    result = subprocess.run(
        [*LAUNCHERS[launcher], script, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return result.returncode, result.stdout


def plain_sizes(config: Config, folder: str) -> Options:
    return Options(world_size=NUM_GPUS, model_config=str(ROOT / folder / "model_config.json"), check_files=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_holds_the_papers_values(script: str) -> None:
    config = load_config(ROOT / recipe_of(script))
    size, method = ("32b" if "32b" in script else "7b"), script.split("run_")[1].removesuffix(".sh")
    prompts, responses, updates, half_life, weights, safety, longest, buffer = PAPER[f"{size} {method}"]
    assert config.algorithm == method
    assert config.objective.future_kl == (method == "fipo")
    assert (config.rollout.num_prompts, config.rollout.num_samples_per_prompt) == (prompts, responses)
    assert config.rollout.num_prompts_per_round == 4 * 512
    assert updates_per_step(config) == updates
    assert (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens) == (2048, longest)
    assert (config.reward.overlong_buffer_tokens, config.reward.overlong_penalty) == (buffer, 1.0)
    assert (config.reward.correct, config.reward.incorrect) == (1.0, -1.0)
    objective = config.objective
    assert (objective.clip_ratio_low, objective.clip_ratio_high, objective.dual_clip) == (0.2, 0.28, 10.0)
    assert objective.loss_aggregation == "token_mean"
    assert objective.kl_coefficient == objective.entropy_coefficient == 0
    assert objective.old_log_probs == "actor"
    if method == "fipo":
        assert objective.half_life_tokens == half_life
        assert (objective.influence_min, objective.influence_max) == weights
        assert objective.safety_ratio == safety
        assert objective.max_dual_clipped_tokens == 1
        assert objective.filter_extreme_ratios
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.num_warmup_steps, optimizer.weight_decay) == (1e-6, 10, 0.1)
    assert optimizer.gradient_clip == 1.0
    assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 1.0)
    assert config.sampling.dynamic
    assert (config.sampling.max_generation_rounds, config.sampling.max_surplus_age_steps) == (10, 0)
    evaluation = config.evaluation
    assert (evaluation.num_samples_per_prompt, evaluation.temperature, evaluation.top_p) == (32, 1.0, 0.7)
    assert config.servers.tp == (4 if size == "32b" else 1)
    assert set(config.data.evaluation) == {"aime_2024", "aime_2025"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_fits_sixteen_nodes(script: str) -> None:
    config = load_config(ROOT / recipe_of(script))
    plan = plan_of(config, plain_sizes(config, str(Path(script).parent)))
    assert plan.fits, [finding.text for finding in plan.findings]
    assert plan.batch.data_ranks * config.parallel.tp * config.parallel.pp * config.parallel.cp == NUM_GPUS
    assert max(stage.training for stage in plan.stages) < plan.gpu.memory_gib


@pytest.mark.parametrize("fp8", FP8_ALIGNMENT)
@pytest.mark.parametrize("script", SCRIPTS)
def test_microbatches_are_whole_blocks_of_every_fp8_recipe(script: str, fp8: str) -> None:
    """The longest sequence fits, however it is padded, and no token of the budget lies beyond the last block."""
    config = load_config(ROOT / recipe_of(script), [f"model.fp8={fp8}"])
    validate(config, NUM_GPUS)
    assert config.batch.max_tokens_per_microbatch % microbatch_token_multiple(config) == 0
    validate_model_layout(config, json.loads((ROOT / Path(script).parent / "model_config.json").read_text()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_node_writes_weights_at_every_step(script: str) -> None:
    assert not load_config(ROOT / recipe_of(script)).servers.keep_snapshot


def rows_of(folder: str, header: str) -> list[list[str]]:
    """Cells of the README's table whose header begins so, without marks of emphasis."""
    lines = (ROOT / folder / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(header)) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" *") for cell in line.strip("|").split("|")])
    return rows


def seconds_of_training(plan: Plan) -> float:
    return plan.cost.seconds["log-probs"] + plan.cost.seconds["updates"]


def test_the_readmes_moments_are_preflights() -> None:
    config = load_config(ROOT / "examples/qwen2_5_32b/fipo.yaml")
    plan = plan_of(config, plain_sizes(config, "examples/qwen2_5_32b"))
    expected = []
    for peak in plan.peaks:
        parts = (peak.actor, peak.passing, peak.server_weights, peak.pool, peak.on_the_way, peak.rest, peak.total)
        expected.append([peak.moment, *(f"{part:.1f}" if part else "" for part in parts)])
    assert rows_of("examples/qwen2_5_32b", "| when |") == expected


def test_the_readmes_layouts_are_preflights() -> None:
    rows = rows_of("examples/qwen2_5_32b", "| tp × pp × cp × dp |")
    assert len(rows) == 8
    for layout, tokens, recompute, *numbers in rows:
        tp, pp, cp, dp = (int(size) for size in layout.split(" × "))
        config = load_config(
            ROOT / "examples/qwen2_5_32b/fipo.yaml",
            [
                *(f"parallel.{name}={size}" for name, size in (("tp", tp), ("pp", pp), ("cp", cp))),
                f"batch.max_tokens_per_microbatch={tokens.replace(',', '')}",
                f"model.recompute={recompute}",
            ],
        )
        plan = plan_of(config, plain_sizes(config, "examples/qwen2_5_32b"))
        assert plan.batch.data_ranks == dp
        totals = {peak.moment: peak.total for peak in plan.peaks}
        found = (totals["an update"], totals["weights go over"])
        assert numbers == [*(f"{gib:.1f}" for gib in found), f"{seconds_of_training(plan):.0f}"], layout


def test_the_smaller_readmes_recipes_are_preflights() -> None:
    folder = "examples/qwen2_5_7b_math"
    for name, *numbers in rows_of(folder, "| recipe |"):
        config = load_config(ROOT / folder / name)
        plan = plan_of(config, plain_sizes(config, folder))
        totals = {peak.moment: peak.total for peak in plan.peaks}
        memory = (totals["an update"], totals["weights go over"], plan.server.pool)
        time = (seconds_of_training(plan), plan.cost.step_seconds)
        assert numbers == [*(f"{gib:.1f}" for gib in memory), *(f"{seconds:.0f}" for seconds in time)], name


def ablations() -> list[tuple[str, str, str, list[str]]]:
    """(folder, name, recipe, overrides) of every line of the sweep files."""
    return [
        (folder, name, entry["recipe"], entry["overrides"].split())
        for folder in FOLDERS
        for name, entry in yaml.safe_load((ROOT / folder / "sweep.yaml").read_text()).items()
    ]


@pytest.mark.parametrize(("folder", "name", "recipe", "overrides"), ablations(), ids=lambda value: str(value)[:40])
def test_an_ablation_is_a_line_that_runs(folder: str, name: str, recipe: str, overrides: list[str]) -> None:
    path = ROOT / folder / f"{recipe}.yaml"
    base, changed = load_config(path), load_config(path, overrides)
    validate(changed, NUM_GPUS)
    assert changed != base, "it changes nothing"
    assert plan_of(changed, plain_sizes(changed, folder)).fits
    assert f"`{' '.join(overrides)}`" in (ROOT / folder / "README.md").read_text(), "the README lists it"


def test_the_papers_ablations_are_all_there() -> None:
    lines = {" ".join(overrides) for folder, _, _, overrides in ablations() if "32b" in folder}
    assert {f"objective.half_life_tokens={tokens}" for tokens in (8, 128, 256)} <= lines
    for line in (
        "objective.influence_min=0.8",
        "objective.filter_extreme_ratios=false",
        "train.num_minibatches=16",
        "objective.clip_ratio_high=0.4",
        "rollout.max_response_tokens=25600 reward.overlong_buffer_tokens=5120 batch.max_tokens_per_microbatch=27648",
        "reward.overlong_buffer_tokens=0",
    ):
        assert line in lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_can_be_executed_and_say_what_they_take(script: str) -> None:
    assert (ROOT / script).stat().st_mode & stat.S_IXUSR
    status, output = execute("bash", script, "--help")
    assert status == 2
    assert output.startswith(f"usage: {Path(script).name}")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_dry_run_prints_configuration_and_verdict(launcher: str) -> None:
    status, output = execute(launcher, FIPO_32B, "--dry-run", "train.num_steps=7", MODEL_PATH="/nowhere/Qwen2.5-32B")
    assert "path: ${oc.env:MODEL_PATH,./models/Qwen2.5-32B}" in output, "what is written keeps the reference"
    assert "model.path=/nowhere/Qwen2.5-32B is no folder here" in output, "MODEL_PATH is honoured"
    assert "num_steps: 7" in output, "overrides are passed through"
    assert "32,763,876,352" in output
    assert "128 x h100-80gb" in output
    assert re.search(r"how stale tokens must be to fill the servers .* 0\.20 steps: these, of 16,384", output)
    assert "missing: model.path=/nowhere/Qwen2.5-32B is no folder here" in output
    assert "Verdict: fits 128 x h100-80gb, but 4 things are missing here" in output
    assert status == 1
    if launcher != "torchrun":  # which reports a process that exits with 1 by a traceback of its own
        assert "Traceback" not in output


def test_a_dry_run_heeds_the_environment() -> None:
    variables = {"NNODES": "4", "GPUS_PER_NODE": "8", "TRAIN_FILE": "/nowhere/train.parquet"}
    status, output = execute("bash", FIPO_32B, "--dry-run", "--gpu", "h200", **variables)
    assert status == 1
    assert "32 x h200" in output
    assert "data.train.dapo_math.path=/nowhere/train.parquet does not exist" in output


def test_a_dry_run_of_the_tiny_recipe_fits() -> None:
    status, output = execute("bash", FIPO_32B, "--dry-run", "model=tiny")
    assert status == 0, output
    assert "Verdict: fits 2 x h100-80gb" in output


def test_what_cannot_run_is_refused_before_anything_starts() -> None:
    status, output = execute("bash", FIPO_32B, GPUS_PER_NODE="8")
    assert status == 2
    assert "8 processes cannot hold whole copies of the model" in output
    assert "Traceback" not in output


def test_one_tiny_step_from_torchrun(tmp_path: Path) -> None:
    """torchrun's one process starts torchrun again, with two ranks that share sequences (cp 2)."""
    folder = tmp_path / "run"
    status, output = execute(
        "torchrun", FIPO_32B, "model=tiny", f"run.output_dir={folder}", "metrics.tensorboard=false"
    )
    assert status == 0, output[-6000:]
    (line,) = step_lines(folder)
    assert line["optim/updates"] == 8
    assert line["mismatch/log_prob_difference/absmax"] < 1e-4, "the engine's log-probs are the actor's"
    config = load_config(folder / "config.yaml")
    assert config.parallel.cp == 2
    assert config.objective == load_config(ROOT / recipe_of(FIPO_32B)).objective
    assert (folder / "huggingface" / "model.safetensors").is_file()
