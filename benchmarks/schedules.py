"""Rounds of generation beside streaming, with real engines and responses of very different lengths. Counted, not timed.

    python benchmarks/schedules.py count [--fill 0.22] [--record FILE]    # idle slots, wasted tokens, the simulation
    python benchmarks/schedules.py learn [--seeds 0 1 2 3 4]              # accuracy over steps and over tokens
    python benchmarks/schedules.py simulate FILE                          # the comparison again, from what was recorded

The quick-start's model, in its own process, is trained on two of its sources: chains of 2 to 7 terms, as it knows them,
and every third prompt a chain of 12 to 20 terms, which it works out at length and mostly wrongly. Responses have from 9
to 200 tokens, where they are cut.

Schedules: `rounds` of four times the batch, whose surplus is thrown away, as the paper's recipe has them; `null`,
a round of the batch's size and then twice what is missing; `streaming`; and `carry-over`, which streams and goes on in
the next step with what a batch leaves unfinished, with a rollout.max_staleness_steps of 1 or 4. The number of slots is
chosen by the fill: responses in flight when all slots are taken, over those that a step needs. The recipe's is about
0.22 on 128 GPUs and 1.8 on 1,024.

A decoding step writes one token in each slot that is taken, so that slots times steps are the tokens and the idle
slots. Wasted are tokens that were generated, not trained on, and not dropped for lack of signal: the metrics
rollout/unused_tokens and rollout/dropped_tokens. A wider count adds the groups without a signal that a round has
generated beyond the batch. What goes on in the next step is neither: it was generated here and counts there.

`count` also gives the simulation of `megatron-fipo preflight --schedules` the lengths and verdicts of each step, the
slots, and decoding steps of one second each, and prints what it says beside what was counted.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, only this folder is on the path

from megatron_fipo.parallel.local_ranks import run_local_ranks  # noqa: E402
from megatron_fipo.preflight.schedules.books import Books  # noqa: E402
from megatron_fipo.preflight.schedules.colocated import simulate_colocated  # noqa: E402
from megatron_fipo.preflight.schedules.decoding import Decoding  # noqa: E402
from megatron_fipo.preflight.schedules.outcome import Setup, Step  # noqa: E402
from megatron_fipo.preflight.schedules.rounds import simulate_rounds  # noqa: E402
from megatron_fipo.preflight.schedules.workload import Lengths, Workload  # noqa: E402
from megatron_fipo.rl.prompt_order import KeptShare  # noqa: E402

QUICKSTART = ROOT / "examples" / "quickstart"
MAX_PROMPT, MAX_RESPONSE = 40, 200
LONG = {"kind": "chain_arithmetic", "verifier": "chain_arithmetic", "params": {"min_terms": 12, "num_terms": 20}}

NUM_PROMPTS, NUM_SAMPLES = 128, 4
KEPT = 0.5
"""Share of the groups that are kept in this task, as measured; it only sets the number of slots."""
SCHEDULES: dict[str, dict[str, Any]] = {
    "rounds": {"rollout": {"num_prompts_per_round": 4 * NUM_PROMPTS}},
    "null": {},
    "streaming": {"sampling": {"streaming": True}, "rollout": {"num_prompts_per_round": 4 * NUM_PROMPTS}},
    **{
        f"carry-over {bound}": {
            "sampling": {"streaming": True},
            "rollout": {"num_prompts_per_round": 4 * NUM_PROMPTS, "max_staleness_steps": bound},
        }
        for bound in (1, 4)
    },
}
"""What each changes in the configuration. Streaming starts no rounds, and may go on as long as ten of them."""
STREAMS = ("streaming", "carry-over 1", "carry-over 4")


@dataclass(frozen=True)
class Counts:
    """What a step came to.

    Attributes:
        decode_steps: decoding steps of the engine.
        slots: of the engine.
        generated: tokens that were generated. trained: of them, those that were trained on.
        unused: of those that were not, the ones that dynamic sampling did not drop for lack of signal. The simulation
            does not tell them apart.
        beyond: tokens of everything that is not needed for the batch, groups without a signal included.
    """

    decode_steps: int
    slots: int
    generated: int
    trained: int
    unused: int | None
    beyond: int

    @property
    def idle(self) -> int:
        """Slots of all steps in which nothing was decoded."""
        return self.decode_steps * self.slots - self.generated


@dataclass(frozen=True)
class Response:
    """A response as it was recorded.

    Attributes:
        is_used: whether its prompt counts as used up; those that a stream has finished beyond its batch come again.
    """

    prompt: int
    sample: int
    tokens: int
    is_right: bool
    is_trained_on: bool
    is_used: bool


Group = tuple[list[int], bool]
"""(tokens of each response of a prompt, whether it carries a signal)"""


def configuration(folder: Path, schedule: str, slots: int, **sections: dict[str, Any]) -> Path:
    """Write a run's configuration into its folder. Sections are laid over the schedule's, and that over the base."""
    config = yaml.safe_load((QUICKSTART / "fipo.yaml").read_text())
    config["model"]["path"] = str(QUICKSTART / "base")
    config["data"]["train"]["chains"]["weight"] = 2
    config["data"]["train"]["long"] = LONG
    base: dict[str, dict[str, Any]] = {
        "run": {"output_dir": str(folder / "run"), "num_sample_prints": 0},
        "rollout": {
            "num_prompts": NUM_PROMPTS,
            "num_samples_per_prompt": NUM_SAMPLES,
            "max_prompt_tokens": MAX_PROMPT,
            "max_response_tokens": MAX_RESPONSE,
            "max_batch_size": slots,
        },
        "sampling": {"max_surplus_age_steps": 0},
        "parallel": {"cp": 1},
        "metrics": {"tensorboard": False},
        "checkpoint": {"export_huggingface": False},
    }
    for layer in (base, SCHEDULES[schedule], sections):
        for name, values in layer.items():
            config[name] = {**config.get(name, {}), **values}
    folder.mkdir(parents=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def train(file: Path) -> list[dict[str, Any]]:
    """Train in a process of its own, with one thread. Returns the lines of metrics.jsonl."""
    log = file.parent / "log.txt"
    (status,) = run_local_ranks(_train_in_process, 1, str(file), str(log), preload=("megatron_fipo.train",))
    if status:
        raise RuntimeError(f"training ended with {status}:\n{log.read_text()[-3000:]}")
    return [json.loads(line) for line in (file.parent / "run" / "metrics.jsonl").read_text().splitlines()]


def _train_in_process(file: str, log: str) -> int:
    """Train, and keep what was recorded of every step."""
    import torch

    from megatron_fipo.rollout.ledger import RolloutLedger
    from megatron_fipo.train import main as train_main

    RolloutLedger.forget_before = lambda self, step: None  # type: ignore[method-assign]
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    return train_main([file])


def in_turn_or_beside(jobs: int, function: Callable[..., Any], *columns: Iterable[Any]) -> list[Any]:
    """What `function` gives for each row, `jobs` of them at a time: nothing that is counted depends on the clock."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(function, *columns))


