"""Evaluation of a Hugging Face folder on a configuration's held-out data, in one process, without Megatron."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.config import Config, read_model_config
from megatron_fipo.data.prompts import evaluation_sets
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.evaluation import (
    EVALUATION_STEP,
    EvaluationResult,
    ProblemResult,
    evaluate_problems,
    write_problems,
)
from megatron_fipo.metrics.console import Console
from megatron_fipo.rl.types import Prompt
from megatron_fipo.rl.verifiers.pool import VerifierPool
from megatron_fipo.rl.verifiers.verdict import Verdict, VerifierJob
from megatron_fipo.rollout.collect import generate_groups
from megatron_fipo.rollout.engine import SamplingParams
from megatron_fipo.rollout.in_process import InProcessEngine


def evaluate_folder(
    config: Config, model_path: str, console: Console
) -> tuple[dict[str, EvaluationResult], list[ProblemResult]]:
    """Generate and judge responses to every evaluation prompt of a configuration.

    Args:
        config: data.evaluation and evaluation say what and how; rollout.max_batch_size how many at a time.
        model_path: Hugging Face folder with the policy.
        console: shows progress.

    Returns:
        Results by source, and the problems behind them.

    Raises:
        ValueError: if the configuration has no evaluation data, or the folder no model.
    """
    if not config.data.evaluation:
        raise ValueError("data.evaluation is empty: there is nothing to evaluate on. Name a source there.")
    read_model_config(model_path)
    tokenizer = load_tokenizer(model_path)
    prompts = [prompt for prompts in evaluation_sets(config, tokenizer).values() for prompt in prompts]
    engine = InProcessEngine(model_path, max_batch_size=config.rollout.max_batch_size, tokenizer=tokenizer)
    settings, verifier = config.evaluation, config.verifier
    sampling = SamplingParams(
        max_tokens=settings.max_response_tokens or config.rollout.max_response_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    total = len(prompts) * settings.num_samples_per_prompt
    names = sorted({prompt.verifier for prompt in prompts})
    with (
        VerifierPool(verifier.num_workers, verifier.timeout_s, verifiers=names) as pool,
        console.evaluation_progress(total) as progress,
    ):

        async def judge(prompt: Prompt, text: str, finish_reason: str) -> Verdict:
            return await pool.judge(VerifierJob(prompt.verifier, text, prompt.reference, finish_reason))

        groups = asyncio.run(
            generate_groups(
                engine,
                prompts,
                judge,
                decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
                num_samples=settings.num_samples_per_prompt,
                sampling=sampling,
                run_seed=config.run.seed,
                step=EVALUATION_STEP,
                on_sample=lambda sample: progress.advance(),
            )
        )
    problems = [ProblemResult.from_group(group) for group in groups]
    return evaluate_problems(problems), problems


def run(config: Config, model_path: str, output_dir: str) -> int:
    """`megatron-fipo evaluate`: show a table, write problems.jsonl and metrics.json. Returns the exit status."""
    console = Console(config)
    results, problems = evaluate_folder(config, model_path, console)
    metrics = {name: value for result in results.values() for name, value in result.metrics.items()}
    folder = Path(output_dir)
    write_problems(folder / "problems.jsonl", problems)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    console.evaluation_table(model_path, {name.removeprefix("evaluation/"): value for name, value in metrics.items()})
    console.info(f"problems and metrics: {folder}")
    return 0
