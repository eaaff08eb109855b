"""Records the results of small trainings, so that a change of the code can show that it changes no number.

    python tools/record_numbers.py write before.json
    python tools/record_numbers.py compare before.json

Trains the quick-start for 3 steps with each of FIPO and DAPO, context parallelism 1 and 2, and 3 seeds. A record holds
every metric that is no time, and hashes of the weights at the end and of the responses. Comparing is exact: a sum in
another order shows. Records are of one machine and one set of packages; another processor rounds differently.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).parents[1]
ALGORITHMS, CONTEXT_PARALLEL, SEEDS = ("fipo", "dapo"), (1, 2), (0, 1, 2)
NUM_STEPS = 3
_TIMES = ("time_s/", "perf/tokens_per_s")
_NUM_SHOWN = 8

Record = dict[str, dict[str, Any]]
"""Name of a run -> its results, by name."""


def main(arguments: Sequence[str]) -> int:
    """Write or compare. Returns the exit status, 1 where anything differs."""
    parser = argparse.ArgumentParser(description="Record the results of small trainings, or compare with a record.")
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file", type=Path, metavar="FILE", help="the record, JSON")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose names hold it, such as cp2_seed0")
    given = parser.parse_args(arguments)
    before: Record = json.loads(given.file.read_text()) if given.action == "compare" else {}
    runs = [run for run in itertools.product(ALGORITHMS, CONTEXT_PARALLEL, SEEDS) if given.only in _name(*run)]
    if not runs:
        parser.error(f"no run's name holds {given.only!r}; one of them is {_name('fipo', 2, 0)}")
    now: Record = {}
    num_different = 0
    with tempfile.TemporaryDirectory() as folder:
        for run in runs:
            name = _name(*run)
            now[name] = train(Path(folder) / name, *run)
            if given.action == "write":
                print(f"{name}: {len(now[name])} values", flush=True)
                continue
            differences = list(different(before.get(name, {}), now[name]))
            num_different += bool(differences)
            found = f"{len(differences)} differ" if differences else f"{len(now[name])} values, all the same"
            print(f"{name}: {found}")
            for line in differences[:_NUM_SHOWN]:
                print(f"    {line}")
            sys.stdout.flush()
    if given.action == "write":
        given.file.write_text(json.dumps(now, indent=1) + "\n")
        return 0
    print(f"{num_different} of {len(runs)} runs differ")
    return int(bool(num_different))


def _name(algorithm: str, cp: int, seed: int) -> str:
    return f"{algorithm}_cp{cp}_seed{seed}"


def train(folder: Path, algorithm: str, cp: int, seed: int) -> dict[str, Any]:
    """The results of one training, by name.

    Raises:
        RuntimeError: if it fails.
    """
    command = [
        *(sys.executable, "-m", "megatron_fipo.cli", "train", "examples/quickstart/fipo.yaml", "--nproc", str(cp)),
        *(f"algorithm={algorithm}", f"parallel.cp={cp}", f"run.seed={seed}", f"run.output_dir={folder}"),
        *(f"train.num_steps={NUM_STEPS}", "evaluation.every_num_steps=2", "metrics.tensorboard=false"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder.name} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return dict(_values(folder))


def _values(folder: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate((folder / "metrics.jsonl").read_text().splitlines()):
        for name, value in json.loads(line).items():
            if not name.startswith(_TIMES):
                yield f"line {number}: {name}", value
    for file in sorted((folder / "huggingface").glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:
            for name in sorted(weights.keys()):
                yield f"weight {name}", hashlib.sha256(weights.get_tensor(name).tobytes()).hexdigest()
    for file in sorted((folder / "samples").rglob("*.jsonl")):
        yield f"responses {file.name}", hashlib.sha256(file.read_bytes()).hexdigest()


def different(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A line for every value that is not the same in both, or is in one alone."""
    for name in dict.fromkeys((*before, *now)):
        old, new = (values.get(name, "nothing") for values in (before, now))
        if old != new:
            yield f"{name}: {old} before, {new} now"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
