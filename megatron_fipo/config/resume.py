"""What a configuration may change between a checkpoint and the run that continues from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_fipo.config.environment import (
    environment_digests,
    value_digest,
    values_for_comparison,
    written_values,
)
from megatron_fipo.config.input_paths import same_place, with_absolute_paths
from megatron_fipo.config.keys import declarations_along
from megatron_fipo.config.sections import Config, DataSourceConfig
from megatron_fipo.system.digests import fingerprint

_FORMER_KEYS_WITHOUT_EFFECT = ("model.log_prob_chunk_tokens",)
"""Keys that only checkpoints of earlier versions have, and that never changed results."""


@dataclass(frozen=True)
class ResumeCheck:
    """How a configuration differs from the one a checkpoint was saved under.

    Attributes:
        refused: differences that would corrupt the run, each a sentence.
        shown: all other differences, as `key: before -> now`.
        same_numbers: whether recorded rollouts of later steps are those that this run would generate.
    """

    refused: tuple[str, ...]
    shown: tuple[str, ...]
    same_numbers: bool


def check_resume(saved: Mapping[str, Any], config: Config, *, is_mid_step: bool) -> ResumeCheck:
    """Compare with a checkpoint's configuration.

    Args:
        saved: `recorded_values` of the configuration that the checkpoint was saved under; `asdict` in older
            checkpoints. A value that came from an environment variable counts as changed when it has changed, unless
            it is a secret: another key to the same reward model is the same run.
        is_mid_step: the checkpoint stands between the updates of a step; nothing that decides numbers may change then.
    """
    recorded = with_absolute_paths(config)
    environment = saved.get("environment", {"salt": "00", "digests": {}})
    before = _settled({key: value for key, value in saved.items() if key != "environment"})
    now, values = _settled(written_values(config)), _settled(asdict(config))
    would_record = _settled(asdict(recorded))
    digests = environment_digests(recorded, environment["salt"])["digests"]
    moved = {key for key, digest in environment["digests"].items() if digests.get(key, digest) != digest}
    refused, shown, same_numbers = [], [], True
    for key in sorted(before.keys() | now.keys()):
        is_moved = any(f"{other}.".startswith(f"{key}.") for other in moved)
        if key in before and key in now and not is_moved:
            was = environment["digests"].get(key)
            place = same_place(key, before[key])
            if place in (same_place(key, now[key]), same_place(key, values[key])):
                continue
            if was == value_digest(would_record[key], environment["salt"]):
                continue
        difference = f"{key}: {_text(before, key)} -> {_text(now, key)}"
        if is_moved and before.get(key) == now.get(key):
            difference += " (the environment variable has another value)"
        elif key in now and now[key] != values[key]:  # a checkpoint from before references were kept may hold a secret
            difference = f"{key}: another value -> {_text(now, key)}"
        is_new = key not in before and key in now and _is_default(key, now[key])  # and changes nothing
        decides = _decides_numbers(key) and not is_new
        same_numbers &= not decides
        if reason := _reason_to_refuse(key):
            refused.append(f"{difference}: {reason}.")
        elif decides and is_mid_step:
            refused.append(
                f"{difference}: the checkpoint was saved between the updates of a step; finish that step first."
            )
        else:
            shown.append(difference)
    return ResumeCheck(tuple(refused), tuple(shown), same_numbers)


def numbers_fingerprint(config: Config) -> str:
    """A fingerprint that two configurations share if they give the same rollouts and weights, up to rounding."""
    settled = _settled(values_for_comparison(config))
    decisive = {key: same_place(key, value) for key, value in settled.items() if _decides_numbers(key)}
    return fingerprint(decisive)


def _settled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key.

    For a falling learning rate, train.num_steps takes the place of a missing num_decay_steps: it decides numbers.
    """
    flat = dict(_flat(values))
    if flat.get("optimizer.schedule", "constant") != "constant" and flat["optimizer.num_decay_steps"] is None:
        flat["optimizer.num_decay_steps"] = flat["train.num_steps"]
    return flat


def _is_default(key: str, value: Any) -> bool:
    """Whether a key that a checkpoint of an earlier version lacks has its default, which means what was done then."""
    source = re.fullmatch(r"data\.(?:train|evaluation)\.[^.]+\.(\w+)", key)
    if source is not None:
        defaults, key = asdict(DataSourceConfig()), source[1]
    else:
        defaults = dict(_flat(asdict(Config())))
    return key in defaults and bool(defaults[key] == value)


def _decides_numbers(key: str) -> bool:
    """Whether a key, dotted, changes results, by its declaration and those of the sections that it is in."""
    if key in _FORMER_KEYS_WITHOUT_EFFECT:
        return False
    return all(declared.changes_results for declared in declarations_along(key.split(".")))


def _reason_to_refuse(key: str) -> str:
    """Why a resumed run must keep a key's value; empty where it need not."""
    along = declarations_along(key.split("."))
    if not all(declared.changes_results for declared in along):
        return ""
    return next((declared.fixed_because for declared in along if declared.fixed_because), "")


def _text(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], default=str) if key in values else "(not there)"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
