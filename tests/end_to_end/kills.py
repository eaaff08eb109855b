"""Preparations under which a rank kills itself at a given point of a run, or is kept from doing something."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core import dist_checkpointing

from megatron_fipo.actor.actor import Actor
from megatron_fipo.rollout import generation
from megatron_fipo.rollout.in_process.engine import InProcessEngine
from megatron_fipo.rollout.stream import Stream


def die() -> None:
    """End this process as the kernel does when memory runs out, or an operator in a hurry."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_rollout(step: int, num_samples: int) -> None:
    """Die when so many of this rank's responses of a step are judged and others are being generated."""
    original = generation.generate_groups

    async def dying(*args: Any, **keywords: Any) -> Any:
        on_sample, seen = keywords["on_sample"], []

        def counting(sample: Any) -> None:
            on_sample(sample)
            seen.append(sample)
            if len(seen) == num_samples:
                die()

        if keywords["step"] == step:
            keywords["on_sample"] = counting
        return await original(*args, **keywords)

    generation.generate_groups = dying


def in_stream(step: int, num_samples: int) -> None:
    """`in_rollout` for sampling.streaming; where the step judges fewer, the first one after it that judges so many."""
    _in_stream(step, num_samples, die)


def signalled_in_stream(step: int, num_samples: int) -> None:
    """Get SIGTERM when so many of this rank's responses of a step are judged, and go on.

    Where the step judges fewer, it is the first one after it that judges so many.
    """
    _in_stream(step, num_samples, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _in_stream(step: int, num_samples: int, action: Callable[[], None]) -> None:
    original = Stream.__init__

    def watched(self: Stream, *args: Any, **keywords: Any) -> None:
        on_written, seen = keywords["on_written"], [0]

        def counting(sample: Any) -> None:
            on_written(sample)
            seen[0] += 1
            if seen[0] == num_samples:
                action()

        if keywords["step"] >= step:
            keywords["on_written"] = counting
        original(self, *args, **keywords)

    Stream.__init__ = watched  # type: ignore[method-assign]


def in_log_probs(call: int) -> None:
    """Die before the log-probs of the old policy are computed for the so-many-th minibatch of the run."""
    die_at(Actor, "log_probs", lambda count, *args, **keywords: count == call)


def in_update(step: int, num_done: int) -> None:
    """Die in a step after so many of its updates."""
    done = [0]

    def is_due(count: int, actor: Any, microbatches: Any, loss_function: Any, step_now: int) -> bool:
        done[0] += step_now == step
        return step_now == step and done[0] == num_done + 1

    die_at(Actor, "update", is_due)


def signalled_in_update(step: int, num_done: int) -> None:
    """Get SIGTERM in a step after so many of its updates, and go on: the run saves and leaves."""
    done = [0]
    original = Actor.update

    def signalling(self: Actor, microbatches: Any, loss_function: Any, step_now: int) -> Any:
        done[0] += step_now == step
        if step_now == step and done[0] == num_done:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, microbatches, loss_function, step_now)

    Actor.update = signalling  # type: ignore[method-assign]


def signalled_in_rollout(step: int) -> None:
    """Get SIGTERM when a step's responses are about to be generated or taken from their records, and go on."""
    original = generation.generate_groups

    async def signalling(*args: Any, **keywords: Any) -> Any:
        if keywords["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return await original(*args, **keywords)

    generation.generate_groups = signalling


def in_save(call: int) -> None:
    """Die in the so-many-th save, when some of its files are written and it has not its name yet."""
    original, calls = dist_checkpointing.save, [0]

    def dying(*args: Any, **keywords: Any) -> Any:
        result = original(*args, **keywords)
        calls[0] += 1
        if calls[0] == call:
            die()
        return result

    dist_checkpointing.save = dying


def after(seconds: float) -> None:
    """Die after some time, wherever the run is then."""
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    timer.start()


def without_generation(last_step: int) -> None:
    """Fail if a response of a step up to `last_step` is generated; evaluations may be."""
    original = InProcessEngine.generate

    async def refusing(self: InProcessEngine, request: Any, **keywords: Any) -> Any:
        step = int(request.sample_id.split("/")[0])
        assert not 0 <= step <= last_step, f"{request.sample_id} is generated again"
        return await original(self, request, **keywords)

    InProcessEngine.generate = refusing  # type: ignore[method-assign]


def die_at(owner: Any, name: str, is_due: Callable[..., bool]) -> None:
    """Die before a call of a function that `is_due` picks by its number, from 1, and its arguments."""
    original, calls = getattr(owner, name), [0]

    def dying(*args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if is_due(calls[0], *args, **keywords):
            die()
        return original(*args, **keywords)

    setattr(owner, name, dying)


KILLS: dict[str, Callable[[], None]] = {
    "in a rollout": partial(in_rollout, step=1, num_samples=3),
    "in a save": partial(in_save, call=1),
    "in an update": partial(in_update, step=3, num_done=1),
    "before the log-probs": partial(in_log_probs, call=3),
}
"""Where a run of four steps with two updates each, saved after two, is killed."""
