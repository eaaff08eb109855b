"""The run's configuration: frozen dataclasses, YAML files, dotted overrides, validation.

One file describes one run from a laptop to a cluster. Imports neither torch nor Megatron, so a configuration can be
checked on any machine in a second.

    config = load_config("examples/quickstart/fipo.yaml", ["train.num_steps=5", "parallel.cp=1"])

Order of precedence, lowest first: the dataclass defaults, the algorithm's preset (`ALGORITHMS`), the YAML file, the
overrides. Nothing rewrites a value that the user wrote.
"""

from megatron_fipo.config.cross_rules.servers import server_device_problems
from megatron_fipo.config.derived import (
    RecomputedPart,
    log_prob_chunk_tokens,
    longest_sequence_tokens,
    microbatch_token_multiple,
    most_prompts,
    num_decay_steps,
    num_groups_ahead,
    num_groups_to_begin,
    pad_multiple,
    recomputed_part,
    required_pad_multiple,
    shadow_objectives,
    updates_per_step,
)
from megatron_fipo.config.environment import (
    looks_secret,
    recorded_values,
    values_for_comparison,
    without_secrets,
    written_values,
)
from megatron_fipo.config.errors import ConfigError
from megatron_fipo.config.input_paths import (
    is_hub_name,
    places_of_relative_paths,
    require_inputs,
    with_absolute_paths,
)
from megatron_fipo.config.loading import load_config, resolved_yaml, save_resolved
from megatron_fipo.config.model_layout import read_model_config, validate_model_layout
from megatron_fipo.config.presets import ALGORITHMS
from megatron_fipo.config.resume import ResumeCheck, check_resume, numbers_fingerprint
from megatron_fipo.config.sections import (
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
    ShadowConfig,
    TrainSection,
    VerifierSection,
)
from megatron_fipo.config.sections.data import FILE_KINDS, PROCEDURAL_KINDS
from megatron_fipo.config.sections.model import FP8_ALIGNMENT
from megatron_fipo.config.stop_rule import StopRule
from megatron_fipo.config.text_files import parse_json, read_text
from megatron_fipo.config.text_rules import REPOSITORY_NAME
from megatron_fipo.config.validation import check_objective, require_source, validate
from megatron_fipo.config.values import choices_of
from megatron_fipo.config.verifiers import require_verifier_name, verifier_weights
from megatron_fipo.config.warnings import warnings_for

__all__ = [
    "ALGORITHMS",
    "FILE_KINDS",
    "FP8_ALIGNMENT",
    "PROCEDURAL_KINDS",
    "REPOSITORY_NAME",
    "AdvantageSection",
    "BatchSection",
    "CheckpointSection",
    "Config",
    "ConfigError",
    "DataSection",
    "DataSourceConfig",
    "EvaluationSection",
    "FipoConfig",
    "MetricsSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "RecomputedPart",
    "ResumeCheck",
    "RewardSection",
    "RolloutSection",
    "RunSection",
    "SamplingSection",
    "ServersSection",
    "ShadowConfig",
    "StopRule",
    "TrainSection",
    "VerifierSection",
    "check_objective",
    "check_resume",
    "choices_of",
    "is_hub_name",
    "load_config",
    "log_prob_chunk_tokens",
    "longest_sequence_tokens",
    "looks_secret",
    "microbatch_token_multiple",
    "most_prompts",
    "num_decay_steps",
    "num_groups_ahead",
    "num_groups_to_begin",
    "numbers_fingerprint",
    "pad_multiple",
    "parse_json",
    "places_of_relative_paths",
    "read_model_config",
    "read_text",
    "recomputed_part",
    "recorded_values",
    "require_inputs",
    "require_source",
    "require_verifier_name",
    "required_pad_multiple",
    "resolved_yaml",
    "save_resolved",
    "server_device_problems",
    "shadow_objectives",
    "updates_per_step",
    "validate",
    "validate_model_layout",
    "values_for_comparison",
    "verifier_weights",
    "warnings_for",
    "with_absolute_paths",
    "without_secrets",
    "written_values",
]
