"""Which reasoning-gym tasks does a model solve sometimes? python examples/smollm2_cpu/measure_tasks.py [--help].

Reinforcement learning needs groups with both right and wrong responses. For each task this samples a few groups with
transformers, judges them with the task's own scorer, and prints a Markdown table: solve rate, share of mixed groups,
mean response tokens, share of responses cut at the limit.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fipo.config import DataSourceConfig
from megatron_fipo.data.prompts import PromptStream
from megatron_fipo.rl.trajectory import Prompt
from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob

TEMPLATES = {
    "direct": """<|im_start|>system
You answer with the result only.<|im_end|>
<|im_start|>user
{prompt}<|im_end|>
<|im_start|>assistant
Answer:""",
    "worked": """<|im_start|>system
You work the problem out in one line and then give the result.<|im_end|>
<|im_start|>user
Calculate 2 + 3.<|im_end|>
<|im_start|>assistant
2 + 3 = 5
Answer: 5<|im_end|>
<|im_start|>user
{prompt}<|im_end|>
<|im_start|>assistant
""",
}
"""The chat format spelled out, with the beginning of the reply or an example. Merely asked for a bare answer, a model
of this size writes sentences around it, which the tasks' scorers do not accept."""

TASKS: dict[str, dict[str, Any]] = {
    "aiw": {},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "max_digits": 1, "operators": ["+", "-"]},
    "caesar_cipher": {"min_words": 1, "max_words": 2, "max_rotation": 2},
    "calendar_arithmetic": {"tasks": ["is_leap_year"]},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "coin_flip": {"min_trials": 2, "max_trials": 3},
    "count_primes": {"min_n": 1, "max_n": 20},
    "family_relationships": {"max_family_size": 4},
    "fraction_simplification": {"max_value": 9, "max_factor": 5, "styles": ["plain"]},
    "gcd": {"max_value": 30},
    "isomorphic_strings": {"max_string_length": 4},
    "lcm": {"max_value": 12},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "max_instances": 4},
    "letter_counting": {"min_words": 2, "max_words": 4},
    "letter_jumble": {"min_words": 1, "max_words": 2, "max_corruption_level": 0.3},
    "needle_haystack": {"min_num_statements": 2, "max_num_statements": 5},
    "number_format": {"max_num_candidates": 2, "max_n": 10000},
    "number_sequence": {"max_complexity": 1, "min_value": 0, "max_value": 10},
    "prime_factorization": {"max_value": 20},
    "products": {"max_digits": 1},
    "ransom_note": {"max_note_length": 3, "max_magazine_length": 6},
    "sentence_reordering": {"min_words_in_sentence": 3, "max_words_in_sentence": 4},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "max_value": 9},
    "spell_backward": {"min_word_len": 3, "max_word_len": 3},
    "syllogism": {},
    "word_sequence_reversal": {"min_words": 3, "max_words": 3},
    "word_sorting": {"min_words": 3, "max_words": 3, "max_word_length": 5},
}
"""Tasks with the easiest parameters that still leave many different questions."""


@dataclass(frozen=True)
class TaskResult:
    """What one task gave.

    Attributes:
        solve_rate: share of correct responses.
        mixed_groups: share of groups with a correct and a wrong response.
        mean_tokens: mean response length in tokens.
        truncated: share of responses cut at the limit.
        seconds: time for generation.
        example: a prompt's first response, for a look at what the model makes of the instruction.
    """

    solve_rate: float
    mixed_groups: float
    mean_tokens: float
    truncated: float
    seconds: float
    example: str


def sample(
    model: Any, tokenizer: Any, prompts: list[Prompt], num_samples: int, max_response_tokens: int
) -> list[list[list[int]]]:
    """Sample at temperature 1: response token ids by prompt and sample, the end of sequence included."""
    padded = tokenizer.pad({"input_ids": [list(prompt.token_ids) for prompt in prompts]}, return_tensors="pt")
    output = model.generate(
        **padded,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_response_tokens,
        num_return_sequences=num_samples,
    )
    responses = []
    for row in output[:, padded["input_ids"].shape[1] :].tolist():
        length = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        responses.append(row[:length])
    return [responses[start : start + num_samples] for start in range(0, len(responses), num_samples)]


