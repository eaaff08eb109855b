"""The verdict on one run: whether it learns, whether FIPO acts, and whether anything saturates or drifts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import TypeVar

import numpy as np

from megatron_fipo.report.finding import BAD, GOOD, LEVELS, NOTE, WARNING, Finding, number, percent
from megatron_fipo.report.limits import beyond_limits, watched_metrics
from megatron_fipo.report.run_data import BEFORE, RunData, evaluated_sources
from megatron_fipo.report.statistics import Interval, mean_interval
from megatron_fipo.report.thresholds import THRESHOLDS
from megatron_fipo.report.trends import LEAST_STEPS, recent, trend

REWARD, ACCURACY, ENTROPY = "reward/mean", "rollout/accuracy/mean", "policy/entropy/mean"
UPDATES, SHIFT_STD, GRAD_NORM = "optim/updates", "policy/log_prob_shift/std", "optim/grad_norm"
STD, STD_AFTER_FIRST = "fipo/influence_weight/std", "fipo/influence_weight/std_after_first_update"
NOISE = "noise_floor/future_kl/share_of_later_std"
FILTERED, GROUPS = "fipo/filtered_sequences", "rollout/batch_groups"
TELLING = (
    ENTROPY,
    GRAD_NORM,
    "policy/clip_fraction",
    "fipo/influence_weight/clipped_share",
    "mismatch/kl/mean",
)
"""The metrics that a healthy run's verdict points to."""
STALENESS = "rollout/staleness_steps/max"
ROUNDS = "rollout/generation_rounds"

Problem = TypeVar("Problem")


def verdict(run: RunData) -> list[Finding]:
    """What there is to say of a run: first of learning and of FIPO, then what is wrong, the worst first.

    Raises:
        ValueError: if a file of an evaluation is damaged.
    """
    if not run.metrics.training_steps:
        return [Finding(NOTE, "No step is finished", "Nothing can be said of a run before its first step.", ())]
    troubles = [*_updates(run), *_entropy(run), *_filter(run), *_staleness(run), *_rounds(run), *_evaluation(run)]
    troubles = sorted([*troubles, *beyond_limits(run.metrics)], key=lambda finding: LEVELS.index(finding.level))
    if not any(finding.level in (WARNING, BAD) for finding in troubles):
        seen = {name for name in (*watched_metrics(), ENTROPY) if run.metrics.values(name)}
        troubles.append(_nothing_wrong(run, seen))
    return [*_progress(run), *_learning(run), *_held_out(run), *_influence(run), *troubles]


def _nothing_wrong(run: RunData, seen: Set[str]) -> Finding:
    if not seen:
        text = "The run has none of the metrics that would tell of it."
        return Finding(NOTE, "Not known whether anything saturates or drifts", text, ())
    text = f"None of the {len(seen)} watched metrics lies beyond its line; those named here tell most."
    named = tuple(name for name in TELLING if name in seen)
    if len(run.metrics.training_steps) < LEAST_STEPS:
        return Finding(GOOD, "Nothing saturates", f"{text} To tell a drift takes {LEAST_STEPS} steps.", named)
    return Finding(GOOD, "Nothing saturates or drifts", text, named)


# --- learning ---------------------------------------------------------------------------------------------------------


def _progress(run: RunData) -> Iterator[Finding]:
    if not run.is_finished:
        done = run.metrics.num_steps_done
        yield Finding(NOTE, "Unfinished", f"{done} of {run.num_steps} steps are done.", ())


def _learning(run: RunData) -> Iterator[Finding]:
    found = trend(run.metrics, REWARD)
    if found is None:
        steps = len(run.metrics.values(REWARD))
        text = f"Steps with a reward: {steps}. It takes {LEAST_STEPS} to tell a change from noise."
        yield Finding(NOTE, "Too early to tell whether it learns", text, (REWARD,))
        return
    text = (
        f"The reward went from {found.first:.3f} in the first {found.num_steps} steps to {found.last:.3f} in the last "
        f"{found.num_steps}: {_signed(found.change)}."
    )
    lost, lost_share = -found.late_change.mean, THRESHOLDS.lost_gain
    if found.falls:
        yield Finding(BAD, "The reward falls", text, (REWARD,))
    elif found.early_change.is_above and found.late_change.is_below and lost > lost_share * found.early_change.mean:
        text += f" In between it was {found.middle:.3f}; since then: {_signed(found.late_change)}."
        yield Finding(WARNING, "The reward rose and falls again", text, (REWARD,))
    elif found.rises:
        yield Finding(GOOD, "It is learning", text, (REWARD,))
    elif (accuracy := recent(run.metrics, ACCURACY)) is not None and accuracy > THRESHOLDS.solved_accuracy:
        solved = f" {percent(accuracy)} of the responses are right: there is little left to learn from these data."
        yield Finding(NOTE, "The data are solved", text + solved, (REWARD, ACCURACY))
    else:
        level = WARNING if found.num_steps >= THRESHOLDS.steps_to_learn else NOTE
        yield Finding(level, "No clear change in reward", f"{text} This can be noise.", (REWARD,))


