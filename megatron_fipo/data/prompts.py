"""Prompts to train on, as an endless order with a cursor, and prompts to evaluate on, as lists."""

from __future__ import annotations

import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from megatron_fipo.config import (
    FILE_KINDS,
    Config,
    DataSourceConfig,
    read_model_config,
    require_source,
    verifier_weights,
)
from megatron_fipo.data.formatting import PromptFormatter
from megatron_fipo.data.held_out import is_held_out
from megatron_fipo.data.records import read_records, record_generator
from megatron_fipo.rl.trajectory import Prompt
from megatron_fipo.verifiers.verdict import combined_name

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 1024
"""Replacements tried for one item of a procedural source before it is given up."""

_TOKENIZER_BATCH = 1024


@dataclass(frozen=True)
class PromptLimits:
    """Limits that every prompt must keep.

    Attributes:
        max_prompt_tokens: longest prompt.
        overlong: what happens to a longer one, "error" or "skip".
        vocab_size: tokens that the model has; None where no model is known.
    """

    max_prompt_tokens: int
    overlong: str = "error"
    vocab_size: int | None = None

    @classmethod
    def from_config(cls, config: Config) -> PromptLimits:
        """The limits of a run and, where its folder is here, of its model."""
        is_here = (Path(config.model.path) / "config.json").is_file()
        vocab_size = read_model_config(config.model.path).get("vocab_size") if is_here else None
        return cls(config.rollout.max_prompt_tokens, config.data.overlong_prompts, vocab_size)


def verifier_of(source: DataSourceConfig) -> str:
    """One name for a source's judges: its verifier's, or those of several verifiers with their weights."""
    return combined_name(verifier_weights(source))


class PromptSource(ABC):
    """One source's prompts by index.

    Attributes:
        num_prompts: how many there are; None for an endless source.
        num_skipped: over-long prompts left out; for a procedural source, those drawn so far.
        num_duplicates: rows of a file left out because they repeat a prompt.
    """

    def __init__(
        self, name: str, config: DataSourceConfig, tokenizer: Any, limits: PromptLimits, with_rows: bool
    ) -> None:
        self.name = name
        self._with_rows = with_rows
        self.num_prompts: int | None = config.num_prompts
        self.num_skipped = 0
        self.num_duplicates = 0
        self._verifier = verifier_of(config)
        self._formatter = PromptFormatter(config, tokenizer, limits.vocab_size)
        self._max_prompt_tokens = limits.max_prompt_tokens
        self._skip_overlong = limits.overlong == "skip"

    @abstractmethod
    def prompt(self, index: int, prompt_id: int) -> Prompt:
        """Prompt `index`, 0 … num_prompts - 1, under the given id; a pure function of configuration and index."""

    def _overlong_message(self, place: str, num_tokens: int, more: str = "") -> str:
        return (
            f"{place}: the prompt has {num_tokens} tokens, over rollout.max_prompt_tokens="
            f"{self._max_prompt_tokens}{more}. Raise that, or set data.overlong_prompts=skip to leave such prompts out."
        )


class FilePrompts(PromptSource):
    """Rows of a jsonl or parquet file. All are tokenized once at the start, so that errors show before training."""

    def __init__(
        self, name: str, config: DataSourceConfig, tokenizer: Any, limits: PromptLimits, with_rows: bool
    ) -> None:
        super().__init__(name, config, tokenizer, limits, with_rows)
        file = read_records(config, with_rows)
        self._records = file.records
        self.num_duplicates = file.num_duplicates
        if file.num_duplicates:
            conflicts = f"; of them {file.num_conflicts} with another answer than the first" * bool(file.num_conflicts)
            logger.warning(
                "data source %r: left out %d rows that repeat a prompt%s, %d left",
                name,
                file.num_duplicates,
                conflicts,
                len(file.records),
            )
        self._rows = list(range(len(self._records)))
        overlong_rows: list[tuple[int, int]] = []
        for start in range(0, len(self._records), _TOKENIZER_BATCH):
            records = self._records[start : start + _TOKENIZER_BATCH]
            texts = [self._formatter.text(record) for record in records]
            for offset, token_ids in enumerate(self._formatter.encode(texts)):
                self._formatter.check_known(token_ids, texts[offset], records[offset].place)
                if len(token_ids) > self._max_prompt_tokens:
                    overlong_rows.append((start + offset, len(token_ids)))
        if overlong_rows:
            self._leave_out(overlong_rows)
        self.num_prompts = len(self._rows)

    def _leave_out(self, overlong_rows: list[tuple[int, int]]) -> None:
        row, num_tokens = overlong_rows[0]
        place = self._records[row].place
        if not self._skip_overlong:
            more = f" (and so are {len(overlong_rows) - 1} more)" if len(overlong_rows) > 1 else ""
            raise ValueError(self._overlong_message(place, num_tokens, more))
        if len(overlong_rows) == len(self._records):
            raise ValueError(
                f"every one of its {len(self._records)} prompts is longer than "
                f"rollout.max_prompt_tokens={self._max_prompt_tokens}, the first ({place}) has {num_tokens} tokens"
            )
        rows = {row for row, _ in overlong_rows}
        self._rows = [row for row in self._rows if row not in rows]
        self.num_skipped = len(rows)
        logger.warning("data source %r: skipped %d over-long prompts, %d left", self.name, len(rows), len(self._rows))

    def prompt(self, index: int, prompt_id: int) -> Prompt:
        record = self._records[self._rows[index]]
        text = self._formatter.text(record)
        token_ids = tuple(self._formatter.encode([text])[0])
        return Prompt(prompt_id, self.name, text, token_ids, self._verifier, record.reference, record.row)


