"""Rollout engines side by side: throughput, start, handover of weights, and log-probs against transformers.

    python benchmarks/rollout_engines.py MODEL --engine in_process --engine sglang=/path/to/its/python

One process, one server. Every engine gets the same requests: prompts of random tokens, several samples each, all of the
same length (no token ends a response). Log-probs are compared with a forward pass by transformers in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.config import load_config
from megatron_fipo.parallel import cpu
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.rl.types import Sample
from megatron_fipo.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_fipo.rollout.in_process import InProcessEngine
from megatron_fipo.rollout.server_engine import ServerEngine
from megatron_fipo.rollout.server_setup import build_server_engine


@dataclass
class Result:
    """What one engine did."""

    name: str
    start_s: float
    sync_s: float
    generate_s: list[float]
    num_tokens: int
    max_difference: float
    peak_gib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", action="append", required=True, help="in_process, sglang=PYTHON or vllm=PYTHON")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checked", type=int, default=None, help="samples whose log-probs are compared; default all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reference = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    requests = _requests(arguments, reference.config.vocab_size)
    results = [_measure(engine, arguments, requests, reference) for engine in arguments.engine]
    print(f"\n{arguments.prompts} prompts x {arguments.samples} samples x {arguments.tokens} tokens, {arguments.model}")
    print("| engine | tokens/s (best, worst) | start s | weights s | max log-prob difference | peak GiB |")
    print("|---|---|---|---|---|---|")
    for result in results:
        rates = [result.num_tokens / seconds for seconds in result.generate_s]
        print(
            f"| {result.name} | {max(rates):,.0f}, {min(rates):,.0f} | {result.start_s:.1f} | {result.sync_s:.2f} "
            f"| {result.max_difference:.1e} | {result.peak_gib:.2f} |"
        )


def _requests(arguments: argparse.Namespace, vocab_size: int) -> list[GenerationRequest]:
    numbers = random.Random(0)
    requests = []
    for group in range(arguments.prompts):
        prompt = tuple(numbers.randrange(vocab_size) for _ in range(arguments.prompt_tokens))
        for index in range(arguments.samples):
            name, seed = f"{group}/{index}", group * arguments.samples + index
            requests.append(GenerationRequest(name, group, index, prompt, SamplingParams(arguments.tokens), seed))
    return requests


def _measure(
    choice: str, arguments: argparse.Namespace, requests: list[GenerationRequest], reference: PreTrainedModel
) -> Result:
    name, _, python = choice.partition("=")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        engine = _build(name, python, arguments, Path(folder))
        start_s = time.perf_counter() - start
        try:
            # Tied weights come once, as the actor gives them.
            weights = list(reference.named_parameters())
            start = time.perf_counter()
            engine.update_weights(weights, 1)
            sync_s = time.perf_counter() - start
            seconds, samples = [], []
            for _ in range(arguments.rounds):
                start = time.perf_counter()
                samples = asyncio.run(_generate(engine, requests))
                seconds.append(time.perf_counter() - start)
            peak = _peak_gib()
        finally:
            engine.close()
    checked = samples if arguments.checked is None else samples[: arguments.checked]
    difference = max(_difference(reference, sample) for sample in checked)
    num_tokens = sum(len(sample.response_ids) for sample in samples)
    return Result(name, start_s, sync_s, seconds, num_tokens, difference, peak)


def _build(name: str, python: str, arguments: argparse.Namespace, folder: Path) -> RolloutEngine:
    if name == "in_process":
        # No token ends a response: one outside the vocabulary is refused, so none is named.
        return InProcessEngine(arguments.model, stop_token_ids=())
    config = load_config(
        None,
        [
            f"model.path={arguments.model}",
            f"rollout.engine={name}",
            f"rollout.max_prompt_tokens={arguments.prompt_tokens}",
            f"rollout.max_response_tokens={arguments.tokens}",
            f"servers.python={python or 'null'}",
            f"run.output_dir={folder}",
        ],
    )
    cpu.install()
    ranks = parallel_groups.initialize(config.parallel, seed=0)
    engine: ServerEngine = build_server_engine(config, ranks, stop_token_ids=(), folder=folder)
    engine.start()
    return engine


async def _generate(engine: RolloutEngine, requests: list[GenerationRequest]) -> list[Sample]:
    return list(await asyncio.gather(*(engine.generate(request) for request in requests)))


@torch.no_grad()
def _difference(reference: PreTrainedModel, sample: Sample) -> float:
    ids = torch.cat([sample.prompt_ids, sample.response_ids])
    hidden = reference.model(ids[None]).last_hidden_state[0, len(sample.prompt_ids) - 1 : -1]
    largest = 0.0
    # In pieces: the logits of a long response over the whole vocabulary would not fit.
    for start in range(0, len(hidden), 1024):
        labels = sample.response_ids[start : start + 1024]
        log_probs = torch.log_softmax(reference.lm_head(hidden[start : start + 1024]), dim=-1)
        ours = log_probs.gather(1, labels[:, None]).squeeze(1)
        largest = max(largest, float((ours - sample.rollout_log_probs[start : start + 1024]).abs().max()))
    return largest


def _peak_gib() -> float:
    """This process's peak, and what its children hold now."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return own + sum(child.memory_info().rss for child in psutil.Process().children(recursive=True)) / 2**30


if __name__ == "__main__":
    main()
