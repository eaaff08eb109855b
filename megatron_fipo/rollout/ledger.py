"""A journal on disk of every judged response since the oldest checkpoint.

Rollouts are the most expensive part of what a run does between checkpoints. A run that was killed reads them here
instead of generating them again, in whatever layout it resumes:

    rollouts/step_000012/rank_003.jsonl
    rollouts/step_000012/plan.json

A line is the CRC-32 of what follows it, a space, and a JSON object. The first line of a file says which configuration
the responses belong to. Token ids and log-probs are little-endian int32 and float32 in base64, so nothing is rounded.
A line is written whole or, on a full disk, not at all. A last line that a killed process left unfinished is ignored;
any other line with a wrong checksum is an error. plan.json is one such line, with the prompts that the step trains on.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.rl.trajectory import Prompt, SampleKey, Trajectory, outline, segments_from
from megatron_fipo.system.disk import append_whole, write_text_whole, writing

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
    """

    prompt_ids: list[int]
    next_prompt: int


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

    def _whole(self, sample: Trajectory, prompt: Prompt) -> Trajectory:
        sample.prompt_ids = torch.tensor(prompt.token_ids, dtype=torch.int64)
        sample.response_text = self._decode(sample.response_ids.tolist())
        return sample

    def append(self, round_index: int, sample: Trajectory) -> None:
        """Record a judged response of the step that was last begun.

        Raises:
            DiskError: if it cannot be written, or the file was deleted meanwhile.
        """
        self._write(
            {
                "round": round_index,
                **sample.key._asdict(),
                "response_ids": _encoded(sample.response_ids, "<i4"),
                "rollout_log_probs": _encoded(sample.rollout_log_probs, "<f4"),
                "finish_reason": sample.finish_reason,
                "segments": outline(sample.segments),
                "accuracy": sample.accuracy,
                "answer": sample.answer,
                "error": sample.error,
                **({"parts": sample.parts} if sample.parts else {}),
            }
        )

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
            write_text_whole(self._plan_path(step), _line(json.dumps(content).encode()).decode())
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
        record = next(_read(path), {})
        if record.get("fingerprint") != self._fingerprint:
            return None
        try:
            return Plan([int(prompt_id) for prompt_id in record["prompt_ids"]], int(record["next_prompt"]))
        except (LookupError, TypeError, ValueError) as error:
            raise _damaged(path, 1, f"it holds no plan: {error!r}") from error

    def _plan_path(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}" / PLAN

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
            for header in [next(_read(file), None)]
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

    def _open(self, step: int) -> None:
        """Read a step's records and open this rank's file at its end."""
        self.close()
        self._step, self._recorded = step, {}
        folder = self._folder / f"step_{step:06d}"
        for file in sorted(folder.glob("*.jsonl")):
            for number, record in enumerate(_read(file), start=1):
                if "fingerprint" not in record:
                    try:
                        round_index, sample = _sample(record)
                    except (LookupError, TypeError, ValueError) as error:  # binascii's error is a ValueError
                        raise _damaged(file, number, f"it holds no judged response: {error!r}") from error
                    self._recorded.setdefault(round_index, {})[sample.key] = sample
        self._path = folder / f"rank_{self._rank:03d}.jsonl"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                _cut_torn_line(self._path)
            self._file = self._path.open("ab", buffering=0)
            is_new = self._path.stat().st_size == 0
        if is_new:
            self._write({"fingerprint": self._fingerprint, "step": step})

    def _write(self, record: dict[str, Any]) -> None:
        assert self._file is not None, "finished() opens the step"
        text = json.dumps(record).encode()  # ASCII: whatever a verifier answered can be written, lone surrogates too
        append_whole(self._file, _line(text), self._path)


def _encoded(values: Tensor, dtype: str) -> str:
    return base64.b64encode(values.cpu().numpy().astype(dtype).tobytes()).decode()


def _decoded(text: str, dtype: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=dtype).copy())


def _sample(record: dict[str, Any]) -> tuple[int, Trajectory]:
    response_ids = _decoded(record["response_ids"], "<i4").long()
    trajectory = Trajectory(
        key=SampleKey(record["source"], record["prompt_id"], record["sample_index"]),
        prompt_ids=torch.empty(0, dtype=torch.int64),
        segments=segments_from(record, response_ids, _decoded(record["rollout_log_probs"], "<f4")),
        finish_reason=record["finish_reason"],
        accuracy=record["accuracy"],
        answer=record["answer"],
        error=record["error"],
        parts=record.get("parts", {}),
    )
    return record["round"], trajectory


def _line(text: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _some(prompt_ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, prompt_ids[:_NUM_SHOWN]))
    return f"{shown} … ({len(prompt_ids)} of them)" if len(prompt_ids) > _NUM_SHOWN else shown or "none"


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, without a last line that was torn."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            checksum, _, text = line[:-1].partition(b" ")
            if checksum != b"%08x" % zlib.crc32(text):
                raise _damaged(path, number, "its CRC-32 differs")
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise _damaged(path, number, f"it is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise _damaged(path, number, f"it holds a {type(record).__name__}")
            yield record


def _damaged(path: Path, number: int, reason: str) -> ValueError:
    return ValueError(
        f"{path}, line {number} is not what was written there ({reason}). Restore the file from a copy, or delete the "
        f"folder {path.parent}: its responses are then generated anew."
    )


def _cut_torn_line(path: Path) -> None:
    """Cut off what follows the last line's end."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
