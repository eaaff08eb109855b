"""Rollout engines side by side: throughput, start, handover of weights, and log-probs against the actor's.

    python benchmarks/rollout_engines.py MODEL --engine in_process --engine sglang=/path/to/its/python

One process, one server. Every engine gets the same requests: prompts of random tokens, several samples each, all of the
same length (no token ends a response). Weights come from a Megatron-Core actor in float32, which then gives the
log-probs of all tokens that the engines have sampled.
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
from typing import TypeAlias

import psutil
import torch

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import load_config
from megatron_fipo.parallel import cpu
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams, Turn
from megatron_fipo.rollout.in_process.engine import InProcessEngine
from megatron_fipo.rollout.servers.engine import ServerEngine
from megatron_fipo.rollout.servers.setup import build_server_engine


@dataclass
class Result:
    """The measurements of one engine."""

    name: str
    start_s: float
    sync_s: list[float]
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
    cpu.install()
    config = load_config(None, [f"model.path={arguments.model}"])
    ranks = parallel_groups.initialize(config.parallel, seed=0)
    actor = Actor(config, ranks)
    requests = _requests(arguments, actor.shape.vocab_size)
    results = [_measure(engine, arguments, requests, actor) for engine in arguments.engine]
    parallel_groups.shut_down()
    print(f"\n{arguments.prompts} prompts x {arguments.samples} samples x {arguments.tokens} tokens, {arguments.model}")
    print("| engine | tokens/s: best, worst | start s | weights s: first, best | log-prob difference | peak GiB |")
    print("|---|---|---|---|---|---|")
    for result in results:
        rates = [result.num_tokens / seconds for seconds in result.generate_s]
        first_s, *later_s = result.sync_s
        print(
            f"| {result.name} | {max(rates):,.0f}, {min(rates):,.0f} | {result.start_s:.1f} "
            f"| {first_s:.2f}, {min(later_s):.2f} | {result.max_difference:.1e} | {result.peak_gib:.2f} |"
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


Engine: TypeAlias = InProcessEngine | ServerEngine


def _measure(choice: str, arguments: argparse.Namespace, requests: list[GenerationRequest], actor: Actor) -> Result:
    name, _, python = choice.partition("=")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        engine = _build(name, python, arguments, Path(folder), actor.ranks)
        start_s = time.perf_counter() - start
        try:
            sync_s = []
            for version in (1, 2, 3):
                start = time.perf_counter()
                engine.update_weights(actor.weights(), version)
                sync_s.append(time.perf_counter() - start)
            seconds, samples = [], []
            for _ in range(arguments.rounds):
                start = time.perf_counter()
                samples = asyncio.run(_generate(engine, requests))
                seconds.append(time.perf_counter() - start)
            peak = _peak_gib()
        finally:
            engine.close()
    checked = samples if arguments.checked is None else samples[: arguments.checked]
    difference = max(_difference(actor, checked[start : start + 16]) for start in range(0, len(checked), 16))
    num_tokens = sum(len(sample.response_ids) for sample in samples)
    return Result(name, start_s, sync_s, seconds, num_tokens, difference, peak)


def _build(name: str, python: str, arguments: argparse.Namespace, folder: Path, ranks: ParallelGroups) -> Engine:
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
    engine: ServerEngine = build_server_engine(config, ranks, stop_token_ids=(), folder=folder)
    engine.start()
    return engine


async def _generate(engine: Engine, requests: list[GenerationRequest]) -> list[Turn]:
    return list(await asyncio.gather(*(engine.generate(request) for request in requests)))


def _difference(actor: Actor, samples: list[Turn]) -> float:
    """Largest |difference| of a sampled token's log-prob."""
    sequences = [[*sample.prompt_ids.tolist(), *sample.response_ids.tolist()] for sample in samples]
    found = actor.score(sequences)
    largest = 0.0
    for sample, log_probs in zip(samples, found, strict=True):
        response = torch.tensor(log_probs[len(sample.prompt_ids) - 1 :])
        largest = max(largest, float((response - sample.rollout_log_probs).abs().max()))
    return largest


def _peak_gib() -> float:
    """This process's peak, and what its children hold now."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return own + sum(child.memory_info().rss for child in psutil.Process().children(recursive=True)) / 2**30


if __name__ == "__main__":
    main()
