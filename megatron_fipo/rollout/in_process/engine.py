"""Rollout engine inside the trainer's own processes: a transformers model and a batched decode loop.

Nothing to install or to start, so it runs anywhere; the weights come from the actor after every step. Responses that
are long keep their row only: when others end, waiting requests take their slots.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from megatron_fipo.metrics.reductions import Mean, Metrics
from megatron_fipo.rl.trajectory import Segment
from megatron_fipo.rollout.engine import ALL_PROMPTS, GenerationRequest, Policy, Share, Turn, check_request
from megatron_fipo.rollout.in_process.decode_batch import DecodeBatch, Row

_ADMIT_SHARE = 8
"""Requests wait until one in this many slots is free, so that a prefill serves several."""
_REST_S = 0.001
"""Time between two looks of an engine that rests, whether it may go on or is to end what is in flight."""


@dataclass(eq=False)
class _Call(Row):
    """A pending `generate`."""

    future: asyncio.Future[Turn]
    on_token: Callable[[int], None] | None
    number: int
    policy_version: int = field(init=False, default=0)


class InProcessEngine:
    """A `RolloutEngine` that generates where it is called.

    Decoding runs on the event loop of the first caller and gives way to it after every token, so verification, progress
    and cancellation go on meanwhile. One event loop at a time; a loop may end and another one begin between steps.

    Args:
        model_path: Hugging Face folder with config.json and weights.
        dtype: arithmetic and storage of the model; "auto" takes the checkpoint's.
        max_batch_size: sequences decoded at a time.
        device: where the model lives.
        tokenizer: whose end-of-sequence token also ends a response.
        stop_token_ids: tokens that end a response; None takes those that the folder and the tokenizer name.
        policy_version: version of the weights in the folder.
        share: this process's share of the prompts.

    Raises:
        ValueError: if the model attends through a sliding window, or nothing names a token that ends a response.
    """

    repeatable = True

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: torch.dtype | Literal["auto"] = torch.float32,
        max_batch_size: int = 128,
        device: torch.device | str = "cpu",
        tokenizer: Any = None,
        stop_token_ids: Collection[int] | None = None,
        policy_version: int = 0,
        share: Share | None = ALL_PROMPTS,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"rollout.max_batch_size must be at least 1; got {max_batch_size}")
        config = _read_config(model_path)
        _refuse_windows(config, model_path)
        self.stop_token_ids = frozenset(
            find_stop_token_ids(model_path, tokenizer) if stop_token_ids is None else stop_token_ids
        )
        outside = sorted(token for token in self.stop_token_ids if not 0 <= token < config.vocab_size)
        if outside:
            raise ValueError(f"stop tokens {outside} lie outside the vocabulary of {config.vocab_size} of {model_path}")
        if not -config.vocab_size <= (config.pad_token_id or 0) < config.vocab_size:
            raise ValueError(
                f"{model_path}: pad_token_id={config.pad_token_id} lies outside the vocabulary of {config.vocab_size}, "
                "and transformers refuses such a model; mend it in its config.json."
            )
        model = AutoModelForCausalLM.from_pretrained(model_path, config=config, dtype=dtype, attn_implementation="sdpa")
        self.model = model.to(device).eval().requires_grad_(False)
        self.policy_version = policy_version
        self.share: Share | None = share
        # So many more that a prefill finds enough waiting, see `_admit`.
        self.capacity = max_batch_size + max(1, max_batch_size // _ADMIT_SHARE)
        self._given: int | None = None
        self._batch: DecodeBatch[_Call] = DecodeBatch(self.model, max_batch_size, self.stop_token_ids)
        self._pending: deque[_Call] = deque()
        self._scheduler: asyncio.Task[None] | None = None
        self._num_calls = 0
        self._abort_below = 0
        self._sweep_due = False
        self._failure = ""
        self._steps_left: int | None = None
        """Decoding steps until it rests; None if it does not."""
        self._on_rest: Callable[[], None] = lambda: None
        self._num_idle = self._num_slots = 0
        """Slots of all steps that decoded nothing, and all slots of these steps, since `metrics` was called."""

    async def generate(self, request: GenerationRequest, *, on_token: Callable[[int], None] | None = None) -> Turn:
        """Generate one response, after those that were asked for earlier have been admitted.

        Args:
            request: what to generate.
            on_token: called with each token id as it is decoded.

        Returns:
            The turn. With a prefix it holds what follows that, while `policy_versions` and max_tokens count from the
            start of the whole response.

        Raises:
            ValueError: if the request breaks a rule; the message names it.
            RuntimeError: if the engine is closed, lacks weights, or the model gives numbers that are not finite.
        """
        self._expect_usable()
        check_request(request, self.model.config.vocab_size, self.stop_token_ids)
        loop = asyncio.get_running_loop()
        call = _Call(request, loop.create_future(), on_token, self._num_calls)
        self._num_calls += 1
        self._pending.append(call)
        if self._scheduler is None or self._scheduler.done():
            self._scheduler = loop.create_task(self._decode())
            self._scheduler.add_done_callback(self._decoding_ended)
        try:
            return await call.future
        except asyncio.CancelledError:
            self._sweep_due = True
            raise

    def start(self, policy: Policy | None) -> None:
        """See `RolloutEngine`; there is nothing to start."""

    def give(self, policy: Policy, version: int) -> None:
        """See `RolloutEngine`. Collective only in so far as `policy.weights()` is."""
        if self._given != version:
            self.update_weights(policy.weights(), version)
            self._given = version

    def take_back(self, policy: Policy) -> None:
        """See `RolloutEngine`; nothing was lent."""

    def forget_load(self) -> None:
        """See `RolloutEngine`."""
        self._num_idle = self._num_slots = 0

    def metrics(self) -> Metrics:
        """See `RolloutEngine`."""
        idle, total = self._num_idle, self._num_slots
        self.forget_load()
        return {"rollout/idle_slots/share": Mean(idle, total)} if total else {}

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Copy new weights into the model, under their Hugging Face names; each is converted to the model's dtype.

        Args:
            tensors: every parameter once, in any order, on any device. Weights that the model ties (an output layer
                that is the embedding) come once, under the name that `named_parameters` gives.
            policy_version: written into samples from now on.

        Raises:
            ValueError: naming missing, unexpected, repeated and misshapen tensors, after the stream was drained; the
                engine refuses to generate until an update succeeds.
            RuntimeError: if requests are in flight: their cached keys and values belong to the old weights.
        """
        if self._batch.rows or self._pending:
            raise RuntimeError(
                f"weights were handed over while {len(self._batch.rows) + len(self._pending)} requests are in flight; "
                "await them, or call abort() and await them, first"
            )
        self._failure = f"the handover of the weights of policy version {policy_version} did not finish"
        copy_weights(self.model, tensors)
        self.policy_version = policy_version
        self._failure = ""

    def abort(self) -> None:
        """End every request in flight before the next token; each returns what it has, with finish_reason "abort"."""
        self._abort_below = self._num_calls
        self._sweep_due = True

    def allow(self, num_steps: int | None, on_rest: Callable[[], None] = lambda: None) -> None:
        """See `StoppableEngine`."""
        self._steps_left, self._on_rest = num_steps, on_rest

    @property
    def is_at_rest(self) -> bool:
        """See `StoppableEngine`."""
        return self._steps_left == 0

    def close(self) -> None:
        """Fail the requests in flight and release the model."""
        self._failure = "it is closed"
        self._fail_all(RuntimeError("the in-process rollout engine was closed while it generated"))
        self.model = None
        self._batch.model = None

    def _expect_usable(self) -> None:
        """Raise RuntimeError with the reason if the engine cannot generate."""
        if self._failure:
            raise RuntimeError(f"the in-process rollout engine cannot generate: {self._failure}")

    async def _decode(self) -> None:
        """Run while anything is in flight. Other tasks have their turn between two tokens."""
        while self._pending or self._batch.rows:
            if self._sweep_due:
                self._drop_cancelled_and_aborted()
            if self._steps_left == 0:
                await asyncio.sleep(_REST_S)
                continue
            self._admit()
            if self._batch.rows:
                self._step()
            await asyncio.sleep(0)
        self._batch.release()

    def _admit(self) -> None:
        num_new = min(self._batch.num_free, len(self._pending))
        enough = min(len(self._pending), max(1, self._batch.max_batch_size // _ADMIT_SHARE))
        if not num_new or (self._batch.rows and num_new < enough):
            return
        new = list(islice(self._pending, num_new))
        for call in new:
            call.policy_version = self.policy_version
        self._batch.admit(new)
        for _ in new:  # only now: a failing prefill leaves them pending, and they fail with it
            self._pending.popleft()

    def _step(self) -> None:
        batch = self._batch
        self._num_idle += batch.num_free
        self._num_slots += batch.max_batch_size
        ended = batch.step()
        for row, call in enumerate(batch.rows):
            if call.on_token is not None:
                call.on_token(batch.last_token(row))
        for row in ended:
            reason = "stop" if batch.last_token(row) in self.stop_token_ids else "length"
            self._deliver(batch.rows[row], *batch.response(row), reason)
        batch.remove(ended)
        if self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left == 0:
                self._on_rest()

    def _deliver(self, call: _Call, response_ids: Tensor, log_probs: Tensor, reason: str) -> None:
        if call.future.done():
            return
        segments = [Segment(response_ids, "policy", log_probs, call.policy_version)] if len(response_ids) else []
        call.future.set_result(Turn(call.request, segments, reason))

    def _drop_cancelled_and_aborted(self) -> None:
        self._sweep_due = False
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float32)
        for call in self._pending:
            if call.number < self._abort_below:
                self._deliver(call, *nothing, "abort")
        self._pending = deque(call for call in self._pending if not call.future.done())
        leaving = []
        for row, call in enumerate(self._batch.rows):
            if call.number < self._abort_below:
                self._deliver(call, *self._batch.response(row), "abort")
            if call.future.done():
                leaving.append(row)
        self._batch.remove(leaving)

    def _decoding_ended(self, scheduler: asyncio.Task[None]) -> None:
        if scheduler.cancelled():
            self._fail_all(None)
        elif (error := scheduler.exception()) is not None:
            self._fail_all(error)

    def _fail_all(self, error: BaseException | None) -> None:
        """End every request in flight, with an error or by cancelling who waits for it."""
        calls = [*self._batch.rows, *self._pending]
        self._batch.remove(range(len(self._batch.rows)))
        self._batch.release()
        self._pending.clear()
        for call in calls:
            if call.future.done():
                continue
            if error is None:
                call.future.cancel()
            else:
                call.future.set_exception(error)


def _read_config(model_path: str | Path) -> Any:
    """config.json as transformers reads it.

    Raises:
        ValueError: if transformers refuses a key's value: it has rules of its own, even for keys that change nothing.
    """
    try:
        return AutoConfig.from_pretrained(model_path)
    except (StrictDataclassError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{Path(model_path) / 'config.json'} is refused by transformers: {reason}. Mend that key, or copy or "
            "download the file again."
        ) from error


def find_stop_token_ids(model_path: str | Path, tokenizer: Any = None) -> tuple[int, ...]:
    """Tokens that end a response, as config.json, generation_config.json and the tokenizer name them, ascending.

    Chat models end their turn with another token than their pre-training's documents; both are wanted.

    Raises:
        ValueError: if none of them names one, or a file cannot be read.
    """
    try:
        named: list[Any] = [getattr(_read_config(model_path), "eos_token_id", None)]
        if (Path(model_path) / "generation_config.json").is_file():
            named.append(GenerationConfig.from_pretrained(model_path).eos_token_id)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # transformers raises each for a damaged file
        raise ValueError(
            f"{model_path}: config.json or generation_config.json cannot be used ({error}). Copy or download them "
            "again."
        ) from error
    if tokenizer is not None:
        named.append(tokenizer.eos_token_id)
    found: set[int] = set()
    for entry in named:
        if entry is not None:
            ids = entry if isinstance(entry, list) else [entry]
            if wrong := [number for number in ids if type(number) is not int or number < 0]:
                raise ValueError(
                    f"{model_path}: eos_token_id={wrong[0]!r} is no token's number; mend it in its *.json."
                )
            found.update(ids)
    if not found:
        raise ValueError(
            f"{model_path}: neither config.json nor generation_config.json nor the tokenizer names an end-of-sequence "
            "token, so no response would ever end; set eos_token_id in its config.json"
        )
    return tuple(sorted(found))


@torch.no_grad()
def copy_weights(model: torch.nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Overwrite a model's parameters, each exactly once.

    The stream is drained to its end, also past an error: other ranks send into it.

    Raises:
        ValueError: naming missing, unexpected, repeated and misshapen tensors. The model is then partly overwritten.
    """
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    seen: set[str] = set()
    problems: list[str] = []
    for name, tensor in tensors:
        parameter = parameters.get(name)
        if parameter is None:
            problems.append(
                f"{name} is tied to another parameter: leave it out" if name in tied else f"{name} is unexpected"
            )
        elif name in seen:
            problems.append(f"{name} came twice")
        elif parameter.shape != tensor.shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, the model's is {list(parameter.shape)}")
        else:
            parameter.copy_(tensor)
        seen.add(name)
    problems += [f"{name} is missing" for name in parameters if name not in seen]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"the weights do not fit the rollout model ({type(model).__name__}): {shown}")


def _refuse_windows(config: Any, model_path: str | Path) -> None:
    """Refuse sliding windows: the slot cache shows every row all of its tokens."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"the in-process engine needs full attention in every layer; {model_path} has layer_types {sorted(kinds)} "
            f"and sliding_window={getattr(config, 'sliding_window', None)}"
        )
