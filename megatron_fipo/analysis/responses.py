"""The responses that a run's folder holds, one after the other: evaluations, kept samples and traces."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from megatron_fipo.run.samples import TrainingSample, read_samples
from megatron_fipo.traces.files import read_trace, trace_files
from megatron_fipo.traces.schema import ENVIRONMENT, TracedResponse

EVALUATION, TRAINING = "evaluation", "training"
_EVALUATION_FILE = re.compile(r"(before|after|step_(\d+))_(.+)\.jsonl")
_SAMPLES_FILE = re.compile(r"step_(\d+)\.jsonl")
_SCORES = "evaluation/"


@dataclass(frozen=True)
class Response:
    """One judged response.

    Attributes:
        source: of its prompt.
        prompt, text: the prompt and the response.
        reference: the right answer as text.
        answer: what the verifier took it to answer.
        score: the verifier's; 1 is right.
        num_tokens: of the response.
        finish_reason: stop or length.
        error: why it could not be judged.
        token_texts: text of each token, where a trace tells it; they join to the whole response.
        own_tokens: which of them the policy wrote.
    """

    source: str
    prompt: str
    text: str
    reference: str
    answer: str
    score: float
    num_tokens: int
    finish_reason: str
    error: str
    token_texts: Sequence[str] | None = None
    own_tokens: Sequence[bool] | None = None

    @property
    def is_right(self) -> bool:
        """Whether the verifier accepted it in full."""
        return self.score >= 1 and not self.error


State: TypeAlias = tuple[tuple[str, int, int], ...]
"""Names of files with their sizes and times in nanoseconds."""


@dataclass(frozen=True)
class Batch:
    """The files of one step, or of one evaluation, that are read together.

    Attributes:
        step: how many steps the policy that wrote them had behind it.
        where: EVALUATION or TRAINING.
        files: in the order in which they are read.
    """

    step: int
    where: str
    files: tuple[Path, ...]

    @property
    def state(self) -> State:
        """What tells whether a file was written anew."""
        return tuple((str(path), found.st_size, found.st_mtime_ns) for path in self.files for found in (path.stat(),))


def batches_of(run: Path) -> list[Batch]:
    """What there is to read in a run's folder, evaluations first, by step.

    Raises:
        ValueError: if it is no folder, or an evaluation's step cannot be told.
    """
    if not run.is_dir():
        nearby = Path("outputs") / run
        hint = f" Did you mean {nearby}?" if nearby.is_dir() else ""
        raise ValueError(f"{run} is no folder here. Name the folder of a run, such as outputs/my_run.{hint}")
    return [*_evaluations(run), *_training(run)]


def _evaluations(run: Path) -> list[Batch]:
    by_step: dict[int, list[Path]] = {}
    done = _done(run)
    for path in sorted(
        (run / "evaluation").glob("*.jsonl"), key=lambda path: (path.name.startswith("after_"), path.name)
    ):
        match = _EVALUATION_FILE.fullmatch(path.name)
        if match is None:
            continue
        when, number = match[1], match[2]
        if when == "after":
            if done is None:
                raise ValueError(
                    f"{run / 'metrics.jsonl'} does not tell how many steps lie before the last evaluation (there is no "
                    "such file). Restore it from a copy, or delete the evaluation's files that begin with after_, to "
                    "read the others."
                )
            if not done.has_ended:
                continue  # of an earlier end: the run was resumed, and goes on with more steps
            step = done.num_steps
        else:
            step = int(number) if number else 0
            if done is not None and step > done.num_steps:
                continue  # of steps that were given up: the run was resumed before them
        # The last step may have had an evaluation of its own before the one at the end: of the same weights.
        if when == "after" and any(_source_of(other) == match[3] for other in by_step.get(step, [])):
            continue
        by_step.setdefault(step, []).append(path)
    return [Batch(step, EVALUATION, tuple(paths)) for step, paths in sorted(by_step.items())]


def _source_of(path: Path) -> str:
    match = _EVALUATION_FILE.fullmatch(path.name)
    assert match is not None
    return match[3]


@dataclass(frozen=True)
class _Done:
    """What a run has done, by its metrics.

    Attributes:
        num_steps: how many steps it has made.
        has_ended: whether the evaluation after the last step is there.
    """

    num_steps: int
    has_ended: bool


def _done(run: Path) -> _Done | None:
    """What a run has done; None where it has written no metrics.

    Raises:
        ValueError: if its metrics cannot be read.
    """
    path, num_steps, has_ended = run / "metrics.jsonl", 0, False
    try:
        with path.open(encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                if not line.endswith("\n"):
                    break  # it is being written, or was torn
                row = json.loads(line)
                step, names = int(row["step"]), row.keys() - {"step"}
                if any(not name.startswith(_SCORES) for name in names):
                    num_steps, has_ended = max(num_steps, step + 1), False
                elif names:
                    has_ended = step >= num_steps > 0
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not tell how many steps lie before an evaluation ({error}). Mend the line, or restore the "
            "file from a copy."
        ) from error
    return _Done(num_steps, has_ended)


def _training(run: Path) -> list[Batch]:
    by_step: dict[int, list[Path]] = {}
    for (step, _), path in trace_files(run / "traces").items():
        by_step.setdefault(step, []).append(path)
    for path in sorted((run / "samples").glob("*.jsonl")):
        if match := _SAMPLES_FILE.fullmatch(path.name):
            by_step.setdefault(int(match[1]), []).append(path)
    return [Batch(step, TRAINING, tuple(paths)) for step, paths in sorted(by_step.items())]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_batch(run: Path, batch: Batch) -> Iterator[Response]:
    """The responses of a batch, each once: one that is in a trace is not read again from the samples.

    Raises:
        ValueError: if a file is damaged, or was deleted since it was found.
    """
    seen: set[tuple[str, int, int]] = set()
    for path in batch.files:
        try:
            if batch.where == EVALUATION:
                yield from _evaluated(path)
            else:
                for key, response in _traced(path) if path.suffix == ".parquet" else _sampled(run, batch.step):
                    if key not in seen:
                        seen.add(key)
                        yield response
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read: {error.strerror or error}. A run that is resumed deletes what it makes again; "
                "start the same command again."
            ) from error


def _sampled(run: Path, step: int) -> Iterator[tuple[tuple[str, int, int], Response]]:
    for sample in read_samples(run, step):
        yield (sample.source, sample.prompt_id, sample.sample_index), _of_sample(sample)


def _of_sample(sample: TrainingSample) -> Response:
    return Response(
        source=sample.source,
        prompt=sample.prompt,
        text=sample.response,
        reference=sample.reference,
        answer=sample.answer,
        score=sample.score,
        num_tokens=sample.tokens,
        finish_reason=sample.finish_reason,
        error=sample.error,
    )


def _traced(path: Path) -> Iterator[tuple[tuple[str, int, int], Response]]:
    for one in read_trace(path).responses:
        yield (one.source, one.prompt_id, one.sample_index), _of_trace(one)


def _of_trace(one: TracedResponse) -> Response:
    return Response(
        source=one.source,
        prompt=one.prompt,
        text=one.response,
        reference=one.reference,
        answer=one.answer,
        score=one.score,
        num_tokens=one.num_tokens,
        finish_reason=one.finish_reason,
        error=one.error,
        token_texts=one.texts,
        own_tokens=[reason != ENVIRONMENT for reason in one.left_out_tokens],
    )


_TEXTS = ("source", "prompt", "reference")
_LISTS: Mapping[str, type | tuple[type, ...]] = {
    "responses": str,
    "scores": (int, float),
    "answers": str,
    "response_tokens": int,
    "finish_reasons": str,
    "errors": str,
}


def _evaluated(path: Path) -> Iterator[Response]:
    with path.open(encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                _check(row)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number} is no judged problem: {error}. The file was damaged or edited; evaluate "
                    "again, or remove it."
                ) from error
            columns = zip(*(row[name] for name in _LISTS), strict=True)
            for text, score, answer, num_tokens, finish_reason, why_not in columns:
                yield Response(
                    source=row["source"],
                    prompt=row["prompt"],
                    text=text,
                    reference=row["reference"],
                    answer=answer,
                    score=score,
                    num_tokens=num_tokens,
                    finish_reason=finish_reason,
                    error=why_not,
                )


def _check(row: Any) -> None:
    """
    Raises:
        ValueError: unless this is a row of an evaluation's file.
    """
    if not isinstance(row, dict):
        raise ValueError("an object was expected")
    if missing := [name for name in (*_TEXTS, *_LISTS) if name not in row]:
        raise ValueError(f"{missing[0]} is missing")
    for name in _TEXTS:
        if not isinstance(row[name], str):
            raise ValueError(f"{name}={row[name]!r} is no text")
    for name, kind in _LISTS.items():
        values = row[name]
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{name} is no list of {'numbers' if name in ('scores', 'response_tokens') else 'texts'}")
        if len(values) != len(row["responses"]):
            raise ValueError(f"{name} has {len(values)} entries for {len(row['responses'])} responses")
