"""A part's report: one JSON file, rewritten whole after every case, so that what ends a run early loses one case.

Imports nothing but the standard library, so that the process that watches over a part can read it without torch.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("tests", "future_kl", "log_probs", "actor", "fp8", "ablate", "memory", "sync", "cluster")
"""All parts; the module `part_NAME` holds each."""

SIZES = ("0.5b", "1.5b", "7b")
WITH_SIZES = ("actor", "fp8", "ablate", "memory", "sync")
"""Parts that are asked for some sizes, or take their own choice."""

PENDING, RUNNING, DONE, SKIPPED, FAILED = "pending", "running", "done", "skipped", "failed"


@dataclass(frozen=True)
class Settings:
    """The settings from the command line.

    Attributes:
        part: one of PARTS.
        sizes: sizes of models, for the parts that have a choice; empty takes the part's own.
        device: cuda or cpu.
        tiny: shapes of a few tokens and channels, to see that the script works; its numbers are no evidence.
        out: folder of the reports.
        budget_s: no case begins after this many seconds.
        started_at: when the part began, by time.time().
        command: as typed.
        warmup, repeats: calls before those that count, and those that count.
        measurement_s: a measurement ends after this time, with the repeats that it has.
        server_python: interpreter that has SGLang, for the case `colocated` of `cluster`.
        world_size: ranks of `cluster`; 0 takes all GPUs, or two on a CPU.
    """

    part: str
    sizes: tuple[str, ...]
    device: str
    tiny: bool
    out: Path
    budget_s: float
    started_at: float
    command: str
    warmup: int = 3
    repeats: int = 10
    measurement_s: float = 20.0
    server_python: str | None = None
    world_size: int = 0

    @property
    def name(self) -> str:
        """Name of the report's file, without its ending."""
        return "-".join((self.part, *self.sizes))

    @property
    def path(self) -> Path:
        """The report's file."""
        return self.out / f"{self.name}.json"

    @property
    def left_s(self) -> float:
        """Seconds left of the budget."""
        return self.budget_s - (time.time() - self.started_at)


class SkipCase(Exception):  # noqa: N818 - not an error
    """A case that cannot run here; the message says why."""


@dataclass
class Report:
    """The contents of a part's JSON file."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def begin(cls, settings: Settings) -> Report:
        """An empty report, written at once."""
        content = {
            "part": settings.part,
            "name": settings.name,
            "command": settings.command,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(settings.started_at)),
            "device": settings.device,
            "tiny": settings.tiny,
            "warmup": settings.warmup,
            "repeats": settings.repeats,
            "budget_s": settings.budget_s,
            "seconds": 0.0,
            "hardware": None,
            "software": None,
            "git": None,
            "backends": None,
            "cases": [],
        }
        report = cls(settings.path, content)
        report.write()
        return report

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read the report from a file."""
        return cls(path, json.loads(path.read_text(encoding="utf-8")))

    @property
    def cases(self) -> list[dict[str, Any]]:
        """All cases, in order."""
        cases: list[dict[str, Any]] = self.content["cases"]
        return cases

    def plan(self, names: list[str]) -> None:
        """Note what cases there will be."""
        known = {case["name"] for case in self.cases}
        for name in names:
            if name not in known:
                self.cases.append({"name": name, "status": PENDING, "reason": None, "seconds": None, "values": {}})
        self.write()

    def with_status(self, *statuses: str) -> list[dict[str, Any]]:
        """Cases of one of these statuses."""
        return [case for case in self.cases if case["status"] in statuses]

    def write(self) -> None:
        """Replace the file at once: a reader finds the old contents or the new."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)
