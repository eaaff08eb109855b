"""Measures what the isolation of verifiers costs: confined and trusted workers judge the same responses in turn.

    python benchmarks/verifiers_isolation.py [--responses 512] [--workers 2] [--rounds 3]

A trusted worker (`verifier.trusted`) judges all responses in one process with all rights, as every worker did before
there was isolation. Mathematics is confined in one process for all responses; a function of one's own has a process
forked for each, and so have the tasks of reasoning-gym whose scorers evaluate the answer. Rounds alternate over new
responses, the best of each counts, and both must come to the same verdicts.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from verifiers import mathematics_jobs

from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.reasoning_gym_tasks import open_task
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob

OWN = """
from megatron_fipo.verifiers.verdict import Verdict

def verify(response_text, reference, finish_reason):
    answer = response_text.rpartition("=")[2].strip()
    return Verdict(float(answer == reference), answer)
"""
TASKS = ("chain_sum", "gcd", "maze", "word_ladder", "zebra_puzzles")
EVALUATING_TASKS = ("countdown", "polynomial_multiplication", "puzzle24", "simple_integration")


def gym_jobs(num_responses: int, rng: Random, tasks: Sequence[str]) -> list[VerifierJob]:
    """Right answers, and those of other entries."""
    entries = {task: list(open_task(task, {}, seed=0, size=16)) for task in tasks}
    jobs = []
    for _ in range(num_responses):
        task = rng.choice(tasks)
        entry, other = rng.choice(entries[task]), rng.choice(entries[task])
        answer = rng.choice([entry, other])["answer"]
        reference = {"task": task, "params": {}, "entry": entry}
        jobs.append(VerifierJob("reasoning_gym", f"<answer>{answer}</answer>", reference))
    return jobs


def own_jobs(num_responses: int, rng: Random) -> list[VerifierJob]:
    """Responses to a cheap function: what is measured is the fork."""
    return [
        VerifierJob("benchmarked_judge:verify", f"so x = {rng.randrange(4)}", str(rng.randrange(4)))
        for _ in range(num_responses)
    ]


KINDS: dict[str, Callable[[int, Random], list[VerifierJob]]] = {
    "math": lambda num_responses, rng: mathematics_jobs(num_responses, rng, "math"),
    "reasoning_gym, comparing": lambda num_responses, rng: gym_jobs(num_responses, rng, TASKS),
    "reasoning_gym, evaluating": lambda num_responses, rng: gym_jobs(num_responses, rng, EVALUATING_TASKS),
    "own function": own_jobs,
}


def judged(pool: VerifierPool, jobs: list[VerifierJob]) -> tuple[float, list[Verdict]]:
    started = time.perf_counter()
    verdicts = pool.judge_all(jobs)
    return time.perf_counter() - started, verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.workers} workers")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "benchmarked_judge.py").write_text(OWN)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))
        for kind, make in KINDS.items():
            rounds = [make(arguments.responses, Random(index)) for index in range(arguments.rounds + 1)]
            names = [rounds[0][0].verifier]
            with (
                VerifierPool(arguments.workers, verifiers=names) as confined,
                VerifierPool(arguments.workers, verifiers=names, trusted=names) as trusted,
            ):
                pools = {"confined": confined, "trusted": trusted}
                best = dict.fromkeys(pools, float("inf"))
                for index, jobs in enumerate(rounds):  # the first one warms up
                    verdicts = {}
                    for name, pool in pools.items():
                        seconds, verdicts[name] = judged(pool, jobs)
                        best[name] = min(best[name], seconds) if index else best[name]
                    assert verdicts["confined"] == verdicts["trusted"], kind
                    assert not any(verdict.error for verdict in verdicts["confined"]), kind
            num_responses = arguments.responses
            rates = {name: num_responses / seconds for name, seconds in best.items()}
            extra_ms = 1000 * arguments.workers * (best["confined"] - best["trusted"]) / num_responses
            print(
                f"{kind:25} {num_responses} responses: confined {rates['confined']:6.0f}/s, "
                f"trusted {rates['trusted']:6.0f}/s, ratio {rates['confined'] / rates['trusted']:.2f}, "
                f"{extra_ms:+.2f} ms a response and worker"
            )


if __name__ == "__main__":
    main()
