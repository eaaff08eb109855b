"""The optimizer of a trained model and the schedule of its learning rate, as the configuration describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_fipo.config import Config, OptimizerSection, num_decay_steps


def build_optimizer(config: Config, chunks: Sequence[nn.Module]) -> Any:
    """Megatron's Adam over the chunks' parameters. Collective over all ranks."""
    section = config.optimizer
    bf16 = config.model.dtype == "bfloat16"
    options = OptimizerConfig(
        optimizer="adam",
        lr=section.learning_rate,
        min_lr=_least_learning_rate(section),
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_epsilon,
        clip_grad=section.gradient_clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=section.distributed,
    )
    overrides = get_standard_config_overrides(options)
    return get_megatron_optimizer(options, list(chunks), overrides, use_gloo_process_groups=False)


def single_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers in a chained optimizer, or the optimizer itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


class LearningRate:
    """The learning rate and weight decay of each step, set in an optimizer."""

    def __init__(self, config: Config, optimizer: Any) -> None:
        section = config.optimizer
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=section.learning_rate,
            min_lr=_least_learning_rate(section),
            lr_warmup_steps=section.num_warmup_steps,
            # At the end of its decay Megatron's rate is the least one. That is set for the step after the last, so
            # that no step is made at a rate of 0: step s asks for the rate at s + 1.
            lr_decay_steps=max(num_decay_steps(config), section.num_warmup_steps) + 1,
            lr_decay_style=section.schedule,
            start_wd=section.weight_decay,
            end_wd=section.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )

    def set_for(self, step: int) -> None:
        """Set learning rate and weight decay of a training step, counted from 0."""
        self._scheduler.num_steps = step + 1
        self._scheduler.step(0)


def _least_learning_rate(section: OptimizerSection) -> float:
    return section.learning_rate if section.schedule == "constant" else section.min_learning_rate
