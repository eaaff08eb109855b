"""The values that each part's JSON must hold, and a check of a file for them.

A case's `kind` decides which values it has: a part may hold cases of several kinds.
"""

from __future__ import annotations

from typing import Any

from benchmarks.evidence.report import DONE, FAILED, PARTS, SKIPPED

NUMBER, TEXT, FLAG, LIST = "a number", "text", "true or false", "a list"
ON_GPU = "a number, null on a CPU"
MAYBE = "a number or null"
LIST_ON_GPU = "a list, null on a CPU"

_HEAD = {
    "part": TEXT,
    "name": TEXT,
    "command": TEXT,
    "date": TEXT,
    "device": TEXT,
    "tiny": FLAG,
    "warmup": NUMBER,
    "repeats": NUMBER,
    "budget_s": NUMBER,
    "seconds": NUMBER,
    "hardware": "an object",
    "software": "an object",
    "git": "an object",
    "cases": LIST,
}
_HARDWARE = ("name", "count", "memory_gib", "driver", "compute_capability", "clocks", "cpu", "cores")
_SOFTWARE = (
    "python", "megatron_fipo", "torch", "cuda", "cudnn", "nccl", "triton", "megatron-core", "transformer-engine",
    "nvidia-cudnn-frontend", "flash-attn",
)  # fmt: skip

_ACTOR = {
    "model": TEXT,
    "layers_built": NUMBER,
    "layers": TEXT,
    "attention": TEXT,
    "packing": TEXT,
    "tokens": NUMBER,
    "recompute": TEXT,
    "fp8": TEXT,
    "log_probs_ms": NUMBER,
    "update_ms": NUMBER,
    "update_repeats": NUMBER,
    "tokens_per_s": NUMBER,
    "update_tflop": NUMBER,
    "tflop_per_s": NUMBER,
    "mfu": MAYBE,
    "peak_gib": NUMBER,
    "peak_reserved_gib": ON_GPU,
    "predicted_gib": NUMBER,
    "predicted_parts_gib": "an object",
    "grad_norm": NUMBER,
    "clock_sm_mhz": MAYBE,
}
_PROFILE = {
    "top_kernels": LIST,
    "kernels_ms": ON_GPU,
    "stream_synchronizes": NUMBER,
    "device_to_host_copies": NUMBER,
    "scalar_reads": NUMBER,
    "attention_kernels": LIST_ON_GPU,
}
_AGAINST_BASE = {
    "mean_log_prob_difference": NUMBER,
    "max_log_prob_difference": NUMBER,
    "grad_norm_ratio": NUMBER,
    "update_time_ratio": NUMBER,
}

PROMISED: dict[str, dict[str, str]] = {
    "test_file": {
        "passed": NUMBER,
        "failed": NUMBER,
        "skipped": NUMBER,
        "errors": NUMBER,
        "junit": TEXT,
        "failures": LIST,
        "skips": LIST,
    },
    "suffix_sum": {
        "sequences": NUMBER,
        "length": NUMBER,
        "call_ms": NUMBER,
        "kernels_ms": ON_GPU,
        "copy_ms": NUMBER,
        "copy_gb_per_s": NUMBER,
        "kernels_gb_per_s": ON_GPU,
        "share_of_copy_rate": ON_GPU,
        "largest_error": NUMBER,
        "error_bound": NUMBER,
        "peer_ms": MAYBE,
        "clock_sm_mhz": MAYBE,
    },
    "log_probs": {
        "side": TEXT,
        "hidden_size": NUMBER,
        "rows": NUMBER,
        "tokens": NUMBER,
        "chunk_tokens": MAYBE,
        "forward_ms": NUMBER,
        "backward_ms": NUMBER,
        "extra_gib": NUMBER,
        "tflop_per_s": NUMBER,
        "max_log_prob_error": NUMBER,
        "mean_log_prob_error": NUMBER,
        "max_entropy_error": MAYBE,
        "hidden_gradient_error": NUMBER,
        "weight_gradient_error": NUMBER,
        "clock_sm_mhz": MAYBE,
    },
    "actor": _ACTOR | _PROFILE,
    "scaled": {
        "model": TEXT,
        "layers": TEXT,
        "attention": TEXT,
        "packing": TEXT,
        "tokens": NUMBER,
        "layers_built": LIST,
        "layers_whole": NUMBER,
        "log_probs_ms_per_layer": NUMBER,
        "update_ms_per_layer": NUMBER,
        "whole_log_probs_ms": NUMBER,
        "whole_update_ms": NUMBER,
        "whole_tokens_per_s": NUMBER,
        "whole_mfu": MAYBE,
    },
    "fp8": _ACTOR | _AGAINST_BASE,
    "ablation": _ACTOR | _AGAINST_BASE | {"variant": TEXT},
    "same_mode": {
        "tokens": NUMBER,
        "equal": FLAG,
        "differing_tokens": NUMBER,
        "max_difference": NUMBER,
        "equal_in_eval_mode": FLAG,
        "max_difference_in_eval_mode": NUMBER,
        "equal_in_train_mode": FLAG,
        "max_difference_in_train_mode": NUMBER,
        "equal_when_repeated": FLAG,
    },
    "memory": {
        "model": TEXT,
        "num_bytes": NUMBER,
        "offload_s": LIST,
        "onload_s": LIST,
        "offload_gb_per_s": LIST,
        "onload_gb_per_s": LIST,
        "reserved_gib_after_update": ON_GPU,
        "reserved_gib_after_empty_cache": ON_GPU,
        "empty_cache_s": ON_GPU,
        "allocated_gib_offloaded": ON_GPU,
        "reserved_gib_offloaded": ON_GPU,
        "used_gib_offloaded": ON_GPU,
        "host_rss_gib": LIST,
        "pinned_gib": LIST_ON_GPU,
        "log_probs_unchanged": FLAG,
    },
    "sync": {
        "model": TEXT,
        "transport": TEXT,
        "snapshot": FLAG,
        "num_bytes": NUMBER,
        "num_buckets": NUMBER,
        "bucket_mib": NUMBER,
        "seconds": NUMBER,
        "gb_per_s": NUMBER,
        "pack_s": NUMBER,
        "snapshot_s": MAYBE,
        "arrived_whole": FLAG,
    },
    "checksums": {
        "model": TEXT,
        "num_bytes": NUMBER,
        "sglang_s": NUMBER,
        "vllm_s": NUMBER,
        "sglang_gb_per_s": NUMBER,
        "vllm_gb_per_s": NUMBER,
    },
    "collectives": {"world_size": NUMBER, "backend": TEXT, "groups": LIST},
    "layout": _ACTOR | {"layout": TEXT, "world_size": NUMBER, "tokens_per_s_per_gpu": NUMBER},
    "certify": {"layouts": TEXT, "exit_code": NUMBER, "passed": FLAG, "output": TEXT},
    "training": {
        "engine": TEXT,
        "steps": NUMBER,
        "exit_code": NUMBER,
        "seconds_by_step": LIST,
        "output": TEXT,
    },
}