def measure(
    model: Any,
    tokenizer: Any,
    pool: VerifierPool,
    source: DataSourceConfig,
    *,
    num_prompts: int,
    num_samples: int,
    max_response_tokens: int,
) -> TaskResult:
    """Sample and judge one task's groups."""
    # Training questions: choosing tasks by their held-out questions would flatter the evaluation, and there are few.
    prompts = PromptStream({source.task: source}, tokenizer, seed=0, max_prompt_tokens=512).take(num_prompts)
    started = time.perf_counter()
    groups = sample(model, tokenizer, prompts, num_samples, max_response_tokens)
    seconds = time.perf_counter() - started
    jobs = [
        VerifierJob("reasoning_gym", tokenizer.decode(response, skip_special_tokens=True), prompt.reference)
        for prompt, group in zip(prompts, groups, strict=True)
        for response in group
    ]
    verdicts = pool.judge_all(jobs)
    errors = [verdict.error for verdict in verdicts if verdict.error]
    if errors:
        raise RuntimeError(f"{len(errors)} responses of task {source.task} could not be judged: {errors[0]}")
    correct = [verdict.correct for verdict in verdicts]
    by_group = [correct[start : start + num_samples] for start in range(0, len(correct), num_samples)]
    lengths = [len(response) for group in groups for response in group]
    cut = [response[-1] != tokenizer.eos_token_id for group in groups for response in group]
    return TaskResult(
        solve_rate=sum(correct) / len(correct),
        mixed_groups=sum(any(group) and not all(group) for group in by_group) / len(by_group),
        mean_tokens=sum(lengths) / len(lengths),
        truncated=sum(cut) / len(cut),
        seconds=seconds,
        example=_example(prompts[0], jobs[0], verdicts[0]),
    )


def _example(prompt: Prompt, job: VerifierJob, verdict: Verdict) -> str:
    expected = prompt.reference["entry"]["answer"]
    return f"{job.response_text!r:.100} -> {verdict.answer!r:.40}, score {verdict.score:.2f}, expected {expected!r:.40}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/smollm2"), help="Hugging Face folder")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), help="tasks to measure")
    parser.add_argument("--num-prompts", type=int, default=12, help="groups per task")
    parser.add_argument("--num-samples", type=int, default=8, help="responses per group")
    parser.add_argument("--max-response-tokens", type=int, default=32, help="longest response")
    parser.add_argument("--template", default="direct", choices=TEMPLATES, help="text around the question")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--examples", action="store_true", help="show a response of each task under the table's row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    print("| task | parameters | solve rate | mixed groups | mean tokens | cut | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with VerifierPool(num_workers=1, verifiers=["reasoning_gym"]) as pool:
        for task in arguments.tasks:
            source = DataSourceConfig(
                kind="reasoning_gym",
                task=task,
                params=TASKS[task],
                prompt_template=TEMPLATES[arguments.template],
                verifier="reasoning_gym",
            )
            result = measure(
                model,
                tokenizer,
                pool,
                source,
                num_prompts=arguments.num_prompts,
                num_samples=arguments.num_samples,
                max_response_tokens=arguments.max_response_tokens,
            )
            parameters = ", ".join(f"{name}={value}" for name, value in TASKS[task].items())
            print(
                f"| {task} | {parameters} | {result.solve_rate:.2f} | {result.mixed_groups:.2f} "
                f"| {result.mean_tokens:.0f} | {result.truncated:.2f} | {result.seconds:.0f} |",
                flush=True,
            )
            if arguments.examples:
                print(f"    {result.example}", flush=True)


if __name__ == "__main__":
    main()
