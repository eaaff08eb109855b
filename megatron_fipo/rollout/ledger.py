"""A journal on disk of every judged response since the oldest checkpoint.

Rollouts are the most expensive part of what a run does between checkpoints. A run that was killed reads them here
instead of generating them again, in whatever layout it resumes:

    rollouts/step_000012/rank_003.jsonl       the responses that a rank has had judged in the step
    rollouts/step_000012/carried_000.jsonl    what a rank that generates took over from the step before
    rollouts/step_000012/plan.json            the prompts that the step trains on

The first line of a file says which configuration the responses belong to; `ledger_lines` says what a line is. A line is
written whole or, on a full disk, not at all. A last line that a killed process left unfinished is ignored; any other
line with a wrong checksum is an error. plan.json is one such line. It is written when all that the next step takes over
is: who finds a plan finds these, too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from megatron_fipo.rl.trajectory import Prompt, SampleKey, Trajectory
from megatron_fipo.rollout.carried import Carried
from megatron_fipo.rollout.ledger_lines import (
    cut_torn_line,
    damaged,
    line_of,
    read_lines,
    recorded_response,
    response_record,
    with_prompt,
)
from megatron_fipo.system.disk import append_whole, write_text_whole, write_whole, writing

_STEP = re.compile(r"step_(-?\d+)")
PLAN = "plan.json"
"""File of a step's folder that says what it trains on."""
_NUM_SHOWN = 8


@dataclass(frozen=True)
class Plan:
    """What a step trains on.

    Attributes:
        prompt_ids: the prompts of the batch's groups, in its order.
        next_prompt: the first prompt of the next step.
        num_carried: responses that the next step takes over.
    """

    prompt_ids: list[int]
    next_prompt: int
    num_carried: int = 0


