"""Numbers that follow from several keys; each is computed here only."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from megatron_fipo.config.sections import Config, FipoConfig, ModelSection
from megatron_fipo.config.sections.model import FP8_ALIGNMENT

_MARGIN = 2.0
"""Standard deviations by which more groups are begun than are expected to be needed, and fewer ahead than may be."""
_TILES = (128, 16)
"""Rows that matrix products on a GPU take at a time; a part of one costs as much as the whole."""

RecomputedPart = Literal["nothing", "core_attn", "mlp", "layer"]


def updates_per_step(config: Config) -> int:
    """Optimizer steps that one batch of rollouts gets."""
    return config.train.num_minibatches * config.train.num_epochs


def shadow_objectives(objective: FipoConfig) -> dict[str, FipoConfig]:
    """Each shadow objective by its name, as an objective of its own: with Future-KL, and whole.

    What its settings leave open is the objective's.
    """
    return {
        name: replace(
            objective,
            future_kl=True,
            shadow={},
            **{key: value for key, value in vars(settings).items() if value is not None},
        )
        for name, settings in objective.shadow.items()
    }


def num_groups_to_begin(num_missing: int, share: float) -> int:
    """Groups to begin with sampling.streaming so that, but for bad luck, enough of them are kept.

    The number of groups until m are kept has mean m / p and standard deviation sqrt(m (1 - p)) / p. Runs ask here, and
    so does the plan of their work.

    Args:
        num_missing: m, groups that are missing.
        share: p, the share that is kept, in (0, 1].
    """
    m, p = max(num_missing, 0), min(share, 1.0)
    return math.ceil((m + _MARGIN * math.sqrt(m * (1.0 - p))) / p)


def num_groups_ahead(num_groups: int, share: float, num_steps: int) -> int:
    """Groups that may be begun ahead so that, but for bad luck, no more of them are kept than the coming steps take.

    With n = (s + 1) m, the number of groups until n are kept has mean n / p and standard deviation sqrt(n (1 - p)) / p;
    what is begun beyond that waits longer than s steps. Runs ask here, and so does the simulation of schedules. A step
    needs what `num_groups_to_begin` says all the same.

    Args:
        num_groups: m, groups that a step trains on.
        share: p, the share that is kept, in (0, 1].
        num_steps: s, steps that a group may wait for.

    Returns:
        The number, counted from the first group that no step has used; at least 0.
    """
    n, p = (num_steps + 1) * num_groups, min(share, 1.0)
    return max(math.floor((n - _MARGIN * math.sqrt(n * (1.0 - p))) / p), 0)


def most_prompts(config: Config) -> int:
    """Prompts after which a step whose batch is still not full stops the run, where it streams."""
    rollout = config.rollout
    return config.sampling.max_generation_rounds * (rollout.num_prompts_per_round or rollout.num_prompts)


def num_decay_steps(config: Config) -> int:
    """Steps after which the learning rate has fallen; `train.num_steps` where none is given."""
    given = config.optimizer.num_decay_steps
    return config.train.num_steps if given is None else given


def longest_sequence_tokens(config: Config) -> int:
    """Tokens of the longest prompt with the longest response, in training."""
    return config.rollout.max_prompt_tokens + config.rollout.max_response_tokens


def required_pad_multiple(config: Config) -> int:
    """Least multiple to which every sequence of a microbatch must be padded.

    Context parallelism cuts a sequence into 2*cp chunks; sequence parallelism then cuts the tokens of one
    context-parallel rank, T / cp, into tp parts.
    """
    parallel = config.parallel
    zigzag = 2 * parallel.cp if parallel.cp > 1 else 1
    return math.lcm(zigzag, parallel.cp * parallel.tp) if parallel.sequence_parallel else zigzag


def pad_multiple(config: Config) -> int:
    """Multiple to which sequences are padded: the configured one, or the least that the layout allows."""
    return config.batch.pad_multiple or required_pad_multiple(config)


def microbatch_token_multiple(config: Config) -> int:
    """Multiple to which a microbatch's tokens must add up: FP8 products want whole blocks of rows on every rank."""
    parallel = config.parallel
    shards = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    return math.lcm(pad_multiple(config), shards * FP8_ALIGNMENT[config.model.fp8])


def log_prob_chunk_tokens(chunk_mib: float, rows: int) -> int:
    """Tokens that go through the output layer together.

    As many as have float32 logits that fit into `chunk_mib`, rounded down to a multiple of 128, or of 16 below 128; at
    least 1.

    Args:
        chunk_mib: model.log_prob_chunk_mib.
        rows: rows of the output layer on one tensor-parallel rank, padding included, so that all ranks agree.
    """
    fitting = int(chunk_mib * 2**20 / (4 * rows))
    return next((fitting // tile * tile for tile in _TILES if fitting >= tile), max(fitting, 1))


def recomputed_part(model: ModelSection, *, on_gpu: bool) -> RecomputedPart:
    """The part of each layer that backward computes again; core_attn and mlp are Megatron's names.

    The actor and the plan of its memory and time both ask here. On GPUs in bfloat16 attention is fused, by Transformer
    Engine or by torch: it keeps its output and one number a row, no scores. Recomputing it would cost time and free
    nothing, so "selective" stands for the MLP there, whose 3 * ffn_hidden_size / tp numbers a token are the largest
    part of what a layer keeps.
    """
    if model.recompute == "none":
        return "nothing"
    if model.recompute == "full":
        return "layer"
    return "mlp" if on_gpu and model.dtype == "bfloat16" else "core_attn"


def evaluation_scores(config: Config) -> list[str]:
    """Names of the scores that evaluations of this run give, higher being better."""
    k = config.evaluation.num_samples_per_prompt
    return [
        f"evaluation/{source}/{score}@{k}" for source in config.data.evaluation for score in ("avg", "cons", "pass")
    ]
