"""Runs the tests that need a GPU, one file at a time, so that a time-out loses one file's results."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.evidence.report import Settings, SkipCase

ROOT = Path(__file__).resolve().parents[2]
_FOLDER = ROOT / "tests" / "gpu"
_ALL = "tests/gpu"


def case_names(settings: Settings) -> list[str]:
    """One case for each file; on a CPU, where every test is skipped, one for all files."""
    if settings.device == "cpu":
        return [_ALL]
    return [str(path.relative_to(ROOT)) for path in sorted(_FOLDER.glob("test_*.py"))]


@contextmanager
def prepared(settings: Settings) -> Iterator[None]:
    yield None


def run_case(name: str, context: None, settings: Settings) -> dict[str, Any]:
    junit = settings.out / f"junit-{Path(name).stem}.xml"
    junit.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", name, "-q", "-p", "no:cacheprovider", "--junitxml", str(junit),
    ]  # fmt: skip
    if settings.left_s < 10:
        raise SkipCase("less than 10 s of the budget were left")
    try:
        run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=settings.left_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"pytest did not end within the budget's last {error.timeout:.0f} s") from None
    if not junit.exists():
        raise RuntimeError(f"pytest ended with exit code {run.returncode} and no report:\n{run.stdout[-2000:]}")
    values = read_junit(junit)
    print(run.stdout.strip().splitlines()[-1], flush=True)
    return values


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, failures and reasons of skips in pytest's report."""
    cases = list(ET.parse(path).getroot().iter("testcase"))

    def of(tag: str) -> list[dict[str, str]]:
        return [
            {"test": f"{case.get('classname')}::{case.get('name')}", "message": (found.get("message") or "")[:600]}
            for case in cases
            if (found := case.find(tag)) is not None
        ]

    failures, errors, skips = of("failure"), of("error"), of("skipped")
    return {
        "kind": "test_file",
        "passed": len(cases) - len(failures) - len(errors) - len(skips),
        "failed": len(failures),
        "errors": len(errors),
        "skipped": len(skips),
        "failures": failures + errors,
        "skips": skips,
        "junit": path.name,
    }
