"""Rewards, advantages and the objective, which lead from verdicts to the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Dict, Optional

from megatron_fipo.config.declaration import key

# OmegaConf resolves these annotations at run time, hence Optional, Dict and List rather than the newer spellings.

_OWN = "to take the objective's own"


@dataclass(frozen=True)
class RewardSection:
    """Rewards that verdicts are turned into."""

    correct: float = key(1.0, least=-math.inf)
    """Reward of an accepted answer."""
    incorrect: float = key(-1.0, least=-math.inf)
    """Reward of any other answer."""
    overlong_buffer_tokens: int = key(0, least=0)
    """Length at the end of max_response_tokens over which the overlong penalty grows; 0 turns it off."""
    overlong_penalty: float = key(1.0, least=0)
    """Largest overlong penalty."""
    mask_truncated: bool = False
    """Leave responses cut at max_response_tokens out of the loss."""


@dataclass(frozen=True)
class AdvantageSection:
    """Group-relative advantages."""

    estimator: str = key("group_std", choices=("group_std", "group_mean", "leave_one_out"))
    """group_std: (R - mean)/(std + 1e-6); group_mean: R - mean (Dr. GRPO); leave_one_out (RLOO)."""


@dataclass(frozen=True)
class ShadowConfig:
    """Settings under which Future-KL and influence weights are measured without being trained on."""

    half_life_tokens: Optional[float] = key(None, above=0, null_means=_OWN)
    """Distance in tokens at which a later token's influence has halved."""
    influence_min: Optional[float] = key(None, least=0, null_means=_OWN)
    """Lower end of the influence weights."""
    influence_max: Optional[float] = key(
        None, above=0, finite=False, null_means=_OWN, because=".inf leaves weights unclipped above"
    )
    """Upper end of the influence weights."""
    safety_ratio: Optional[float] = key(None, above=0, null_means=_OWN)
    """Where the advantage is negative and the ratio above this, the weight is clipped to [0.8, 1.0]."""
    dual_clip: Optional[float] = key(None, above=1, null_means=_OWN)
    """Tokens with a ratio above this stay out of Future-KL."""
    filter_extreme_ratios: Optional[bool] = None
    """Whether they do; false lets every token in."""


@dataclass(frozen=True)
class FipoConfig:
    """The objective. FIPO and the methods it is compared with are settings of `rl.objective.policy_loss`."""

    clip_ratio_low: float = key(0.2, above=0, most=1)
    """The ratio is clipped below at 1 - clip_ratio_low."""
    clip_ratio_high: float = key(0.28, above=0)
    """The ratio is clipped above at 1 + clip_ratio_high."""
    dual_clip: Optional[float] = key(10.0, above=1, null_means="to turn it off")
    """Where the weighted advantage is negative, the loss is at most `-f*A*dual_clip`; null: none (not for FIPO)."""
    future_kl: bool = True
    """Weight advantages by Future-KL and filter sequences (FIPO); false leaves every weight at 1."""
    half_life_tokens: float = key(32.0, above=0)
    """Distance in tokens at which a later token's influence has halved."""
    influence_min: float = key(1.0, least=0)
    """Lower end of the influence weights."""
    influence_max: float = key(1.2, above=0, finite=False, because=".inf leaves weights unclipped above")
    """Upper end of the influence weights."""
    safety_ratio: float = key(10.0, above=0)
    """Where the advantage is negative and the ratio above this, the weight is clipped to [0.8, 1.0]."""
    max_dual_clipped_tokens: int = key(1, least=0)
    """A response with more tokens of negative advantage and ratio above dual_clip leaves the loss altogether."""
    filter_extreme_ratios: bool = True
    """Tokens with a ratio above dual_clip stay out of Future-KL; false is the paper's ablation."""
    loss_aggregation: str = key("token_mean", choices=("token_mean", "sequence_mean", "sequence_sum"))
    """token_mean; sequence_mean: mean of responses' token means (GRPO); sequence_sum: by a fixed length (Dr. GRPO)."""
    sequence_sum_tokens: Optional[int] = key(None, least=1)
    """The constant length of sequence_sum; required there, usually rollout.max_response_tokens."""
    kl_coefficient: float = key(0.0, least=0)
    """Weight of the KL penalty against the frozen starting policy (k3 estimator); 0 builds no reference."""
    entropy_coefficient: float = key(0.0, least=0)
    """Weight of the entropy bonus."""
    old_log_probs: str = key("actor", choices=("actor", "rollout"))
    """Old policy's log-probs: actor (recomputed before the step's first update) or rollout (refused with future_kl)."""
    future_kl_reference: str = key("proximal", choices=("proximal", "behaviour"))
    """What Future-KL sums the policy's log-probs against: proximal (the old policy), or behaviour (each token's own
    author), an ablation that takes staleness for credit; see docs/staleness.md."""
    rollout_correction: str = key(
        "none", choices=("none", "token_truncated", "token_masked", "sequence_masked", "geometric_masked")
    )
    """Correction of staleness and of the engine's numerical differences: none, token_truncated (truncated importance
    sampling), token_masked, sequence_masked (masked importance sampling) or geometric_masked; see
    rl/rollout_correction.py. Where nobody sets it, it is token_truncated with rollout.max_staleness_steps above 0 and
    old_log_probs=actor."""
    rollout_ratio_min: float = key(0.5, above=0, below=1)
    """Least accepted ratio of the actor's to the engine's probability; of a token, or of a whole response."""
    rollout_ratio_max: float = key(2.0, above=1)
    """Largest such ratio: token_truncated cuts the weight there, the others mask what lies above."""
    shadow: Dict[str, ShadowConfig] = key({}, changes_results=False)
    """Shadow objectives by name, such as objective.shadow.tau_128.half_life_tokens=128: settings under which Future-KL
    and influence weights are measured in the same updates, without being trained on. What one leaves open is the
    objective's own: with algorithm=dapo, objective.shadow.fipo={} shows what FIPO would have made of the run."""
