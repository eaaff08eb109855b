"""What each value must be on its own; what values demand of each other is `validation`'s business."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from megatron_fipo.config.errors import choice_problem
from megatron_fipo.config.keys import entry_type, field_types
from megatron_fipo.config.schema import (
    ALGORITHMS,
    FP8_ALIGNMENT,
    REPOSITORY_NAME,
    SCHEMAS,
    SOURCE_KINDS,
    AdvantageSection,
    BatchSection,
    CheckpointSection,
    Config,
    DataSection,
    DataSourceConfig,
    EvaluationSection,
    FipoConfig,
    MetricsSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RewardSection,
    RolloutSection,
    RunSection,
    SamplingSection,
    ServersSection,
    TrainSection,
    VerifierSection,
)

_CHOICES: dict[type, dict[str, tuple[str, ...]]] = {
    Config: {"algorithm": tuple(ALGORITHMS)},
    ModelSection: {
        "dtype": ("float32", "bfloat16"),
        "fp8": tuple(FP8_ALIGNMENT),
        "transformer_engine": ("auto", "off"),
        "recompute": ("none", "selective", "full"),
    },
    DataSection: {"overlong_prompts": ("error", "skip")},
    DataSourceConfig: {"kind": SOURCE_KINDS, "schema": SCHEMAS},
    RolloutSection: {"engine": ("in_process", "sglang", "vllm")},
    ServersSection: {
        "device": ("auto", "cpu", "cuda"),
        "placement": ("dedicated", "colocated"),
        "weight_sync": ("tensor", "distributed", "disk"),
    },
    AdvantageSection: {"estimator": ("group_std", "group_mean", "leave_one_out")},
    FipoConfig: {
        "loss_aggregation": ("token_mean", "sequence_mean", "sequence_sum"),
        "old_log_probs": ("actor", "rollout"),
        "rollout_correction": ("none", "token_truncated", "token_masked", "sequence_masked", "geometric_masked"),
    },
    OptimizerSection: {"schedule": ("constant", "linear", "cosine")},
    MetricsSection: {"wandb": ("off", "online", "offline")},
}


@dataclass(frozen=True)
class _Rule:
    """What a number, or a text, must be on its own."""

    text: str
    holds: Callable[[Any], bool]


MAX_VERIFIER_WORKERS = 1024
"""More processes than the largest machine has cores."""

LONGEST_WAIT_S = 2_000_000
"""poll() counts milliseconds in 32 bits."""
LARGEST_NUMBER = 2**53
"""Beyond it a float, and with it JSON, does not hold every whole number."""
LONGEST_NAME = 255
"""Bytes in a file's name that file systems take."""