def responses_of(folder: Path, step: int) -> list[Response]:
    """Every response that was finished in a step, or before it and carried over, in the order of prompts."""
    place = folder / "run" / "rollouts" / f"step_{step:06d}"
    plan, header = (_records(place / name)[0] for name in ("plan.json", "rank_000.jsonl"))
    trained_on = {*plan["prompt_ids"]}
    carried = place / "carried_000.jsonl"
    judged_before = [one for one in _records(carried) if one.get("is_judged")] if carried.exists() else []
    found = [
        Response(
            one["prompt_id"],
            one["sample_index"],
            len(base64.b64decode(one["response_ids"])) // 4,
            one["accuracy"] == 1,
            one["prompt_id"] in trained_on,
            one["prompt_id"] < plan["next_prompt"],
        )
        for one in [*judged_before, *_records(place / "rank_000.jsonl")]
        if "fingerprint" not in one
    ]
    assert "fingerprint" in header, "the first line says which run the file belongs to"
    return sorted(found, key=lambda one: (one.prompt, one.sample))


def _records(path: Path) -> list[dict[str, Any]]:
    """The objects of a ledger's file, each behind its checksum."""
    return [json.loads(line.partition(" ")[2]) for line in path.read_text().splitlines()]


def groups_of(responses: Sequence[Response]) -> list[Group]:
    """The groups of a step that were judged whole and used up, in the order of prompts."""
    used = (one for one in responses if one.is_used)
    return [
        ([one.tokens for one in group], len({one.is_right for one in group}) > 1)
        for group in (list(of_prompt) for _, of_prompt in itertools.groupby(used, key=lambda one: one.prompt))
    ]


