"""Numbers of a run that lie beyond a line, or grow too fast: what is saturating, drifting or about to break."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fipo.report.finding import BAD, NOTE, WARNING, Finding, number, percent
from megatron_fipo.report.metrics_file import MetricTable
from megatron_fipo.report.thresholds import THRESHOLDS
from megatron_fipo.report.trends import recent, trend


@dataclass(frozen=True)
class Limit:
    """A metric whose mean over the last third of the steps is not to lie above a line."""

    metric: str
    above: float
    level: str
    title: str
    text: str
    is_share: bool = True


@dataclass(frozen=True)
class Growth:
    """A metric that is not to grow from the first third of the steps to the last by a factor and more, beyond noise.

    Attributes:
        above: the last third's mean above which growth matters.
    """

    metric: str
    factor: float
    above: float
    level: str
    title: str
    text: str


LIMITS = (
    Limit(
        "noise_floor/future_kl/share_of_later_std",
        THRESHOLDS.noise_share,
        BAD,
        "The weights follow rounding",
        "Before any update, when every shift is rounding, Future-KL spreads {value} as far as after it. Use a higher "
        "precision (model.dtype), or a shorter objective.half_life_tokens.",
    ),
    Limit(
        "fipo/influence_weight/clipped_share",
        THRESHOLDS.two_valued_share,
        WARNING,
        "The influence weights saturate",
        "For {value} of the tokens exp(F) lies outside the range, so that the weights have little more than two "
        "values. A wider range, a shorter half-life or smaller updates would tell tokens apart.",
    ),
    Limit(
        "policy/clip_fraction",
        THRESHOLDS.clip_fraction,
        WARNING,
        "Updates are too large",
        "The loss of {value} of the tokens is clipped; a few per cent are usual. Lower optimizer.learning_rate, or "
        "make fewer updates in a step.",
    ),
    Limit(
        "policy/dual_clip_fraction",
        THRESHOLDS.dual_clip_fraction,
        WARNING,
        "Dual clipping is no longer rare",
        "{value} of the tokens have a negative advantage and a ratio above objective.dual_clip: the policy moves far "
        "within a step.",
    ),
    Limit(
        "policy/ratio_negative/p99.9",
        THRESHOLDS.ratio_p999,
        WARNING,
        "Large ratios in wrong responses",
        "One in a thousand tokens of negative advantage has a ratio above {value}; a few are usual. It is an early "
        "sign of instability.",
        is_share=False,
    ),
    Limit(
        "rollout/dropped_groups/all_right_share",
        THRESHOLDS.without_signal,
        WARNING,
        "The data are too easy",
        "In {value} of the generated groups every response is right, and they carry no signal.",
    ),
    Limit(
        "rollout/dropped_groups/all_wrong_share",
        THRESHOLDS.without_signal,
        WARNING,
        "The data are too hard",
        "In {value} of the generated groups every response is wrong, and they carry no signal. If that is a surprise, "
        "look at the samples: template or verifier may be wrong.",
    ),
    Limit(
        "rollout/dropped_groups/failed_share",
        THRESHOLDS.failed,
        WARNING,
        "Responses could not be judged",
        "{value} of the generated groups were dropped because a response of theirs could not be judged.",
    ),
    Limit(
        "rollout/truncated_share",
        THRESHOLDS.truncated,
        WARNING,
        "Many responses are cut",
        "{value} of the responses reach rollout.max_response_tokens: the limit is too small, or they repeat "
        "themselves.",
    ),
    Limit(
        "mismatch/share_outside_0.5_to_2",
        THRESHOLDS.far_from_engine,
        WARNING,
        "Engine and actor differ",
        "For {value} of the tokens the actor's probability is not within a factor of 2 of the engine's.",
    ),
    Limit(
        "mismatch/masked_share",
        THRESHOLDS.masked,
        WARNING,
        "The rollout correction leaves out most tokens",
        "It leaves out {value} of them; objective.rollout_ratio_min and rollout_ratio_max do not fit.",
    ),
    Limit(
        "rollout/server_restarts",
        0,
        NOTE,
        "Servers were restarted",
        "{value} restarts on average over the last third of the steps, counted since the run began.",
        is_share=False,
    ),
)

GROWTHS = (
    Growth(
        "optim/grad_norm",
        THRESHOLDS.growth,
        THRESHOLDS.grad_norm,
        WARNING,
        "The gradient norm grows",
        "From {first} to {last} between the first and the last third of the steps.",
    ),
    Growth(
        "policy/kl/mean",
        THRESHOLDS.growth,
        0.01,
        WARNING,
        "The policy moves ever further in a step",
        "The KL from the old policy has grown from {first} to {last} nats.",
    ),
    Growth(
        "policy/ratio_negative/p99.9",
        THRESHOLDS.growth,
        THRESHOLDS.ratio_p999 / 2,
        WARNING,
        "Ratios in wrong responses grow",
        "Their 99.9 % quantile has grown from {first} to {last}, an early sign of instability.",
    ),
    Growth(
        "mismatch/kl/mean",
        THRESHOLDS.growth,
        THRESHOLDS.mismatch_kl,
        WARNING,
        "Engine and actor drift apart",
        "The KL between them has grown from {first} to {last} nats; such a trend comes before collapse.",
    ),
    Growth(
        "policy/entropy/mean",
        THRESHOLDS.entropy_rise,
        0.0,
        WARNING,
        "Entropy rises",
        "From {first} to {last} nats; a rise without end is noise.",
    ),
)


def beyond_limits(table: MetricTable) -> Iterator[Finding]:
    """What lies beyond a line or grows too fast."""
    for limit in LIMITS:
        value = recent(table, limit.metric)
        if value is not None and value > limit.above:
            shown = percent(value) if limit.is_share else number(value)
            yield Finding(limit.level, limit.title, limit.text.format(value=shown), (limit.metric,))
    for growth in GROWTHS:
        found = trend(table, growth.metric)
        if found is None or not found.rises or found.last <= growth.above:
            continue
        if found.last > growth.factor * abs(found.first):
            text = growth.text.format(first=number(found.first), last=number(found.last))
            yield Finding(growth.level, growth.title, text, (growth.metric,))


def watched_metrics() -> tuple[str, ...]:
    """The metrics that are looked at here."""
    return tuple(dict.fromkeys(one.metric for one in (*LIMITS, *GROWTHS)))
