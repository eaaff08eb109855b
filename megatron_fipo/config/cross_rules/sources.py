"""Rules between the keys of a data source: all that can be known of one without reading a file.

Rules that need the files, the tokenizer or the verifier's module are checked where those are opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_fipo.config.errors import NOT_SHOWN, Problem
from megatron_fipo.config.sections import Config, DataSourceConfig
from megatron_fipo.config.sections.data import FILE_KINDS, PROCEDURAL_KINDS
from megatron_fipo.config.text_rules import REPOSITORY_NAME
from megatron_fipo.config.values import section_problems
from megatron_fipo.config.verifiers import verifier_names, weight_problems


def data_problems(config: Config, *, is_for_training: bool) -> Iterator[Problem]:
    """What is wrong with the sources of a run, their values by themselves included."""
    if is_for_training and not config.data.train:
        yield Problem(
            "data.train",
            {},
            "a run needs at least one source of prompts, such as data.train.<name>.kind=jsonl",
        )
    for part in ("train", "evaluation"):
        for name, source in getattr(config.data, part).items():
            key = f"data.{part}.{name}"
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                yield Problem(
                    f"data.{part}",
                    NOT_SHOWN,
                    f"the name {name!r} goes into metric names",
                    "Use letters, digits, _ and - only",
                )
            if part == "evaluation" or is_for_training:
                yield from source_problems(f"{key}.", source)
                if part == "evaluation":
                    yield from _endless_problems(key, source)
            else:
                yield from section_problems(source, f"{key}.")
    yield from _trusted_problems(config)


def source_problems(prefix: str, source: DataSourceConfig) -> Iterator[Problem]:
    """What is wrong with a source, whatever it is for.

    Args:
        prefix: prefix of its keys in messages, such as "data.train.sums."; empty for a source that stands by itself.
    """
    by_itself = list(section_problems(source, prefix))
    yield from by_itself
    unsound = {problem.key for problem in by_itself}  # a value that is wrong by itself gets no further problem
    yield from (problem for problem in _combination_problems(prefix, source) if problem.key not in unsound)


def _combination_problems(prefix: str, source: DataSourceConfig) -> Iterator[Problem]:
    if source.kind in PROCEDURAL_KINDS:
        if source.path:
            yield _procedural_problem(prefix, source, "path", "Remove it, or change the kind")
        if source.schema != "columns":
            yield _procedural_problem(prefix, source, "schema", "Remove it")
    elif source.kind in FILE_KINDS:
        yield from _file_problems(prefix, source)
    if source.kind in (*FILE_KINDS, *PROCEDURAL_KINDS):
        yield from _kind_problems(prefix, source)
    if source.schema != "columns":
        for name, default in (("prompt_field", "prompt"), ("answer_field", "answer")):
            if getattr(source, name) != default:
                yield Problem(
                    f"{prefix}{name}",
                    getattr(source, name),
                    f"schema={source.schema} knows its columns and would not read it",
                    f"Remove {name}, or set {prefix}schema=columns",
                )
    yield from weight_problems(prefix, source)
    if source.system_prompt and not source.chat_template:
        yield Problem(
            f"{prefix}system_prompt",
            source.system_prompt,
            "chat_template=false leaves it out",
            f"Set {prefix}chat_template=true",
        )


def _procedural_problem(prefix: str, source: DataSourceConfig, name: str, remedy: str) -> Problem:
    return Problem(f"{prefix}{name}", getattr(source, name), f"kind={source.kind} reads no file", remedy)


def _endless_problems(key: str, source: DataSourceConfig) -> Iterator[Problem]:
    missing = [name for name in ("num_prompts", "seed") if getattr(source, name) is None]
    if source.kind in PROCEDURAL_KINDS and missing:
        yield Problem(
            key,
            NOT_SHOWN,
            f"an evaluation source must be finite and the same in every run, and kind={source.kind} makes prompts "
            "without end",
            f"Set {' and '.join(f'{key}.{name}' for name in missing)}",
        )


def _file_problems(prefix: str, source: DataSourceConfig) -> Iterator[Problem]:
    if not source.path:
        what = "a data set on the hub, such as openai/gsm8k" if source.kind == "hub" else "a file"
        yield Problem(f"{prefix}path", "", f"kind={source.kind} reads {what}", "Set it")
    if source.seed is not None:
        yield Problem(
            f"{prefix}seed",
            source.seed,
            "only procedural sources draw by one",
            "Remove it; run.seed shuffles",
        )
    if source.params:
        yield Problem(f"{prefix}params", source.params, f"kind={source.kind} takes no parameters", "Remove them")
    if source.kind != "hub":
        return
    if source.path and not REPOSITORY_NAME.fullmatch(source.path):
        yield Problem(
            f"{prefix}path",
            source.path,
            "kind=hub takes a data set's name on the Hugging Face hub, such as openai/gsm8k",
            "A file here is read with kind=jsonl or kind=parquet",
        )
    if not source.split:
        yield Problem(f"{prefix}split", "", "kind=hub reads one split", f"Set it, such as {prefix}split=train")


def _kind_problems(prefix: str, source: DataSourceConfig) -> Iterator[Problem]:
    """What is wrong with keys that only one kind reads, and with the kind's verifier."""
    if source.kind != "hub":
        for name in ("subset", "split", "revision"):
            if value := getattr(source, name):
                yield Problem(
                    f"{prefix}{name}",
                    value,
                    "only kind=hub reads a data set of the hub",
                    "Remove it, or set kind=hub",
                )
    if source.kind == "reasoning_gym" and not source.task:
        yield Problem(f"{prefix}task", "", "kind=reasoning_gym needs the name of a data set, such as task=chain_sum")
    if source.kind != "reasoning_gym" and source.task:
        yield Problem(f"{prefix}task", source.task, "only kind=reasoning_gym has tasks", "Remove it")
    names = verifier_names(source)
    if source.kind == "reasoning_gym" and names and "reasoning_gym" not in names:
        yield Problem(
            f"{prefix}verifier",
            source.verifier,
            "entries of kind=reasoning_gym are judged by their own task",
            f"Set {prefix}verifier=reasoning_gym, or put it among several",
        )
    if source.kind != "reasoning_gym" and "reasoning_gym" in names:
        yield Problem(
            f"{prefix}verifier",
            "reasoning_gym",
            f"judges entries of kind=reasoning_gym, and this kind is {source.kind}",
            "Use math or exact",
        )


def _trusted_problems(config: Config) -> Iterator[Problem]:
    sources = (*config.data.train.values(), *config.data.evaluation.values())
    in_use = sorted({name for source in sources for name in verifier_names(source)})
    for name in sorted(set(config.verifier.trusted) - set(in_use)):
        yield Problem(
            "verifier.trusted",
            NOT_SHOWN,
            f"{name!r} is no verifier in use; these are {', '.join(in_use)}",
            "Remove it, or spell it as the source does",
        )
