"""Megatron's schedule: microbatches through the stages of the pipeline, forward alone or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_fipo.actor.hidden_states import HiddenStateModel, unwrap
from megatron_fipo.actor.model import packed_sequence_params
from megatron_fipo.rl.packed_batch import PackedBatch

AtTheEnd = Callable[[Tensor, PackedBatch, HiddenStateModel], Any]
"""(hidden states, microbatch, the chunk that gave them) -> outputs. It is called on the last pipeline stage; for a
backward pass it returns (sum of the loss, its normalizer as int32, what to collect)."""


def run_schedule(
    chunks: Sequence[nn.Module], microbatches: Sequence[PackedBatch], at_the_end: AtTheEnd, *, forward_only: bool
) -> list[Any]:
    """Run the microbatches through a model. Collective over all ranks, with the same number of microbatches on each.

    Returns:
        The outputs collected for each microbatch; empty except on the last pipeline stage.
    """
    for chunk in chunks:
        chunk.train()  # for log-probs, too: they are then computed as in the update; nothing in the model is random
    iterators = [iter(microbatches) for _ in chunks]
    num_tokens = microbatches[0].layout.num_tokens
    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, at_the_end=at_the_end),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=num_tokens,
        micro_batch_size=1,
        decoder_seq_length=num_tokens,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return collected


def _forward_step(
    iterator: Iterator[PackedBatch], chunk: nn.Module, *, at_the_end: AtTheEnd
) -> tuple[Tensor, Callable[..., Any]]:
    """Run the next microbatch through one chunk, as Megatron asks for it."""
    batch, model = next(iterator), unwrap(chunk)
    keywords = {"fp32_output": False} if model.config.bf16 else {}
    hidden = chunk(
        batch.input_ids[None],
        batch.position_ids[None],
        None,
        packed_seq_params=packed_sequence_params(batch.cu_seqlens_padded, batch.layout.cu_seqlens_padded),
        **keywords,
    )

    def end(hidden: Tensor, non_loss_data: bool = False) -> Any:  # Megatron names the kind of data that it collects
        return at_the_end(hidden, batch, model)

    return hidden, end
