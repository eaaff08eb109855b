"""What a run writes down for people and for other programs: its configuration, metrics and samples of its responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from megatron_fipo.console.console import Console
from megatron_fipo.metrics.sinks import SinkGroup, open_sinks
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.agreement import on_every_rank, on_leader
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rollout.source import StepRollouts
from megatron_fipo.run.folder import RunFolder, prepare, record_config
from megatron_fipo.run.named_on_hub import NamedRun
from megatron_fipo.run.sample_choice import choose, kept
from megatron_fipo.run.samples import TrainingSample, forget_samples, table_of, write_samples
from megatron_fipo.traces.files import forget_traces


class RunRecords:
    """A run's folder, locked, and what is written into it. Its methods are collective; the leader alone writes."""

    def __init__(self, named: NamedRun, ranks: ParallelGroups, console: Console) -> None:
        """Make the folder, or take the one that there is; another run's is renamed where train.resume says so.

        Raises:
            ValueError: on every rank, if the folder cannot be this run's; nothing is written then.
        """
        self._named, self._world = named, ranks.world
        self._is_leader = ranks.rank == 0
        self._sinks: SinkGroup | None = None
        prepared = on_leader(lambda: prepare(named.local), ranks.world)
        self.folder = prepared[0] if prepared else RunFolder(Path(named.local.run.output_dir))
        self._lock = prepared[1] if prepared else None
        if prepared and prepared[2]:
            console.info(prepared[2])

    def open(self, next_step: int, num_updates: int = 0) -> RunRecords:
        """Begin to write, from a step on; what there is of later ones is forgotten. Use it as a context.

        Args:
            num_updates: how many of the step's updates are made already.
        """
        config = self._named.recorded
        on_leader(lambda: record_config(config, self.folder, self._named.origins), self._world)
        on_leader(lambda: forget_samples(self.folder.samples, next_step), self._world)
        on_leader(lambda: forget_traces(self.folder.traces, next_step, num_updates), self._world)
        self._sinks = on_every_rank(
            lambda: open_sinks(config, self.folder.root, resumed_step=next_step, enabled=self._is_leader), self._world
        )
        return self

    def __enter__(self) -> RunRecords:
        assert self._sinks is not None, "open() comes first"
        self._sinks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._sinks is not None, "open() comes first"
        self._sinks.__exit__(kind, error, traceback)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics down."""
        self.check()
        sinks = self._sinks
        assert sinks is not None, "open() comes first"
        on_every_rank(lambda: sinks.write(step, metrics), self._world)

    def keep_samples(
        self, step: int, rollouts: StepRollouts, plane: DataPlane, decode: Callable[[list[int]], str]
    ) -> None:
        """Write some of the step's responses down for people to read: rank 0 chooses, who holds one tells it."""
        config = self._named.local
        count = config.metrics.num_samples_per_step
        if not count:
            return
        judged = rollouts.judged
        chosen = exchange.broadcast_object(
            None if judged is None else choose(judged.trained_on, judged.generated, count, config.sampling), self._world
        )
        own = [(place, one) for place, one in enumerate(chosen) if one.leader == plane.leader]
        told = plane.gathered([(place, kept(step, one, rollouts.held, decode)) for place, one in own])
        samples = [sample for _, sample in sorted(told, key=_place)]
        sinks = self._sinks
        assert sinks is not None, "open() comes first"
        on_leader(lambda: write_samples(self.folder.samples, step, samples), self._world)
        on_leader(lambda: sinks.write_table(step, "samples", table_of(samples)), self._world)

    def check(self) -> None:
        """See that nobody has taken the run's folder away, before more is written into it.

        Raises:
            DiskError, ValueError: on every rank, if somebody has.
        """
        on_every_rank(lambda: self._lock.check() if self._lock is not None else None, self._world)

    def close(self) -> None:
        """Let others have the folder. Not collective."""
        if self._lock is not None:
            self._lock.release()


def _place(placed: tuple[int, TrainingSample]) -> int:
    return placed[0]