_AT_LEAST_0 = _Rule("must be at least 0", lambda value: 0 <= value < math.inf)
_AT_LEAST_1 = _Rule("must be at least 1", lambda value: 1 <= value < math.inf)
_ABOVE_0 = _Rule("must be above 0 and finite", lambda value: 0 < value < math.inf)
_SECONDS = _Rule(
    f"must be above 0 and at most {LONGEST_WAIT_S:,} seconds (23 days), the longest that the system's calls take",
    lambda value: 0 < value <= LONGEST_WAIT_S,
)
_FINITE = _Rule("must be a finite number", math.isfinite)
_DECAY = _Rule("must be at least 0 and below 1", lambda value: 0 <= value < 1)
_SHARE = _Rule("must be above 0 and at most 1; 1 samples from the whole distribution", lambda value: 0 < value <= 1)
_SEED = _Rule("must be between 0 and 2**32 - 1", lambda value: 0 <= value < 2**32)
_NOT_EMPTY = _Rule("must not be empty", lambda value: bool(value.strip()))
_ONE_FOLDER = _Rule(
    "must be one folder's name, since run.output_dir is outputs/NAME by default: not empty, without / and not . or "
    "..; set "
    "run.output_dir to write elsewhere",
    lambda value: bool(value.strip()) and value not in (".", "..") and not {*value} & {"/", "\\", "\0", "\n"},
)
_RULES: dict[type, dict[str, _Rule]] = {
    RunSection: {"name": _ONE_FOLDER, "output_dir": _NOT_EMPTY, "seed": _SEED, "num_sample_prints": _AT_LEAST_0},
    ModelSection: {
        "path": _Rule(
            "must name a folder with a Hugging Face checkpoint, or a model on the hub (owner/name)",
            lambda value: bool(value.strip()),
        ),
        "revision": _NOT_EMPTY,
        "log_prob_chunk_mib": _ABOVE_0,
    },
    DataSourceConfig: {
        "num_prompts": _AT_LEAST_1,
        "seed": _SEED,
        "revision": _NOT_EMPTY,
        "prompt_field": _NOT_EMPTY,
        "answer_field": _NOT_EMPTY,
        "prompt_template": _Rule("must hold {prompt}, where the prompt goes", lambda value: "{prompt}" in value),
        "verifier_weights": _Rule(
            "must be finite and not negative; 0 shows a verifier's score without counting it",
            lambda value: all(0 <= weight < math.inf for weight in value),
        ),
        "weight": _AT_LEAST_1,
    },
    RolloutSection: {
        "num_prompts": _AT_LEAST_1,
        "num_samples_per_prompt": _Rule(
            "must be at least 2: advantages compare the responses to one prompt", lambda value: value >= 2
        ),
        "num_prompts_per_round": _AT_LEAST_1,
        "temperature": _Rule(
            "must be above 0: training samples its responses. evaluation.temperature=0 evaluates greedily",
            lambda value: 0 < value < math.inf,
        ),
        "top_p": _SHARE,
        "max_prompt_tokens": _AT_LEAST_1,
        "max_response_tokens": _AT_LEAST_1,
        "max_batch_size": _AT_LEAST_1,
    },
    ServersSection: {
        "num_per_node": _AT_LEAST_1,
        "tp": _AT_LEAST_1,
        "gpus": _Rule(
            "must be different numbers from 0 on",
            lambda value: min(value, default=0) >= 0 and len({*value}) == len(value),
        ),
        "memory_fraction": _Rule("must be above 0 and below 1", lambda value: 0 < value < 1),
        "max_total_tokens": _AT_LEAST_1,
        "max_concurrent_requests": _AT_LEAST_1,
        "base_port": _Rule("must be between 1024 and 65535", lambda value: 1024 <= value <= 65535),
        "bucket_mib": _AT_LEAST_1,
        "request_timeout_s": _SECONDS,
        "sync_timeout_s": _SECONDS,
        "start_timeout_s": _SECONDS,
        "health_interval_s": _SECONDS,
        "health_timeout_s": _SECONDS,
        "max_restarts": _AT_LEAST_0,
        "canary_sequences": _AT_LEAST_0,
        "canary_tolerance": _ABOVE_0,
    },
    VerifierSection: {
        "num_workers": _Rule(
            f"must be between 1 and {MAX_VERIFIER_WORKERS}: these are processes on each rank",
            lambda value: 1 <= value <= MAX_VERIFIER_WORKERS,
        ),
        "timeout_s": _SECONDS,
    },
    RewardSection: {
        "correct": _FINITE,
        "incorrect": _FINITE,
        "overlong_buffer_tokens": _AT_LEAST_0,
        "overlong_penalty": _AT_LEAST_0,
    },
    SamplingSection: {"max_generation_rounds": _AT_LEAST_1, "max_surplus_age_steps": _AT_LEAST_0},
    FipoConfig: {
        "clip_ratio_low": _Rule("must be above 0 and at most 1", lambda value: 0 < value <= 1),
        "clip_ratio_high": _ABOVE_0,
        "dual_clip": _Rule("must be above 1, or null to turn it off", lambda value: 1 < value < math.inf),
        "half_life_tokens": _ABOVE_0,
        "influence_min": _AT_LEAST_0,
        "influence_max": _Rule("must be above 0; .inf leaves weights unclipped above", lambda value: value > 0),
        "safety_ratio": _ABOVE_0,
        "max_dual_clipped_tokens": _AT_LEAST_0,
        "sequence_sum_tokens": _AT_LEAST_1,
        "kl_coefficient": _AT_LEAST_0,
        "entropy_coefficient": _AT_LEAST_0,
        "rollout_ratio_min": _Rule("must be above 0 and below 1", lambda value: 0 < value < 1),
        "rollout_ratio_max": _Rule("must be above 1 and finite", lambda value: 1 < value < math.inf),
    },
    TrainSection: {"num_steps": _AT_LEAST_1, "num_minibatches": _AT_LEAST_1, "num_epochs": _AT_LEAST_1},
    OptimizerSection: {
        "learning_rate": _AT_LEAST_0,
        "num_warmup_steps": _AT_LEAST_0,
        "min_learning_rate": _AT_LEAST_0,
        "num_decay_steps": _AT_LEAST_1,
        "weight_decay": _AT_LEAST_0,
        "adam_beta1": _DECAY,
        "adam_beta2": _DECAY,
        "adam_epsilon": _ABOVE_0,
        "gradient_clip": _AT_LEAST_0,
    },
    ParallelSection: {
        "tp": _AT_LEAST_1,
        "pp": _AT_LEAST_1,
        "virtual_pp": _Rule("must be at least 2, or null for the plain schedule", lambda value: value >= 2),
        "cp": _AT_LEAST_1,
        "timeout_s": _SECONDS,
    },
    BatchSection: {"max_tokens_per_microbatch": _AT_LEAST_1, "pad_multiple": _AT_LEAST_1},
    EvaluationSection: {
        "every_num_steps": _AT_LEAST_0,
        "num_samples_per_prompt": _AT_LEAST_1,
        "temperature": _AT_LEAST_0,
        "top_p": _SHARE,
        "max_response_tokens": _AT_LEAST_1,
    },
    MetricsSection: {"num_samples_per_step": _AT_LEAST_0, "wandb_project": _NOT_EMPTY},
    CheckpointSection: {
        "every_num_steps": _AT_LEAST_0,
        "keep_last": _AT_LEAST_1,
        "keep_every_num_steps": _AT_LEAST_0,
        "push_to_hub": _Rule(
            "must be a repository on the Hugging Face hub, such as me/my-model, or empty",
            lambda value: not value or bool(REPOSITORY_NAME.fullmatch(value)),
        ),
    },
}
"""A rule for every number (a test holds that none is without) and for texts that are no choices."""


