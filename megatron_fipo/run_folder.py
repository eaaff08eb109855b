"""The folder a run writes into, and what is written there before anything is trained.

config.yaml  provenance.json  metrics.jsonl  tensorboard/  evaluation/  checkpoints/  huggingface/
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config import Config, save_resolved
from megatron_fipo.metrics.provenance import save_provenance


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def huggingface(self) -> Path:
        return self.root / "huggingface"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"


def prepare(config: Config) -> tuple[RunFolder, str]:
    """Make the run's folder and write its configuration and provenance. One rank alone calls this.

    With train.resume=false a folder of an earlier run is renamed, never overwritten.

    Returns:
        (the folder, a line about what was set aside, or empty).
    """
    folder = RunFolder(Path(config.run.output_dir))
    note = ""
    if not config.train.resume and folder.root.exists() and any(folder.root.iterdir()):
        aside = _free_name(folder.root)
        folder.root.rename(aside)
        note = f"train.resume=false: the earlier run in {folder.root} was renamed to {aside}"
    folder.root.mkdir(parents=True, exist_ok=True)
    save_resolved(config, folder.root)
    save_provenance(folder.root)
    return folder, note


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate
