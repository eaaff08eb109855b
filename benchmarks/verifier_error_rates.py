"""How often the verifiers judge wrongly, beside other judges: the tables of docs/verifiers.md.

    python benchmarks/verifier_error_rates.py            # prints them
    python benchmarks/verifier_error_rates.py --write    # puts them into the page
    python benchmarks/verifier_error_rates.py --check    # exit 1 if the page has others

The pairs are those of tests/data/judged_pairs.jsonl, labelled by hand. Wrongly accepted is the share of the pairs
labelled different that a judge accepts, wrongly refused the share of those labelled equal that it refuses. Everything
is counted, nothing drawn: another run gives the same tables.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, only this folder is on the path

from benchmarks import verifier_baselines as baselines  # noqa: E402
from megatron_fipo.verifiers.pool import VerifierPool  # noqa: E402
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob  # noqa: E402

PAIRS_FILE = ROOT / "tests" / "data" / "judged_pairs.jsonl"
PAGE = ROOT / "docs" / "verifiers.md"
BEGIN = "<!-- error rates: what stands from here to the end marker is written by benchmarks/verifier_error_rates.py -->"
END = "<!-- error rates: end -->"

Pair = dict[str, Any]
"""response, reference, verifier, label (equal or different), rule, kind, style; why and source where there is one."""

OURS = "this project"
BASELINES: dict[str, baselines.Judge] = {
    "math-verify alone": baselines.math_verify_alone,
    "DAPO's scorer": baselines.dapo_scorer,
    "DAPO's scorer, answer restated": baselines.dapo_scorer_restated,
    "last box as text": baselines.last_box_as_text,
}
BY_KIND = (OURS, "math-verify alone", "DAPO's scorer, answer restated")
"""Judges of the table by kind."""


@dataclass
class Rates:
    """Counts of one judge's verdicts against the labels."""

    num_different: int = 0
    num_wrongly_accepted: int = 0
    num_equal: int = 0
    num_wrongly_refused: int = 0

    def add(self, pair: Pair, accepted: bool) -> None:
        if pair["label"] == "equal":
            self.num_equal += 1
            self.num_wrongly_refused += not accepted
        else:
            self.num_different += 1
            self.num_wrongly_accepted += accepted


def read_pairs() -> list[Pair]:
    return [json.loads(line) for line in PAIRS_FILE.read_text(encoding="utf-8").splitlines()]


def judged_by_ours(pairs: Sequence[Pair]) -> list[Verdict]:
    """Verdicts of the verifier that each pair names, from the pool that a training run has."""
    jobs = [VerifierJob(pair["verifier"], pair["response"], pair["reference"]) for pair in pairs]
    with VerifierPool(num_workers=2, timeout_s=60.0, verifiers=sorted({job.verifier for job in jobs})) as pool:
        return pool.judge_all(jobs)


def judged_by_all(pairs: Sequence[Pair], ours: Sequence[bool]) -> dict[str, list[bool]]:
    """Whether each judge accepts each pair; ours is given, the others are called."""
    accepted = {OURS: list(ours)}
    for name, judge in BASELINES.items():
        accepted[name] = [judge(pair["response"], str(pair["reference"])) for pair in pairs]
    return accepted


def rates(pairs: Iterable[Pair], accepted: Iterable[bool], where: Callable[[Pair], bool] = lambda pair: True) -> Rates:
    counted = Rates()
    for pair, verdict in zip(pairs, accepted, strict=True):
        if where(pair):
            counted.add(pair, verdict)
    return counted


# ------------------------------------------------------------------------------------------------------ the tables


def tables(pairs: Sequence[Pair], accepted: dict[str, list[bool]]) -> str:
    return "\n\n".join([_overall(pairs, accepted), _by_kind(pairs, accepted)])