_FREE_TEXTS = ("prompt_template", "system_prompt")
"""Keys whose text goes to the model as it is, line breaks and all."""
_FILE_NAMES = ("name", "output_dir", "path", "snapshot_dir", "python")


def value_problems(section: Any, prefix: str) -> Iterator[str]:
    """Values that break their rule or are none of their choices, in a section and all below it."""
    rules, choices = _RULES.get(type(section), {}), _CHOICES.get(type(section), {})
    types = field_types(type(section))
    for item in fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if is_dataclass(value):
            yield from value_problems(value, f"{key}.")
        elif entry_type(types[item.name]):
            for name, source in value.items():
                if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                    yield f"{key}: the name {name!r} goes into metric names; use letters, digits, _ and - only."
                yield from value_problems(source, f"{key}.{name}.")
        elif item.name in choices and value not in choices[item.name]:
            yield choice_problem(key, value, choices[item.name])
        elif item.name in rules and value is not None and not rules[item.name].holds(value):
            yield f"{key}={value!s:.200}: {rules[item.name].text}."
        elif problem := _limit_problem(item.name, value):
            yield f"{key}={value!r:.200}: {problem}."


def _limit_problem(name: str, value: Any) -> str:
    """What no value of its kind may be, whatever its key; empty where nothing is wrong."""
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        return f"is beyond {LARGEST_NUMBER:,}, more than any run counts. Lower it"
    if not isinstance(value, str) or name in _FREE_TEXTS:
        return ""
    if control := next((character for character in value if unicodedata.category(character) == "Cc"), ""):
        return f"holds the control character {control!r}, which no name or path needs. Remove it"
    if name in _FILE_NAMES and any(len(part.encode()) > LONGEST_NAME for part in value.split("/")):
        return f"file systems take names of at most {LONGEST_NAME} bytes. Shorten it"
    return ""
