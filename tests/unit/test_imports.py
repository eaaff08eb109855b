"""Holds the dependency directions by reading the imports of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_fipo

PACKAGE = Path(megatron_fipo.__file__).parent

ALLOWED: dict[str, set[str]] = {
    "quiet": set(),
    "cuda_start": set(),
    "system": {"system"},
    "system.error_net": {"config", "system"},
    "config": {"config", "verifiers.names"},
    "metrics.reductions": set(),
    "metrics": {"config", "metrics", "metrics.tables"},
    "metrics.tables": set(),
    "verifiers.names": set(),
    "verifiers": {"config", "verifiers.names", "verifiers"},
    "rl": {"config", "verifiers", "metrics.reductions", "rl"},
    "hub": {"config", "hub"},
    "data": {"config", "hub", "rl", "verifiers", "data"},
    "parallel": {"config", "rl", "metrics.reductions", "parallel"},
    "convert": {"config", "parallel", "convert"},
    "convert.offline": {
        *("config", "data", "hub", "parallel", "actor", "checkpoint", "convert", "convert.offline", "system.error_net")
    },
    "actor": {"config", "rl", "metrics.reductions", "parallel", "convert", "actor"},
    "checkpoint": {"config", "parallel", "convert", "actor", "checkpoint"},
    "rollout.engine": {"rl", "metrics.reductions"},
    "environments": {"config", "rl", "verifiers", "rollout.engine", "environments"},
    "rollout": {
        *("config", "rl", "parallel", "convert", "metrics.reductions", "environments", "rollout", "rollout.engine")
    },
    "console": {"config", "console"},
    "traces": {"traces"},
    "analysis": {"analysis", "console", "data", "run.samples", "traces"},
    "certify.command": {"config", "hub", "parallel", "certify"},
    "certify": {"config", "rl", "parallel", "convert", "metrics.reductions", "actor", "certify"},
    "conformance": {"config", "rl", "conformance"},
    "preflight": {"config", "convert", "data", "hub", "preflight"},
    "launch": {"config", "preflight", "launch"},
    "evaluation.evaluate_command": {"config", "verifiers", "evaluation"},
    "evaluation.scores": {"rl", "verifiers"},
    "evaluation": {
        *("config", "hub", "data", "rl", "verifiers", "parallel", "convert", "environments"),
        *("rollout", "rollout.engine", "console", "evaluation", "evaluation.scores", "system.error_net"),
    },
    "report": {*("analysis", "config", "convert", "preflight", "traces", "evaluation.scores", "run.samples", "report")},
    "run.folder": {"config", "metrics"},
    "run.samples": {"console", "metrics.tables"},
    "run.samples_command": {"run.samples"},
    "run.serve_command": {"config", "hub", "rollout", "run.folder"},
    "run.train_command": {"config", "parallel", "train"},
    "run.validate_command": {"config", "hub", "preflight", "verifiers"},
    "run": {
        *("config", "metrics", "metrics.reductions", "hub", "data", "rl", "verifiers", "parallel", "convert"),
        *("actor", "checkpoint", "environments", "rollout", "rollout.engine", "console"),
        *("evaluation", "run", "run.folder", "run.samples", "system.error_net", "traces"),
    },
    "starters": {"starters"},
    "starters.own_data": {"verifiers"},
    "train": {"rl", "parallel", "actor", "rollout", "console", "run", "system.error_net"},
    "cli": {"config", "system.error_net"},
}
"""What each part of the package may import of it; the bare package (its version) is open to all."""

OPEN_TO_ALL = {"system", "quiet", "cuda_start"}
"""What the operating system, the process and its libraries need: they import nothing else of the package."""

TORCH_FREE = {"config", "hub", "preflight", "launch", "analysis", "report"}
TORCH_FREE_REFUSED = ("torch", "megatron", "transformers")
PURE = {"config", "metrics.reductions", "rl"}
"""Parts that never see a process group or Megatron."""
PURE_REFUSED = ("torch.distributed", "megatron")

COLLECTIVES = {
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "init_process_group",
    "irecv",
    "isend",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
}


def part_of(module: str) -> str:
    """The part of the package that a module belongs to: config, metrics.reductions, metrics, rl, …"""
    for part in sorted(ALLOWED, key=len, reverse=True):
        if module == part or module.startswith(f"{part}."):
            return part
    return module.split(".")[0]


def imported_names(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; `from a import b` gives a.b, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def local_names(tree: ast.AST, target: str) -> set[str]:
    """Dotted expressions that mean the module `target` in this file, such as dist for torch.distributed."""
    names = {target}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname for alias in node.names if alias.name == target and alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name for alias in node.names if f"{node.module}.{alias.name}" == target}
    return names


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def violations(module: str, source: str) -> list[str]:
    """What a module of the package (named without the package's name) does against the rules."""
    tree, part, found = ast.parse(source), part_of(module), []
    if part not in ALLOWED:
        return [f"{module}: no rule says what it may import"]
    is_package = (PACKAGE / module.replace(".", "/")).is_dir()
    package = f"megatron_fipo.{module}" if is_package else f"megatron_fipo.{module}".rpartition(".")[0]
    for line, name in imported_names(tree, package):
        inner = name.removeprefix("megatron_fipo.")
        if inner != name and inner != "__version__" and part_of(inner) not in ALLOWED[part] | OPEN_TO_ALL:
            found.append(f"{module}:{line} imports {name}")
        heavy = TORCH_FREE_REFUSED if part in TORCH_FREE else PURE_REFUSED if part in PURE else ()
        if any(within(name, refused) for refused in heavy):
            found.append(f"{module}:{line} imports {name}")
        if within(name, "megatron.core.parallel_state") and module != "parallel.groups":
            found.append(f"{module}:{line} reads megatron.core.parallel_state")
        if name.startswith("torch.distributed.") and name.rpartition(".")[2] in COLLECTIVES and part != "parallel":
            found.append(f"{module}:{line} imports the collective {name}")

    distributed = local_names(tree, "torch.distributed")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        if part in PURE and f"{owner}.{node.attr}" == "torch.distributed":
            found.append(f"{module}:{node.lineno} uses torch.distributed")
        if owner in distributed and node.attr in COLLECTIVES and part != "parallel":
            found.append(f"{module}:{node.lineno} uses the collective {owner}.{node.attr}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, path


def test_every_module_keeps_the_directions() -> None:
    found = [problem for name, path in modules() for problem in violations(name, path.read_text(encoding="utf-8"))]
    assert found == []


def test_the_package_itself_imports_nothing_of_its_own() -> None:
    """What stands under TYPE_CHECKING is for type checkers; test_padded.py looks at what is loaded."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    roots = {name.partition(".")[0] for _, name in imported_names(tree, "megatron_fipo")}
    assert roots <= {"__future__", "importlib", "typing"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "import torch"),
        ("config", "from megatron.core import mpu"),
        ("config", "def f():\n    import transformers"),
        ("config", "from megatron_fipo.rl.trajectory import Trajectory"),
        ("config", "from ..rl import types"),
        ("config.loading", "import torch"),
        ("config.loading", "from ..rl import types"),
        ("config.sections.data", "from megatron_fipo.verifiers.registry import load_verifier"),
        ("verifiers.names", "from megatron_fipo.config import Config"),
        ("run.folder", "from ..rl import types"),
        ("metrics.reductions", "from megatron_fipo.config import Config"),
        ("console.tables", "from megatron_fipo.rl.trajectory import Trajectory"),
        ("rl.objective", "from megatron_fipo.parallel.groups import ParallelGroups"),
        ("rl.objective", "from megatron_fipo.metrics.sinks import open_sinks"),
        ("rl.objective", "from megatron_fipo.metrics import sinks"),
        ("rl.objective", "import torch.distributed as dist"),
        ("rl.objective", "from torch import distributed"),
        ("rl.objective", "import torch\ntorch.distributed.get_rank()"),
        ("rl.objective", "import megatron.core"),
        ("data.sources", "from megatron_fipo.parallel import groups"),
        ("convert.mapping", "from ..rl import types"),
        ("actor.actor", "from megatron_fipo.rollout.engine import RolloutEngine"),
        ("actor.actor", "from ..rollout import engine"),
        ("rollout.in_process", "from megatron_fipo.actor import actor"),
        ("rollout.in_process", "from megatron_fipo.train import main"),
        ("actor.actor", "from megatron.core import parallel_state"),
        ("actor.actor", "import megatron.core.parallel_state as mpu"),
        ("parallel.cp_layout", "from megatron.core.parallel_state import get_tensor_model_parallel_rank"),
        ("actor.actor", "import torch.distributed as dist\ndist.all_reduce(x)"),
        ("actor.actor", "from torch import distributed as d\nd.barrier()"),
        ("train", "import torch\ntorch.distributed.broadcast(x, 0)"),
        ("train", "from torch.distributed import all_gather_object"),
        ("train", "import torch.distributed as dist\nreduce = dist.all_reduce"),
        ("system.text_hygiene", "from megatron_fipo.config import Config"),
        ("convert.stream", "from megatron_fipo.convert.offline.verification import verify_weights"),
        ("cli", "from megatron_fipo.run.train_command import run"),
        ("preflight.command", "from megatron_fipo.run.validate_command import run"),
        ("train", "from megatron_fipo.cli import main"),
        ("conformance.comparison", "from megatron_fipo.parallel.objective import Objective"),
        ("newcomer", "import os"),
    ],
)
def test_a_violation_is_noticed(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("metrics.provenance", "from megatron_fipo import __version__"),
        ("config.loading", "from megatron_fipo.system.text_hygiene import clean_text"),
        (
            "rl.objective",
            "from megatron_fipo.metrics.reductions import Mean\nfrom megatron_fipo.config import FipoConfig",
        ),
        ("rollout.in_process", "import torch.distributed as dist\nrank = dist.get_rank()"),
        ("parallel.groups", "from megatron.core import parallel_state\nimport torch.distributed as d\nd.all_reduce(x)"),
        (
            "train",
            "from megatron_fipo.actor.actor import Actor\nfrom megatron_fipo.rollout.in_process.engine import Engine",
        ),
        ("actor.actor", "queue.gather(x)\nimport asyncio\nasyncio.gather(x)"),
    ],
)
def test_what_is_allowed_is_allowed(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_the_configuration_loads_without_torch_or_megatron() -> None:
    code = (
        "import sys, megatron_fipo.config as config; config.validate_model_layout; config.load_config(None); "
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PACKAGE.parent, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("verifier", "found"),
    [("exact", []), ("tests.end_to_end.verifiers:always_right", ["asyncio"]), ("http://127.0.0.1:9", ["http.client"])],
)
def test_a_verifiers_worker_imports_what_its_kind_needs(verifier: str, found: list[str]) -> None:
    """Each rank has one. What it judges with is there when it has loaded: once confined, it can read no modules."""
    code = (
        "import sys, megatron_fipo.verifiers.worker; from megatron_fipo.verifiers.registry import load_verifier; "
        f"load_verifier({verifier!r}); print(sorted({{'asyncio', 'http.client', 'torch'}} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PACKAGE.parent, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(found)
