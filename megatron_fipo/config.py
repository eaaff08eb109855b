"""The run's configuration: frozen dataclasses, YAML files, dotted overrides, validation.

One file describes one run from a laptop to a cluster. Imports neither torch nor Megatron, so a configuration can be
checked on any machine in a second.

    config = load_config("examples/quickstart/fipo.yaml", ["train.num_steps=5", "parallel.cp=1"])

Order of precedence, lowest first: the dataclass defaults, the algorithm's preset (`ALGORITHMS`), the YAML file, the
overrides. Nothing rewrites a value that the user wrote.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Dict, Optional, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

# OmegaConf resolves these annotations at run time, hence Optional and Dict rather than the newer spellings.


@dataclass(frozen=True)
class RunSection:
    """Name, place and seed of the run."""

    name: str = "fipo"
    """Name shown in the console and in the trackers."""
    output_dir: str = "outputs/${run.name}"
    """Folder of everything the run writes; ${run.name} stands for the name above."""
    seed: int = 0
    """Seed of data order, sampling and dropout-free initialisation; results depend on it, never on the rank count."""
    num_sample_prints: int = 3
    """Sample responses shown before and after training."""


@dataclass(frozen=True)
class ModelSection:
    """Which model is trained and in which precision."""

    path: str = ""
    """Folder with a Hugging Face checkpoint (config, safetensors, tokenizer); relative to the current directory."""
    dtype: str = "float32"
    """Arithmetic of the actor's forward and backward: float32 or bfloat16 (bfloat16 keeps float32 main weights)."""
    recompute: str = "none"
    """Activation recompute: none, selective (core attention only) or full (every layer)."""
    log_prob_chunk_tokens: int = 1024
    """Tokens per chunk of the output layer when log-probs are computed; bounds the memory that logits take."""


@dataclass(frozen=True)
class DataSourceConfig:
    """One source of prompts."""

    kind: str = ""
    """jsonl, parquet, chain_arithmetic or reasoning_gym."""
    path: str = ""
    """File of a jsonl or parquet source; relative to the current directory."""
    task: str = ""
    """Name of the reasoning-gym data set."""
    params: Dict[str, Any] = field(default_factory=dict)
    """Parameters of a procedural source, passed on by name."""
    num_prompts: Optional[int] = None
    """Use only the first so many prompts; required for a procedural source used for evaluation."""
    seed: Optional[int] = None
    """Seed of a procedural source; None takes run.seed. Give held-out data a fixed seed of its own."""
    prompt_field: str = "prompt"
    """Column that holds the prompt: a string, or a list of chat messages."""
    answer_field: str = "answer"
    """Column that holds the reference answer; a dot descends into a struct (reward_model.ground_truth)."""
    prompt_template: str = "{prompt}"
    """Text around the prompt; {prompt} is replaced."""
    system_prompt: str = ""
    """System message in front of the chat; needs chat_template=true."""
    chat_template: bool = False
    """Format the prompt with the tokenizer's chat template; false feeds the text as it is."""
    verifier: str = ""
    """Judge of its responses: chain_arithmetic, reasoning_gym, math, exact, or your own as package.module:function."""
    weight: int = 1
    """Prompts taken from this source in each round over the sources."""


@dataclass(frozen=True)
class DataSection:
    """Prompts to train on and to evaluate on."""

    train: Dict[str, DataSourceConfig] = field(default_factory=dict)
    """Training sources by name."""
    evaluation: Dict[str, DataSourceConfig] = field(default_factory=dict)
    """Evaluation sources by name; each must be finite."""
    overlong_prompts: str = "error"
    """What happens to a prompt longer than rollout.max_prompt_tokens: error or skip (skips are counted and logged)."""


@dataclass(frozen=True)
class RolloutSection:
    """How responses are generated."""

    engine: str = "in_process"
    """in_process: transformers in the trainer's own processes, fed with the actor's weights after every step."""
    num_prompts: int = 16
    """Groups that one step trains on."""
    num_samples_per_prompt: int = 16
    """Responses to each prompt: the size of a group."""
    num_prompts_per_round: Optional[int] = None
    """Prompts of each round of generation; null takes num_prompts first, then twice what the batch still lacks."""
    temperature: float = 1.0
    """Sampling temperature; training log-probs are taken at the same temperature."""
    top_p: float = 1.0
    """Nucleus sampling threshold; 1 samples from the whole distribution."""
    max_prompt_tokens: int = 1024
    """Longest prompt."""
    max_response_tokens: int = 1024
    """Longest response."""
    max_batch_size: int = 128
    """Sequences that one process decodes at a time (in-process engine)."""