def counts_of(
    line: dict[str, Any], before: dict[str, Any], responses: Sequence[Response], slots: int, *, is_stream: bool
) -> Counts:
    """A step's counts, from its metrics and its responses.

    Args:
        before: the metrics of the step before; of the first one none.

    Raises:
        ValueError: if they do not fit together: the engine's steps must come out as a whole number.
    """
    judged = round(line["rollout/response_tokens/mean"] * line["rollout/generated_groups"] * NUM_SAMPLES)
    if judged != sum(one.tokens for one in responses if one.is_used):
        raise ValueError(f"step {line['step']}: {judged} tokens by the metrics, others by what was recorded")
    last = max(one.prompt for one in responses if one.is_trained_on)
    behind = sum(one.tokens for one in responses if one.is_used and one.prompt > last)
    unused = round(line["rollout/unused_tokens"])
    in_vain = unused if is_stream else 0  # rounds have judged what they do not use
    dropped = round(line.get("rollout/dropped_tokens", 0))
    taken_over = round(before.get("rollout/carried_tokens", 0)) - dropped
    generated = judged + in_vain + round(line.get("rollout/carried_tokens", 0)) - taken_over
    steps = generated / (1 - line["rollout/idle_slots/share"]) / slots
    if abs(steps - round(steps)) > 1e-3:
        raise ValueError(f"step {line['step']}: {generated} tokens in {steps} decoding steps of {slots} slots")
    trained = sum(one.tokens for one in responses if one.is_trained_on)
    return Counts(round(steps), slots, generated, trained, unused + dropped, behind + in_vain + dropped)


def count(schedule: str, slots: int, num_steps: int, folder: Path) -> Run:
    """Train for some steps, and count."""
    place = folder / f"{schedule}-{slots}"
    file = configuration(
        place,
        schedule,
        slots,
        train={"num_steps": num_steps, "num_epochs": 1},
        data={"evaluation": {}},  # what evaluations decode would count, too
    )
    lines = [line for line in train(file) if "optim/grad_norm" in line]
    responses = [responses_of(place, step) for step in range(num_steps)]
    is_stream = schedule in STREAMS
    steps = [
        counts_of(line, before, one, slots, is_stream=is_stream)
        for before, line, one in zip([{}, *lines[:-1]], lines, responses, strict=True)
    ]
    return Run(steps, [groups_of(of_step) for of_step in responses])


class Recorded(Workload):
    """The groups of a step, in its order, then others.

    Args:
        kept: share of groups that are kept, as far as the run knew when the step began.
    """

    def __init__(self, groups: Sequence[Group], others: Sequence[Group], kept: float) -> None:
        tokens = [length for lengths, _ in groups for length in lengths]
        super().__init__(Lengths(fmean(tokens), MAX_RESPONSE, MAX_PROMPT), NUM_SAMPLES)
        self.kept = kept
        self._groups, self._others = groups, others

    def group(self, prompt: int) -> Group:
        """See `Workload`."""
        behind = prompt - len(self._groups)
        return self._groups[prompt] if behind < 0 else self._others[behind % len(self._others)]


def simulate(schedule: str, groups: Sequence[Group], others: Sequence[Group], slots: int, kept: float) -> Counts:
    """What the simulation says of a step, on an engine whose decoding steps take a second each.

    Args:
        groups: those that the step has used up, in order. others: what comes behind them.
        kept: share of groups that are kept, as far as the run knew when the step began.
    """
    setup = _setup(slots)
    workload = Recorded(groups, others, kept)
    if schedule == "streaming":
        (step,) = simulate_colocated(setup, Books(workload, NUM_PROMPTS, adapts=False), steps=1)
    else:
        per_round = SCHEDULES[schedule].get("rollout", {}).get("num_prompts_per_round")
        (step,) = simulate_rounds(setup, workload, per_round=per_round, spread=True, steps=1)
    return _counts(step, slots)


def simulate_carry_over(
    bound: int, groups: Sequence[Sequence[Group]], others: Sequence[Group], slots: int
) -> list[Counts]:
    """What the simulation says of steps of which each goes on with what the one before has left.

    Args:
        bound: rollout.max_staleness_steps.
        groups: those that each step has used up, in order. others: what comes behind them.
    """
    all_groups = [group for of_step in groups for group in of_step]
    workload = Recorded(all_groups, others, fmean(mixed for _, mixed in all_groups))
    steps = simulate_colocated(_setup(slots), Books(workload, NUM_PROMPTS, bound), steps=len(groups))
    return [_counts(step, slots) for step in steps]


