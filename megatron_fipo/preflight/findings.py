"""Findings about a plan: faults, missing files, and settings that run but probably not as intended."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.config import (
    FILE_KINDS,
    REPOSITORY_NAME,
    Config,
    DataSourceConfig,
    is_hub_name,
    most_prompts,
    updates_per_step,
    warnings_for,
)
from megatron_fipo.data.row_forms import ROW_FORMS, select_columns
from megatron_fipo.hub.datasets import cached_source, file_kind
from megatron_fipo.hub.datasets import would_download as source_would_download
from megatron_fipo.hub.models import cached_folder, revision_without_name, would_download
from megatron_fipo.hub.names import HubError, Repository
from megatron_fipo.preflight.work import BatchPlan

FAILS, MISSING, WARNS = "fails", "missing", "warning"
BFLOAT16_SIGNIFICAND_BITS = 8
DEFAULT_INITIALIZER_RANGE = 0.02


@dataclass(frozen=True)
class Finding:
    """One remark.

    Attributes:
        level: FAILS and MISSING make the verdict negative; WARNS does not.
    """

    level: str
    text: str


def batch_findings(config: Config, plan: BatchPlan) -> Iterator[Finding]:
    """Find layouts that the batch does not fill."""
    parallel = config.parallel
    if plan.samples_per_update < plan.data_ranks:
        yield Finding(
            WARNS,
            f"{plan.samples_per_update} responses per update for {plan.data_ranks} data-parallel ranks: some of them "
            "only pad. Lower train.num_minibatches, or use a larger tp, pp or cp.",
        )
    if parallel.pp > 1 and plan.microbatches < 2 * parallel.pp:
        yield Finding(
            WARNS,
            f"{plan.microbatches} microbatches per update for pp={parallel.pp}: stages wait {plan.bubble:.0%} of the "
            "time. Lower batch.max_tokens_per_microbatch or pp.",
        )
    if config.sampling.streaming and plan.prompts_needed > most_prompts(config):
        yield Finding(
            FAILS,
            f"{plan.prompts_needed:,} prompts are needed at the assumed share of kept groups, and "
            f"sampling.max_generation_rounds={config.sampling.max_generation_rounds} allows {most_prompts(config):,} "
            "(so many times rollout.num_prompts_per_round, or rollout.num_prompts where that is null): the run would "
            "stop. Raise one of them.",
        )
    elif plan.prompts_ahead > most_prompts(config):
        yield Finding(
            WARNS,
            f"rollout.max_staleness_steps={config.rollout.max_staleness_steps} would begin {plan.prompts_ahead:,} "
            "prompts ahead at the assumed share of kept groups, and "
            f"sampling.max_generation_rounds={config.sampling.max_generation_rounds} allows {most_prompts(config):,}: "
            "servers may run empty. Raise sampling.max_generation_rounds.",
        )
    if config.sampling.dynamic and plan.rounds > config.sampling.max_generation_rounds:
        yield Finding(
            FAILS,
            f"{plan.rounds} rounds of generation are needed at the assumed share of kept groups, and "
            f"sampling.max_generation_rounds={config.sampling.max_generation_rounds} allows fewer: the run would stop.",
        )


def objective_findings(config: Config, model_config: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether FIPO can act, and what `warnings_for` has to say."""
    for warning in warnings_for(config, model_config):
        yield Finding(WARNS, warning)
    if config.objective.future_kl and updates_per_step(config) > 1:
        noise = update_noise(config, model_config)
        if noise.signal_to_noise < 1:
            yield Finding(
                WARNS,
                "FIPO is dominated by noise: after a step's updates only "
                f"{noise.changed_share:.1e} of the bfloat16 weights have changed (learning rate "
                f"{config.optimizer.learning_rate:g} against a spacing of {noise.spacing:.1e}), and what has is "
                f"rounding (signal to noise {noise.signal_to_noise:.2g}). Raise optimizer.learning_rate, or use "
                "model.dtype=float32.",
            )


@dataclass(frozen=True)
class UpdateNoise:
    """How a step's updates show in weights of the model's precision.

    Attributes:
        spacing: distance between neighbouring numbers at a weight's usual size.
        changed_share: share of the weights that, at the step's last update, differ from those of its first.
        signal_to_noise: of a product over the hidden size, if all its weights moved the way that helps most.
    """

    spacing: float
    changed_share: float
    signal_to_noise: float


def update_noise(config: Config, model_config: Mapping[str, Any]) -> UpdateNoise:
    """What Future-KL can see of a step's updates.

    Adam moves a weight by about the learning rate. The model computes with weights that are rounded to its precision,
    of spacing u: after k updates a weight has moved by k*lr on average, but by u or nothing, a variance of k*lr*u. Over
    the H weights of one product the movements add up, and their noise by its root: H*k*lr / sqrt(H*k*lr*u). That all
    weights move alike is the best case; k is the number of updates between a step's first forward pass and its last.
    """
    typical = float(model_config.get("initializer_range") or DEFAULT_INITIALIZER_RANGE)
    bits = BFLOAT16_SIGNIFICAND_BITS if config.model.dtype == "bfloat16" else 24
    spacing = 2.0 ** (math.floor(math.log2(typical)) - (bits - 1))
    moved = (updates_per_step(config) - 1) * config.optimizer.learning_rate
    return UpdateNoise(
        spacing, min(moved / spacing, 1.0), math.sqrt(int(model_config["hidden_size"]) * moved / spacing)
    )


