"""Turns reports into Markdown: a section for each, a table for each kind of case, and what was skipped or failed."""

from __future__ import annotations

from typing import Any

from benchmarks.evidence.report import DONE, FAILED, SKIPPED

Column = tuple[str, str, str]
"""(heading, key of the case's values, format)."""

_ACTOR: tuple[Column, ...] = (
    ("layers", "layers_built", "d"),
    ("recompute", "recompute", ""),
    ("log-probs, ms", "log_probs_ms", ",.1f"),
    ("update, ms", "update_ms", ",.1f"),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("TFLOP/s", "tflop_per_s", ",.1f"),
    ("MFU", "mfu", ".1%"),
    ("peak GiB", "peak_gib", ".2f"),
    ("predicted", "predicted_gib", ".2f"),
)
_AGAINST_BASE: tuple[Column, ...] = (
    ("time × base", "update_time_ratio", ".3f"),
    ("mean log-prob difference", "mean_log_prob_difference", ".1e"),
    ("largest", "max_log_prob_difference", ".1e"),
    ("gradient norm × base", "grad_norm_ratio", ".4f"),
)
TABLES: dict[str, tuple[Column, ...]] = {
    "test_file": tuple((name, name, "d") for name in ("passed", "failed", "errors", "skipped")),
    "suffix_sum": (
        ("call, ms", "call_ms", ".3f"),
        ("kernels, ms", "kernels_ms", ".3f"),
        ("copy, ms", "copy_ms", ".3f"),
        ("kernels, GB/s", "kernels_gb_per_s", ",.0f"),
        ("of the copy's rate", "share_of_copy_rate", ".1%"),
        ("largest error", "largest_error", ".1e"),
        ("sum over pairs, ms", "peer_ms", ",.1f"),
    ),
    "log_probs": (
        ("forward, ms", "forward_ms", ",.2f"),
        ("backward, ms", "backward_ms", ",.2f"),
        ("TFLOP/s", "tflop_per_s", ",.1f"),
        ("extra GiB", "extra_gib", ".3f"),
        ("largest log-prob error", "max_log_prob_error", ".1e"),
        ("mean", "mean_log_prob_error", ".1e"),
        ("hidden gradient", "hidden_gradient_error", ".1e"),
        ("weight gradient", "weight_gradient_error", ".1e"),
    ),
    "actor": (
        *_ACTOR,
        ("kernels, ms", "kernels_ms", ",.1f"),
        ("stream waits", "stream_synchronizes", "d"),
        ("copies to host", "device_to_host_copies", "d"),
    ),
    "scaled": (
        ("layers built", "layers_built", ""),
        ("of", "layers_whole", "d"),
        ("update of a layer, ms", "update_ms_per_layer", ",.2f"),
        ("whole log-probs, ms", "whole_log_probs_ms", ",.1f"),
        ("whole update, ms", "whole_update_ms", ",.1f"),
        ("tokens/s", "whole_tokens_per_s", ",.0f"),
        ("MFU", "whole_mfu", ".1%"),
    ),
    "fp8": (*_ACTOR, *_AGAINST_BASE),
    "ablation": (
        ("log-probs, ms", "log_probs_ms", ",.1f"),
        ("update, ms", "update_ms", ",.1f"),
        ("peak GiB", "peak_gib", ".2f"),
        *_AGAINST_BASE,
    ),
    "same_mode": (
        ("tokens", "tokens", ",d"),
        ("equal", "equal", ""),
        ("largest difference", "max_difference", ".1e"),
        ("equal in evaluation mode", "equal_in_eval_mode", ""),
        ("equal in training mode", "equal_in_train_mode", ""),
        ("equal when repeated", "equal_when_repeated", ""),
    ),
    "memory": (
        ("GB", "num_bytes", "GB"),
        ("offload, s: first, then", "offload_s", ""),
        ("onload, s", "onload_s", ""),
        ("offload, GB/s", "offload_gb_per_s", ""),
        ("onload, GB/s", "onload_gb_per_s", ""),
        ("left: tensors, GiB", "allocated_gib_offloaded", ".2f"),
        ("on the device", "used_gib_offloaded", ".2f"),
        ("reserved after an update", "reserved_gib_after_update", ".2f"),
        ("after empty_cache", "reserved_gib_after_empty_cache", ".2f"),
        ("host resident, GiB", "host_rss_gib", ""),
        ("pinned, GiB", "pinned_gib", ""),
        ("log-probs unchanged", "log_probs_unchanged", ""),
    ),
    "sync": (
        ("by", "transport", ""),
        ("GB", "num_bytes", "GB"),
        ("buckets", "num_buckets", "d"),
        ("first, s", "first_seconds", ".3f"),
        ("s", "seconds", ".3f"),
        ("GB/s", "gb_per_s", ",.1f"),
        ("packing alone, s", "pack_s", ".3f"),
        ("of it snapshot, s", "snapshot_s", ".3f"),
        ("arrived whole", "arrived_whole", ""),
    ),
    "checksums": (
        ("GB", "num_bytes", "GB"),
        ("SGLang's, s", "sglang_s", ".3f"),
        ("vLLM's, s", "vllm_s", ".3f"),
    ),
    "layout": (("ranks", "world_size", "d"), *_ACTOR, ("tokens/s a GPU", "tokens_per_s_per_gpu", ",.0f")),
    "certify": (("layouts", "layouts", ""), ("all within their bounds", "passed", "")),
    "training": (("engine", "engine", ""), ("steps", "steps", "d")),
}  # fmt: skip
_COLLECTIVES: tuple[Column, ...] = (
    ("ranks", "size", "d"),
    ("MiB", "mib", ",.2f"),
    ("all-reduce, GB/s", "all_reduce_bus_gb_per_s", ",.1f"),
    ("all-gather", "all_gather_bus_gb_per_s", ",.1f"),
    ("reduce-scatter", "reduce_scatter_bus_gb_per_s", ",.1f"),
    ("broadcast", "broadcast_bus_gb_per_s", ",.1f"),
    ("adds up", "adds_up", ""),
)
_SHOWN_KERNELS = 5