@dataclass(frozen=True)
class VerifierSection:
    """The pool of processes that judges responses."""

    num_workers: int = 1
    """Worker processes on each rank."""
    timeout_s: float = 10.0
    """Longest time for one response; one that takes longer is killed, reported, and its group dropped."""


@dataclass(frozen=True)
class RewardSection:
    """From verdicts to rewards."""

    correct: float = 1.0
    """Reward of an accepted answer."""
    incorrect: float = -1.0
    """Reward of any other."""
    overlong_buffer_tokens: int = 0
    """Length at the end of max_response_tokens over which the overlong penalty grows; 0 turns it off."""
    overlong_penalty: float = 1.0
    """Largest overlong penalty."""
    mask_truncated: bool = False
    """Leave responses cut at max_response_tokens out of the loss."""


@dataclass(frozen=True)
class SamplingSection:
    """Dynamic sampling (DAPO): only groups with mixed rewards carry a signal."""

    dynamic: bool = True
    """Drop groups whose rewards are all equal and go on sampling until the batch is full."""
    max_generation_rounds: int = 10
    """Rounds of generation after which a batch that is still not full stops the run."""
    max_surplus_age_steps: int = 0
    """Steps that groups beyond the batch are kept for; 0 discards them, as the paper does."""
    allow_short_batch: bool = False
    """Train on the groups there are when the rounds are used up, instead of stopping."""


@dataclass(frozen=True)
class AdvantageSection:
    """Group-relative advantages."""

    estimator: str = "group_std"
    """group_std: (R - mean)/(std + 1e-6); group_mean: R - mean (Dr. GRPO); leave_one_out (RLOO)."""


@dataclass(frozen=True)
class FipoConfig:
    """The objective. FIPO and the methods it is compared with are settings of `rl.objective.policy_loss`."""

    clip_ratio_low: float = 0.2
    """The ratio is clipped below at 1 - clip_ratio_low."""
    clip_ratio_high: float = 0.28
    """The ratio is clipped above at 1 + clip_ratio_high."""
    dual_clip: Optional[float] = 10.0
    """Where the weighted advantage is negative, the loss is at most -f*A*dual_clip; null: none (not with future_kl)."""
    future_kl: bool = True
    """Weight advantages by Future-KL and filter sequences (FIPO); false leaves every weight at 1."""
    half_life_tokens: float = 32.0
    """Distance in tokens at which a later token's influence has halved."""
    influence_min: float = 1.0
    """Lower end of the influence weights."""
    influence_max: float = 1.2
    """Upper end of the influence weights."""
    safety_ratio: float = 10.0
    """Where the advantage is negative and the ratio above this, the weight is clipped to [0.8, 1.0]."""
    max_dual_clipped_tokens: int = 1
    """A response with more tokens of negative advantage and ratio above dual_clip leaves the loss altogether."""
    filter_extreme_ratios: bool = True
    """Tokens with a ratio above dual_clip stay out of Future-KL; false is the paper's ablation."""
    loss_aggregation: str = "token_mean"
    """token_mean; sequence_mean: mean of responses' token means (GRPO); sequence_sum: by a fixed length (Dr. GRPO)."""
    sequence_sum_tokens: Optional[int] = None
    """The constant length of sequence_sum; required there, usually rollout.max_response_tokens."""
    kl_coefficient: float = 0.0
    """Weight of the KL penalty against the frozen starting policy (k3 estimator); 0 builds no reference."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    old_log_probs: str = "actor"
    """Old policy's log-probs: actor (recomputed before the step's first update) or rollout (refused with future_kl)."""


@dataclass(frozen=True)
class TrainSection:
    """Steps and updates."""

    num_steps: int = 100
    """Steps to run; one step is one batch of rollouts."""
    num_minibatches: int = 4
    """Minibatches that a step's groups are cut into, by prompt; each is one update."""
    num_epochs: int = 1
    """Times that each step's minibatches are gone through."""
    resume: bool = True
    """Go on from the newest checkpoint in the run's folder where there is one."""


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW with a linear warm-up, then constant."""

    learning_rate: float = 1e-6
    """Learning rate after the warm-up."""
    num_warmup_steps: int = 10
    """Steps (not updates) over which the rate rises linearly from 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases are exempt."""
    adam_beta1: float = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: float = 0.999
    """Decay of the squared gradient's running mean."""
    adam_epsilon: float = 1e-8
    """Added to the denominator."""
    gradient_clip: float = 1.0
    """Largest gradient norm over all parameters; 0 turns clipping off."""
    distributed: bool = True
    """Shard the optimizer's state over data- and context-parallel ranks."""


