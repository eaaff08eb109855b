"""Several GPUs of one node: collectives, two layouts of the 32B's width, certified layouts, and two training steps.

The training steps are colocated: servers of SGLang on the trainer's own GPUs, which take memory and weights by turns.
On a CPU ranks talk over gloo, and responses are generated in the trainer's processes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.evidence import cluster_ranks, models
from benchmarks.evidence.report import Settings, SkipCase
from megatron_fipo.config import ParallelSection
from megatron_fipo.convert.families import expected_tensors
from megatron_fipo.convert.hf_config import model_shape
from megatron_fipo.convert.hf_writer import DEFAULT_SHARD_BYTES, ShardWriter
from megatron_fipo.parallel.local_ranks import run_local_ranks

ROOT = Path(__file__).resolve().parents[2]
_QUICKSTART = ROOT / "examples" / "quickstart"
_STEPS = 2
_SERVER_LAYERS = 4
_PRELOAD = ("megatron_fipo.certify.preload", "benchmarks.evidence.cluster_ranks")


def _world_size(settings: Settings) -> int:
    if settings.world_size:
        return settings.world_size
    return torch.cuda.device_count() if settings.device == "cuda" else 2


def _layouts(settings: Settings) -> dict[str, ParallelSection]:
    world_size = _world_size(settings)
    half = max(world_size // 2, 1)
    return {
        f"tp{world_size}": cluster_ranks.layout_of(world_size, 1),
        f"tp{half} cp2": cluster_ranks.layout_of(half, 2),
    }


def case_names(settings: Settings) -> list[str]:
    layouts = [f"layout {name}" for name in _layouts(settings)]
    return ["collectives", *layouts, "certify", "colocated"]


@contextmanager
def prepared(settings: Settings) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gpu_evidence_") as folder:
        yield Path(folder)


def run_case(name: str, folder: Path, settings: Settings) -> dict[str, Any]:
    world_size = _world_size(settings)
    if settings.device == "cuda" and not 2 <= world_size <= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise SkipCase(f"{world_size} ranks: 2 or more are needed, each with a CUDA device, and there are {there}")
    if name == "collectives":
        parallel = _layouts(settings)[f"tp{world_size // 2} cp2"]
        rates = _run(cluster_ranks.collectives, settings, parallel)[0]
        backend = "nccl" if settings.device == "cuda" else "gloo"
        return {"kind": "collectives", "world_size": world_size, "backend": backend, "groups": rates}
    if name.startswith("layout "):
        return _layout(name.removeprefix("layout "), folder, settings)
    if name == "certify":
        return _certify(settings)
    return _training(folder, settings)


def _run(target: Any, settings: Settings, *args: Any) -> list[Any]:
    timeout_s = max(settings.left_s, 30.0)
    return run_local_ranks(target, _world_size(settings), *args, settings, preload=_PRELOAD, timeout_s=timeout_s)


def _layout(name: str, folder: Path, settings: Settings) -> dict[str, Any]:
    found = _run(cluster_ranks.layout, settings, _layouts(settings)[name], folder)
    worst = {key: max((of_rank[key] or 0.0) for of_rank in found) for key in ("peak_gib", "update_ms", "log_probs_ms")}
    world_size = _world_size(settings)
    return {
        "kind": "layout",
        "layout": name,
        "world_size": world_size,
        **found[0],
        **worst,
        "tokens_per_s_per_gpu": round(found[0]["tokens_per_s"] / world_size, 2),
    }


def _certify(settings: Settings) -> dict[str, Any]:
    """Run megatron-fipo certify: training in each layout against one process, on small random models."""
    if settings.device == "cuda":
        layouts, choices = "tp2,cp2,tp2+sp+cp2,dp2", ["--dtype", "bfloat16", "--steps", "1", "--updates", "2"]
    else:
        layouts, choices = "cp2", ["--steps", "1", "--updates", "1", "--longest-response", "24"]
    command = [
        sys.executable, "-m", "megatron_fipo.cli", "certify", str(_QUICKSTART / "fipo.yaml"), "--model", "small",
        "--layouts", layouts, *choices,
    ]  # fmt: skip
    run = _command(command, settings)
    return {
        "kind": "certify",
        "layouts": layouts,
        "exit_code": run.returncode,
        "passed": run.returncode == 0,
        "output": (run.stdout + run.stderr)[-4000:] or "nothing",
    }


def _training(folder: Path, settings: Settings) -> dict[str, Any]:
    """Train two steps by torchrun: servers, handover of memory and weights, updates, and the way back."""
    on_gpu = settings.device == "cuda"
    world_size = _world_size(settings)
    if on_gpu and not settings.server_python:
        raise SkipCase("--server-python was not given: an interpreter that has SGLang")
    if on_gpu and world_size != 8:
        raise SkipCase(f"two servers of four GPUs each need 8 CUDA devices; {world_size} are used")
    model = folder / "model"
    if on_gpu:
        write_model(model, "7b", _SERVER_LAYERS, settings.device)
    path = folder / "training.yaml"
    path.write_text(yaml.safe_dump(_training_config(model, folder, settings)), encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size), "-m",
        "megatron_fipo.train", str(path),
    ]  # fmt: skip
    run = _command(command, settings)
    output = (run.stdout + run.stderr)[-6000:]
    metrics = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    steps = [line for line in lines if "optim/grad_norm" in line]
    if run.returncode or len(steps) != _STEPS:
        raise RuntimeError(f"training ended with exit code {run.returncode} after {len(steps)} steps:\n{output}")
    times = [{key: value for key, value in step.items() if key.startswith(("time_s/", "sync/"))} for step in steps]
    return {
        "kind": "training",
        "engine": "sglang, 2 servers of 4 GPUs, colocated" if on_gpu else "in process",
        "steps": len(steps),
        "exit_code": run.returncode,
        "seconds_by_step": times,
        "output": output or "nothing",
    }


def _training_config(model: Path, folder: Path, settings: Settings) -> dict[str, Any]:
    on_gpu = settings.device == "cuda"
    response, world_size = (1024 if on_gpu else 16), _world_size(settings)
    config: dict[str, Any] = {
        "algorithm": "fipo",
        "run": {"name": "evidence", "output_dir": str(folder / "run"), "num_sample_prints": 0},
        "model": {"path": str(_QUICKSTART / "base")},
        "data": {"train": {"chains": {"kind": "chain_arithmetic", "verifier": "benchmarks.evidence.judge:by_length"}}},
        "rollout": {
            "num_prompts": 16 if on_gpu else 2, "num_samples_per_prompt": 8 if on_gpu else 4, "max_prompt_tokens": 32,
            "max_response_tokens": response,
        },
        "sampling": {"dynamic": False},
        "train": {"num_steps": _STEPS, "num_minibatches": 2, "resume": False},
        "parallel": {"cp": 2},
        "batch": {"max_tokens_per_microbatch": 8 * (response + 64)},
        "metrics": {"tensorboard": False},
        "checkpoint": {"export_huggingface": False},
    }  # fmt: skip
    if on_gpu:
        config["model"] = {"path": str(model), "dtype": "bfloat16"} | models.layer_choice()
        config["rollout"]["engine"] = "sglang"
        config["servers"] = {
            "python": settings.server_python, "num_per_node": 2, "tp": 4, "placement": "colocated",
            "keep_snapshot": False,
        }  # fmt: skip
        config["parallel"] = {"tp": world_size // 2, "cp": 2, "sequence_parallel": True}
    return config


def write_model(folder: Path, name: str, layers: int, device: str) -> None:
    """Write a whole Hugging Face folder with random weights and the quick-start's tokenizer, for servers to read."""
    size = models.size_of(name, tiny=False)
    models.write_folder(folder, size, layers, longest=4096)
    writer = ShardWriter(folder, DEFAULT_SHARD_BYTES)
    generator = torch.Generator(device).manual_seed(0)
    for key, shape in expected_tensors(model_shape(size.raw(layers, 4096), str(folder))).items():
        values = torch.randn(shape, generator=generator, device=device) / shape[-1] ** 0.5
        writer.add(key, (1 + 0.1 * values if "norm" in key else values).bfloat16().cpu())
    writer.finish()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_QUICKSTART / "base" / file, folder)


def _command(command: list[str], settings: Settings) -> subprocess.CompletedProcess[str]:
    if settings.left_s < 10:
        raise SkipCase("less than 10 s of the budget were left")
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=settings.left_s + 20, check=False)
