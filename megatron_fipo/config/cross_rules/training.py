"""Rules between the keys of training: algorithm, batch, objective, precision, layout."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_fipo.config.cross_rules.shadows import shadow_problems
from megatron_fipo.config.derived import (
    longest_sequence_tokens,
    microbatch_token_multiple,
    pad_multiple,
    required_pad_multiple,
)
from megatron_fipo.config.errors import NOT_SHOWN, Problem, shown_value
from megatron_fipo.config.presets import ALGORITHMS
from megatron_fipo.config.sections import Config

_DEFINING_KEYS = ("objective.future_kl", "objective.loss_aggregation", "advantages.estimator")
"""Keys that define an algorithm, where its preset sets them."""


def training_problems(config: Config) -> Iterator[Problem]:
    """Broken rules of training that do not depend on the layout."""
    yield from _algorithm_problems(config)
    yield from _batch_problems(config)
    yield from objective_problems(config)
    yield from precision_problems(config)


def _algorithm_problems(config: Config) -> Iterator[Problem]:
    preset = ALGORITHMS[config.algorithm]
    for key in _DEFINING_KEYS:
        section, name = key.split(".")
        wanted, value = preset.get(section, {}).get(name), getattr(getattr(config, section), name)
        if wanted is not None and value != wanted:
            others = [
                other
                for other, values in ALGORITHMS.items()
                if name in values.get(section, {}) and values[section][name] == value
            ]
            remedy = f"take algorithm={' or '.join(others)}" if others else "take an algorithm that leaves it open"
            yield Problem(
                key,
                value,
                f"contradicts algorithm={config.algorithm}, which is {key}={shown_value(wanted)}",
                f"Remove the key, or {remedy}",
            )


def _batch_problems(config: Config) -> Iterator[Problem]:
    rollout, reward, train = config.rollout, config.reward, config.train
    if rollout.num_prompts % train.num_minibatches:
        divisors = [str(n) for n in range(1, rollout.num_prompts + 1) if rollout.num_prompts % n == 0]
        yield Problem(
            "train.num_minibatches",
            train.num_minibatches,
            f"must divide rollout.num_prompts={rollout.num_prompts}: a minibatch holds whole groups",
            f"Set it to one of {', '.join(divisors)}",
        )
    if config.sampling.streaming and config.sampling.max_surplus_age_steps:
        yield Problem(
            "sampling.max_surplus_age_steps",
            config.sampling.max_surplus_age_steps,
            "must be 0 with sampling.streaming: a batch that is full in the order of prompts leaves no group over",
            "Set it to 0, or sampling.streaming=false",
        )
    if rollout.max_staleness_steps and not config.sampling.streaming:
        yield Problem(
            "rollout.max_staleness_steps",
            rollout.max_staleness_steps,
            "needs sampling.streaming: a round waits for its last response, and leaves none that could go on",
            "Set sampling.streaming=true, or rollout.max_staleness_steps=0",
        )
    if rollout.overlap and not rollout.max_staleness_steps:
        yield Problem(
            "rollout.overlap",
            rollout.overlap,
            "needs rollout.max_staleness_steps of 1 or more: what is generated while a step trains is a step old",
            "Set rollout.max_staleness_steps=1, or rollout.overlap=false",
        )
    if rollout.overlap and (rollout.engine == "in_process" or config.servers.placement != "dedicated"):
        where = "rollout.engine=in_process" if rollout.engine == "in_process" else "servers.placement=colocated"
        yield Problem(
            "rollout.overlap",
            rollout.overlap,
            f"needs servers with devices of their own: with {where} generation and training take turns",
            "Set rollout.engine to sglang or vllm and servers.placement=dedicated, or rollout.overlap=false",
        )
    if rollout.in_flight != "retract" and not rollout.overlap:
        yield Problem(
            "rollout.in_flight",
            rollout.in_flight,
            "is read only with rollout.overlap: without it nothing is in flight when new weights come",
            "Set rollout.overlap=true, or rollout.in_flight=retract",
        )
    if rollout.too_stale != "drop" and not rollout.max_staleness_steps:
        yield Problem(
            "rollout.too_stale",
            rollout.too_stale,
            "is read only where tokens may be stale, and rollout.max_staleness_steps=0",
            "Remove it, or set rollout.max_staleness_steps to 1 or more",
        )
    if reward.correct <= reward.incorrect:
        yield Problem("reward.correct", reward.correct, f"must be above reward.incorrect={reward.incorrect}")
    if reward.overlong_buffer_tokens >= rollout.max_response_tokens:
        yield Problem(
            "reward.overlong_buffer_tokens",
            reward.overlong_buffer_tokens,
            f"must be below rollout.max_response_tokens={rollout.max_response_tokens}, at whose end the buffer lies",
            "Lower it, or set 0 to turn the penalty off",
        )


def objective_problems(config: Config) -> Iterator[Problem]:
    objective = config.objective
    if objective.future_kl and objective.old_log_probs == "rollout":
        yield Problem(
            "objective.old_log_probs",
            "rollout",
            "rollout log-probs as π_old are refused with future_kl=true, because Future-KL sums up the engine's "
            "numerical differences over many tokens",
            "Set objective.old_log_probs=actor",
        )
    if objective.future_kl and objective.dual_clip is None:
        yield Problem(
            "objective.dual_clip",
            None,
            "Future-KL leaves out tokens with a ratio above dual_clip and needs a number",
            "Set objective.dual_clip=10",
        )
    if objective.rollout_correction != "none" and objective.old_log_probs == "rollout":
        yield Problem(
            "objective.rollout_correction",
            objective.rollout_correction,
            "with objective.old_log_probs=rollout the old policy is the engine's, and there is nothing to correct",
            "Set objective.old_log_probs=actor, or rollout_correction=none",
        )
    if objective.influence_min > objective.influence_max:
        yield Problem(
            "objective.influence_min",
            objective.influence_min,
            f"must not be above objective.influence_max={objective.influence_max}",
        )
    if objective.loss_aggregation == "sequence_sum" and objective.sequence_sum_tokens is None:
        yield Problem(
            "objective.sequence_sum_tokens",
            None,
            "loss_aggregation=sequence_sum divides by a constant length",
            f"Set it, usually to rollout.max_response_tokens={config.rollout.max_response_tokens}",
        )
    yield from shadow_problems(objective)


def precision_problems(config: Config) -> Iterator[Problem]:
    """What FP8 demands of the model's other keys."""
    model = config.model
    if model.fp8 != "none" and model.dtype != "bfloat16":
        yield Problem(
            "model.fp8",
            model.fp8,
            f"FP8 products are taken of bfloat16 numbers, and model.dtype={model.dtype}",
            "Set model.dtype=bfloat16, or model.fp8=none",
        )
    if model.fp8 != "none" and model.transformer_engine == "off":
        yield Problem(
            "model.transformer_engine",
            "off",
            f"model.fp8={model.fp8} is computed by Transformer Engine alone",
            "Set model.transformer_engine=auto, or model.fp8=none",
        )