@dataclass(frozen=True)
class ParallelSection:
    """Megatron's layout. What the product leaves of the world size is data parallel."""

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size."""
    virtual_pp: Optional[int] = None
    """Model chunks on each pipeline stage (interleaved schedule); needs pp > 1."""
    cp: int = 1
    """Context-parallel size: each sequence is cut into 2*cp chunks, two on each rank."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence; needs tp > 1."""
    timeout_s: float = 1800.0
    """Longest wait inside one collective."""


@dataclass(frozen=True)
class BatchSection:
    """Packing."""

    max_tokens_per_microbatch: int = 16384
    """Token budget of a microbatch over all its context-parallel ranks, padding included."""
    pad_multiple: Optional[int] = None
    """Sequences are padded to a multiple of this; null takes the least that the layout needs."""


@dataclass(frozen=True)
class EvaluationSection:
    """Evaluation during the run."""

    every_num_steps: int = 0
    """Evaluate after every so many steps; 0 only before and after training."""
    num_samples_per_prompt: int = 1
    """Responses to each evaluation prompt: k of avg@k, cons@k, pass@k."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 0.7
    """Nucleus sampling threshold."""
    max_response_tokens: Optional[int] = None
    """Longest response; null takes rollout.max_response_tokens."""


@dataclass(frozen=True)
class MetricsSection:
    """Where metrics go."""

    console: bool = True
    """One line a step, with progress bars for rollout and updates."""
    jsonl: bool = True
    """metrics.jsonl in the run's folder."""
    tensorboard: bool = True
    """TensorBoard events in the run's folder."""
    wandb: str = "off"
    """Weights & Biases: off, online or offline."""
    wandb_project: str = "megatron_fipo"
    """Project on Weights & Biases."""


@dataclass(frozen=True)
class CheckpointSection:
    """What is saved, and when."""

    every_num_steps: int = 0
    """Save after every so many steps; 0 only at the end and when the run is interrupted."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted."""
    export_huggingface: bool = True
    """Write the trained model as a Hugging Face folder at the end."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    algorithm: str = "fipo"
    """Preset that fills in what the file leaves open: fipo, dapo, grpo, grpo_sequence_mean, dr_grpo or rloo."""
    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    verifier: VerifierSection = field(default_factory=VerifierSection)
    reward: RewardSection = field(default_factory=RewardSection)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    advantages: AdvantageSection = field(default_factory=AdvantageSection)
    objective: FipoConfig = field(default_factory=FipoConfig)
    train: TrainSection = field(default_factory=TrainSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    batch: BatchSection = field(default_factory=BatchSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)


ALGORITHMS: dict[str, dict[str, Any]] = {
    "fipo": {"objective": {"future_kl": True}},
    "dapo": {"objective": {"future_kl": False}},
    "grpo": {
        "objective": {"future_kl": False, "clip_ratio_high": 0.2, "dual_clip": None},
        "sampling": {"dynamic": False},
    },
    "grpo_sequence_mean": {
        "objective": {
            "future_kl": False,
            "clip_ratio_high": 0.2,
            "dual_clip": None,
            "loss_aggregation": "sequence_mean",
        },
        "sampling": {"dynamic": False},
    },
    "dr_grpo": {
        "objective": {
            "future_kl": False,
            "clip_ratio_high": 0.2,
            "dual_clip": None,
            "loss_aggregation": "sequence_sum",
        },
        "advantages": {"estimator": "group_mean"},
        "sampling": {"dynamic": False},
    },
    "rloo": {
        "objective": {"future_kl": False},
        "advantages": {"estimator": "leave_one_out"},
        "sampling": {"dynamic": False},
    },
}
"""What each algorithm sets; a key the user sets wins, except where `validate` names a contradiction."""


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


class ConfigError(ValueError):
    """A configuration that cannot run. The message names key, value, rule and remedy, one line for each problem."""

    @classmethod
    def of(cls, problems: Sequence[str], where: str = "the configuration") -> ConfigError:
        """One problem stands alone, several make a list."""
        if len(problems) == 1:
            return cls(problems[0])
        return cls("\n  - ".join([f"{len(problems)} problems in {where}:", *problems]))


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration.

    Precedence, lowest first: dataclass defaults, the algorithm's preset, the file, the overrides in their order.
    `${section.key}` stands for another value and `${oc.env:NAME}` for an environment variable. Paths in the
    configuration are relative to the current directory. Rules between values are `validate`'s business.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: `section.key=value`, the value in YAML's syntax: `train.num_steps=5`, `parallel.virtual_pp=null`.

    Raises:
        ConfigError: an unknown key, algorithm or malformed override, or a value of the wrong type, with its place.
    """
    layers = [] if path is None else [(str(path), _read_yaml_file(Path(path)))]
    layers += [(f"override {text!r}", _parse_override(text)) for text in overrides]
    for place, layer in layers:
        if problems := list(_key_problems(layer, Config, prefix="", place=place)):
            raise ConfigError.of(problems, where=place)

    algorithm = Config.algorithm
    for _, layer in layers:
        algorithm = layer.get("algorithm", algorithm)
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise ConfigError(_choice_problem("algorithm", algorithm, tuple(ALGORITHMS)))

    merged = OmegaConf.structured(Config)
    for place, layer in [(f"preset of {algorithm}", ALGORITHMS[algorithm]), *layers]:
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(_type_problem(error, layer, place)) from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        value = OmegaConf.to_container(merged, resolve=False)
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}={_look_up(value, error.full_key or '')}: {reason}.") from error
    assert isinstance(config, Config)
    return config