def _overall(pairs: Sequence[Pair], accepted: dict[str, list[bool]]) -> str:
    parts: list[tuple[str, tuple[str, ...], Callable[[Pair], bool]]] = [
        ("`math`, all pairs", tuple(accepted), _is_math),
        (
            '`math`, with an "Answer:" line',
            (OURS, "math-verify alone", "DAPO's scorer"),
            lambda pair: _is_math(pair) and baselines.has_answer_line(pair["response"]),
        ),
        (
            r"`math`, with a `\boxed`",
            (OURS, "math-verify alone", "last box as text"),
            lambda pair: _is_math(pair) and "\\boxed{" in pair["response"],
        ),
        ("`math_answer`, `math_boxed`, `exact`", (OURS,), lambda pair: not _is_math(pair)),
    ]
    lines = ["| pairs | judge | wrongly accepted | wrongly refused |", "|---|---|---:|---:|"]
    for title, judges, where in parts:
        for judge in judges:
            counted = rates(pairs, accepted[judge], where)
            lines.append(
                f"| {title} | {judge} | {_share(counted.num_wrongly_accepted, counted.num_different)}"
                f" | {_share(counted.num_wrongly_refused, counted.num_equal)} |"
            )
    return "\n".join(lines)


def _by_kind(pairs: Sequence[Pair], accepted: dict[str, list[bool]]) -> str:
    """Accepted of the different and refused of the equal pairs, kind by kind; baselines know `math`'s markers only."""
    lines = [
        f"| kind | different | equal | {' | '.join(BY_KIND)} |",
        "|---|---:|---:|" + "---:|" * len(BY_KIND),
    ]
    for kind in dict.fromkeys(pair["kind"] for pair in pairs):
        chosen = [index for index, pair in enumerate(pairs) if pair["kind"] == kind]
        of_kind = [pairs[index] for index in chosen]
        counted = {judge: rates(of_kind, [accepted[judge][index] for index in chosen]) for judge in BY_KIND}
        cells = [
            f"{item.num_wrongly_accepted} / {item.num_wrongly_refused}"
            if judge == OURS or all(map(_is_math, of_kind))
            else "–"
            for judge, item in counted.items()
        ]
        ours = counted[OURS]
        lines.append(f"| {kind} | {ours.num_different} | {ours.num_equal} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_math(pair: Pair) -> bool:
    return bool(pair["verifier"] == "math")


def _share(count: int, of: int) -> str:
    return f"{count} of {of} ({100 * count / of:.1f} %)"


def in_page(page: str) -> str:
    """The text between a page's markers."""
    return _parts(page)[1].strip()


def _parts(page: str) -> tuple[str, str, str]:
    """A page up to its first marker, between the two, and from the second on.

    Raises:
        ValueError: if a marker is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    between, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has lost the line {BEGIN!r} or {END!r}; put both back where the tables belong")
    return before + begin, between, end + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/verifiers.md")
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/verifiers.md has other tables")
    arguments = parser.parse_args()
    pairs = read_pairs()
    started = time.perf_counter()
    verdicts = judged_by_ours(pairs)
    print(f"{len(pairs)} pairs, {time.perf_counter() - started:.1f} s for ours with the pool's start", file=sys.stderr)
    versions = ", ".join(f"{name} {version(name)}" for name in ("math-verify", "sympy"))
    print(f"Python {platform.python_version()}, {versions}", file=sys.stderr)
    for pair, verdict in zip(pairs, verdicts, strict=True):
        if verdict.correct is not (pair["label"] == "equal"):
            print(f"ours errs: {json.dumps(pair, ensure_ascii=False)} -> {verdict}", file=sys.stderr)
    text = tables(pairs, judged_by_all(pairs, [verdict.correct for verdict in verdicts]))
    print(text)
    before, present, after = _parts(PAGE.read_text(encoding="utf-8"))
    if arguments.write:
        PAGE.write_text(f"{before}\n\n{text}\n\n{after}", encoding="utf-8")
    if arguments.check and present.strip() != text:
        sys.exit(f"{PAGE} has other tables; python benchmarks/verifier_error_rates.py --write puts these there")


if __name__ == "__main__":
    main()