class ProceduralPrompts(PromptSource):
    """Questions from a generator, from the held-out share for evaluation and from the rest for training."""

    def __init__(
        self,
        name: str,
        config: DataSourceConfig,
        tokenizer: Any,
        limits: PromptLimits,
        with_rows: bool,
        *,
        seed: int,
        held_out: bool,
    ) -> None:
        super().__init__(name, config, tokenizer, limits, with_rows)
        self._generate = record_generator(config, seed)
        self._held_out = held_out
        # A source that can give nothing says so before a model is built.
        self.prompt(0, 0)
        self.num_skipped = 0

    def prompt(self, index: int, prompt_id: int) -> Prompt:
        longest = 0
        for attempt in range(MAX_ATTEMPTS):
            record = self._generate(index, attempt)
            if is_held_out(str(record.prompt)) != self._held_out:
                continue
            text = self._formatter.text(record)
            token_ids = self._formatter.encode([text])[0]
            self._formatter.check_known(token_ids, text, record.place)
            if len(token_ids) <= self._max_prompt_tokens:
                row = {"prompt": record.prompt, "reference": record.reference} if self._with_rows else None
                return Prompt(prompt_id, self.name, text, tuple(token_ids), self._verifier, record.reference, row)
            if not self._skip_overlong:
                raise ValueError(self._overlong_message(record.place, len(token_ids)))
            self.num_skipped += 1
            longest = max(longest, len(token_ids))
        if longest:
            reason = f"rollout.max_prompt_tokens={self._max_prompt_tokens} leaves none; some have {longest} tokens"
        else:
            share = "held-out" if self._held_out else "training"
            reason = f"none belongs to the {share} share; the task has too few different questions with its parameters"
        raise ValueError(f"no prompt found in {MAX_ATTEMPTS} attempts at {record.place}: {reason}")


