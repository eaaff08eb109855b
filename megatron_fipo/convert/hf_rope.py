"""RoPE as config.json describes it, in any of the places where transformers 4 and 5 and the engines look.

transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters with both inside. A reader of
version 5 takes rope_scaling for the whole of rope_parameters where both are given, and puts rope_theta into it only
where it has none; others read differently. So nothing is chosen here: places that disagree are refused.
"""

from __future__ import annotations

import math
from typing import Any

_DEFAULT_THETA = 10000.0
_TABLES = ("rope_parameters", "rope_scaling")
_KINDS = ("rope_type", "type")
_FACTORS = ("partial_rotary_factor", "rotary_pct", "rope_partial_factor", "factor")
"""Keys that change nothing where they are 1."""


def rope_theta(raw: dict[str, Any], place: str) -> float:
    """RoPE's base.

    Raises:
        ValueError: naming the key, where RoPE is scaled, does not cover the whole head, differs between layers, or has
            several bases.
    """
    tables = {name: _table(raw, place, name) for name in _TABLES}
    for name, table in tables.items():
        _check_table(table, f"{place}: {name}")
    for key in _FACTORS[:-1]:
        _check_factor(raw, key, f"{place}: {key}")
    _check_kind(raw.get("rope_type"), place)
    found = {f"{name}.rope_theta": table["rope_theta"] for name, table in tables.items() if "rope_theta" in table}
    if raw.get("rope_theta") is not None:
        found["rope_theta"] = raw["rope_theta"]
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{place}: {key}={value!r} should be a number above 0.")
    values = {float(value) for value in found.values()}
    if "rope_theta" not in raw and tables["rope_scaling"] and "rope_theta" not in tables["rope_scaling"] and found:
        values.add(_DEFAULT_THETA)  # what transformers 5 takes: rope_scaling stands for all of rope_parameters
        found["rope_scaling.rope_theta, which is missing, means"] = _DEFAULT_THETA
    if len(values) > 1:
        told = ", ".join(f"{key} {value!r}" if "means" in key else f"{key}={value!r}" for key, value in found.items())
        raise ValueError(
            f"{place}: {told}: transformers and the engines would take different ones for the base of RoPE. Keep the "
            "one "
            "that the model was trained with."
        )
    return values.pop() if values else _DEFAULT_THETA


def _table(raw: dict[str, Any], place: str, name: str) -> dict[str, Any]:
    value = raw.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{place}: {name}={value!r} should be an object, or null.")
    return {key: item for key, item in (value or {}).items() if item is not None}


def _check_table(table: dict[str, Any], place: str) -> None:
    for key in _KINDS:
        if key in table:
            _check_kind(table[key], place)
    for key, value in table.items():
        if key in _FACTORS:
            _check_factor(table, key, f"{place}.{key}")
        elif isinstance(value, dict):
            raise ValueError(
                f"{place}.{key}={value!r}: RoPE per kind of layer is not supported; only one for all layers is."
            )
        elif key not in (*_KINDS, "rope_theta"):
            raise ValueError(f"{place}.{key}={value!r}: RoPE scaling is not supported; only plain RoPE is.")


def _check_kind(kind: Any, place: str) -> None:
    if kind not in ("default", None):
        raise ValueError(f"{place}: RoPE scaling of type {kind!r} is not supported; only plain RoPE is.")


def _check_factor(table: dict[str, Any], key: str, place: str) -> None:
    value = table.get(key)
    if value is not None and (isinstance(value, bool) or value != 1):
        raise ValueError(
            f"{place}={value!r} is not supported, only 1: vLLM rotates that part of each head, transformers all of it."
            if key != "factor"
            else f"{place}={value!r}: RoPE scaling is not supported; only plain RoPE is."
        )