class _YamlLoader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2 (`off` is a word, 1e-6 a number); a key given twice is an error."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - emptied of version 1.1's; filled below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    _YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def _read_yaml_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}.") from error
    try:
        content = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; sections such as 'train:' were expected.")
    return content


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value_text = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {text!r} is not of the form section.key=value, such as train.num_steps=5.")
    try:
        value: Any = yaml.load(value_text, Loader=_YamlLoader) if value_text.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {' '.join(str(error).split())}.") from error
    for part in reversed(parts):
        value = {part: value}
    assert isinstance(value, dict)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# The schema, read off the dataclasses
# ---------------------------------------------------------------------------------------------------------------------


def _field_types(section: Any) -> dict[str, Any]:
    return get_type_hints(section)


def _entry_type(annotation: Any) -> type | None:
    """DataSourceConfig for Dict[str, DataSourceConfig], else None."""
    if get_origin(annotation) is not dict:
        return None
    entry: type = get_args(annotation)[1]
    return entry if is_dataclass(entry) else None


@cache
def _known_keys() -> tuple[str, ...]:
    """Every key, dotted; <name> stands for the name of a data source."""

    def walk(section: type, prefix: str) -> Iterator[str]:
        for name, annotation in _field_types(section).items():
            yield prefix + name
            if isinstance(annotation, type) and is_dataclass(annotation):
                yield from walk(annotation, f"{prefix}{name}.")
            elif entry := _entry_type(annotation):
                yield from walk(entry, f"{prefix}{name}.<name>.")

    return tuple(walk(Config, ""))


def _key_problems(layer: Any, section: type, prefix: str, place: str) -> Iterator[str]:
    """Unknown keys, and values where a section was expected, at any depth."""
    if not isinstance(layer, Mapping):
        yield (
            f"{prefix[:-1]}={layer!r} in {place}: a section was expected, with keys such as "
            f"{', '.join(list(_field_types(section))[:3])}. Indent its keys under it, or remove it."
        )
        return
    types = _field_types(section)
    for key, value in layer.items():
        if key not in types:
            yield _unknown_key_problem(str(key), prefix, tuple(types), place)
        elif is_dataclass(types[key]):
            yield from _key_problems(value, types[key], f"{prefix}{key}.", place)
        elif entry := _entry_type(types[key]):
            if not isinstance(value, Mapping):
                yield f"{prefix}{key}={value!r} in {place}: sources by name were expected ({prefix}{key}.<name>.kind)."
                continue
            for name, source in value.items():
                yield from _key_problems(source, entry, f"{prefix}{key}.{name}.", place)


def _unknown_key_problem(key: str, prefix: str, siblings: tuple[str, ...], place: str) -> str:
    if close := difflib.get_close_matches(key, siblings, n=1):
        hint = f"Did you mean {prefix}{close[0]}?"
    else:  # perhaps the right name in the wrong section
        leaves = {known: known.rpartition(".")[2] for known in _known_keys()}
        nearest = difflib.get_close_matches(key, leaves.values(), n=1)
        elsewhere = [known for known, leaf in leaves.items() if leaf in nearest]
        hint = f"Did you mean {' or '.join(elsewhere)}?" if elsewhere else f"Known here: {', '.join(siblings)}."
    return f"unknown key {prefix}{key} in {place}. {hint}"


def _look_up(layer: Any, dotted_key: str) -> Any:
    for part in dotted_key.split("."):
        if not isinstance(layer, Mapping) or part not in layer:
            return None
        layer = layer[part]
    return layer


