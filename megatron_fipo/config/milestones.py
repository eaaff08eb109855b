"""How a run's learning rate falls, when it ends, and what it keeps on the way: rules between these keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from megatron_fipo.config.schema import Config
from megatron_fipo.config.stop_rule import StopRule


def num_decay_steps(config: Config) -> int:
    """Steps after which the learning rate has fallen; `train.num_steps` where none is given."""
    given = config.optimizer.num_decay_steps
    return config.train.num_steps if given is None else given


def evaluation_scores(config: Config) -> list[str]:
    """Names of the scores that evaluations of this run give, higher being better."""
    k = config.evaluation.num_samples_per_prompt
    return [
        f"evaluation/{source}/{score}@{k}" for source in config.data.evaluation for score in ("avg", "cons", "pass")
    ]


def milestone_problems(config: Config) -> Iterator[str]:
    """What is wrong with the schedule, `train.stop_when` or `checkpoint.keep_best`, each a sentence with a remedy."""
    optimizer = config.optimizer
    if optimizer.schedule == "constant":
        if optimizer.num_decay_steps is not None:
            yield (
                f"optimizer.num_decay_steps={optimizer.num_decay_steps}: optimizer.schedule=constant never falls. Set "
                "optimizer.schedule to linear or cosine, or leave num_decay_steps out."
            )
        if optimizer.min_learning_rate:
            yield (
                f"optimizer.min_learning_rate={optimizer.min_learning_rate}: optimizer.schedule=constant never falls. "
                "Set optimizer.schedule to linear or cosine, or leave min_learning_rate out."
            )
    else:
        if optimizer.min_learning_rate > optimizer.learning_rate:
            yield (
                f"optimizer.min_learning_rate={optimizer.min_learning_rate}: must not be above "
                f"optimizer.learning_rate={optimizer.learning_rate}."
            )
        if num_decay_steps(config) <= optimizer.num_warmup_steps:
            yield (
                f"optimizer.num_warmup_steps={optimizer.num_warmup_steps}: must be below the steps at whose end the "
                f"rate has fallen, {num_decay_steps(config)} (optimizer.num_decay_steps, by default train.num_steps). "
                "Shorten the warm-up."
            )
    yield from _period_problems(config)
    if config.checkpoint.keep_best:
        yield from _score_problems(config, "checkpoint.keep_best", config.checkpoint.keep_best)
    if config.train.stop_when:
        try:
            metric = StopRule.parse(config.train.stop_when).metric
        except ValueError as error:
            yield f"train.stop_when={config.train.stop_when}: {error}."
            return
        if metric.startswith("evaluation/"):
            yield from _score_problems(config, "train.stop_when", metric)


def _period_problems(config: Config) -> Iterator[str]:
    """Periods that would never come."""
    checkpoint, every = config.checkpoint, config.checkpoint.every_num_steps
    if config.evaluation.every_num_steps and not config.data.evaluation:
        yield (
            f"evaluation.every_num_steps={config.evaluation.every_num_steps}: data.evaluation is empty, and there is "
            "nothing to evaluate on. Add a source there, or set it to 0."
        )
    if checkpoint.keep_every_num_steps and (not every or checkpoint.keep_every_num_steps % every):
        yield (
            f"checkpoint.keep_every_num_steps={checkpoint.keep_every_num_steps}: must be a multiple of "
            f"checkpoint.every_num_steps={every}, the steps at which there is a checkpoint to keep. Change one of them."
        )
    if checkpoint.export_with_checkpoints and not every:
        yield (
            "checkpoint.export_with_checkpoints=true: checkpoint.every_num_steps=0 makes no periodic checkpoints. Set "
            "that to a number of steps, or this to false."
        )


def _score_problems(config: Config, key: str, name: str) -> Iterator[str]:
    known = evaluation_scores(config)
    if name in known:
        return
    if not known:
        yield f"{key}={name}: there is no data.evaluation to score. Add a source there, or leave {key} out."
        return
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    yield f"{key}={name}: the scores of this run's evaluations are {', '.join(known)}.{hint}"
