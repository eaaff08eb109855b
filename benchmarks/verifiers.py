"""Time that the verifier pool takes over one step's responses: 8,192 of mathematics, 512 problems with 16 answers each.

    python benchmarks/verifiers.py [--responses 8192] [--workers 2] [--code 0]

Responses have the lengths of a long chain of thought (up to 20,000 tokens) and answers of the kinds that problems of
competitions have: three quarters whole numbers, as in DAPO-Math-17k, the rest fractions, roots, sets, intervals,
polynomials; half of them right, in the reference's spelling or another. The pool is the one of a training rank: worker
processes, batches, a time-out for every response. The clock starts with the first response handed in, its workers
ready, and stops with the last verdict; after that, each verifier and each kind is measured alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from random import Random

from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.verdict import VerifierJob

SENTENCES = (
    "Let us denote by $x_{%d}$ the number of ways; then $x_{%d} = x_{%d} + 2x_{%d}$ holds. ",
    "Wait, we should check the case $n = %d$ again: $\\frac{%d}{%d} < %d$, so it is impossible. ",
    "Hence the answer so far is %d, but the condition $a^{%d} \\equiv %d \\pmod{%d}$ has not been used. ",
)


def whole_number(rng: Random) -> tuple[str, list[str], list[str]]:
    n = rng.randrange(10, 10_000)
    return (
        str(n),
        [str(n), f"{n:,}", f"${n}$", f"{n}.0"],
        [str(n + 1), f"\\frac{{{n}}}{{7}}", f"x = {n - 1}", "no idea"],
    )


def fraction(rng: Random) -> tuple[str, list[str], list[str]]:
    a, b = rng.randrange(1, 50), rng.randrange(51, 99)
    return f"\\frac{{{a}}}{{{b}}}", [f"{a}/{b}", f"\\dfrac{{{2 * a}}}{{{2 * b}}}"], [f"{a}/{b + 1}", f"{a / b:.2f}"]


def root(rng: Random) -> tuple[str, list[str], list[str]]:
    a, b = rng.randrange(2, 20), rng.randrange(2, 20)
    right = [f"\\sqrt{{{a * a * b}}}", f"\\sqrt{{{b}}} \\cdot {a}"]
    return f"{a}\\sqrt{{{b}}}", right, [f"\\sqrt{{{a * b}}}", f"{a + b}"]


def finite_set(rng: Random) -> tuple[str, list[str], list[str]]:
    a, b, c = rng.sample(range(100), 3)
    return f"\\{{{a}, {b}, {c}\\}}", [f"{c}, {a}, {b}"], [f"\\{{{a}, {b}\\}}", f"({a}, {b}, {c + 1})"]


def interval(rng: Random) -> tuple[str, list[str], list[str]]:
    a, b = sorted(rng.sample(range(100), 2))
    return f"({a}, {b}]", [f"\\left({a}, {b}\\right]", f"x \\in ({a},{b}]"], [f"[{a}, {b}]", f"({a}, {b + 1}]"]


def polynomial(rng: Random) -> tuple[str, list[str], list[str]]:
    a, b = rng.randrange(1, 20), rng.randrange(1, 20)
    expanded = f"x^2 + {a + b}x + {a * b}"
    return expanded, [f"(x+{a})(x+{b})"], [f"(x+{a})(x+{b + 1})", f"x^2 + {a + b + 1}x + {a * b}"]


KINDS: dict[str, Callable[[Random], tuple[str, list[str], list[str]]]] = {
    "whole number": whole_number,
    "fraction": fraction,
    "root": root,
    "set": finite_set,
    "interval": interval,
    "polynomial": polynomial,
}
"""Kinds of problems: reference, right answers in other spellings, wrong answers."""


def thought(rng: Random, num_characters: int) -> str:
    """A chain of thought of about that length."""
    parts, length = [], 0
    while length < num_characters:
        sentence = rng.choice(SENTENCES)
        parts.append(sentence % tuple(rng.randrange(100) for _ in range(sentence.count("%d"))))
        length += len(parts[-1])
    return "".join(parts)


def mathematics_jobs(num_responses: int, rng: Random, verifier: str, only_kind: str = "") -> list[VerifierJob]:
    """Groups of 16 responses to problems of mixed kinds, or of one."""
    others = [kind for kind in KINDS if kind != "whole number"]
    jobs: list[VerifierJob] = []
    while len(jobs) < num_responses:
        kind = only_kind or ("whole number" if rng.random() < 0.75 else rng.choice(others))
        reference, right, wrong = KINDS[kind](rng)
        for _ in range(16):
            answer = rng.choice([reference, rng.choice(right)]) if rng.random() < 0.5 else rng.choice(wrong)
            marked = f"\\boxed{{{answer}}}" if verifier == "math_boxed" else f"Answer: {answer}"
            text = thought(rng, int(min(rng.lognormvariate(9.5, 0.9), 60_000)))
            jobs.append(VerifierJob(verifier, f"{text}\n\n{marked}", reference))
    return jobs[:num_responses]


def code_jobs(num_responses: int, rng: Random) -> list[VerifierJob]:
    """Short programs with a few assertions, half of them wrong."""
    jobs = []
    for _ in range(num_responses):
        slip = rng.randrange(2)
        program = f"def f(numbers):\n    return sum(n * n for n in numbers) + {slip}"
        tests = "assert f([1, 2, 3]) == 14\nassert f([]) == 0\nassert f(range(1000)) == 332833500"
        jobs.append(VerifierJob("code", f"We square.\n```python\n{program}\n```", {"tests": tests}))
    return jobs


def measure(pool: VerifierPool, jobs: list[VerifierJob]) -> tuple[float, int, int]:
    """Seconds, accepted responses, responses that could not be judged."""
    started = time.perf_counter()
    verdicts = pool.judge_all(jobs)
    seconds = time.perf_counter() - started
    return seconds, sum(verdict.correct for verdict in verdicts), sum(bool(verdict.error) for verdict in verdicts)


def report(name: str, jobs: list[VerifierJob], result: tuple[float, int, int]) -> None:
    seconds, correct, errors = result
    rate = len(jobs) / seconds
    print(f"{name:28} {len(jobs):6d} responses {seconds:7.2f} s {rate:8.0f}/s   {correct} right, {errors} errors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--code", type=int, default=256, help="responses for the verifier code; 0 leaves it out")
    arguments = parser.parse_args()
    rng = Random(0)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.workers} workers")
    names = ["math", "math_answer", "math_boxed"] + ["code"] * bool(arguments.code)
    with VerifierPool(num_workers=arguments.workers, timeout_s=10.0, verifiers=names) as pool:
        warm_up = mathematics_jobs(16 * arguments.workers, rng, "math")
        pool.judge_all(warm_up)
        jobs = mathematics_jobs(arguments.responses, rng, "math")
        megabytes = sum(len(job.response_text) for job in jobs) / 1e6
        print(f"responses of {megabytes / len(jobs) * 1e6:.0f} characters on average, {megabytes:.0f} MB in all")
        report("math, all kinds", jobs, measure(pool, jobs))
        for verifier in ("math_answer", "math_boxed"):
            jobs = mathematics_jobs(arguments.responses // 4, rng, verifier)
            report(f"{verifier}, all kinds", jobs, measure(pool, jobs))
        for kind in KINDS:
            jobs = mathematics_jobs(max(arguments.responses // 16, 1), rng, "math", kind)
            report(f"math, {kind}", jobs, measure(pool, jobs))
        if arguments.code:
            jobs = code_jobs(arguments.code, rng)
            report("code", jobs, measure(pool, jobs))


if __name__ == "__main__":
    main()
