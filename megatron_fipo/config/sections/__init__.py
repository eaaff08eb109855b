"""A whole run's configuration as frozen dataclasses, one module for each idea.

The docstring under a field is its entry in the reference of all keys; `declaration.key` says what its value must be.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fipo.config.declaration import key, section
from megatron_fipo.config.presets import ALGORITHMS
from megatron_fipo.config.sections.data import DataSection, DataSourceConfig, VerifierSection
from megatron_fipo.config.sections.model import BatchSection, ModelSection, OptimizerSection, ParallelSection
from megatron_fipo.config.sections.objective import AdvantageSection, FipoConfig, RewardSection, ShadowConfig
from megatron_fipo.config.sections.rollout import RolloutSection, SamplingSection, ServersSection
from megatron_fipo.config.sections.run import (
    CheckpointSection,
    EvaluationSection,
    MetricsSection,
    RunSection,
    TrainSection,
)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    algorithm: str = key("fipo", choices=tuple(ALGORITHMS))
    """Preset that fills in what the file leaves open: fipo, dapo, grpo, grpo_sequence_mean, dr_grpo or rloo."""
    run: RunSection = section(RunSection)
    model: ModelSection = section(ModelSection)
    data: DataSection = section(DataSection)
    rollout: RolloutSection = section(RolloutSection)
    servers: ServersSection = section(ServersSection, changes_results=False)
    verifier: VerifierSection = section(VerifierSection, changes_results=False)
    reward: RewardSection = section(RewardSection)
    sampling: SamplingSection = section(SamplingSection)
    advantages: AdvantageSection = section(AdvantageSection)
    objective: FipoConfig = section(FipoConfig)
    train: TrainSection = section(TrainSection)
    optimizer: OptimizerSection = section(OptimizerSection)
    parallel: ParallelSection = section(ParallelSection, changes_results=False)
    batch: BatchSection = section(BatchSection, changes_results=False)
    evaluation: EvaluationSection = section(EvaluationSection, changes_results=False)
    metrics: MetricsSection = section(MetricsSection, changes_results=False)
    checkpoint: CheckpointSection = section(CheckpointSection, changes_results=False)


__all__ = [
    "AdvantageSection",
    "BatchSection",
    "CheckpointSection",
    "Config",
    "DataSection",
    "DataSourceConfig",
    "EvaluationSection",
    "FipoConfig",
    "MetricsSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "RewardSection",
    "RolloutSection",
    "RunSection",
    "SamplingSection",
    "ServersSection",
    "ShadowConfig",
    "TrainSection",
    "VerifierSection",
]