def _setup(slots: int) -> Setup:
    """An engine whose decoding steps take a second each."""
    engine = Decoding(fixed=1, weights=0, cached_token=0, response=0, prefilled_token=0, pool=10**9, slots=slots)
    return Setup(engine, 1, 1, 1, 1, NUM_PROMPTS, lambda lengths: 0.0, 0.0, claims=slots)


def _counts(step: Step, slots: int) -> Counts:
    return Counts(round(step.generation), slots, step.generated, step.tokens.trained, None, step.tokens.wasted)


@dataclass(frozen=True)
class Run:
    """A schedule's run: the counts of its steps, and the groups that each has used up."""

    counts: list[Counts]
    groups: list[list[Group]]

    def simulated(self, schedule: str, others: Sequence[Group]) -> list[Counts]:
        """What the simulation says of the steps after the first, in which a stream does not know yet how many groups
        are kept, under this schedule or another one."""
        if bound := SCHEDULES[schedule].get("rollout", {}).get("max_staleness_steps"):
            return simulate_carry_over(bound, self.groups, others, self.counts[0].slots)[1:]
        known, slots, found = KeptShare(), self.counts[0].slots, []
        for groups in self.groups:
            if known.used:
                found.append(simulate(schedule, groups, others, slots, known.share()))
            known = known.after(sum(mixed for _, mixed in groups), len(groups))
        return found


