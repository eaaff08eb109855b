"""Describes the machine: hardware, versions, clocks, and the layers and attention that an actor really has."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.actor.actor import Actor
from megatron_fipo.metrics.provenance import run_provenance
from megatron_fipo.preflight.hardware import GPUS, Gpu

GIB = 2**30
_ALSO = (
    "triton", "transformer-engine-torch", "transformer-engine-cu13", "transformer-engine-cu12", "nvidia-cudnn-frontend",
    "flash-attn", "flash-attn-3", "cut-cross-entropy", "verl",
)  # fmt: skip
_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "persistence_mode")
_ROUTE_OF_GPU = (("H200", "h200"), ("B200", "b200"), ("H100 80GB HBM3", "h100-80gb"), ("A100", "a100-80gb"))
"""Parts of the driver's names. An H100 with PCIe or NVL is another GPU than the data sheet's that preflight knows."""


def hardware(device: str) -> dict[str, Any]:
    """The GPU, or the CPU where none is used. What cannot be read is null."""
    found: dict[str, Any] = {
        "name": None, "count": 0, "memory_gib": None, "driver": None, "compute_capability": None, "clocks": None,
        "cpu": _cpu_name(), "cores": os.cpu_count(),
    }  # fmt: skip
    if device != "cuda":
        return found
    properties = torch.cuda.get_device_properties(0)
    asked = _nvidia_smi("driver_version", *_CLOCKS)
    return found | {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / GIB, 2),
        "driver": asked.pop("driver_version", None),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "clocks": asked or None,
    }


def software() -> dict[str, Any]:
    """Versions of all that the numbers depend on, null where a package is not installed."""
    versions: dict[str, Any] = dict(run_provenance()["versions"])
    versions |= {name: _installed(name) for name in _ALSO}
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None  # type: ignore
    return versions | {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": _cudnn_version(), "nccl": nccl}


def _cudnn_version() -> int | str | None:
    """torch's number, or why it has none: it refuses a cuDNN that another package has loaded."""
    try:
        return torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    except RuntimeError as error:
        return str(error)


def git_state() -> dict[str, Any]:
    """The revision, or why there is none; a copy without its history may be named by an environment variable."""
    state: dict[str, Any] = run_provenance()["git"]
    if state["revision"] is None and (named := os.environ.get("GPU_EVIDENCE_REVISION")):
        return {"revision": named, "dirty": None, "reason": "named by GPU_EVIDENCE_REVISION"}
    return state


def sm_clock_mhz(device: str) -> float | None:
    """The clock at this moment, null where it cannot be read."""
    value = _nvidia_smi("clocks.sm").get("clocks.sm") if device == "cuda" else None
    return value if isinstance(value, float) else None


def known_gpu(device: str) -> Gpu | None:
    """This GPU as preflight knows it; None where its peak is not known, and with it no MFU."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name(0)
    return next((GPUS[key] for part, key in _ROUTE_OF_GPU if part in name), None)


def backends(actor: Actor) -> dict[str, str]:
    """Whose layers an actor has, and the attention's class; with Transformer Engine its choice after a forward pass."""
    modules = [module for model in actor.models for module in model.modules()]
    if any(type(module).__name__.startswith("TE") for module in modules):  # Megatron's names for Transformer Engine's
        return {"layers": "Transformer Engine", "attention": f"Transformer Engine: {_engine_choice()}"}
    attention = {type(module).__name__ for module in modules if type(module).__name__.endswith("Attention")}
    return {"layers": "Megatron's local layers", "attention": ", ".join(sorted(attention - {"SelfAttention"}))}


def _engine_choice() -> str:
    """The backend that Transformer Engine's last attention call took, by its own record."""
    try:
        from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as module
    except ImportError:
        return "choice unknown"
    noted = getattr(module, "_attention_backends", {})
    if noted.get("use_fused_attention"):
        return f"fused, {noted.get('fused_attention_backend')}"
    if noted.get("use_flash_attention"):
        return f"flash, {noted.get('flash_attention_backend')}"
    return "unfused" if noted.get("use_unfused_attention") else "choice unknown"


def _nvidia_smi(*fields: str) -> dict[str, Any]:
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    found: dict[str, Any] = {}
    for name, text in zip(fields, answer.strip().splitlines()[0].split(", "), strict=False):
        is_number = re.fullmatch(r"\d+(\.\d+)?", text) and name != "driver_version"
        found[name] = float(text) if is_number else None if text.startswith("[") else text
    return found


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", path.read_text()) if path.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
