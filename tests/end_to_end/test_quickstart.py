"""The quick-start as a user runs it, cut to three small steps: what is shown, measured, saved, and exported."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_fipo import config as configuration
from megatron_fipo.actor.actor import Actor
from megatron_fipo.checkpoint.torch_dist import load_checkpoint
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.local_ranks import run_local_ranks
from megatron_fipo.rl.packing import build_packed_batch
from megatron_fipo.rl.trajectory import Trajectory
from megatron_fipo.run.samples import read_samples
from megatron_fipo.traces.files import read_trace, trace_files
from megatron_fipo.verifiers import chain_arithmetic
from tests.end_to_end.runs import (
    BASE,
    QUICKSTART,
    ROOT,
    metric_lines,
    processes_of,
    run_command,
    sample_files,
    step_lines,
)

NUM_STEPS = 3
SMALLER = (
    f"train.num_steps={NUM_STEPS}",
    "rollout.num_prompts=8",
    "rollout.num_samples_per_prompt=8",
    "train.num_minibatches=4",
    "optimizer.num_warmup_steps=2",
    "data.evaluation.held_out.num_prompts=16",
)
TIMEOUT_S = 300.0

PAPER_PLOTS = {
    "reward and accuracy": ("reward/mean", "rollout/accuracy/mean"),
    "response length": tuple(f"rollout/response_tokens/{s}" for s in ("min", "p25", "mean", "median", "p75")),
    "accuracy against length": tuple(
        f"rollout/accuracy_by_length/{low}_to_{low + 12}" for low in range(0, 96, 12)
    ),
    "generation rounds": ("rollout/generation_rounds",),
    "length-weighted mean advantage": ("advantages/length_weighted_mean",),
    "policy KL, gradient norm, entropy": ("policy/kl/mean", "optim/grad_norm", "policy/entropy/mean"),
    "clip fractions": ("policy/clip_fraction", "policy/dual_clip_fraction"),
    "influence weights": tuple(
        f"fipo/influence_weight/{s}" for s in ("mean", "min", "max", "clipped_high_share", "clipped_low_share")
    ),
    "unclipped weights": tuple(f"fipo/exp_future_kl/{s}" for s in ("mean", "min", "max")),
    "ratios of negative samples": tuple(
        f"policy/ratio_negative/{s}"
        for s in ("share_2_to_3", "share_3_to_4", "share_4_to_dual_clip", "p75", "p99.5", "p99.9", "max")
    ),
    "ratios of positive samples": tuple(
        f"policy/ratio_positive/{s}"
        for s in ("min", "p25", "median", "p75", "p99.5", "p99.9", "max", "share_below_1e-3")
    ),
}  # fmt: skip
"""What the paper plots of every step."""
PAPER_EVALUATION = tuple(f"evaluation/held_out/{score}@4" for score in ("avg", "cons", "pass"))

SOLUTIONS = {
    "3+9-5+1+6-2+4=": "3+9=12;12-5=7?7;7+1=8;8+6=14;14-2=12;12+4=16;#16",
    "8+8+8+8-1-1-1=": "8+8=16;16+8=23?24;24+8=32;32-1=31;31-1=30;30-1=29;#29",
    "1+2=": "1+2=3;#4",
}
"""Prompts with responses, right and wrong, as the model meets them."""

MAY_BE_EMPTY = "rollout/accuracy_by_length/"
"""There need not be a response of every length."""


@dataclass(frozen=True)
class QuickStart:
    """A finished run."""

    folder: Path
    code: int
    output: str

    @property
    def config(self) -> configuration.Config:
        return configuration.load_config(self.folder / "config.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> QuickStart:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    program = str(Path(sys.executable).with_name("megatron-fipo"))
    command = [program, "train", QUICKSTART, "--nproc", "2", *SMALLER]
    code, output = run_command([*command, f"run.output_dir={folder}"], TIMEOUT_S, mark=str(folder))
    assert code == 0, output[-6000:]
    return QuickStart(folder, code, output)


def test_what_is_shown(run: QuickStart) -> None:
    lines = run.output.splitlines()
    assert "FIPO on Megatron-Core" in run.output
    for fact in (BASE, "8 prompts × 8 responses", f"{NUM_STEPS} steps × 8 updates", "2 = tp 1 × pp 1 × cp 2 × dp 1"):
        assert fact in run.output
    steps = [line for line in lines if re.match(rf"\s*\d+/{NUM_STEPS}\s", line)]
    assert [int(line.split("/")[0]) for line in steps] == list(range(NUM_STEPS)), "one line for each step"
    assert all("±" in line and "–" not in line for line in steps), "no number is missing"
    (table,) = (index for index, line in enumerate(lines) if "Held-out, before and after" in line)
    assert {"before", "after", "change"} <= set(lines[table].split())
    assert any("held_out/avg@4" in line for line in lines[table:])
    for when in ("before", "after"):
        start = next(index for index, line in enumerate(lines) if f"Responses {when} training: held_out" in line)
        block = "\n".join(lines[start : start + 30])
        assert len(re.findall(r"(✓ correct|✗ wrong)", block.split("Held-out")[0])) == 3, "three samples"
    closing = "\n".join(lines[next(index for index, line in enumerate(lines) if line.startswith("Done")) :])
    for name in ("checkpoints", "metrics.jsonl", "tensorboard", "huggingface"):
        assert str(run.folder / name) in closing
    assert "megatron-fipo chat" in closing
    assert "Traceback" not in run.output
    assert "Warning" not in run.output


def test_metrics_let_a_user_redraw_the_papers_figures(run: QuickStart) -> None:
    steps = step_lines(run.folder)
    assert [line["step"] for line in steps] == list(range(NUM_STEPS))
    for line in steps:
        for figure, names in PAPER_PLOTS.items():
            assert set(names) <= line.keys(), figure
            for name in names:
                if not name.startswith(MAY_BE_EMPTY):
                    assert line[name] is not None, name  # null stands for what is not finite
                    assert math.isfinite(line[name]), name
        assert any(line[name] is not None for name in PAPER_PLOTS["accuracy against length"])
        assert line["policy/response_tokens"] > 0
        assert line["perf/tokens_per_s"] > 0
        assert line["perf/suffix_sum_exchange_bytes"] > 0, "context parallelism exchanges"
    evaluations = [line for line in metric_lines(run.folder) if PAPER_EVALUATION[0] in line]
    assert [line["step"] for line in evaluations] == [0, NUM_STEPS]
    for line in evaluations:
        assert all(0 <= line[name] <= 1 for name in PAPER_EVALUATION)


def test_fipo_acts(run: QuickStart) -> None:
    """From its first update on the policy moves within a step, and the weights say so."""
    last = step_lines(run.folder)[-1]
    assert last["fipo/influence_weight/std_after_first_update"] > 0.02
    for line in step_lines(run.folder):
        assert line["noise_floor/log_prob_shift/absmax"] == 0, "the first update's forward pass is the old policy's"


def test_tensorboard_can_be_read(run: QuickStart) -> None:
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    for name in ("reward/mean", "fipo/influence_weight/mean"):
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == list(range(NUM_STEPS))
        expected = [line[name] for line in step_lines(run.folder)]
        assert [event.value for event in scalars] == pytest.approx(expected, rel=1e-6)


def test_traces_tell_each_token_of_whole_groups(run: QuickStart) -> None:
    found = trace_files(run.folder / "traces")
    assert {step for step, _ in found} == {0, NUM_STEPS - 1}
    for (step, update), path in found.items():
        responses = read_trace(path).responses
        assert [one.sample_index for one in responses] == list(range(8)) * (len(responses) // 8)
        for one in responses:
            assert (one.step, one.update) == (step, update)
            assert "".join(one.texts).removesuffix("<eos>") == one.response
            assert not one.left_out
            assert set(one.policy_versions.tolist()) <= {step - 1, step}, "a group that was left over is a step older"
            assert np.all((one.influence_weights >= np.float32(0.8)) & (one.influence_weights <= np.float32(1.2)))
            assert np.ptp(one.influence_weights) > 0 or update == 0, "no shift without an update"


def test_responses_of_every_step_can_be_read(run: QuickStart) -> None:
    assert sorted(sample_files(run.folder)) == [f"step_{step:06d}.jsonl" for step in range(NUM_STEPS)]
    for step in range(NUM_STEPS):
        samples = read_samples(run.folder, step)
        assert len(samples) == 4
        assert len({sample.prompt for sample in samples}) == 4, "each of another group"
        assert {sample.is_right for sample in samples if sample.trained_on} == {True, False}
        for sample in samples:
            verdict = chain_arithmetic.verify(sample.response, sample.reference, sample.finish_reason)
            assert (verdict.score, verdict.answer) == (sample.score, sample.answer), "the text is what was judged"
            assert sample.reward == (1.0 if sample.is_right else -1.0)
            assert sample.trained_on == (sample.advantage is not None)
            assert not sample.trained_on or (sample.advantage > 0) == sample.is_right  # type: ignore[operator]


def test_configuration_and_provenance_are_written(run: QuickStart) -> None:
    given = configuration.load_config(ROOT / QUICKSTART, [*SMALLER, f"run.output_dir={run.folder}"])
    assert run.config == given
    provenance = json.loads((run.folder / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__
    assert all(provenance["versions"][name] for name in ("megatron_fipo", "megatron-core", "transformers"))
    assert provenance["git"]["revision"] or provenance["git"]["reason"]


def _response_log_probs_of_actor(folder: Path, samples: list[Trajectory]) -> Tensor:
    """Of the samples' responses, by the checkpoint in Megatron."""
    os.chdir(ROOT)
    overrides = ["parallel.cp=1", "rollout.temperature=1.0"]
    config = configuration.load_config(folder / "config.yaml", overrides)
    ranks = parallel_groups.initialize(config.parallel, config.run.seed)
    actor = Actor(config, ranks)
    load_checkpoint(actor, folder / "checkpoints" / f"step_{NUM_STEPS:06d}")
    batch = build_packed_batch(samples, range(len(samples)), pad_multiple=1, pad_token_id=0)
    (log_probs,) = actor.log_probs([batch])
    return log_probs[batch.response_mask]


