"""Finds a run's newest checkpoint, and the folder of the model that the run began with."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_fipo.checkpoint.folder import faults, latest_first, read_manifest
from megatron_fipo.config import load_config
from megatron_fipo.convert.torch_dist import is_torch_dist
from megatron_fipo.hub.models import model_folder
from megatron_fipo.hub.names import HubError


def find_checkpoint(source: str | Path, base: str | Path | None) -> tuple[Path, Path | None]:
    """The checkpoint to convert and the folder of its config and tokenizer.

    Args:
        source: a checkpoint, a run's folder or the run's checkpoints/, which stand for the newest whole checkpoint.
        base: folder that the user gave; None takes model.path of the run's config.yaml, a folder or a name on the hub,
            if the checkpoint has no config.json.

    Raises:
        ValueError: if a run's folder has no whole checkpoint, or its configuration names a model that is not here.
    """
    path = Path(source)
    checkpoint = path if is_torch_dist(path) or not path.is_dir() else _newest(path)
    if base is not None or (checkpoint / "config.json").is_file():
        return checkpoint, None if base is None else Path(base)
    run_config = checkpoint.resolve().parent.parent / "config.yaml"
    if checkpoint.resolve().parent.name != "checkpoints" or not run_config.is_file():
        return checkpoint, None  # not a run's; the conversion says what is missing
    model = load_config(run_config, []).model
    try:
        named = Path(model_folder(model.path, model.revision))
    except HubError as error:
        raise HubError(f"{run_config} names {error}\nOr name the model's Hugging Face folder with --base.") from error
    if not (named / "config.json").is_file():
        raise ValueError(
            f"{run_config} names model.path={named}, which holds no config.json here (a relative path starts from the "
            f"current directory, {Path.cwd()}). Name the model's Hugging Face folder with --base."
        )
    return checkpoint, named


def _newest(folder: Path) -> Path:
    root = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    damaged: list[str] = []
    for candidate in latest_first(root):
        try:
            files = read_manifest(candidate)
            problems = faults(candidate, sorted(files), files)
        except (ValueError, OSError) as error:
            problems = [str(error)]
        if not problems:
            for words in damaged:
                print(f"warning: {root}/{words}. It is skipped.", file=sys.stderr)
            return candidate
        damaged.append(f"{candidate.name}: {problems[0]}")
    if damaged:
        raise ValueError(f"no checkpoint in {root} is whole ({'; '.join(damaged[:3])}). Restore one from a copy.")
    return folder
