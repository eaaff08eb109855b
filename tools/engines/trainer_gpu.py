"""Installs the trainer for GPUs into the environment that runs this: torch, this project, Transformer Engine.

    python3.12 -m venv .venv
    .venv/bin/python tools/engines/trainer_gpu.py                     # all of it; --dry-run only prints the commands
    python3 tools/engines/trainer_gpu.py --offline packed/wheels      # Transformer Engine alone, for the torch there is

Versions are those of constraints.txt and constraints-gpu.txt. Transformer Engine's torch part is published as source
only and is compiled here, by a C++ compiler; nvcc is not needed. It must be compiled against the torch that it will run
with, which pip's isolated builds do not do: they compile against the newest torch, and the result then lacks symbols
or fails in training. The headers of CUDA, cuDNN and NCCL are those that pip has just installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINS = (ROOT / "constraints.txt", ROOT / "constraints-gpu.txt")
TRANSFORMER_ENGINE = "transformer-engine[pytorch,core_cu13]==2.20.2"
TORCH_PART = "transformer-engine-torch"
CUDA_MAJOR = 13
HEADERS = {
    "cuda_runtime.h": "nvidia-cuda-runtime",
    "crt/host_defines.h": "nvidia-cuda-crt",
    "nv/target": "nvidia-cuda-cccl",
    "cublasLt.h": "nvidia-cublas",
    "cudnn.h": "nvidia-cudnn-cu13",
    "nccl.h": "nvidia-nccl-cu13",
}
"""Headers that the torch part includes, and the package that has each. torch requires all but crt and cccl."""
GIB_A_COMPILER = 4
"""Memory that one compiler process is granted: torch's headers are large."""


@dataclass(frozen=True)
class Step:
    """A command, what it is for, and the variables that it needs beside this process's."""

    purpose: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.command])


def pip_install(*arguments: str) -> list[str]:
    pins = [word for file in PINS for word in ("--constraint", str(file))]
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *pins, *arguments]


def torch_step() -> Step:
    """torch first, with the headers that it lacks and the tools of the build: later steps must find them."""
    tools = ["setuptools", "wheel", "packaging", "ninja"]
    return Step("torch, CUDA's headers, build tools", pip_install("torch", "cuda-toolkit[cccl,crt]", *tools))


def project_step() -> Step:
    return Step("this project", pip_install("--editable", str(ROOT)))