def file_findings(config: Config) -> Iterator[Finding]:
    """Model, tokenizer and data that are not there, or not as the configuration says.

    What a run would fetch from the hub is looked for in the hub's cache alone, and is a warning where it is not there.
    """
    path, revision = config.model.path, config.model.revision
    folder = Path(cached_folder(path, revision) or path)
    if is_hub_name(path) and not folder.is_dir():
        yield Finding(WARNS, would_download(Repository("model.path", path, revision=revision)))
    elif not folder.is_dir():
        yield Finding(MISSING, f"model.path={path} is no folder here{_as_a_name(path)}")
    elif revision and not is_hub_name(path):
        yield Finding(MISSING, revision_without_name(path, revision))
    else:
        if not (folder / "config.json").is_file():
            yield Finding(MISSING, f"{folder / 'config.json'} does not exist")
        yield from _weight_findings(folder)
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            yield Finding(MISSING, f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    for part in ("train", "evaluation"):
        for name, source in getattr(config.data, part).items():
            if source.kind in FILE_KINDS:
                yield from _source_findings(f"data.{part}.{name}", source)


def _weight_findings(folder: Path) -> Iterator[Finding]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            yield Finding(MISSING, f"{index} is not an index of safetensors files: {error!r}")
            return
        if absent := sorted(name for name in names if not (folder / name).is_file()):
            yield Finding(MISSING, f"{folder} lacks {len(absent)} of {len(names)} weight files, such as {absent[0]}")
    elif not any(folder.glob("*.safetensors")):
        yield Finding(MISSING, f"{folder} holds no weights (*.safetensors)")


def _as_a_name(path: str) -> str:
    """Why a path of the form owner/name is not asked for on the hub, where it has that form."""
    owner = path.split("/")[0]
    if not REPOSITORY_NAME.fullmatch(path) or not Path(owner).is_dir():
        return ""
    return (
        f", and because {owner} is one it is not taken for a name on the hub. If it is one, fetch it with "
        f"`hf download {path} --local-dir {path}`"
    )


def _source_findings(key: str, source: DataSourceConfig) -> Iterator[Finding]:
    if source.kind == "hub":
        yield from _hub_source_findings(key, source)
        return
    path = Path(source.path)
    if not path.is_file():
        what = "is a folder: name one file in it" if path.is_dir() else "does not exist"
        yield Finding(MISSING, f"{key}.path={source.path} {what}")
        return
    yield from _column_findings(key, source, path, source.kind)


def _hub_source_findings(key: str, source: DataSourceConfig) -> Iterator[Finding]:
    try:
        cached = cached_source(key, source)
    except HubError as error:
        yield Finding(WARNS, str(error))
        return
    if cached is None:
        yield Finding(WARNS, source_would_download(key, source))
        return
    yield from _column_findings(key, source, Path(cached.files[0]), file_kind(cached.files[0]))


def _column_findings(key: str, source: DataSourceConfig, path: Path, kind: str) -> Iterator[Finding]:
    try:
        columns = _parquet_columns(path) if kind == "parquet" else _jsonl_columns(path)
    except (ValueError, OSError) as error:
        yield Finding(MISSING, f"{key}.path={source.path} cannot be read as {kind}: {error}")
        return
    if source.schema != "columns":
        try:
            select_columns(ROW_FORMS[source.schema], sorted(columns), source.path)
        except ValueError as error:
            yield Finding(MISSING, f"{key}.schema={source.schema}: {error}")
        return
    for name, wanted in (("prompt_field", source.prompt_field), ("answer_field", source.answer_field)):
        if wanted not in columns:
            yield Finding(
                MISSING, f"{key}.{name}={wanted}: {source.path} has no such column; it has {', '.join(sorted(columns))}"
            )


def _jsonl_columns(path: Path) -> set[str]:
    """Dotted names of the first row's fields."""
    with path.open(encoding="utf-8") as file:
        first = next((line for line in file if line.strip()), None)
    if first is None:
        raise ValueError("it is empty")
    row = json.loads(first)
    if not isinstance(row, dict):
        raise ValueError(f"its first row is a {type(row).__name__}, not an object")
    return set(_dotted(row, ""))


def _dotted(row: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in row.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")


def _parquet_columns(path: Path) -> set[str]:
    """Dotted names of the columns, structs and what they hold."""
    import pyarrow.parquet as parquet
    from pyarrow import types

    found: set[str] = set()

    def collect(fields: Any, prefix: str) -> None:
        for field in fields:
            found.add(prefix + field.name)
            if types.is_struct(field.type):
                collect([field.type.field(index) for index in range(field.type.num_fields)], f"{prefix}{field.name}.")

    collect(parquet.read_schema(path), "")
    return found