def _response_log_probs_of_export(folder: Path, samples: list[Trajectory]) -> Tensor:
    """The same by transformers, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for sample in samples:
        ids = torch.cat([sample.prompt_ids, sample.response_ids])
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0].log_softmax(-1)
        start = len(sample.prompt_ids)
        found.append(log_probs[start - 1 : -1].gather(1, ids[start:, None])[:, 0])
    return torch.cat(found)


def test_the_export_is_the_actor(run: QuickStart) -> None:
    tokenizer = load_tokenizer(run.folder / "huggingface")
    samples = [_sample(tokenizer, *texts) for texts in SOLUTIONS.items()]
    (actor,) = run_local_ranks(
        _response_log_probs_of_actor, 1, run.folder, samples, preload=("tests.parallel.preload",), timeout_s=120
    )
    export = _response_log_probs_of_export(run.folder / "huggingface", samples)
    assert len(export) > 100
    torch.testing.assert_close(export, actor, rtol=1e-5, atol=1e-5)
    untrained = _response_log_probs_of_export(ROOT / BASE, samples)
    assert (untrained - actor).abs().max() > 1e-2, "training has changed the model"


def _sample(tokenizer: Any, prompt: str, response: str) -> Trajectory:
    prompt_ids, response_ids = (
        torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, response)
    )
    return Trajectory.of_response(0, 0, prompt_ids, response_ids, torch.zeros(len(response_ids)), "stop")


def test_the_chat_command_answers(run: QuickStart) -> None:
    (command,) = (line.strip() for line in run.output.splitlines() if "megatron-fipo chat" in line)
    command = command[command.index(re.search(r"\S*megatron-fipo chat", command)[0]) :]  # type: ignore[index]
    program, *arguments = shlex.split(command)
    assert Path(program).name == "megatron-fipo"
    code, answer = run_command(
        [str(ROOT / program) if "/" in program else program, *arguments, "--prompt", "3+4=", "--seed", "0"],
        120.0,
        mark=f"{run.folder}/chat",
    )
    assert code == 0, answer
    assert re.fullmatch(r"[0-9+\-=;?#]+", answer.strip())


def test_nothing_is_left_running(run: QuickStart) -> None:
    assert processes_of(str(run.folder)) == {}
