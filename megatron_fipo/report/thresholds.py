"""Where the verdict on a run draws its lines. docs/metrics.md says in words what a healthy run shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """One number for each line; shares are of 1."""

    solved_accuracy: float = 0.95
    """Accuracy in training above which a run has little left to learn from these data."""
    steps_to_learn: int = 10
    """Steps in a third of the run from which on a reward without a clear change is a warning."""
    lost_gain: float = 0.25
    """Share of the reward gained up to the middle third that is lost again in the last one, beyond noise."""
    inert_weight_std: float = 1e-3
    """Standard deviation of the influence weights below which they change nothing."""
    noise_share: float = 0.5
    """Share of the noise in Future-KL above which the weights follow rounding; the trainer warns there, too."""
    two_valued_share: float = 0.9
    """Share of clipped weights above which they have only two values."""
    majority: float = 0.5
    """Share above which something meant for a minority is the rule."""
    clip_fraction: float = 0.1
    """Share of clipped tokens above which updates are too large: a few per cent are usual."""
    dual_clip_fraction: float = 1e-3
    """Share of dual-clipped tokens that is no longer rare."""
    filtered_share: float = 0.01
    """Share of responses left out by the sequence filter that is no longer rare."""
    ratio_p999: float = 5.0
    """The 99.9 % quantile of the ratio of negative samples, of which a few are usual."""
    growth: float = 3.0
    """Factor between first and last third above which a measure of distance grows fast."""
    grad_norm: float = 1.0
    """Gradient norm below which growth does no harm, since gradients are clipped there."""
    collapsed_entropy: float = 0.01
    """Entropy in nats below which next to nothing is sampled but the likeliest token."""
    entropy_rise: float = 2.0
    """Factor between first and last third above which entropy rises without end."""
    without_signal: float = 0.8
    """Share of groups that are all right, or all wrong, above which the data are too easy, or too hard."""
    truncated: float = 0.1
    """Share of truncated responses that is more than a few per cent."""
    no_answer: float = 0.5
    """Share of responses without an answer above which the prompt does not say how to answer."""
    failed: float = 0.0
    """Share of groups that could not be judged above which the verifier is at fault."""
    mismatch_kl: float = 1e-3
    """KL between engine and actor, in nats, below which a trend does no harm: steps of healthy runs of the quick-start,
    whose leftover groups older weights wrote, go up to 5e-4."""
    far_from_engine: float = 0.01
    """Share of tokens whose probability is not within a factor of 2 of the engine's."""
    masked: float = 0.5
    """Share of tokens left out by the rollout correction above which its bounds do not fit."""


THRESHOLDS = Thresholds()
