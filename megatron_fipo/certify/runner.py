"""Runs layouts and deliberate mistakes, each in processes of its own, and measures what they gave."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_fipo.certify.comparison import Comparison, measure
from megatron_fipo.certify.computation import Job, Record, run_rank
from megatron_fipo.certify.controls import Control
from megatron_fipo.certify.layouts import Layout, configure, one_process, parse_layout
from megatron_fipo.certify.synthetic import LONGEST_PROMPT, shrunken_config, write_random_model
from megatron_fipo.config import Config, read_model_config
from megatron_fipo.convert.hf_config import ModelShape, model_shape
from megatron_fipo.parallel.local_ranks import run_local_ranks

LAYOUT_TIMEOUT_S = 900.0
"""Longest time that a layout may take."""
LEARNING_RATE = 1e-4
"""Learning rate of the certified updates. The recipes' 1e-6 moves float32 weights by so few of their last bits that
||p - start|| would measure rounding."""
_PRELOAD = ("megatron_fipo.certify.preload",)
_SMALL_LOG_PROB_CHUNK_MIB = 3 / 64
"""Memory for a chunk of log-probs on the small model: small enough for several chunks, 48 tokens over its 256 rows."""


@dataclass(frozen=True)
class Options:
    """What a certificate covers.

    Attributes:
        layouts: names of layouts; empty for DEFAULT_LAYOUTS, less those that need more GPUs than there are.
        as_is: whether to take the configuration's own model instead of a small one of the same kind.
        negative_controls: whether to make deliberate mistakes as well, each of which must be caught.
        num_steps, num_updates: number of steps, and of optimizer updates in each.
        longest_response: tokens of the longest synthetic response.
        dtype: the model's, float32 or bfloat16; bounds differ.
    """

    layouts: tuple[str, ...] = ()
    as_is: bool = False
    negative_controls: bool = False
    num_steps: int = 3
    num_updates: int = 8
    longest_response: int = 120
    dtype: str = "float32"


@dataclass(frozen=True)
class Measured:
    """Result of one layout.

    Attributes:
        num_microbatches: microbatches of its first update, on each rank.
        values: values of comparison.QUANTITIES, in their order.
    """

    num_microbatches: int
    values: list[float | None]


class Runner:
    """Computes the reference once and measures layouts against it."""

    def __init__(self, config: Config, options: Options, layouts: Sequence[Layout], folder: Path) -> None:
        """
        Args:
            config: the user's.
            layouts: all that `measure` will be called with, checked here before anything runs.
            folder: where temporary files are written.

        Raises:
            ValueError: if the model cannot be read, or does not divide into a layout.
        """
        if min(options.num_steps, options.num_updates, options.longest_response) < 1:
            raise ValueError("the number of steps and updates and the longest response must be at least 1.")
        self._options, self._folder = options, folder
        self._raw = read_model_config(config.model.path)
        model = replace(config.model, dtype=options.dtype)
        if not options.as_is:
            self._raw = shrunken_config(self._raw)
            write_random_model(folder / "model", self._raw, config.run.seed)
            model = replace(model, path=str(folder / "model"), log_prob_chunk_mib=_SMALL_LOG_PROB_CHUNK_MIB)
        self.shape: ModelShape = model_shape(self._raw, f"{config.model.path}/config.json")
        self.config = replace(
            config,
            model=model,
            train=replace(config.train, num_minibatches=options.num_updates),
            optimizer=replace(config.optimizer, learning_rate=LEARNING_RATE, num_warmup_steps=0),
        )
        for layout in layouts:
            self._configure(layout)
        self._reference: Record | None = None
        self._start: dict[str, Tensor] = {}

    def measure(self, layout: Layout) -> Measured:
        """All quantities of a layout.

        Raises:
            RankError: if a computation fails.
        """
        return self._measure(layout, None)

    def measure_control(self, control: Control) -> Measured:
        """The quantities of the first update with a deliberate mistake in it.

        Raises:
            RankError: if a computation fails.
        """
        return self._measure(parse_layout(control.layout), control)

    def compute_reference(self) -> None:
        """Run the one process, unless that is done."""
        if self._reference is None:
            self._reference = self._compute(one_process(), None)
            self._start = _read_weights(Path(self.config.model.path), self._reference.weights.keys())

    def _measure(self, layout: Layout, control: Control | None) -> Measured:
        self.compute_reference()
        assert self._reference is not None
        record = self._compute(layout, control)
        values = measure(Comparison(record, self._reference, self._start, self.config.objective))
        return Measured(record.num_microbatches, values)

    def _configure(self, layout: Layout) -> Config:
        return configure(self.config, layout, LONGEST_PROMPT + self._options.longest_response, self._raw)

    def _compute(self, layout: Layout, control: Control | None) -> Record:
        options, output = self._options, self._folder / "record.pt"
        job = Job(
            config=self._configure(layout),
            num_steps=options.num_steps,
            num_updates=options.num_updates,
            longest_response=options.longest_response,
            output=output,
            control=control.name if control else None,
        )
        run_local_ranks(run_rank, layout.world_size, job, preload=_PRELOAD, timeout_s=LAYOUT_TIMEOUT_S)
        record = torch.load(output, weights_only=False)
        output.unlink()
        assert isinstance(record, Record)
        return record


def _read_weights(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """The named tensors of a Hugging Face folder, float32."""
    weights: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            weights |= {name: tensors.get_tensor(name).float() for name in tensors.keys() if name in names}  # noqa: SIM118
    return weights