def transformer_engine_steps(offline: Path | None, num_jobs: int) -> list[Step]:
    """Transformer Engine, compiled against the torch of this environment.

    Offline, its torch part is first built as a wheel beside the carried files; carried to another machine of this kind,
    the wheel is installed as it is.
    """
    variables, purpose = build_variables(num_jobs), "Transformer Engine, compiled for this torch"
    if offline is None:
        return [Step(purpose, pip_install("--no-build-isolation", TRANSFORMER_ENGINE), variables)]
    carried = ["--no-index", "--find-links", str(offline), "--no-deps"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", *carried, "--no-build-isolation", "--wheel-dir", str(offline), TORCH_PART]
    install = [*pip, "install", *carried, "transformer-engine", "transformer-engine-cu13", TORCH_PART]
    return [Step(purpose, build, variables), Step("Transformer Engine", install)]


def build_variables(num_jobs: int) -> dict[str, str]:
    """Variables of the build of Transformer Engine's torch part."""
    # Headers of the packages that torch runs with, not those of a toolkit that may be of another version.
    headers = {"NVTE_BUILD_USE_NVIDIA_WHEELS": "1"}
    if folders := include_folders():  # an empty CPATH would be the working directory
        headers["CPATH"] = os.pathsep.join(map(str, folders))
    return {
        **headers,
        "NVTE_FRAMEWORK": "pytorch",
        # Its setup would fetch a binary from elsewhere first, which is compiled against NVIDIA's own torch.
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
        # Expert parallelism over NCCL wants a newer NCCL than torch has, and no model here has experts.
        "NVTE_WITH_NCCL_EP": "0",
        "MAX_JOBS": str(num_jobs),
        # ninja is in this environment's folder, which is on PATH only where the environment is activated.
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
    }


def include_folders() -> list[Path]:
    """The include folders of NVIDIA's packages in this environment; none before they are installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else [Path(path) for path in spec.submodule_search_locations or ()]
    return sorted(folder for root in roots for folder in root.glob("*/include"))


def default_num_jobs() -> int:
    """A compiler process for each core that this process may use, as far as memory suffices."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory_gib / GIB_A_COMPILER)))


def check_python() -> None:
    """Refuse an environment that the pins are not made for, before anything is installed.

    Raises:
        SystemExit: with what is wrong, and what to do.
    """
    if sys.version_info[:2] != (3, 12):
        raise SystemExit(
            f"The trainer's versions for GPUs are pinned for Python 3.12; this is {sys.version.split()[0]} "
            f"({sys.executable}). Make an environment with python3.12 -m venv and call this with its Python."
        )
    if sys.prefix == sys.base_prefix:
        raise SystemExit(
            f"{sys.executable} belongs to no virtual environment, and torch would go into the system's packages. "
            "Make one with python3.12 -m venv .venv and call .venv/bin/python."
        )


def check_build() -> None:
    """Refuse to compile where it must fail, which pip would say after minutes and in hundreds of lines.

    Raises:
        SystemExit: with what is wrong, and what to do.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"Transformer Engine needs a C++ compiler, and {compiler} is not on PATH: install it or set CXX."
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise SystemExit(
            f"Transformer Engine needs Python's headers, and {sysconfig.get_path('include')} has no Python.h "
            "(Debian, Ubuntu: python3-dev)."
        )
    torch, cuda = torch_versions()
    if cuda.partition(".")[0] != str(CUDA_MAJOR):
        raise SystemExit(
            f"Transformer Engine is pinned for CUDA {CUDA_MAJOR}, and torch {torch} of {sys.executable} is a build for "
            f"{f'CUDA {cuda}' if cuda else 'the CPU'}. Uninstall it and let pip take PyPI's build "
            "(no --index-url, no --find-links)."
        )
    folders = include_folders()
    missing = {name: owner for name, owner in HEADERS.items() if not any((path / name).exists() for path in folders)}
    if missing:
        raise SystemExit(
            f"Transformer Engine needs the headers {', '.join(missing)}, and no nvidia/*/include of {sys.executable} "
            f"has them. They are in {', '.join(missing.values())}: pip install them as constraints-gpu.txt pins them."
        )


def torch_versions() -> tuple[str, str]:
    """torch's version and its CUDA's, "" for none; from another process, since this one may have begun without torch.

    Raises:
        SystemExit: where torch does not import.
    """
    program = "import torch; print(torch.__version__, torch.version.cuda or '')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"torch does not import in {sys.executable}:\n{result.stderr}")
    version, _, cuda = result.stdout.strip().partition(" ")
    return version, cuda


def verify_step() -> Step:
    """Load what was compiled. torch comes first: it brings the CUDA libraries that Transformer Engine looks for."""
    program = (
        "import torch, transformer_engine.pytorch\n"
        "from megatron.core.extensions.transformer_engine import HAVE_TE\n"
        "assert HAVE_TE, 'Megatron-Core does not find Transformer Engine'\n"
        "print('torch', torch.__version__, 'with Transformer Engine', transformer_engine.__version__)"
    )
    return Step("does it load?", [sys.executable, "-c", program])


def run(step: Step) -> None:
    print(f"# {step.purpose}\n{step}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    if status := subprocess.run(step.command, env=environment | dict(step.environment), check=False).returncode:
        raise SystemExit(f"Could not install {step.purpose} (exit status {status}); the reason is above.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--offline", type=Path, metavar="FOLDER", help="Transformer Engine alone, from carried files")
    parser.add_argument("--jobs", type=int, default=default_num_jobs(), help="compiler processes at a time")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    arguments = parser.parse_args()
    if arguments.dry_run:
        before = [] if arguments.offline else [torch_step(), project_step()]
        steps = [*before, *transformer_engine_steps(arguments.offline, arguments.jobs), verify_step()]
        print(*(f"# {step.purpose}\n{step}" for step in steps), sep="\n")
        return
    if arguments.offline is None:
        check_python()
        run(torch_step())
        run(project_step())
    if arguments.offline is None or not any(arguments.offline.glob(f"{TORCH_PART.replace('-', '_')}-*.whl")):
        check_build()
    for step in transformer_engine_steps(arguments.offline, arguments.jobs):
        run(step)
    run(verify_step())


if __name__ == "__main__":
    main()
