"""Rules between the keys of a run's course: how its learning rate falls, when it ends, what it keeps and pushes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_fipo.config.derived import evaluation_scores, num_decay_steps
from megatron_fipo.config.errors import Problem
from megatron_fipo.config.sections import Config
from megatron_fipo.config.stop_rule import StopRule
from megatron_fipo.system.nearest_name import nearest_name


def milestone_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the schedule, with `train.stop_when`, and with what is kept and pushed."""
    yield from _schedule_problems(config)
    yield from _period_problems(config)
    if config.checkpoint.keep_best:
        yield from _score_problems(config, "checkpoint.keep_best", config.checkpoint.keep_best)
    yield from _stop_problems(config)
    yield from _push_problems(config)


def _schedule_problems(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    if optimizer.schedule == "constant":
        for name, is_set in (
            ("num_decay_steps", optimizer.num_decay_steps is not None),
            ("min_learning_rate", bool(optimizer.min_learning_rate)),
        ):
            if is_set:
                yield Problem(
                    f"optimizer.{name}",
                    getattr(optimizer, name),
                    "optimizer.schedule=constant never falls",
                    f"Set optimizer.schedule to linear or cosine, or leave {name} out",
                )
        return
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield Problem(
            "optimizer.min_learning_rate",
            optimizer.min_learning_rate,
            f"must not be above optimizer.learning_rate={optimizer.learning_rate}",
        )
    if num_decay_steps(config) <= optimizer.num_warmup_steps:
        yield Problem(
            "optimizer.num_warmup_steps",
            optimizer.num_warmup_steps,
            f"must be below the steps at whose end the rate has fallen, {num_decay_steps(config)} "
            "(optimizer.num_decay_steps, by default train.num_steps)",
            "Shorten the warm-up",
        )


def _period_problems(config: Config) -> Iterator[Problem]:
    """Periods that would never come."""
    checkpoint, every = config.checkpoint, config.checkpoint.every_num_steps
    if config.evaluation.every_num_steps and not config.data.evaluation:
        yield Problem(
            "evaluation.every_num_steps",
            config.evaluation.every_num_steps,
            "data.evaluation is empty, and there is nothing to evaluate on",
            "Add a source there, or set it to 0",
        )
    if checkpoint.keep_every_num_steps and (not every or checkpoint.keep_every_num_steps % every):
        yield Problem(
            "checkpoint.keep_every_num_steps",
            checkpoint.keep_every_num_steps,
            f"must be a multiple of checkpoint.every_num_steps={every}, the steps at which there is a checkpoint to "
            "keep",
            "Change one of them",
        )
    if checkpoint.export_with_checkpoints and not every:
        yield Problem(
            "checkpoint.export_with_checkpoints",
            True,
            "checkpoint.every_num_steps=0 makes no periodic checkpoints",
            "Set that to a number of steps, or this to false",
        )


def _stop_problems(config: Config) -> Iterator[Problem]:
    if not config.train.stop_when:
        return
    try:
        metric = StopRule.parse(config.train.stop_when).metric
    except ValueError as error:
        yield Problem("train.stop_when", config.train.stop_when, str(error))
        return
    if metric.startswith("evaluation/"):
        yield from _score_problems(config, "train.stop_when", metric)


def _score_problems(config: Config, key: str, name: str) -> Iterator[Problem]:
    known = evaluation_scores(config)
    if name in known:
        return
    if not known:
        yield Problem(key, name, "there is no data.evaluation to score", f"Add a source there, or leave {key} out")
        return
    nearest = nearest_name(name, known)
    yield Problem(
        key,
        name,
        f"the scores of this run's evaluations are {', '.join(known)}",
        f"Did you mean {nearest}?" if nearest else "",
    )


def _push_problems(config: Config) -> Iterator[Problem]:
    section = config.checkpoint
    if section.push_to_hub and not section.export_huggingface:
        yield Problem(
            "checkpoint.push_to_hub",
            section.push_to_hub,
            "pushes the exported model, and checkpoint.export_huggingface=false exports none",
            "Set that to true, or push_to_hub to empty",
        )
