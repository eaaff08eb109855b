"""A data source's verifiers: one by name, or several with weights."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_fipo.config.errors import choice_problem
from megatron_fipo.config.schema import VERIFIERS, DataSourceConfig

_CUSTOM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*|https?://[^\s/]+\S*")


def verifier_weights(source: DataSourceConfig) -> dict[str, float]:
    """Weight of each of a source's verifiers, in the order in which it names them.

    Raises:
        ValueError: if they cannot be read; `verifier_problems` tells in full.
    """
    if problems := list(_form_problems("the data source", source)):
        raise ValueError(problems[0])
    if isinstance(source.verifier, str):
        return {source.verifier: 1.0}
    return dict(zip(source.verifier, source.verifier_weights or [1.0] * len(source.verifier), strict=True))


def verifier_problems(key: str, source: DataSourceConfig) -> Iterator[str]:
    """What is wrong with a source's verifiers; `key` names the source, as data.train.sums."""
    if problems := list(_form_problems(key, source)):
        yield from problems
        return
    names = list(verifier_weights(source))
    for name in names:
        if name not in VERIFIERS and not _CUSTOM.fullmatch(name):
            yield choice_problem(
                f"{key}.verifier", name, (*VERIFIERS, "package.module:function", "http://host:port/path")
            )
    if source.kind == "reasoning_gym" and "reasoning_gym" not in names:
        yield (
            f"{key}.verifier={source.verifier}: entries of kind=reasoning_gym are judged by their own task. "
            f"Set {key}.verifier=reasoning_gym, or put it among several."
        )
    if source.kind != "reasoning_gym" and "reasoning_gym" in names:
        yield (
            f"{key}.verifier=reasoning_gym: judges entries of kind=reasoning_gym, and this kind is {source.kind}. "
            "Use math or exact."
        )


def _form_problems(key: str, source: DataSourceConfig) -> Iterator[str]:
    """Problems of form: whether they are names with weights at all."""
    names, weights = source.verifier, source.verifier_weights
    if isinstance(names, str):
        if weights:
            yield (
                f"{key}.verifier_weights={weights}: the one verifier {names} has nothing to be weighed against. Remove "
                f"them, or name several: {key}.verifier=[{names}, my_rewards:format]."
            )
        return
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        yield (
            f"{key}.verifier={names!r}: a verifier's name, or a list of several, was expected, such as "
            "[math, my_rewards:format] with verifier_weights=[1.0, 0.2]."
        )
        return
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        yield f"{key}.verifier: {', '.join(repeated)} is named twice. Name it once, with the sum of its weights."
    if weights and len(weights) != len(names):
        yield (
            f"{key}.verifier_weights={weights}: one for each of the {len(names)} verifiers was expected "
            f"({', '.join(names)})."
        )
    elif weights and not any(weights):
        yield f"{key}.verifier_weights={weights}: no verifier counts. Give at least one a weight above 0."
