"""What depends on the model: its config.json, and whether it divides into the layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.config.errors import ConfigError, Problem
from megatron_fipo.config.sections import Config, ParallelSection
from megatron_fipo.config.sections.model import FP8_ALIGNMENT
from megatron_fipo.config.text_files import read_json_object


def read_model_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder, as a plain dict.

    Raises:
        ConfigError: if the file cannot be read, or holds no JSON object.
    """
    file = Path(path) / "config.json"
    expected = (
        "A folder with a Hugging Face checkpoint was expected; a relative path starts from the current folder, "
        f"{Path.cwd()}, or from the configuration file's."
    )
    return read_json_object(file, f"model.path={path}: {file}", expected)


def validate_model_layout(config: Config, model_config: Mapping[str, Any]) -> None:
    """Refuse layouts into which the model does not divide.

    Args:
        model_config: config.json of the model, as `read_model_config` returns it.

    Raises:
        ConfigError: naming the sizes that do not divide.
    """
    names = ("num_attention_heads", "num_hidden_layers", "intermediate_size")
    given = {name: model_config.get(name) for name in names}
    optional = ("hidden_size", "num_key_value_heads", "head_dim")
    given |= {name: model_config[name] for name in optional if model_config.get(name) is not None}
    if wrong := [name for name, size in given.items() if type(size) is not int or size < 1]:
        raise ConfigError(
            f"model.path={config.model.path}: config.json has no whole number for {', '.join(wrong)}: one from 1 on "
            "was expected."
        )
    heads, intermediate = model_config["num_attention_heads"], model_config["intermediate_size"]
    parallel = config.parallel
    problems = division_problems(model_config, parallel)
    alignment = FP8_ALIGNMENT[config.model.fp8]
    width = model_config.get("head_dim") or model_config.get("hidden_size", 0) // heads
    sizes_of_a_rank = {
        "hidden_size": model_config.get("hidden_size", 0),
        "intermediate_size / tp": intermediate // parallel.tp,
        "num_attention_heads x head_dim / tp": heads * width // parallel.tp,
    }
    for name, size in sizes_of_a_rank.items() if not problems else ():
        if size % alignment:
            rule = f"needs multiples of {alignment}, and the model's {name} is {size}"
            remedy = "Lower parallel.tp, or take another recipe (tensorwise needs multiples of 16)"
            problems.append(Problem("model.fp8", config.model.fp8, rule, remedy))
    if problems:
        raise ConfigError.of(problems, where="the layout of the model")


def division_problems(model_config: Mapping[str, Any], parallel: ParallelSection) -> list[Problem]:
    """Why a model does not divide into a layout's tensor-parallel ranks and pipeline stages; empty where it does.

    Args:
        model_config: config.json of the model, whose sizes are whole numbers.
    """
    heads, layers = model_config["num_attention_heads"], model_config["num_hidden_layers"]
    groups = model_config.get("num_key_value_heads") or heads
    problems = [
        Problem("parallel.tp", parallel.tp, f"must divide the model's {name}={model_config[name]}")
        for name in ("num_attention_heads", "intermediate_size")
        if model_config[name] % parallel.tp
    ]
    if groups % parallel.tp and parallel.tp % groups:
        problems.append(
            Problem(
                "parallel.tp",
                parallel.tp,
                f"must divide the model's num_key_value_heads={groups}, or be a multiple of it",
            )
        )
    stages = parallel.pp * (parallel.virtual_pp or 1)
    if layers % stages:
        chunks = f" (x parallel.virtual_pp={parallel.virtual_pp})" if parallel.virtual_pp else ""
        rule = f"{stages} stages{chunks} must divide the model's num_hidden_layers={layers}"
        problems.append(Problem("parallel.pp", parallel.pp, rule))
    return problems