def show_counts(title: str, counted: dict[str, list[Counts]]) -> None:
    """A table of averages over the steps, with what is lost by idle slots and by waste over what rounds lose."""
    print(f"\n{title}")
    print("| schedule | decoding steps | idle slots | tokens | trained | wasted | beyond the batch | lost |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    of_rounds: tuple[float, float] | None = None
    for name, steps in counted.items():
        idle, generated = mean(steps, "idle"), mean(steps, "generated")
        unused, beyond = mean(steps, "unused"), mean(steps, "beyond")
        of_rounds = of_rounds or (idle + unused, idle + beyond)
        print(
            f"| {name} | {mean(steps, 'decode_steps'):,.0f} | {idle:,.0f} ({idle / (idle + generated):.1%}) | "
            f"{generated:,.0f} | {mean(steps, 'trained'):,.0f} | {unused:,.0f} ({unused / generated:.1%}) | "
            f"{beyond:,.0f} ({beyond / generated:.1%}) | "
            f"{(idle + unused) / of_rounds[0]:.2f}, {(idle + beyond) / of_rounds[1]:.2f} |"
        )


def mean(steps: Sequence[Counts], name: str) -> float:
    """Average of one of the counts."""
    return fmean(getattr(step, name) for step in steps)


def show_simulation(runs: dict[str, Run]) -> None:
    """What the simulation says beside what was counted, on average over the steps after the first."""
    others = [group for of_step in runs["rounds"].groups for group in of_step]
    print("\n| schedule | decoding steps, simulated / counted | idle slots | tokens | beyond the batch |")
    print("|---|---:|---:|---:|---:|")
    for name, one in runs.items():
        simulated, cells = one.simulated(name, others), []
        for column in ("decode_steps", "idle", "generated", "beyond"):
            said, was = mean(simulated, column), mean(one.counts[1:], column)
            cells.append(f"{said:,.0f} / {was:,.0f}" + (f" ({said / was:.2f})" if was else ""))
        print(f"| {name} | {' | '.join(cells)} |")


def run_count(arguments: argparse.Namespace) -> None:
    """Count every schedule at one fill."""
    slots = round(arguments.fill * NUM_PROMPTS * NUM_SAMPLES / KEPT)
    with tempfile.TemporaryDirectory() as scratch:
        found = in_turn_or_beside(
            arguments.jobs, lambda name: count(name, slots, arguments.steps, Path(scratch)), SCHEDULES
        )
    runs = dict(zip(SCHEDULES, found, strict=True))
    if arguments.record:
        record(arguments.record, runs)
    show(runs)


def show(runs: dict[str, Run]) -> None:
    """Print what the task is like, what was counted, and the simulation."""
    groups = [group for of_step in runs["rounds"].groups for group in of_step]
    lengths = sorted(length for group, _ in groups for length in group)
    quartiles = [lengths[len(lengths) * part // 4] for part in (1, 2, 3)]
    print(
        f"{len(lengths):,} responses in rounds: from {lengths[0]} to {lengths[-1]} tokens, quartiles {quartiles}, mean "
        f"{fmean(lengths):.1f}; {fmean(mixed for _, mixed in groups):.0%} of groups with a signal"
    )
    counted = {name: one.counts for name, one in runs.items()}
    show_counts(f"{counted['rounds'][0].slots} slots, all {len(counted['rounds'])} steps", counted)
    show_counts("The same without the first step", {name: steps[1:] for name, steps in counted.items()})
    show_simulation(runs)


def record(path: Path, runs: dict[str, Run]) -> None:
    """Write down what was counted and the groups: a line of JSON for each step."""
    command = " ".join(["python", "benchmarks/schedules.py", *sys.argv[1:]])
    lines: list[dict[str, Any]] = [{"command": command, "num_prompts": NUM_PROMPTS}]
    for name, one in runs.items():
        for counts, groups in zip(one.counts, one.groups, strict=True):
            lines.append({"schedule": name, "counts": astuple(counts), "groups": groups})
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def read_record(path: Path) -> dict[str, Run]:
    """What `record` has written.

    Raises:
        ValueError: if it was written by runs with another batch.
    """
    head, *lines = map(json.loads, path.read_text().splitlines())
    if head["num_prompts"] != NUM_PROMPTS:
        raise ValueError(
            f"{path}: steps of {head['num_prompts']} prompts, and {NUM_PROMPTS} are simulated. Record anew."
        )
    runs: dict[str, Run] = {}
    for line in lines:
        one = runs.setdefault(line["schedule"], Run([], []))
        one.counts.append(Counts(*line["counts"]))
        one.groups.append([(lengths, mixed) for lengths, mixed in line["groups"]])
    return runs


LEARNING_STEPS, EVALUATED_EVERY = 8, 4
LEARNING_BATCH = {"num_prompts": 16, "num_samples_per_prompt": 8, "num_prompts_per_round": 64}


def learn(schedule: str, seed: int, folder: Path) -> list[tuple[int, int, float]]:
    """Train. Returns (steps that are done, tokens generated by then, held-out accuracy) of each evaluation."""
    place = folder / f"{schedule}-{seed}"
    file = configuration(
        place,
        schedule,
        48,
        run={"seed": seed},
        rollout=LEARNING_BATCH,
        train={"num_steps": LEARNING_STEPS},
        evaluation={"every_num_steps": EVALUATED_EVERY, "num_samples_per_prompt": 4},
    )
    done, generated, carried = 0, 0, 0
    points: dict[int, tuple[int, int, float]] = {}
    for line in train(file):
        if "optim/grad_norm" in line:
            done += 1
            num_responses = line["rollout/generated_groups"] * LEARNING_BATCH["num_samples_per_prompt"]
            generated += round(line["rollout/response_tokens/mean"] * num_responses)
            if schedule in STREAMS:
                generated += round(line["rollout/unused_tokens"])
            before, carried = carried, round(line.get("rollout/carried_tokens", 0))
            generated += carried - before + round(line.get("rollout/dropped_tokens", 0))
        if "evaluation/held_out/avg@4" in line:
            points[done] = (done, generated, line["evaluation/held_out/avg@4"])
    return list(points.values())


def run_learn(arguments: argparse.Namespace) -> None:
    """Train with every schedule from every seed."""
    cases = [(name, seed) for seed in arguments.seeds for name in arguments.schedules]
    with tempfile.TemporaryDirectory() as scratch:
        names, seeds = zip(*cases, strict=True)
        results = in_turn_or_beside(arguments.jobs, lambda n, s: learn(n, s, Path(scratch)), names, seeds)
    for (name, seed), points in zip(cases, results, strict=True):
        print(json.dumps({"schedule": name, "seed": seed, "points": points}))


def run_simulate(arguments: argparse.Namespace) -> None:
    """Compare the simulation with what was recorded."""
    show(read_record(arguments.file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    counting = commands.add_parser("count", help="idle slots and wasted tokens")
    counting.add_argument("--fill", type=float, default=0.22)
    counting.add_argument("--steps", type=int, default=5)
    counting.add_argument("--record", type=Path, metavar="FILE", help="write down what was counted")
    counting.set_defaults(run=run_count)
    learning = commands.add_parser("learn", help="accuracy over steps and over tokens")
    learning.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    learning.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=["rounds", *STREAMS])
    learning.set_defaults(run=run_learn)
    for command in (counting, learning):
        command.add_argument("--jobs", type=int, default=1, help="runs at a time")
    simulating = commands.add_parser("simulate", help="compare the simulation with what was recorded")
    simulating.add_argument("file", type=Path)
    simulating.set_defaults(run=run_simulate)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