KINDS = {
    "tests": {"test_file"},
    "future_kl": {"suffix_sum"},
    "log_probs": {"log_probs"},
    "actor": {"actor", "scaled"},
    "fp8": {"fp8"},
    "ablate": {"ablation", "same_mode"},
    "memory": {"memory"},
    "sync": {"sync", "checksums"},
    "cluster": {"collectives", "layout", "certify", "training"},
}
"""Kinds of case that each part holds."""
_WITH_BACKENDS = {"actor", "fp8", "ablate", "memory", "sync"}


def lacks(content: dict[str, Any]) -> list[str]:
    """What a report lacks, one sentence for each value; empty if it is whole."""
    found = [text for key, rule in _HEAD.items() if (text := _breach(content, key, rule, content))]
    if found:
        return found
    if content["part"] not in PARTS:
        return [f"part: {content['part']!r} is none of {', '.join(PARTS)}"]
    found += [f"hardware.{key} is missing" for key in _HARDWARE if key not in content["hardware"]]
    found += [f"software.{key} is missing" for key in _SOFTWARE if key not in content["software"]]
    if content["device"] == "cuda" and not (content["hardware"].get("name") and content["hardware"].get("driver")):
        found.append("hardware: a run on CUDA does not say on which GPU and driver")
    is_done = any(case.get("status") == DONE for case in content["cases"])
    if content["part"] in _WITH_BACKENDS and is_done and not (content.get("backends") or {}).get("layers"):
        found.append("backends.layers is missing though a model was built")
    if not content["cases"]:
        found.append("cases: there are none")
    for case in content["cases"]:
        found += _case_lacks(case, content)
    return found


def _case_lacks(case: dict[str, Any], content: dict[str, Any]) -> list[str]:
    name = case.get("name", "a case without a name")
    if case.get("status") in (SKIPPED, FAILED):
        return [] if case.get("reason") else [f"{name}: {case['status']} without a reason"]
    if case.get("status") != DONE:
        return [f"{name}: status {case.get('status')!r}; it was neither done, skipped nor failed"]
    values = case.get("values", {})
    kind = values.get("kind")
    if kind not in KINDS[content["part"]]:
        return [f"{name}: kind {kind!r} is none of {', '.join(sorted(KINDS[content['part']]))}"]
    breaches = (_breach(values, key, rule, content) for key, rule in PROMISED[kind].items())
    found = [f"{name}: {text}" for text in breaches if text]
    if not isinstance(case.get("seconds"), (int, float)):
        found.append(f"{name}: seconds is missing")
    return found


def _breach(values: dict[str, Any], key: str, rule: str, content: dict[str, Any]) -> str | None:
    if key not in values:
        return f"{key} is missing"
    value, on_cpu = values[key], content.get("device") == "cpu"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        NUMBER: is_number,
        MAYBE: is_number or value is None,
        ON_GPU: is_number or (value is None and on_cpu),
        TEXT: isinstance(value, str) and bool(value),
        FLAG: isinstance(value, bool),
        LIST: isinstance(value, list),
        LIST_ON_GPU: isinstance(value, list) or (value is None and on_cpu),
        "an object": isinstance(value, dict),
    }[rule]
    return None if fits else f"{key} is {value!r}, not {rule}"
