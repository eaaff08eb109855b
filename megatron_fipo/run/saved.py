"""A run's state on disk: saved, found again, checked, and given back to the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fipo.actor.actor import Actor
from megatron_fipo.checkpoint import folder as checkpoint_folder
from megatron_fipo.checkpoint.torch_dist import (
    Keeping,
    PendingCheckpoint,
    begin_checkpoint,
    find_whole_checkpoint,
    load_checkpoint,
    load_loop_state,
)
from megatron_fipo.config import Config, check_resume, recorded_values, with_absolute_paths
from megatron_fipo.console.console import Console
from megatron_fipo.convert.dtypes import MODEL_DTYPES
from megatron_fipo.convert.stream import export_folder
from megatron_fipo.parallel import exchange, rng_state
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.run.folder import RunFolder


class SavedRun:
    """Checkpoints of a run and the rollouts recorded since. Its methods are collective over all ranks."""

    def __init__(
        self,
        config: Config,
        actor: Actor,
        folder: RunFolder,
        ledger: RolloutLedger,
        console: Console,
        recorded: Config | None = None,
    ) -> None:
        """
        Args:
            recorded: the configuration as it is saved and compared, with names where `config` has this machine's
                folders; None: the same.
        """
        self._recorded = config if recorded is None else recorded
        section = config.checkpoint
        self._config, self._actor, self._folder, self._ledger, self._console = config, actor, folder, ledger, console
        self._keeping = Keeping(section.keep_last, section.keep_every_num_steps)
        self._pending: PendingCheckpoint | None = None

    def save(self, loop_state: Mapping[str, Any], *, in_background: bool = False) -> None:
        """Write a checkpoint; one that is still being written is waited for first.

        Args:
            loop_state: what the loop goes on from; next_step and, between the updates of a step, num_updates name it.
            in_background: return as soon as the snapshot is taken, where the configuration allows it.

        Raises:
            CheckpointError: if this or the one before it could not be written.
        """
        self.finish()
        section = self._config.checkpoint
        state = {
            **loop_state,
            "config": recorded_values(with_absolute_paths(self._recorded)),
            "model": asdict(self._actor.shape),
            "rng": rng_state.gather(self._actor.ranks),
        }
        self._pending = begin_checkpoint(
            self._actor,
            self._folder.checkpoints,
            loop_state["next_step"],
            state,
            self._keeping,
            num_updates=loop_state.get("num_updates", 0),
            extras=self._export_into if in_background and section.export_with_checkpoints else None,
            asynchronous=in_background and section.asynchronous,
        )
        if not (in_background and section.asynchronous):
            self.finish()

    def poll(self) -> None:
        """Let a checkpoint that was written in the background take its place; call it between steps."""
        if self._pending is not None and self._pending.poll():
            self._conclude()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any."""
        if self._pending is not None:
            self._pending.finish()
            self._conclude()

    def restore(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into the actor; the loop's state, None where there is nothing to go on from.

        Raises:
            ValueError: if none of the checkpoints is whole, or the configuration or the model has changed in a way that
                would corrupt the run.
        """
        warn = self._console.warning
        checkpoint = find_whole_checkpoint(self._folder.checkpoints, self._actor.ranks, on_fault=warn)
        if checkpoint is None:
            self._discard_foreign_rollouts(0)
            return None
        state = load_loop_state(checkpoint)
        self._check(checkpoint, state)
        state = load_checkpoint(self._actor, checkpoint)
        num_updates = state.get("num_updates", 0)
        more = f" and {num_updates} updates of the next" if num_updates else ""
        self._console.info(f"resumed from {checkpoint}: {state['next_step']} steps are done{more}")
        if not rng_state.restore(state["rng"], self._actor.ranks):
            self._console.info(f"the checkpoint was written by {len(state['rng'])} ranks; their random states are left")
        self._discard_foreign_rollouts(state["next_step"])
        return state

    def export(self, folder: Path) -> None:
        """Write the actor's weights as a Hugging Face folder."""
        export_folder(
            self._actor.weights(),
            self._config.model.path,
            folder,
            is_writer=self._is_leader,
            dtype=MODEL_DTYPES[self._config.model.dtype],
        )
        exchange.barrier(self._actor.ranks.world)

    @property
    def _is_leader(self) -> bool:
        return self._actor.ranks.rank == 0

    def _export_into(self, checkpoint: Path) -> None:
        self.export(checkpoint / "huggingface")

    def _conclude(self) -> None:
        assert self._pending is not None
        self._console.info(f"saved {self._pending.target}")
        self._pending = None
        if self._is_leader:
            kept = checkpoint_folder.latest_first(self._folder.checkpoints)[: self._keeping.last]
            self._ledger.forget_before(min(checkpoint_folder.step_of(path) for path in kept))

    def _check(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        """Compare the checkpoint's configuration and model with this run's."""
        are_dicts = all(isinstance(state.get(name), dict) for name in ("config", "model", "prompts", "sampler"))
        if not are_dicts or not isinstance(state.get("rng"), list):
            raise ValueError(
                f"{checkpoint} does not hold what this version of a run goes on from. Go on with the version that "
                "saved it, "
                "delete it to go on from the one before, or set train.resume=false to start over (the old run is "
                "renamed)."
            )
        name = checkpoint_folder.checkpoint_name(state["next_step"], state.get("num_updates", 0))
        if checkpoint.name.removesuffix(".again") != name:
            raise ValueError(
                f"{checkpoint} holds what {name} should: {state['next_step']} steps are done in it. By the names it is "
                "decided which is the newest and what may be deleted. Rename it, and write its name into the file "
                "latest beside it."
            )
        check = check_resume(state["config"], self._recorded, is_mid_step=bool(state.get("num_updates")))
        shape = asdict(self._actor.shape)
        refused = [*check.refused]
        refused += [
            f"model.path: its config.json has {name}={shape[name]}, the checkpoint's model {value}."
            for name, value in state["model"].items()
            if shape.get(name) != value
        ]
        if refused:
            lines = "\n  ".join(refused)
            raise ValueError(
                f"{checkpoint} was saved under another configuration, and this one cannot resume from it:\n  "
                f"{lines}\nChange these keys back, start a new run (another run.output_dir, or train.resume=false, "
                "which renames the old one), or delete this checkpoint to go on from the one before."
            )
        if check.shown:
            self._console.info("changed since the checkpoint: " + "; ".join(check.shown))

    def _discard_foreign_rollouts(self, first_step: int) -> None:
        """Discard rollouts of another configuration. Those of finished steps stay: older checkpoints need them."""
        discarded = self._ledger.discard_others(first_step) if self._is_leader else 0
        exchange.barrier(self._actor.ranks.world)
        if discarded:
            self._console.warning(
                f"recorded rollouts of {discarded} steps belong to another configuration; they are deleted and "
                "generated anew"
            )