def _held_out(run: RunData) -> Iterator[Finding]:
    """The newest scores against those before training."""
    latest = run.latest_evaluation()
    for source, k in evaluated_sources(run.metrics):
        name = f"evaluation/{source}/avg@{k}"
        scores = run.metrics.values(name)
        if len(scores) < 2:
            continue
        before = run.problems(BEFORE, source)
        after = run.problems(latest, source) if latest else None
        change = None
        if before is not None and after is not None:
            change = paired_change(
                {(problem.prompt_id, problem.prompt): float(np.mean(problem.correct)) for problem in before},
                {(problem.prompt_id, problem.prompt): float(np.mean(problem.correct)) for problem in after},
            )
        text = f"avg@{k} on {source} went from {scores[0]:.3f} to {scores[-1]:.3f}"
        if change is None:
            text += "; the problems of both evaluations are needed to tell that from noise."
            yield Finding(NOTE, f"Held-out scores: {source}", text, (name,))
            continue
        text += f": {_signed(change)}, over {len(before or ())} problems."
        if change.low is None:
            text += " It is the same on each of them, which tells nothing of noise."
        if change.is_above:
            yield Finding(GOOD, f"Held-out scores rise: {source}", text, (name,))
        elif change.is_below:
            yield Finding(BAD, f"Held-out scores fall: {source}", text, (name,))
        else:
            yield Finding(NOTE, f"No clear change in held-out scores: {source}", text, (name,))


def paired_change(before: Mapping[Problem, float], after: Mapping[Problem, float]) -> Interval | None:
    """Mean of the differences of what both have, with its interval; None unless they have the same problems."""
    if not before or before.keys() != after.keys():
        return None
    return mean_interval([after[problem] - before[problem] for problem in before])


# --- FIPO -------------------------------------------------------------------------------------------------------------


def _influence(run: RunData) -> Iterator[Finding]:
    if run.config.get("objective.future_kl") is False:
        text = "Every influence weight is 1: this run weights all tokens of a response alike."
        yield Finding(NOTE, f"No Future-KL: {run.algorithm}", text, ())
        return
    updates = recent(run.metrics, UPDATES)
    sums_shifts = run.config.get("objective.future_kl_reference") != "behaviour"  # which are 0 in the first update
    if updates is not None and updates <= 1 and sums_shifts:
        text = (
            "A step has one update, and in the first update every influence weight is 1: this is plain DAPO. Raise "
            "train.num_minibatches or train.num_epochs."
        )
        yield Finding(BAD, "FIPO is inert", text, (UPDATES,))
        return
    name = STD_AFTER_FIRST if run.metrics.values(STD_AFTER_FIRST) else STD
    spread = recent(run.metrics, name)
    if spread is None:
        return
    whose = "The influence weights" if name == STD else "After the first update of a step the influence weights"
    text = f"{whose} spread by {number(spread)} (standard deviation)"
    low, high = run.config.get("objective.influence_min"), run.config.get("objective.influence_max")
    if low == high and low is not None:
        text = f"objective.influence_min and influence_max are both {low}: the weights cannot vary."
        yield Finding(BAD, "FIPO is inert", text, (name,))
    elif spread < THRESHOLDS.inert_weight_std:
        yield Finding(WARNING, "FIPO hardly acts", f"{text}: they change next to nothing.", (name,))
    elif (recent(run.metrics, NOISE) or 0) <= THRESHOLDS.noise_share:  # otherwise it is the noise that acts
        clipped = recent(run.metrics, "fipo/influence_weight/clipped_share")
        more = "" if clipped is None else f"; exp(F) lies outside their range for {percent(clipped)} of the tokens"
        metrics = (name, *([] if clipped is None else ["fipo/influence_weight/clipped_share"]))
        yield Finding(GOOD, "FIPO acts", f"{text}{more}.", metrics)


