"""Resolves the pinned environments for GPUs anew, or checks them: on any machine, without a GPU, with uv.

    python tools/engines/resolve.py --check      # do the pinned files hold all that is needed, without a conflict?
    python tools/engines/resolve.py              # write them anew, the newest that fits

| file | environment |
|---|---|
| constraints-gpu.txt | the trainer's: what CUDA and Transformer Engine need beside constraints.txt |
| tools/engines/sglang-gpu.txt | SGLang servers, complete |
| tools/engines/vllm-gpu.txt | vLLM servers, complete |

It resolves for CPython 3.12 on Linux, x86-64, glibc 2.34 or later (Ubuntu 22.04, RHEL 9), from the metadata of what is
published: no package is downloaded whole. uv evaluates the requirements' conditions for that platform, not for the
machine it runs on, which pip does not.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
PLATFORM = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_34")


@dataclass(frozen=True)
class Environment:
    """One of the environments.

    Attributes:
        file: where its versions are pinned.
        requirements: what was asked for; everything else follows from it.
        is_trainers: whether constraints.txt holds as well, and its packages are left out of the file.
        title: first line of the file.
        installer: which of the tools installs it.
    """

    file: Path
    requirements: tuple[str, ...]
    is_trainers: bool
    title: str
    installer: str


ENVIRONMENTS = {
    "trainer": Environment(
        ROOT / "constraints-gpu.txt",
        (
            "transformer-engine[pytorch,core_cu13]==2.20.2",
            # The headers that torch's own packages lack and the torch part of Transformer Engine is compiled with.
            "cuda-toolkit[cccl,crt]==13.0.3",
            # What an installation without build isolation must find. ninja compiles files side by side.
            *("setuptools", "wheel", "packaging", "ninja"),
        ),
        is_trainers=True,
        title="The trainer on GPUs, beside constraints.txt: what the CUDA build of torch and Transformer Engine need.",
        installer="trainer_gpu.py",
    ),
    "sglang-gpu": Environment(
        ROOT / "tools/engines/sglang-gpu.txt",
        ("sglang==0.5.23", "sglang-router==0.3.2"),
        is_trainers=False,
        title="SGLang server on GPUs: every package that its environment holds.",
        installer="install.py",
    ),
    "vllm-gpu": Environment(
        ROOT / "tools/engines/vllm-gpu.txt",
        ("vllm==0.32.0",),
        is_trainers=False,
        title="vLLM server on GPUs: every package that its environment holds.",
        installer="install.py",
    ),
}


def canonical(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(file: Path) -> dict[str, str]:
    """Versions by canonical name, on Python 3.12."""
    pins = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        requirement, _, condition = line.partition("#")[0].partition(";")
        if "==" in requirement and "< '3.12'" not in condition:
            name, _, version = requirement.strip().partition("==")
            pins[canonical(name)] = version
    return pins


def resolve(environment: Environment, constraints: list[Path]) -> dict[str, str]:
    """Versions of all packages of the environment, by canonical name.

    Raises:
        SystemExit: where the requirements and constraints have no solution, with uv's explanation.
    """
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        raise SystemExit("resolve.py needs uv, which is neither beside this Python nor on PATH: pip install uv")
    command = [uv, "pip", "compile", "-", *PLATFORM, "--no-header", "--no-annotate", "--quiet"]
    command += ["--config-file", str(Path(__file__).with_name("uv.toml"))]
    sources = [str(ROOT / "setup.py")] if environment.is_trainers else []
    for file in constraints:
        command += ["--constraint", str(file)]
    result = subprocess.run(
        command + sources, input="\n".join(environment.requirements), capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"{environment.file.name} does not resolve:\n{result.stderr}")
    lines = [line.split(";")[0].strip() for line in result.stdout.splitlines() if "==" in line]
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines)}


def pinned_elsewhere(environment: Environment) -> dict[str, str]:
    return read_pins(CONSTRAINTS) if environment.is_trainers else {}


def write(environment: Environment) -> None:
    found = resolve(environment, [CONSTRAINTS] if environment.is_trainers else [])
    elsewhere = pinned_elsewhere(environment)
    lines = [
        f"# {environment.title}",
        "# CPython 3.12, Linux x86-64, glibc 2.34 or later. Written by tools/engines/resolve.py, which checks it too;",
        f"# installed by tools/engines/{environment.installer}.",
        *(f"{name}=={version}" for name, version in sorted(found.items()) if name not in elsewhere),
    ]
    environment.file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def problems(environment: Environment) -> list[str]:
    """What is wrong with a pinned file: packages that it lacks, that nothing needs, or of another version."""
    constraints = [environment.file, *([CONSTRAINTS] if environment.is_trainers else [])]
    found, pinned = resolve(environment, constraints), read_pins(environment.file)
    all_pinned = pinned_elsewhere(environment) | pinned
    return [
        *(f"{name}=={version} is missing" for name, version in found.items() if name not in all_pinned),
        *(
            f"{name} is pinned to {all_pinned[name]} and resolves to {version}"
            for name, version in found.items()
            if all_pinned.get(name, version) != version
        ),
        *(f"{name}=={version} is needed by nothing" for name, version in pinned.items() if name not in found),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="environment", help=f"some of {', '.join(ENVIRONMENTS)}; all")
    parser.add_argument("--check", action="store_true", help="only say whether the pinned files hold")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - ENVIRONMENTS.keys():
        parser.error(f"there is no environment {', '.join(sorted(unknown))}; there are {', '.join(ENVIRONMENTS)}")
    wrong = False
    for name in arguments.names or ENVIRONMENTS:
        environment = ENVIRONMENTS[name]
        if not arguments.check:
            write(environment)
        found = problems(environment) if arguments.check else []
        wrong = wrong or bool(found)
        print(f"{name}: {len(read_pins(environment.file))} packages", *found, sep="\n  ")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