class PromptStream:
    """An endless, deterministic order over several training sources, resumable from one integer.

    A round takes `weight` prompts from each source in turn. File sources, and procedural ones with num_prompts, are
    shuffled anew in every epoch. Prompt i is a pure function of configuration, seed and i.
    """

    def __init__(
        self,
        sources: Mapping[str, DataSourceConfig],
        tokenizer: Any,
        *,
        seed: int,
        max_prompt_tokens: int,
        overlong: str = "error",
        vocab_size: int | None = None,
        row_readers: Collection[str] = (),
    ) -> None:
        """Open the sources.

        Args:
            sources: the sources by name, as in data.train.
            tokenizer: a transformers tokenizer.
            seed: run.seed, for the order and for sources without a seed of their own.
            max_prompt_tokens: longest prompt.
            overlong: "error" or "skip".
            vocab_size: tokens that the model has; None skips the checks that need it.
            row_readers: verifiers that ask for rows; the prompts that they judge carry them.

        Raises:
            ValueError: for a source that cannot be used, naming it.
        """
        if not sources:
            raise ValueError("data.train names no source of prompts")
        self._sources: list[PromptSource] = []
        self._seeds: list[int] = []
        self._slots: list[tuple[int, int]] = []
        limits = PromptLimits(max_prompt_tokens, overlong, vocab_size)
        for position, (name, config) in enumerate(sources.items()):
            self._sources.append(
                _open(name, config, tokenizer, seed, limits, row_readers, held_out=False),
            )
            self._seeds.append(seed if config.seed is None else config.seed)
            self._slots += [(position, turn) for turn in range(config.weight)]
        self._weights = [config.weight for config in sources.values()]
        self._orders: dict[int, tuple[int, list[int]]] = {}
        self._next_prompt_id = 0

    @classmethod
    def from_config(cls, config: Config, tokenizer: Any, row_readers: Collection[str] = ()) -> PromptStream:
        """Open the training sources of a run."""
        limits = PromptLimits.from_config(config)
        return cls(config.data.train, tokenizer, seed=config.run.seed, row_readers=row_readers, **asdict(limits))

    def first_prompts(self) -> dict[str, Prompt]:
        """The first prompt of each source, by the source's name; moves no cursor and counts no prompt."""
        first = {}
        for source in self._sources:
            num_skipped = source.num_skipped
            first[source.name] = source.prompt(0, 0)
            source.num_skipped = num_skipped
        return first

    def prompt(self, prompt_id: int) -> Prompt:
        """Prompt at a position, from 0; does not move the cursor."""
        round_index, slot = divmod(prompt_id, len(self._slots))
        position, turn = self._slots[slot]
        source = self._sources[position]
        item = round_index * self._weights[position] + turn
        if source.num_prompts is not None:
            epoch, place = divmod(item, source.num_prompts)
            item = self._order(position, epoch)[place]
        return source.prompt(item, prompt_id)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; moves the cursor past them."""
        first = self._next_prompt_id
        self.move_to(first + count)
        return [self.prompt(prompt_id) for prompt_id in range(first, first + count)]

    @property
    def position(self) -> int:
        """The cursor: the first prompt that nobody has used."""
        return self._next_prompt_id

    def move_to(self, prompt_id: int) -> None:
        """Move the cursor."""
        self._next_prompt_id = prompt_id

    @property
    def num_skipped(self) -> dict[str, int]:
        """Over-long prompts left out, by source; for procedural sources, those drawn so far."""
        return {source.name: source.num_skipped for source in self._sources}

    @property
    def num_duplicates(self) -> dict[str, int]:
        """Rows left out because they repeat a prompt, by source."""
        return {source.name: source.num_duplicates for source in self._sources}

    def state_dict(self) -> dict[str, Any]:
        """The cursor for the checkpoint, and the sizes of the sources, on which its meaning depends."""
        return {"next_prompt_id": self._next_prompt_id, "num_prompts": self._sizes()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, given the same sources, seed and tokenizer.

        Raises:
            ValueError: if a source has another number of prompts now: the order, and the place in it, would change.
        """
        for name, size in self._sizes().items():
            before = state["num_prompts"].get(name)
            if before != size:
                raise ValueError(
                    f"data source {name!r} has {size} prompts, and had {before} when the checkpoint was saved: the run "
                    "would go on at another place of another order. Bring the old data back, or start a new run "
                    "(another run.output_dir)."
                )
        self._next_prompt_id = state["next_prompt_id"]

    def _sizes(self) -> dict[str, int | None]:
        return {source.name: source.num_prompts for source in self._sources}

    def _order(self, position: int, epoch: int) -> list[int]:
        """Order of a finite source's prompts in an epoch; the latest is kept."""
        cached = self._orders.get(position)
        if cached is None or cached[0] != epoch:
            source = self._sources[position]
            assert source.num_prompts is not None
            order = list(range(source.num_prompts))
            Random(f"{self._seeds[position]}/{source.name}/{epoch}").shuffle(order)
            cached = self._orders[position] = (epoch, order)
        return cached[1]


def evaluation_prompts(
    name: str,
    source: DataSourceConfig,
    tokenizer: Any,
    *,
    seed: int,
    max_prompt_tokens: int,
    overlong: str = "error",
    vocab_size: int | None = None,
    row_readers: Collection[str] = (),
) -> list[Prompt]:
    """All prompts of an evaluation source, in their order.

    Their ids are negative, so that they differ from every training prompt's, and differ between sources.

    Raises:
        ValueError: for a source that cannot be used, or an endless one without num_prompts.
    """
    limits = PromptLimits(max_prompt_tokens, overlong, vocab_size)
    opened = _open(name, source, tokenizer, seed, limits, row_readers, held_out=True)
    if opened.num_prompts is None:
        raise ValueError(f"evaluation source {name!r} is endless ({source.kind}); set its num_prompts")
    first_id = -((zlib.crc32(name.encode()) + 1) << 24)
    return [opened.prompt(index, first_id + index) for index in range(opened.num_prompts)]


def evaluation_sets(config: Config, tokenizer: Any, row_readers: Collection[str] = ()) -> dict[str, list[Prompt]]:
    """Prompts of every evaluation source of a run, by name."""
    limits = asdict(PromptLimits.from_config(config))
    return {
        name: evaluation_prompts(name, source, tokenizer, seed=config.run.seed, row_readers=row_readers, **limits)
        for name, source in config.data.evaluation.items()
    }


def _open(
    name: str,
    config: DataSourceConfig,
    tokenizer: Any,
    run_seed: int,
    limits: PromptLimits,
    row_readers: Collection[str],
    *,
    held_out: bool,
) -> PromptSource:
    """Open a source; every error names it."""
    try:
        require_source(config)
        with_rows = any(verifier in row_readers for verifier in verifier_weights(config))
        if config.kind in FILE_KINDS:
            return FilePrompts(name, config, tokenizer, limits, with_rows)
        seed = run_seed if config.seed is None else config.seed
        return ProceduralPrompts(name, config, tokenizer, limits, with_rows, seed=seed, held_out=held_out)
    except ValueError as error:
        raise ValueError(f"data source {name!r}: {error}") from error