# --- what may be wrong ------------------------------------------------------------------------------------------------


def _updates(run: RunData) -> Iterator[Finding]:
    shift, updates = recent(run.metrics, SHIFT_STD), recent(run.metrics, UPDATES)
    if recent(run.metrics, GRAD_NORM) == 0:
        text = "The gradient is 0: all responses of a group have the same reward, or the loss leaves out all tokens."
        yield Finding(BAD, "Nothing is learnt", text, (GRAD_NORM,))
    elif shift == 0 and updates is not None and updates > 1:
        text = "The log-probs do not move within a step: the learning rate is 0, or no gradient arrives."
        yield Finding(BAD, "Nothing is learnt", text, (SHIFT_STD,))


def _entropy(run: RunData) -> Iterator[Finding]:
    value = recent(run.metrics, ENTROPY)
    if value is not None and value < THRESHOLDS.collapsed_entropy:
        text = f"It is {number(value)} nats: the policy samples next to nothing but its likeliest token."
        yield Finding(BAD, "Entropy has collapsed", text, (ENTROPY,))


def _filter(run: RunData) -> Iterator[Finding]:
    filtered, groups = recent(run.metrics, FILTERED), recent(run.metrics, GROUPS)
    if filtered is None or not groups:
        return
    seen = groups * run.number("rollout.num_samples_per_prompt") * run.number("train.num_epochs")
    if filtered / seen > THRESHOLDS.filtered_share:
        text = (
            f"It leaves out {percent(filtered / seen)} of the responses, which have several dual-clipped tokens each."
        )
        yield Finding(WARNING, "The sequence filter is no longer rare", text, (FILTERED,))


def _staleness(run: RunData) -> Iterator[Finding]:
    largest, bound = recent(run.metrics, STALENESS), run.config.get("rollout.max_staleness_steps")
    if largest is None or not bound:
        return
    mean = recent(run.metrics, "rollout/staleness_steps/mean")
    text = f"The oldest tokens are of {number(largest)} versions ago"
    text += "" if mean is None else f", {number(mean)} on average"
    text += f"; rollout.max_staleness_steps allows {bound}."
    metrics = (STALENESS, "rollout/staleness_steps/mean")
    if largest > bound and run.config.get("rollout.too_stale") != "mask":
        yield Finding(BAD, "Tokens are older than allowed", text, metrics)
    else:
        yield Finding(NOTE, "It trains on stale tokens", text, metrics)


def _rounds(run: RunData) -> Iterator[Finding]:
    rounds, most = recent(run.metrics, ROUNDS), run.config.get("sampling.max_generation_rounds")
    if rounds is not None and type(most) is int and most > 1 and rounds > most / 2:
        text = f"A batch takes {number(rounds)} rounds of generation; at {most} the run stops."
        yield Finding(WARNING, "Batches hardly fill", text, (ROUNDS,))


def _evaluation(run: RunData) -> Iterator[Finding]:
    for source, _ in evaluated_sources(run.metrics):
        base = f"evaluation/{source}"
        for stat, limit, title, remedy in (
            ("truncated/share", THRESHOLDS.truncated, "are cut", "Raise evaluation.max_response_tokens"),
            ("no_answer/share", THRESHOLDS.no_answer, "hold no answer", "The prompt may not say how to answer"),
        ):
            values = run.metrics.values(f"{base}/{stat}")
            if values and values[-1] > limit:
                text = f"{percent(values[-1])} of the responses {title} in the last evaluation. {remedy}."
                yield Finding(WARNING, f"Many responses {title}: {source}", text, (f"{base}/{stat}",))
        errors = run.metrics.values(f"{base}/errors/count")
        if errors and errors[-1] > 0:
            text = f"{errors[-1]:.0f} responses of the last evaluation could not be judged, and count as wrong."
            yield Finding(WARNING, f"Responses could not be judged: {source}", text, (f"{base}/errors/count",))


def _signed(change: Interval) -> str:
    if change.low is None or change.high is None:
        return f"{change.mean:+.3f}"
    return f"{change.mean:+.3f}, 95 % interval {change.low:+.3f} to {change.high:+.3f}"