class RolloutLedger:
    """The ledger as one rank sees it: the rank appends to its own file and reads the files of all ranks.

    Args:
        folder: the ledger's folder, shared by all ranks.
        rank: the rank that this object belongs to.
        fingerprint: identifies what decides the responses, see `config.numbers_fingerprint`.
        decode: turns response tokens into text.
    """

    def __init__(self, folder: Path, rank: int, fingerprint: str, decode: Callable[[list[int]], str]) -> None:
        self._folder, self._rank, self._fingerprint, self._decode = folder, rank, fingerprint, decode
        self._step: int | None = None
        self._recorded: dict[int, dict[SampleKey, Trajectory]] = {}
        self._file: IO[bytes] | None = None
        self._path = folder

    def finished(self, step: int, round_index: int, prompts: Sequence[Prompt]) -> dict[SampleKey, Trajectory]:
        """Return the recorded responses to these prompts in one round of generation.

        Raises:
            ValueError: if a file is damaged, naming it and the line.
        """
        self.begin(step)
        by_prompt = {(prompt.source, prompt.prompt_id): prompt for prompt in prompts}
        recorded = self._recorded.get(round_index, {})
        return {
            key: self._whole(sample, by_prompt[key[:2]]) for key, sample in recorded.items() if key[:2] in by_prompt
        }

    def begin(self, step: int) -> None:
        """Read what is recorded of a step, and let `append` add to it.

        Raises:
            ValueError: if a file is damaged, naming it and the line.
        """
        if step != self._step:
            self._open(step)

    def found(self, step: int, round_index: int, prompt: Prompt, key: SampleKey) -> Trajectory | None:
        """Return one recorded response of the step that was begun; None if there is none."""
        assert step == self._step, "begin() opens the step"
        sample = self._recorded.get(round_index, {}).get(key)
        return None if sample is None else self._whole(sample, prompt)

    def shared_out(self, step: int, leader: int, num_leaders: int) -> list[Trajectory]:
        """A rank's share of what is recorded of a step that streams: each response is in one rank's share.

        Without prompts and texts.

        Raises:
            ValueError: if a file is damaged, naming it and the line.
        """
        files = self._response_files(step)[leader::num_leaders]
        return [sample for file in files for _, sample in _responses(file)]

    def _whole(self, sample: Trajectory, prompt: Prompt) -> Trajectory:
        sample.response_text = self._decode(sample.response_ids.tolist())
        return with_prompt(sample, prompt)

    def append(self, round_index: int, sample: Trajectory) -> None:
        """Record a judged response of the step that was last begun.

        Raises:
            DiskError: if it cannot be written, or the file was deleted meanwhile.
        """
        self._write({"round": round_index, **response_record(sample)})

    def recording(self, round_index: int, on_sample: Callable[[Trajectory], None]) -> Callable[[Trajectory], None]:
        """Return a callback that records a judged response, unless it was aborted, and passes it on."""

        def record(sample: Trajectory) -> None:
            if sample.finish_reason != "abort":
                self.append(round_index, sample)
            on_sample(sample)

        return record

    def secure(self) -> None:
        """Flush what was appended to the disk, so that it survives a crash of the machine."""
        if self._file is not None:
            with writing(self._folder):
                os.fsync(self._file.fileno())

    def note_plan(self, step: int, plan: Plan, *, must_be_same: bool) -> None:
        """Record what a step trains on, as the rank that decides it.

        Args:
            must_be_same: the step has made updates on what was recorded: this has to be the same.

        Raises:
            ValueError: if it is not, or the record is damaged.
            DiskError: if it cannot be written.
        """
        recorded = self.plan(step) if must_be_same else None
        if recorded is None:
            content = {"fingerprint": self._fingerprint, "step": step, **asdict(plan)}
            write_text_whole(self._plan_path(step), line_of(content).decode())
        elif recorded != plan:
            raise ValueError(
                f"{self._plan_path(step)} says that step {step} trains on prompts {_some(recorded.prompt_ids)}; its "
                f"recorded rollouts come to {_some(plan.prompt_ids)}, and updates on the former are made already. "
                "Bring the run's folder rollouts/ back as it was, or delete the checkpoint to go on from the one "
                "before."
            )

    def plan(self, step: int) -> Plan | None:
        """What a step trains on, if a run before this one has decided it.

        Raises:
            ValueError: if the record is damaged.
        """
        path = self._plan_path(step)
        if not path.is_file():
            return None
        record = next(read_lines(path), {})
        if record.get("fingerprint") != self._fingerprint:
            return None
        try:
            prompt_ids = [int(prompt_id) for prompt_id in record["prompt_ids"]]
            return Plan(prompt_ids, int(record["next_prompt"]), int(record.get("num_carried", 0)))
        except (LookupError, TypeError, ValueError) as error:
            raise damaged(path, 1, f"it holds no plan: {error!r}") from error

    def _plan_path(self, step: int) -> Path:
        return self._step_folder(step) / PLAN

    def _step_folder(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}"

    def write_carried(self, step: int, leader: int, carried: Iterable[Carried]) -> None:
        """Record what a rank takes over into a step, all at once, so that it is on the disk whole or not at all.

        Args:
            leader: the rank's number among those that generate.

        Raises:
            DiskError: if it cannot be written.
        """
        lines = [line_of({"fingerprint": self._fingerprint, "step": step})]
        for one in carried:
            more = {"begun_at_step": one.begun_at_step, "is_judged": one.is_judged}
            lines.append(line_of({**more, **response_record(one.response)}))
        path = self._step_folder(step) / f"carried_{leader:03d}.jsonl"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, b"".join(lines))

    def carried(self, step: int, leader: int, num_leaders: int) -> list[Carried]:
        """What a rank takes over into a step, by `SampleKey`; without prompts and texts.

        With as many ranks as wrote it, each gets what it had. With fewer, some get that of several; with more, some get
        nothing.

        Raises:
            ValueError: if a file is damaged, naming it and the line.
        """
        found = []
        for path in sorted(self._step_folder(step).glob("carried_*.jsonl")):
            if int(path.stem.removeprefix("carried_")) % num_leaders != leader:
                continue
            for number, record in enumerate(read_lines(path), start=1):
                if "fingerprint" in record:
                    continue
                begun_at_step, is_judged = record.get("begun_at_step"), record.get("is_judged")
                if type(begun_at_step) is not int or type(is_judged) is not bool:
                    raise damaged(path, number, "it does not say since when it is carried")
                found.append(Carried(recorded_response(record, path, number), begun_at_step, is_judged))
        return sorted(found, key=lambda one: one.response.key)

    def forget_after(self, step: int) -> None:
        """Delete what would follow from a step that is generated anew: its plan, and the records of later steps.

        Only the leader may call this, before anybody generates.
        """
        self._plan_path(step).unlink(missing_ok=True)
        for path, number in self._step_folders():
            if number > step:
                shutil.rmtree(path)

    def forget_before(self, step: int) -> None:
        """Delete the records of earlier steps. Only the leader may call this."""
        for path, number in self._step_folders():
            if number < step:
                shutil.rmtree(path)

    def discard_others(self, first_step: int | None = None) -> int:
        """Delete the records that belong to another configuration. Only the leader may call this.

        Args:
            first_step: records of earlier steps stay, whatever they belong to; None looks at all steps.

        Returns:
            The number of steps whose records were deleted.
        """
        stale = {
            folder
            for folder, number in self._step_folders()
            for file in folder.glob("*.jsonl")
            for header in [next(read_lines(file), None)]
            if first_step is None or number >= first_step
            if header is not None and header.get("fingerprint") != self._fingerprint
        }
        for folder in stale:
            shutil.rmtree(folder)
        return len(stale)

    def close(self) -> None:
        """Close the file that is being written."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _step_folders(self) -> list[tuple[Path, int]]:
        found = ((path, _STEP.fullmatch(path.name)) for path in self._folder.glob("step_*") if path.is_dir())
        return sorted((path, int(match[1])) for path, match in found if match)

    def _response_files(self, step: int) -> list[Path]:
        return sorted(self._step_folder(step).glob("rank_*.jsonl"))

    def _open(self, step: int) -> None:
        """Read a step's records and open this rank's file at its end."""
        self.close()
        self._step, self._recorded = step, {}
        for file in self._response_files(step):
            for round_index, sample in _responses(file):
                self._recorded.setdefault(round_index, {})[sample.key] = sample
        folder = self._step_folder(step)
        self._path = folder / f"rank_{self._rank:03d}.jsonl"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                cut_torn_line(self._path)
            self._file = self._path.open("ab", buffering=0)
            is_new = self._path.stat().st_size == 0
        if is_new:
            self._write({"fingerprint": self._fingerprint, "step": step})

    def _write(self, record: dict[str, Any]) -> None:
        assert self._file is not None, "finished() opens the step"
        append_whole(self._file, line_of(record), self._path)


def _responses(file: Path) -> Iterator[tuple[int, Trajectory]]:
    """The rounds and responses that a rank's file holds."""
    for number, record in enumerate(read_lines(file), start=1):
        if "fingerprint" not in record:
            sample, round_index = recorded_response(record, file, number), record.get("round")
            if type(round_index) is not int:
                raise damaged(file, number, "it names no round")
            yield round_index, sample


def _some(prompt_ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, prompt_ids[:_NUM_SHOWN]))
    return f"{shown} … ({len(prompt_ids)} of them)" if len(prompt_ids) > _NUM_SHOWN else shown or "none"