def is_evidence(content: dict[str, Any]) -> bool:
    """Whether a report's numbers mean anything: measured on a GPU, at full size."""
    return content["device"] == "cuda" and not content["tiny"]


def render(reports: list[dict[str, Any]]) -> str:
    """Markdown of all reports, in the order given."""
    return "\n\n".join(_section(content) for content in reports) + "\n"


def _section(content: dict[str, Any]) -> str:
    hardware, software, git = content["hardware"], content["software"], content["git"]
    on = f"{hardware['count']} × {hardware['name']}" if hardware["name"] else f"{hardware['cpu']} (no GPU)"
    tiny = ", tiny shapes: no evidence" if content["tiny"] else ""
    parts = [f"### {content['name']}: {on}, {content['date'][:10]}{tiny}"]
    versions = [
        f"{name} {software.get(key) or 'not installed'}"
        for name, key in (
            ("torch", "torch"), ("CUDA", "cuda"), ("cuDNN", "cudnn"), ("Megatron-Core", "megatron-core"),
            ("Transformer Engine", "transformer-engine"), ("Triton", "triton"),
        )
    ]  # fmt: skip
    revision = (git["revision"] or "unknown revision")[:10] + (" with changes" if git["dirty"] else "")
    backends = content["backends"]
    used = f" Layers: {backends['layers']}; attention: {backends['attention']}." if backends else ""
    driver = f"driver {hardware['driver']}, " if hardware["driver"] else ""
    parts.append(f"    {content['command']}")
    parts.append(
        f"{driver}{', '.join(versions)}; {revision}. Warm-up {content['warmup']}, median of {content['repeats']}; "
        f"{content['seconds']:.0f} s.{used}"
    )
    done = [case for case in content["cases"] if case["status"] == DONE]
    for kind in dict.fromkeys(case["values"]["kind"] for case in done):
        of_kind = [case for case in done if case["values"]["kind"] == kind]
        parts += _of_kind(kind, of_kind)
    for status in (SKIPPED, FAILED):
        lines = [
            f"- {case['name']}: {case['reason'].strip().splitlines()[-1]}"
            for case in content["cases"]
            if case["status"] == status
        ]
        if lines:
            parts.append(f"{status.capitalize()}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _of_kind(kind: str, cases: list[dict[str, Any]]) -> list[str]:
    if kind == "collectives":
        rows = [(group["group"], group) for case in cases for group in case["values"]["groups"]]
        return [_table("group", rows, _COLLECTIVES)]
    parts = [_table("case", [(case["name"], case["values"]) for case in cases], TABLES[kind])]
    if kind == "actor":
        parts.append("Longest kernels:\n\n" + "\n".join(_kernels(case) for case in cases))
    if kind == "test_file":
        failures = [f"- {failure['test']}: {_first_line(failure['message'])}" for case in cases
                    for failure in case["values"]["failures"]]  # fmt: skip
        parts += ["Failures:\n\n" + "\n".join(failures)] if failures else []
    if kind == "training":
        for case in cases:
            steps = case["values"]["seconds_by_step"]
            rows = [(key, {str(n): step.get(key) for n, step in enumerate(steps)}) for key in steps[0]]
            parts.append(_table("seconds", rows, tuple((f"step {n}", str(n), ".2f") for n in range(len(steps)))))
    return parts


def _kernels(case: dict[str, Any]) -> str:
    top = case["values"]["top_kernels"][:_SHOWN_KERNELS]
    return f"- {case['name']}: " + "; ".join(f"`{_short(k['name'])}` {k['ms']:,.1f} ms in {k['calls']}" for k in top)


def _short(name: str) -> str:
    return name.replace("`", "'").replace("|", "/")[:60]


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0][:200]


def _table(first: str, rows: list[tuple[str, dict[str, Any]]], columns: tuple[Column, ...]) -> str:
    lines = [
        "| " + " | ".join([first, *(heading for heading, _, _ in columns)]) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for name, values in rows:
        lines.append("| " + " | ".join([name, *(_cell(values.get(key), form) for _, key, form in columns)]) + " |")
    return "\n".join(lines)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, list):
        return ", ".join(_cell(entry, "") for entry in value)
    if form == "GB":
        return f"{value / 1e9:,.3f}"
    return format(value, form) if form else f"{value:.4g}" if isinstance(value, float) else str(value)
