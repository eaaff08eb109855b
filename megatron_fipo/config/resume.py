"""What a configuration may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_fipo.config.schema import Config, DataSourceConfig

_BESIDE = (
    "run.name",
    "run.output_dir",
    "run.num_sample_prints",
    "rollout.engine",
    "rollout.max_batch_size",
    "servers",
    "verifier",
    "train.num_steps",  # where the learning rate falls towards it, `_settled` says so
    "train.resume",
    "train.stop_when",
    "parallel",
    "batch",
    "model.transformer_engine",
    "model.recompute",
    "model.log_prob_chunk_mib",
    "model.log_prob_chunk_tokens",  # of checkpoints from before chunks were measured in MiB
    "data.evaluation",
    "evaluation",
    "metrics",
    "checkpoint",
)
"""Keys that leave the numbers as they are, but for the rounding of sums taken in another order."""

_ORDER_OF_PROMPTS = ("kind", "task", "params", "num_prompts", "seed", "weight")
"""Keys of a source that decide which prompt stands where: with others the cursor would point elsewhere."""

_REFUSED = {
    "run.seed": "it decides the order of the prompts, in which the checkpoint holds a place",
    "model.dtype": "the optimizer's state is laid out for the other",
    "optimizer.distributed": "the optimizer's state is laid out for the other",
}


@dataclass(frozen=True)
class ResumeCheck:
    """How a configuration differs from the one a checkpoint was saved under.

    Attributes:
        refused: differences that would corrupt the run, each a sentence.
        shown: all other differences, as `key: before -> now`.
        same_numbers: whether recorded rollouts of later steps are those that this run would come to.
    """

    refused: tuple[str, ...]
    shown: tuple[str, ...]
    same_numbers: bool


def check_resume(saved: Mapping[str, Any], config: Config, *, is_mid_step: bool) -> ResumeCheck:
    """Compare with a checkpoint's configuration.

    Args:
        saved: `asdict` of the configuration that the checkpoint was saved under.
        is_mid_step: the checkpoint stands between the updates of a step; nothing that decides numbers may change then.
    """
    before, now = _settled(saved), _settled(asdict(config))
    defaults = dict(_flat(asdict(Config())))
    refused, shown, same_numbers = [], [], True
    for key in sorted(before.keys() | now.keys()):
        if key in before and key in now and before[key] == now[key]:
            continue
        difference = f"{key}: {_text(before, key)} -> {_text(now, key)}"
        is_new = key not in before and key in now and now[key] == _default(key, defaults)  # and changes nothing
        decides = _decides_numbers(key) and not is_new
        same_numbers &= not decides
        if reason := _reason_to_refuse(key):
            refused.append(f"{difference}: {reason}.")
        elif decides and is_mid_step:
            refused.append(
                f"{difference}: the checkpoint was saved between the updates of a step, which is to end first."
            )
        else:
            shown.append(difference)
    return ResumeCheck(tuple(refused), tuple(shown), same_numbers)


def numbers_fingerprint(config: Config) -> str:
    """The same for two configurations that come to the same rollouts and weights, up to rounding."""
    decisive = {key: value for key, value in _settled(asdict(config)).items() if _decides_numbers(key)}
    return hashlib.blake2b(json.dumps(decisive, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _settled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key.

    Where the end of a falling learning rate is left to train.num_steps, it is written in its place: it decides numbers.
    """
    flat = dict(_flat(values))
    if flat.get("optimizer.schedule", "constant") != "constant" and flat["optimizer.num_decay_steps"] is None:
        flat["optimizer.num_decay_steps"] = flat["train.num_steps"]
    return flat


def _decides_numbers(key: str) -> bool:
    return not any(key == beside or key.startswith(f"{beside}.") for beside in _BESIDE)


def _reason_to_refuse(key: str) -> str:
    parts = key.split(".")
    if parts[:2] == ["data", "train"] and len(parts) >= 4 and parts[3] in _ORDER_OF_PROMPTS:
        return "it decides the order of the prompts, in which the checkpoint holds a place"
    return _REFUSED.get(key, "")


def _default(key: str, defaults: Mapping[str, Any]) -> Any:
    """A key's default; those of sources of data stand below names of one's own."""
    parts = key.split(".")
    if parts[0] == "data" and len(parts) == 4:
        return getattr(DataSourceConfig, parts[3], None)
    return defaults.get(key)


def _text(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], default=str) if key in values else "(not there)"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
