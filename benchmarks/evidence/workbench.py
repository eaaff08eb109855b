"""The setting of every part with an actor: process groups of one rank, a temporary folder, and earlier results."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.evidence import machine, models
from benchmarks.evidence.models import Packing, Size
from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import Config, ParallelSection
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.groups import ParallelGroups


@dataclass
class Workbench:
    """The setting of one process.

    Attributes:
        backends: layers and attention of the last actor; goes into the report.
        kept: what one case leaves for the next; a process that takes over has to make it again.
    """

    ranks: ParallelGroups
    folder: Path
    backends: dict[str, str] | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    def config(self, size: Size, layers: int, packing: Packing, **choices: Any) -> Config:
        """Write an actor's folder, and return its configuration."""
        folder = models.write_folder(self.folder / f"{size.name}-{layers}", size, layers, max(packing.lengths))
        return models.config_for(folder, packing, **choices)

    def build(self, config: Config) -> Actor:
        """Build an actor, and note its layers."""
        actor = models.build_actor(config, self.ranks)
        self.backends = machine.backends(actor)
        return actor

    def note(self, values: dict[str, Any]) -> None:
        """Note a measured actor's layers and attention, of which the latter is known only after a forward pass."""
        self.backends = {"layers": values["layers"], "attention": values["attention"]}


@contextmanager
def workbench() -> Iterator[Workbench]:
    """Groups of one rank and a folder, gone at the end."""
    ranks = parallel_groups.initialize(ParallelSection(), seed=0)
    try:
        with tempfile.TemporaryDirectory(prefix="gpu_evidence_") as folder:
            yield Workbench(ranks, Path(folder))
    finally:
        parallel_groups.shut_down()