def _type_problem(error: OmegaConfBaseException, layer: Mapping[str, Any], place: str) -> str:
    """Name key, value and expected type of what OmegaConf could not convert."""
    if not error.full_key:
        return f"{place}: {str(error).splitlines()[0]}."
    annotation: Any = Config
    for part in error.full_key.split("."):
        if is_dataclass(annotation):
            annotation = _field_types(annotation)[part]
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    arguments = get_args(annotation) if get_origin(annotation) is Union else (annotation,)
    expected = " or ".join("null" if kind is type(None) else names.get(kind, "a section") for kind in arguments)
    return f"{error.full_key}={_look_up(layer, error.full_key)!r} in {place}: {expected} was expected."


def _choice_problem(key: str, value: object, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{key}={value}: must be one of {', '.join(choices)}.{hint}"


# ---------------------------------------------------------------------------------------------------------------------
# Validation: first each value on its own, then what values demand of each other
# ---------------------------------------------------------------------------------------------------------------------

SOURCE_KINDS = ("jsonl", "parquet", "chain_arithmetic", "reasoning_gym")
"""What data.*.kind may be; the first two read a file, the others make their prompts."""
PROCEDURAL_KINDS = ("chain_arithmetic", "reasoning_gym")
VERIFIERS = ("chain_arithmetic", "reasoning_gym", "math", "exact")
"""What data.*.verifier may be, besides a function of one's own as package.module:function."""

_CHOICES: dict[type, dict[str, tuple[str, ...]]] = {
    Config: {"algorithm": tuple(ALGORITHMS)},
    ModelSection: {"dtype": ("float32", "bfloat16"), "recompute": ("none", "selective", "full")},
    DataSection: {"overlong_prompts": ("error", "skip")},
    DataSourceConfig: {"kind": SOURCE_KINDS},
    RolloutSection: {"engine": ("in_process",)},
    AdvantageSection: {"estimator": ("group_std", "group_mean", "leave_one_out")},
    FipoConfig: {
        "loss_aggregation": ("token_mean", "sequence_mean", "sequence_sum"),
        "old_log_probs": ("actor", "rollout"),
    },
    MetricsSection: {"wandb": ("off", "online", "offline")},
}


@dataclass(frozen=True)
class _Rule:
    """What a number, or a text, must be on its own."""

    text: str
    holds: Callable[[Any], bool]


_AT_LEAST_0 = _Rule("must be at least 0", lambda value: 0 <= value < math.inf)
_AT_LEAST_1 = _Rule("must be at least 1", lambda value: 1 <= value < math.inf)
_ABOVE_0 = _Rule("must be above 0 and finite", lambda value: 0 < value < math.inf)
_FINITE = _Rule("must be a finite number", math.isfinite)
_DECAY = _Rule("must be at least 0 and below 1", lambda value: 0 <= value < 1)
_SHARE = _Rule("must be above 0 and at most 1; 1 samples from the whole distribution", lambda value: 0 < value <= 1)
_SEED = _Rule("must be between 0 and 2**32 - 1", lambda value: 0 <= value < 2**32)
_NOT_EMPTY = _Rule("must not be empty", lambda value: bool(value.strip()))

_RULES: dict[type, dict[str, _Rule]] = {
    RunSection: {"name": _NOT_EMPTY, "output_dir": _NOT_EMPTY, "seed": _SEED, "num_sample_prints": _AT_LEAST_0},
    ModelSection: {
        "path": _Rule("must name a folder with a Hugging Face checkpoint", lambda value: bool(value.strip())),
        "log_prob_chunk_tokens": _AT_LEAST_1,
    },
    DataSourceConfig: {
        "num_prompts": _AT_LEAST_1,
        "seed": _SEED,
        "prompt_field": _NOT_EMPTY,
        "answer_field": _NOT_EMPTY,
        "prompt_template": _Rule("must hold {prompt}, where the prompt goes", lambda value: "{prompt}" in value),
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
    VerifierSection: {"num_workers": _AT_LEAST_1, "timeout_s": _ABOVE_0},
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
    },
    TrainSection: {"num_steps": _AT_LEAST_1, "num_minibatches": _AT_LEAST_1, "num_epochs": _AT_LEAST_1},
    OptimizerSection: {
        "learning_rate": _AT_LEAST_0,
        "num_warmup_steps": _AT_LEAST_0,
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
        "timeout_s": _ABOVE_0,
    },
    BatchSection: {"max_tokens_per_microbatch": _AT_LEAST_1, "pad_multiple": _AT_LEAST_1},
    EvaluationSection: {
        "every_num_steps": _AT_LEAST_0,
        "num_samples_per_prompt": _AT_LEAST_1,
        "temperature": _AT_LEAST_0,
        "top_p": _SHARE,
        "max_response_tokens": _AT_LEAST_1,
    },
    MetricsSection: {"wandb_project": _NOT_EMPTY},
    CheckpointSection: {"every_num_steps": _AT_LEAST_0, "keep_last": _AT_LEAST_1},
}
"""A rule for every number (a test holds that none is without) and for texts that are no choices."""

_DEFINING_KEYS = ("objective.future_kl", "objective.loss_aggregation", "advantages.estimator")
"""Keys without which an algorithm would not be what its name says, where its preset sets them."""


def validate(config: Config, world_size: int | None = None) -> None:
    """Refuse what cannot run, before any model is built.

    Args:
        config: as `load_config` returned it.
        world_size: number of processes; None leaves out what depends on it.

    Raises:
        ConfigError: naming for every problem the key, its value, the rule and what to do.
    """
    problems = list(_value_problems(config, ""))
    if not problems:  # combinations divide by values that must be sound first
        problems += _algorithm_problems(config)
        problems += _data_problems(config)
        problems += _batch_problems(config)
        problems += _objective_problems(config)
        problems += _layout_problems(config, world_size)
    if problems:
        raise ConfigError.of(problems)


def _value_problems(section: Any, prefix: str) -> Iterator[str]:
    rules, choices = _RULES.get(type(section), {}), _CHOICES.get(type(section), {})
    types = _field_types(type(section))
    for item in fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if is_dataclass(value):
            yield from _value_problems(value, f"{key}.")
        elif _entry_type(types[item.name]):
            for name, source in value.items():
                if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                    yield f"{key}: the name {name!r} goes into metric names; use letters, digits, _ and - only."
                yield from _value_problems(source, f"{key}.{name}.")
        elif item.name in choices and value not in choices[item.name]:
            yield _choice_problem(key, value, choices[item.name])
        elif item.name in rules and value is not None and not rules[item.name].holds(value):
            yield f"{key}={value}: {rules[item.name].text}."


def _algorithm_problems(config: Config) -> Iterator[str]:
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
            yield (
                f"{key}={_yaml_scalar(value)}: contradicts algorithm={config.algorithm}, which is {key}="
                f"{_yaml_scalar(wanted)}. Remove the key, or {remedy}."
            )


def _data_problems(config: Config) -> Iterator[str]:
    if not config.data.train:
        yield "data.train is empty: a run needs at least one source of prompts, such as data.train.<name>.kind=jsonl."
    for part in ("train", "evaluation"):
        for name, source in getattr(config.data, part).items():
            yield from _source_problems(f"data.{part}.{name}", source, is_evaluation=part == "evaluation")


def _source_problems(key: str, source: DataSourceConfig, is_evaluation: bool) -> Iterator[str]:
    if source.kind in PROCEDURAL_KINDS:
        if source.path:
            yield f"{key}.path={source.path}: kind={source.kind} reads no file. Remove it, or change the kind."
        if is_evaluation and (source.num_prompts is None or source.seed is None):
            missing = [name for name in ("num_prompts", "seed") if getattr(source, name) is None]
            yield (
                f"{key}: an evaluation source must be finite and the same in every run, and kind={source.kind} makes "
                f"prompts without end. Set {' and '.join(f'{key}.{name}' for name in missing)}."
            )
    elif not source.path:
        yield f"{key}.path is empty: kind={source.kind} reads a file. Set it."
    elif source.params:
        yield f"{key}.params={source.params}: kind={source.kind} takes no parameters. Remove them."
    if source.kind == "reasoning_gym" and not source.task:
        yield f"{key}.task is empty: kind=reasoning_gym needs the name of a data set, such as task=chain_sum."
    if source.kind != "reasoning_gym" and source.task:
        yield f"{key}.task={source.task}: only kind=reasoning_gym has tasks. Remove it."
    if source.verifier not in VERIFIERS and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source.verifier):
        yield _choice_problem(f"{key}.verifier", source.verifier, (*VERIFIERS, "package.module:function"))
    if source.kind == "reasoning_gym" and source.verifier != "reasoning_gym":
        yield (
            f"{key}.verifier={source.verifier}: entries of kind=reasoning_gym are judged by their own task. "
            f"Set {key}.verifier=reasoning_gym."
        )
    if source.verifier == "reasoning_gym" and source.kind != "reasoning_gym":
        yield (
            f"{key}.verifier=reasoning_gym: judges entries of kind=reasoning_gym, and this kind is {source.kind}. "
            "Use math or exact."
        )
    if source.system_prompt and not source.chat_template:
        yield f"{key}.system_prompt is set, but chat_template=false leaves it out. Set {key}.chat_template=true."


