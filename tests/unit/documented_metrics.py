"""Metric names: those that the package writes, and those that docs/metrics.md explains."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_fipo.config import FipoConfig, RewardSection, SamplingSection, ShadowConfig
from megatron_fipo.evaluation.scores import ProblemResult, evaluate_problems
from megatron_fipo.metrics.reductions import Metrics, scalars
from megatron_fipo.rl.advantages import assign_advantages, assign_rewards
from megatron_fipo.rl.diagnostics import advantage_metrics, noise_floor, rollout_metrics
from megatron_fipo.rl.dynamic_sampling import DynamicSampler
from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.rl.staleness import staleness_metrics
from megatron_fipo.rl.trajectory import SampleKey, Segment, Trajectory
from megatron_fipo.rollout.carry_over import CARRIED_TOKENS, DROPPED_TOKENS
from megatron_fipo.run.step_report import INFLUENCE_STD, StepClock
from tests.losses import CORRECTIONS, packed_loss
from tests.unit.rl_samples import make_group, make_judged

AREAS = (
    "advantages", "canary", "evaluation", "fipo", "mismatch", "noise_floor", "optim", "perf", "policy", "reward",
    "rollout", "shadow", "time_s", "weight_sync",
)  # fmt: skip
_NAME = re.compile(rf"({'|'.join(AREAS)})/[A-Za-z0-9_./@{{}}<>,-]+")
_FIELD = "\0"
"""Stands for a part of a name that is known at run time only."""


def measured_names() -> set[str]:
    """Names that the package's own functions give for a made-up step, under every rollout correction."""
    config = FipoConfig(kl_coefficient=0.1, entropy_coefficient=0.1, shadow={"tau_128": ShadowConfig(128.0)})
    whole = make_group(0, (1.0, 0.0))
    whole.samples[0].parts = {"math": 1.0}
    groups = [JudgedGroup.of(whole), make_judged(1, (1.0, 1.0, 0.5, 0.0))]
    assign_rewards(groups, RewardSection(), max_response_tokens=16)
    assign_advantages(groups, "group_std")
    sampler = DynamicSampler(1, SamplingSection())
    sampler.start_step(0)
    sampler.add_round(groups)
    sampler.take()
    clock = StepClock()
    metrics: Metrics = {
        **rollout_metrics(groups, 16), **advantage_metrics(groups), **sampler.metrics(), **clock.metrics(1),
        **staleness_metrics([_of_version(0)], 1),
    }  # fmt: skip
    updates = [_update_metrics(config, correction) for correction in CORRECTIONS]
    for update in updates:
        metrics |= update
    numbers = scalars(updates[0])
    metrics |= noise_floor(numbers, numbers).metrics
    evaluations = evaluate_problems([ProblemResult.from_group(whole)])
    carried = {CARRIED_TOKENS, DROPPED_TOKENS}  # measured where ranks take over what others have left
    return {*scalars(metrics), *evaluations, *carried, f"{INFLUENCE_STD}_after_first_update"}


def _of_version(version: int) -> Trajectory:
    segment = Segment(torch.tensor([1]), "policy", torch.zeros(1), version)
    return Trajectory(SampleKey("sums", 0, 0), torch.tensor([2]), [segment], "stop")


def _update_metrics(config: FipoConfig, correction: str) -> Metrics:
    settings = {**vars(config), "rollout_correction": correction}
    tokens = torch.linspace(-1.0, -0.1, 8)
    output = packed_loss(
        torch.tensor([0, 4, 8]),
        FipoConfig(**settings),
        log_probs=tokens,
        old_log_probs=tokens - 0.1,
        advantages=torch.tensor([1.0] * 4 + [-1.0] * 4),
        response_mask=torch.ones(8, dtype=torch.bool),
        reference_log_probs=tokens,
        entropy=torch.ones(8),
        rollout_log_probs=tokens,
        staleness_steps=torch.arange(8) % 2,
    )
    return output.metrics


def source_names(package: Path) -> Iterator[tuple[str, str]]:
    """(place, name) of every metric that the package's source spells out as the key of a mapping.

    A name made at run time holds a `_FIELD` for each part that is not spelled out. The phases of the step's clock are
    metrics, too.
    """
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.expr):
                continue
            keys: list[ast.expr | None] = []
            if isinstance(node, ast.Dict):
                keys = list(node.keys)
            elif isinstance(node, ast.DictComp):
                keys = [node.key]
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                keys = [node.slice]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "phase":
                yield f"{path.name}:{node.lineno}", f"time_s/{_text(node.args[0])}"
            for key in keys:
                name = _text(key)
                if name.split("/")[0] in AREAS and "/" in name:
                    yield f"{path.name}:{node.lineno}", name


def _text(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else _FIELD for part in node.values)
    return ""


def documented_names(page: str) -> set[str]:
    """The page's names in backticks, {a,b} written out; <…> is kept."""
    found = set()
    for quoted in re.findall(r"`([^`\n]+)`", page):
        if _NAME.fullmatch(quoted) and not quoted.endswith("/"):
            found |= set(_written_out(quoted))
    return found


def _written_out(name: str) -> Iterator[str]:
    parts = [part[1:-1].split(",") if part.startswith("{") else [part] for part in re.split(r"({[^}]*})", name)]
    for choice in itertools.product(*parts):
        yield "".join(choice)


def is_entry_for(documented: str, measured: str) -> bool:
    """Whether an entry of the page stands for a metric as it arrives in the sinks."""
    return bool(_pattern(documented, r"<[^>]*>").fullmatch(measured))


def is_entry_for_source(documented: str, written: str) -> bool:
    """Whether an entry stands for a name as the source spells it.

    A histogram or a distribution is written under its base name and arrives with a quantile behind it.
    """
    entry = re.sub(r"<[^>]*>", "x", documented)
    return any(_pattern(written, _FIELD).fullmatch(text) for text in (entry, entry.rpartition("/")[0]))


def _pattern(name: str, field: str) -> re.Pattern[str]:
    return re.compile("[^/]+".join(re.escape(part) for part in re.split(field, name)))