def layout_problems(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Processes, padding and the token budget; `model_layout` has the rules that depend on the model."""
    parallel, rollout, batch = config.parallel, config.rollout, config.batch
    if parallel.sequence_parallel and parallel.tp == 1:
        yield Problem("parallel.sequence_parallel", True, "needs parallel.tp above 1", "Set it to false")
    if parallel.virtual_pp is not None and parallel.pp == 1:
        yield Problem("parallel.virtual_pp", parallel.virtual_pp, "needs parallel.pp above 1", "Set it to null")
    model_parallel = parallel.tp * parallel.pp * parallel.cp
    if world_size is not None and world_size < 1:
        yield Problem(
            "parallel", NOT_SHOWN, f"{world_size} processes (the world size) run nothing: it must be at least 1"
        )
    elif world_size is not None and world_size % model_parallel:
        yield Problem(
            "parallel",
            NOT_SHOWN,
            f"{world_size} processes cannot hold whole copies of the model: tp={parallel.tp} x pp={parallel.pp} x "
            f"cp={parallel.cp} takes {model_parallel} each",
            f"Start a multiple of {model_parallel}, or lower parallel.*",
        )
    needed = required_pad_multiple(config)
    if pad_multiple(config) % needed:
        yield Problem(
            "batch.pad_multiple",
            batch.pad_multiple,
            f"cp={parallel.cp}, tp={parallel.tp} and sequence_parallel={shown_value(parallel.sequence_parallel)} need "
            f"sequences padded to a multiple of {needed}",
            f"Set it to {needed}, a multiple of that, or null",
        )
    whole = microbatch_token_multiple(config)
    padded = -(-longest_sequence_tokens(config) // whole) * whole
    if padded > batch.max_tokens_per_microbatch:
        yield Problem(
            "batch.max_tokens_per_microbatch",
            batch.max_tokens_per_microbatch,
            f"one sequence of rollout.max_prompt_tokens={rollout.max_prompt_tokens} + rollout.max_response_tokens="
            f"{rollout.max_response_tokens} takes {padded} tokens with padding",
            f"Raise it to at least {padded}",
        )