def _batch_problems(config: Config) -> Iterator[str]:
    rollout, reward, train = config.rollout, config.reward, config.train
    if rollout.num_prompts % train.num_minibatches:
        divisors = [str(n) for n in range(1, rollout.num_prompts + 1) if rollout.num_prompts % n == 0]
        yield (
            f"train.num_minibatches={train.num_minibatches}: must divide rollout.num_prompts={rollout.num_prompts}: "
            f"a minibatch holds whole groups. Set it to one of {', '.join(divisors)}."
        )
    if reward.correct <= reward.incorrect:
        yield f"reward.correct={reward.correct}: must be above reward.incorrect={reward.incorrect}."
    if reward.overlong_buffer_tokens >= rollout.max_response_tokens:
        yield (
            f"reward.overlong_buffer_tokens={reward.overlong_buffer_tokens}: must be below rollout.max_response_tokens="
            f"{rollout.max_response_tokens}, at whose end the buffer lies. Lower it, or set 0 to turn the penalty off."
        )


def _objective_problems(config: Config) -> Iterator[str]:
    objective = config.objective
    if objective.future_kl and objective.old_log_probs == "rollout":
        yield (
            "objective.old_log_probs=rollout: rollout log-probs as π_old are refused with future_kl=true, because "
            "Future-KL sums up the engine's numerical differences over many tokens. Set objective.old_log_probs=actor."
        )
    if objective.future_kl and objective.dual_clip is None:
        yield (
            "objective.dual_clip=null: Future-KL leaves out tokens with a ratio above dual_clip and needs a number. "
            "Set objective.dual_clip=10."
        )
    if objective.influence_min > objective.influence_max:
        yield (
            f"objective.influence_min={objective.influence_min}: must not be above objective.influence_max="
            f"{objective.influence_max}."
        )
    if objective.loss_aggregation == "sequence_sum" and objective.sequence_sum_tokens is None:
        yield (
            "objective.sequence_sum_tokens=null: loss_aggregation=sequence_sum divides by a constant length. Set it, "
            f"usually to rollout.max_response_tokens={config.rollout.max_response_tokens}."
        )


