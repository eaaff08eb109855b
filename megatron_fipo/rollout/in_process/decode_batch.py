"""The batch that the in-process engine decodes: rows of different length that join and leave between steps.

A row caches all of its tokens but the last, which is the next step's input. So the responses to one prompt share its
prefill (whose logits nobody needs), the first response token comes out of the same step as all others, and a partial
response is continued like a longer prompt.

Shapes: N rows, B largest number of rows, V vocabulary, W longest row, R response tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from megatron_fipo.rollout.engine import GenerationRequest, NotFiniteError
from megatron_fipo.rollout.in_process.slot_cache import SlotCache
from megatron_fipo.rollout.in_process.token_sampling import request_uniforms, sample_tokens

PREFILL_TOKENS = 8192
"""Tokens of one prefill forward pass, padding included; bounds the memory of its activations."""


@dataclass(eq=False)
class Row:
    """A request with its place in the batch."""

    request: GenerationRequest
    context: tuple[int, ...] = field(init=False)
    """Tokens that exist already: the prompt and the prefix."""
    joined_at: int = field(init=False, default=0)
    """Decode steps that the batch had taken when the row joined."""

    def __post_init__(self) -> None:
        self.context = self.request.prompt_ids + self.request.prefix


RowT = TypeVar("RowT", bound=Row)


class DecodeBatch(Generic[RowT]):
    """Decodes up to max_batch_size rows, one token each a step. Synchronous; rows 0 … N - 1 are in use, without gaps.

    Args:
        model: a transformers causal language model with full attention in every layer.
        max_batch_size: B.
        stop_token_ids: tokens that end a response.
    """

    def __init__(self, model: Any, max_batch_size: int, stop_token_ids: Collection[int]) -> None:
        self.model = model
        self._cache_argument = _cache_argument(model)
        self.max_batch_size = max_batch_size
        self.rows: list[RowT] = []
        self.num_steps = 0
        device = model.device
        self._cache: SlotCache | None = None
        self._is_stop = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
        self._is_stop[list(stop_token_ids)] = True
        self._indices = torch.arange(max_batch_size, device=device)
        # One entry for each slot. They move together, see `_per_slot`.
        self._next_tokens = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self._lengths = torch.zeros_like(self._next_tokens)
        self._num_new = torch.zeros_like(self._next_tokens)
        self._limits = torch.zeros_like(self._next_tokens)
        self._temperature = torch.zeros(max_batch_size, dtype=torch.float32, device=device)
        self._top_p = torch.zeros_like(self._temperature)
        # And [B, R], widened as longer responses are asked for.
        self._tokens = torch.zeros(max_batch_size, 0, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(max_batch_size, 0, dtype=torch.float32, device=device)
        self._uniforms = torch.zeros(max_batch_size, 0, dtype=torch.float64, device=device)
        self._uses_top_p = False
        self._longest_offset = 0

    @property
    def num_free(self) -> int:
        """Slots without a row."""
        return self.max_batch_size - len(self.rows)

    @torch.inference_mode()
    def admit(self, new: Sequence[RowT]) -> None:
        """Add rows, at most num_free of them.

        Rows with the same context share one prefill, also with a row that is already being decoded.
        """
        assert 0 < len(new) <= self.num_free
        device = self._lengths.device
        if self._cache is None:
            self._cache = SlotCache(self.model.config.num_hidden_layers, self.max_batch_size)
        first = len(self.rows)
        places = range(first, first + len(new))
        self._fill_cache(new, first)

        slots = torch.arange(first, first + len(new), device=device)
        sampling = [row.request.sampling for row in new]
        limits = [row.request.sampling.max_tokens - len(row.request.prefix) for row in new]
        self._widen_responses(max(limits))
        self._next_tokens[slots] = torch.tensor([row.context[-1] for row in new], device=device)
        self._lengths[slots] = torch.tensor([len(row.context) - 1 for row in new], device=device)
        self._num_new[slots] = 0
        self._limits[slots] = torch.tensor(limits, device=device)
        self._temperature[slots] = torch.tensor([params.temperature for params in sampling], device=device)
        self._top_p[slots] = torch.tensor([params.top_p for params in sampling], device=device)
        for place, row in zip(places, new, strict=True):
            request = row.request
            uniforms = request_uniforms(request.seed, len(request.prefix), request.sampling.max_tokens)
            self._uniforms[place, : len(uniforms)] = torch.from_numpy(uniforms)
            row.joined_at = self.num_steps
        self.rows.extend(new)
        self._rows_changed()

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Decode one token for every row. Returns the rows that ended, by a stop token or at their limit.

        Raises:
            NotFiniteError: if the model gives NaN, or log-prob -inf for the drawn token.
        """
        assert self.rows
        assert self._cache is not None
        n = len(self.rows)
        rows, lengths, num_new = self._indices[:n], self._lengths[:n], self._num_new[:n]
        max_length = self._longest_offset + self.num_steps
        self._cache.begin_step(rows, lengths, max_length)
        columns = torch.arange(max_length + 1, device=lengths.device)
        mask = torch.zeros(n, max_length + 1, dtype=self.model.dtype, device=lengths.device)
        mask.masked_fill_(columns > lengths[:, None], -math.inf)
        logits = self.model(
            input_ids=self._next_tokens[:n, None],
            attention_mask=mask[:, None, None, :],
            position_ids=lengths[:, None],
            use_cache=True,
            **{self._cache_argument: self._cache},
        ).logits[:, -1]
        tokens, log_probs = sample_tokens(
            logits, self._temperature[:n], self._uniforms[rows, num_new], self._top_p[:n] if self._uses_top_p else None
        )
        self._tokens[rows, num_new] = tokens
        self._log_probs[rows, num_new] = log_probs
        self._next_tokens[:n] = tokens
        lengths += 1
        num_new += 1
        self.num_steps += 1
        broken = ~torch.isfinite(log_probs)
        ended = (self._is_stop[tokens] | (num_new >= self._limits[:n]) | broken).nonzero().flatten().tolist()
        for row in ended:
            if broken[row]:
                raise NotFiniteError(
                    f"the model gave log-prob {float(log_probs[row])} at response token {int(num_new[row]) - 1} of "
                    f"sample {self.rows[row].request.sample_id!r}: its weights or activations are not finite. If that "
                    "is so from the start, the files in model.path hold such numbers; if later, lower "
                    "optimizer.learning_rate and go on from an earlier checkpoint."
                )
        return ended

    def response(self, row: int) -> tuple[Tensor, Tensor]:
        """Tokens (int64 [R]) and log-probs (float32 [R]) of one row so far, without its prefix, copied to the CPU."""
        length = self.num_steps - self.rows[row].joined_at
        return self._tokens[row, :length].clone().cpu(), self._log_probs[row, :length].clone().cpu()

    def last_token(self, row: int) -> int:
        """Token that the last step decoded for a row."""
        return int(self._next_tokens[row])

    @torch.inference_mode()
    def remove(self, leaving: Collection[int]) -> None:
        """Take rows out; the last rows move into the gaps."""
        if not leaving:
            return
        left = set(leaving)
        num_kept = len(self.rows) - len(left)
        gaps = [row for row in left if row < num_kept]
        movers = [row for row in range(num_kept, len(self.rows)) if row not in left]
        for gap, mover in zip(gaps, movers, strict=True):
            self.rows[gap] = self.rows[mover]
        del self.rows[num_kept:]
        if gaps:
            assert self._cache is not None
            sources = torch.tensor(movers, device=self._lengths.device)
            targets = torch.tensor(gaps, device=self._lengths.device)
            self._cache.copy(sources, targets, int(self._lengths[sources].max()))
            for tensor in self._per_slot():
                tensor[targets] = tensor[sources]
        self._rows_changed()

    def release(self) -> None:
        """Free the cache, once no row is left: the memory is the trainer's until the next response is asked for."""
        assert not self.rows
        self._cache = None

    def _per_slot(self) -> tuple[Tensor, ...]:
        return (
            self._next_tokens,
            self._lengths,
            self._num_new,
            self._limits,
            self._temperature,
            self._top_p,
            self._tokens,
            self._log_probs,
            self._uniforms,
        )

    def _rows_changed(self) -> None:
        """Recompute the values that depend on the rows; steps only read them."""
        self._uses_top_p = any(row.request.sampling.top_p < 1 for row in self.rows)
        self._longest_offset = max((len(row.context) - 1 - row.joined_at for row in self.rows), default=0)

    def _widen_responses(self, num_tokens: int) -> None:
        missing = num_tokens - self._tokens.shape[1]
        if missing > 0:
            self._tokens = torch.nn.functional.pad(self._tokens, (0, missing))
            self._log_probs = torch.nn.functional.pad(self._log_probs, (0, missing))
            self._uniforms = torch.nn.functional.pad(self._uniforms, (0, missing))

    def _fill_cache(self, new: Sequence[RowT], first: int) -> None:
        """Cache the contexts of rows that take the slots from `first` on, each context once."""
        assert self._cache is not None
        decoded = {row.context: place for place, row in enumerate(self.rows)}
        shared: dict[int, list[tuple[int, int]]] = {}
        missing: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(new, start=first):
            length = len(row.context) - 1
            if row.context in decoded:
                shared.setdefault(length, []).append((decoded[row.context], place))
            elif length:
                missing.setdefault(row.context, []).append(place)
        for length, pairs in shared.items():
            sources, places = torch.tensor(pairs, device=self._lengths.device).unbind(1)
            self._cache.copy(sources, places, length)
        for contexts in _prefill_chunks(list(missing)):
            self._prefill(contexts, [missing[context] for context in contexts])

    def _prefill(self, contexts: list[tuple[int, ...]], places: list[list[int]]) -> None:
        """Run all but the last token of each context and copy its keys and values into every slot that shares it."""
        assert self._cache is not None
        device = self._lengths.device
        width = max(len(context) for context in contexts) - 1
        # Padding comes last, where causal attention hides it from every real token; decoding masks its columns.
        input_ids = torch.tensor(
            [context[:-1] + (0,) * (width + 1 - len(context)) for context in contexts], device=device
        )
        prefilled = DynamicCache()
        self.model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **{self._cache_argument: prefilled})
        sources = torch.tensor([i for i, slots in enumerate(places) for _ in slots], device=device)
        self._cache.write(prefilled, sources, torch.tensor([slot for slots in places for slot in slots], device=device))


def _cache_argument(model: Any) -> str:
    """Name of the cache argument of the model's `forward`: transformers 5.24 renamed it, and warns of the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _prefill_chunks(contexts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Contexts by decreasing length, in chunks that hold, padded to their longest, PREFILL_TOKENS or one context."""
    chunks: list[list[tuple[int, ...]]] = []
    for context in sorted(contexts, key=len, reverse=True):
        if chunks and (len(chunks[-1]) + 1) * len(chunks[-1][0]) <= PREFILL_TOKENS:
            chunks[-1].append(context)
        else:
            chunks.append([context])
    return chunks
