"""A few responses of each training step, kept in the run's folder and shown in the terminal.

samples/step_000037.jsonl       one response a line
megatron-fipo samples outputs/my_run --step 37 --wrong
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_fipo.console.samples import ShownSample, print_samples
from megatron_fipo.metrics.tables import Table
from megatron_fipo.system.disk import write_text_whole

_FILE = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True)
class TrainingSample:
    """One response of a training step, as it is kept.

    Attributes:
        step: the step that generated it or trained on it.
        source, prompt_id, sample_index: which one it is.
        prompt, response: the texts; the prompt's with its template.
        reference: the right answer as text.
        answer: what the verifier took the response to answer.
        score: the verifier's.
        reward: the reward, after shaping.
        advantage: None where its group was not trained on.
        trained_on: whether this step trained on its group.
        why_not: the reason if it did not.
        tokens: number of the response's tokens.
        finish_reason: stop or length.
        error: why it could not be judged.
        created_at_step: an earlier step where the group was left over from it.
    """

    step: int
    source: str
    prompt_id: int
    sample_index: int
    prompt: str
    response: str
    reference: str
    answer: str
    score: float
    reward: float
    advantage: float | None
    trained_on: bool
    why_not: str
    tokens: int
    finish_reason: str
    error: str
    created_at_step: int

    @property
    def is_right(self) -> bool:
        """Whether the verifier accepted it in full."""
        return self.score >= 1 and not self.error


_COLUMNS = ("source", "prompt", "response", "answer", "reference", "score", "reward", "advantage", "tokens", "why_not")


def table_of(samples: Sequence[TrainingSample]) -> Table:
    """The samples for trackers."""
    return Table(_COLUMNS, [[getattr(sample, column) for column in _COLUMNS] for sample in samples])


# --- writing ---------------------------------------------------------------------------------------------------------


def write_samples(folder: Path, step: int, samples: Sequence[TrainingSample]) -> None:
    """Write a step's file, whole or not at all; one of the same step gives way.

    Everything that cannot be printed is written as JSON escapes it, lone surrogates and marks of direction, too, so
    that the file is safe to look at.

    Raises:
        DiskError: if it cannot be written.
    """
    lines = [_visible(json.dumps(asdict(sample), ensure_ascii=False)) + "\n" for sample in samples]
    write_text_whole(folder / f"step_{step:06d}.jsonl", "".join(lines))


def _visible(line: str) -> str:
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)


def forget_samples(folder: Path, first_step: int) -> None:
    """Delete the files of steps that will be made again, from `first_step` on."""
    for step, path in _files(folder).items():
        if step >= first_step:
            path.unlink()


def _files(folder: Path) -> dict[int, Path]:
    """Files by step, in order."""
    found = {int(match[1]): path for path in folder.glob("*") if (match := _FILE.fullmatch(path.name))}
    return dict(sorted(found.items()))


# --- reading and showing ----------------------------------------------------------------------------------------------


def read_samples(run: str | Path, step: int | None = None) -> list[TrainingSample]:
    """Read the responses that were kept of a step.

    Args:
        run: the run's folder.
        step: None takes the newest.

    Raises:
        ValueError: if there is no such run or step, saying which there are, or the file is damaged.
    """
    folder = Path(run) / "samples"
    if not Path(run).is_dir():
        nearby = Path("outputs") / run
        hint = f" Did you mean {nearby}?" if nearby.is_dir() else ""
        raise ValueError(f"{run} is no folder here. Name the folder of a run, such as outputs/my_run.{hint}")
    files = _files(folder)
    if not files:
        is_run = (Path(run) / "config.yaml").is_file()
        raise ValueError(
            f"{folder} holds no samples. A run keeps them from its first step on, unless metrics.num_samples_per_step "
            f"is 0.{'' if is_run else f' {run} does not look like the folder of a run: it has no config.yaml.'}"
        )
    if step is None:
        step = next(reversed(files))
    if step not in files:
        raise ValueError(f"{folder} has no samples of step {step}. It has those of {_spans(list(files))}.")
    return list(_read(files[step]))


def _read(path: Path) -> Iterator[TrainingSample]:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="backslashreplace").split("\n"), start=1):
        if not line:
            continue
        try:
            sample = TrainingSample(**json.loads(line))
            if wrong := [field.name for field in fields(sample) if not _fits(getattr(sample, field.name), field.type)]:
                raise ValueError(f"{wrong[0]}={getattr(sample, wrong[0])!r}")
            if sample.trained_on and sample.advantage is None:
                raise ValueError("it was trained on, without an advantage")
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no sample: {error}. The file was damaged or edited.") from error
        yield sample


def _fits(value: object, kind: object) -> bool:
    """Whether a value is what a field's annotation says."""
    if value is None:
        return "None" in str(kind)
    allowed: dict[str, tuple[type, ...]] = {"int": (int,), "str": (str,), "bool": (bool,), "float": (int, float)}
    return type(value) in allowed[str(kind).partition(" ")[0]]


def _spans(steps: Sequence[int]) -> str:
    """The steps in words, such as "steps 0 to 7 and 9"; where there are many stretches, only the last eight."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in spans[-8:]]
    return f"step{'s' if len(steps) > 1 else ''} " + (
        texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
    )


def show_samples(
    run: str, step: int | None, source: str | None, right: bool | None, limit: int | None, *, full: bool
) -> None:
    """Print what was kept of a step.

    Args:
        step: which step; None shows the newest.
        source: show only responses of this source; None shows all.
        right: only right or only wrong ones; None shows both.
        limit: show at most this many; None shows all.
        full: whole texts, however long.

    Raises:
        ValueError: if there is nothing to show, saying what there is.
    """
    kept = read_samples(run, step)
    sources = sorted({sample.source for sample in kept})
    if source is not None and source not in sources:
        raise ValueError(
            f"no sample of step {kept[0].step} is of source {source!r}; there are {', '.join(sources)}."
            if kept
            else f"no sample of this step is of source {source!r}."
        )
    shown = [
        sample
        for sample in kept
        if (source is None or sample.source == source) and (right is None or sample.is_right is right)
    ]
    if not shown:
        kind = {True: "right", False: "wrong", None: "there"}[right]
        raise ValueError(f"of the {len(kept)} samples that were kept of this step none is {kind}; try another --step.")
    shown = shown[:limit]
    count = f"{len(shown)} of {len(kept)} samples" if len(shown) < len(kept) else f"{len(kept)} samples"
    with suppress(SystemExit):  # rich's word for a pipe whose reader, such as head, has seen enough
        print_samples(f"Step {kept[0].step} of {run}: {count}", [_shown(sample) for sample in shown], full=full)


def _shown(sample: TrainingSample) -> ShownSample:
    if sample.trained_on:
        fate = f"trained on, advantage {sample.advantage:+.3f}"
        if sample.created_at_step < sample.step:
            fate += f", left over from step {sample.created_at_step}"
    else:
        fate = sample.why_not
    return ShownSample(
        prompt=sample.prompt,
        response=sample.response,
        reference=sample.reference,
        answer=sample.answer,
        accuracy=sample.score if not sample.error else 0.0,
        num_tokens=sample.tokens,
        truncated=sample.finish_reason == "length",
        note=f"{sample.source}: reward {sample.reward:+.3g}; {fate}",
    )