def _layout_problems(config: Config, world_size: int | None) -> Iterator[str]:
    parallel, rollout, batch = config.parallel, config.rollout, config.batch
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel=true: needs parallel.tp above 1. Set it to false."
    if parallel.virtual_pp is not None and parallel.pp == 1:
        yield f"parallel.virtual_pp={parallel.virtual_pp}: needs parallel.pp above 1. Set it to null."
    model_parallel = parallel.tp * parallel.pp * parallel.cp
    if world_size is not None and world_size % model_parallel:
        yield (
            f"{world_size} processes cannot hold whole copies of the model: tp={parallel.tp} x pp={parallel.pp} x "
            f"cp={parallel.cp} takes {model_parallel} each. Start a multiple of {model_parallel}, or lower parallel.*."
        )
    needed = required_pad_multiple(config)
    multiple = needed if batch.pad_multiple is None else batch.pad_multiple
    if multiple % needed:
        yield (
            f"batch.pad_multiple={multiple}: cp={parallel.cp}, tp={parallel.tp} and sequence_parallel="
            f"{_yaml_scalar(parallel.sequence_parallel)} need sequences padded to a multiple of {needed}. "
            f"Set it to {needed}, a multiple of that, or null."
        )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    padded = -(-longest // multiple) * multiple
    if padded > batch.max_tokens_per_microbatch:
        yield (
            f"batch.max_tokens_per_microbatch={batch.max_tokens_per_microbatch}: one sequence of "
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} + rollout.max_response_tokens="
            f"{rollout.max_response_tokens} takes {padded} tokens with padding. Raise it to at least {padded}."
        )


def required_pad_multiple(config: Config) -> int:
    """Least multiple to which every sequence of a microbatch must be padded.

    Context parallelism cuts a sequence into 2*cp chunks; sequence parallelism then cuts the tokens of one
    context-parallel rank, T / cp, into tp parts.
    """
    parallel = config.parallel
    zigzag = 2 * parallel.cp if parallel.cp > 1 else 1
    return math.lcm(zigzag, parallel.cp * parallel.tp) if parallel.sequence_parallel else zigzag


def updates_per_step(config: Config) -> int:
    """Optimizer steps that one batch of rollouts gets."""
    return config.train.num_minibatches * config.train.num_epochs


def _yaml_scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# What depends on the model
# ---------------------------------------------------------------------------------------------------------------------


def read_model_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder, as a plain dict.

    Raises:
        ConfigError: if the folder, the file or its content is not there.
    """
    file = Path(path) / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"model.path={path}: {file} cannot be read ({error.strerror}). A folder with a Hugging Face checkpoint was "
            f"expected; a relative path starts from the current directory, {Path.cwd()}."
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.path={path}: {file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"model.path={path}: {file} holds a {type(content).__name__}; an object was expected.")
    return content


def validate_model_layout(config: Config, model_config: Mapping[str, Any]) -> None:
    """Refuse layouts into which the model does not divide.

    Args:
        model_config: config.json of the model, as `read_model_config` returns it.

    Raises:
        ConfigError: naming the sizes that do not divide.
    """
    names = ("num_attention_heads", "num_hidden_layers", "intermediate_size")
    if missing := [name for name in names if not isinstance(model_config.get(name), int)]:
        raise ConfigError(f"model.path={config.model.path}: config.json has no whole number for {', '.join(missing)}.")
    heads, layers, intermediate = (model_config[name] for name in names)
    groups = model_config.get("num_key_value_heads") or heads
    parallel, problems = config.parallel, []
    for name, size in (("num_attention_heads", heads), ("intermediate_size", intermediate)):
        if size % parallel.tp:
            problems.append(f"parallel.tp={parallel.tp}: must divide the model's {name}={size}.")
    if groups % parallel.tp and parallel.tp % groups:
        problems.append(
            f"parallel.tp={parallel.tp}: must divide the model's num_key_value_heads={groups}, or be a multiple of it."
        )
    stages = parallel.pp * (parallel.virtual_pp or 1)
    if layers % stages:
        sizes = f"parallel.pp={parallel.pp}" + (f" x virtual_pp={parallel.virtual_pp}" if parallel.virtual_pp else "")
        problems.append(f"{sizes}: {stages} stages must divide the model's num_hidden_layers={layers}.")
    if problems:
        raise ConfigError.of(problems, where="the layout of the model")


def warnings_for(config: Config, model_config: Mapping[str, Any] | None = None) -> list[str]:
    """What runs but hardly means what it says; for the console, in full sentences."""
    objective, rollout, evaluation = config.objective, config.rollout, config.evaluation
    found = []
    if objective.future_kl and updates_per_step(config) == 1:
        found.append(
            "FIPO is inert: with one update per step (train.num_minibatches x train.num_epochs = 1) the policy has not "
            "moved when Future-KL is taken, every influence weight is 1, and this run is plain DAPO."
        )
    if objective.future_kl and objective.influence_min == objective.influence_max:
        found.append(
            f"influence weights cannot vary: objective.influence_min = influence_max = {objective.influence_max}."
        )
    if rollout.top_p < 1:
        found.append(
            f"rollout.top_p={rollout.top_p} samples from a truncated distribution, but log-probs are taken over the "
            "whole one: updates are biased. Training usually samples at top_p=1."
        )
    if config.optimizer.num_warmup_steps >= config.train.num_steps:
        found.append(
            f"optimizer.num_warmup_steps={config.optimizer.num_warmup_steps} covers all {config.train.num_steps} "
            f"steps: the learning rate never reaches {config.optimizer.learning_rate}."
        )
    if evaluation.temperature == 0 and evaluation.num_samples_per_prompt > 1:
        found.append(
            f"evaluation.temperature=0 is greedy: all {evaluation.num_samples_per_prompt} responses will be alike."
        )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    positions = (model_config or {}).get("max_position_embeddings")
    if positions is not None and longest > positions:
        found.append(
            f"sequences of up to {longest} tokens (rollout.max_prompt_tokens + max_response_tokens) go beyond "
            f"the model's max_position_embeddings={positions}: it was never trained at those positions."
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The resolved configuration
# ---------------------------------------------------------------------------------------------------------------------


def resolved_yaml(config: Config) -> str:
    """Every key with its value; `load_config` reads it back to an equal Config, whatever the preset says by then."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape_interpolations(asdict(config))))


def _escape_interpolations(value: Any) -> Any:
    """Resolved text that holds ${...} means it literally."""
    if isinstance(value, dict):
        return {key: _escape_interpolations(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape_interpolations(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def save_resolved(config: Config, folder: str | Path) -> Path:
    """Write `resolved_yaml` to config.yaml in the run's folder, which is made if need be."""
    path = Path(folder) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(resolved_yaml(config), encoding="utf-8")
    return path
