"""What a server reuses of its prefix cache after an update; and what comes of it where the cache is left as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from megatron_fipo.rl.trajectory import Trajectory
from megatron_fipo.rollout.servers.api import ScoredEnd
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.server import State
from megatron_fipo.rollout.servers.vllm.client import VllmServer
from tests.engines.serving import TOLERANCE, VOCABULARY, Serving, request, scores

PROMPT = tuple(2 + 7 * position % (VOCABULARY - 2) for position in range(300))
"""Two whole blocks of vLLM's on the CPU and more."""
BLOCK_TOKENS = 128


class HeldModel:
    """A `Policy` of one of the models, on a device of its own."""

    vocab_size = VOCABULARY

    def __init__(self, serving: Serving, model: int) -> None:
        self._serving, self._model = serving, model

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._serving.weights(self._model)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [scores(self._serving.models[self._model], sequence).tolist() for sequence in sequences]

    def offload(self) -> None:
        raise AssertionError("nothing is lent")

    def onload(self) -> None:
        raise AssertionError("nothing is lent")


def _give(serving: Serving, model: int, version: int) -> tuple[float, float]:
    """Hand a model over as a run does; how much of the canary was cached just before, and after."""
    serving.engine.give(HeldModel(serving, model), version)
    metrics = serving.engine.metrics()
    return tuple(metrics[f"canary/cached_tokens/{when}"].value() for when in ("before", "after"))  # type: ignore[return-value]


def _generate(serving: Serving) -> tuple[Trajectory, float]:
    """One response, and how much of its prompt was cached."""
    serving.engine.metrics()
    (sample,) = serving.generate(replace(request(0, 8), prompt_ids=PROMPT))
    return sample, serving.engine.metrics()["rollout/cached_prompt_share"].value()


def expect_nothing_older_is_reused(serving: Serving, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where both safeguards are there nor with one of them; without any, the canary stops the run.

    Args:
        version: the first of thirteen that no update has had yet.
    """
    client = serving.client
    serving.engine.give(HeldModel(serving, 1), version + 12)  # before the first, a run asks for nothing

    async def leave_it(self: object) -> None:
        pass

    async def pause_and_leave_it(self: Any) -> None:
        await self._post("/pause?mode=keep&clear_cache=false")

    def expect_nothing_reused(first: int) -> None:
        for model in (0, 1):
            before, after = _give(serving, model, first + model)
            assert before >= BLOCK_TOKENS, "it would have been there to be reused"
            assert after == 0
            sample, share = _generate(serving)
            assert share == 0
            serving.expect_log_probs(sample, model)
            assert _generate(serving)[1] > 0.5, "what is of these weights is reused"

    def expect_refused(model: int, version: int, words: str) -> None:
        with pytest.raises(ServerError, match=words):
            serving.engine.give(HeldModel(serving, model), version)
        assert serving.pool.servers[0].state is State.STALE

    def always_salt_with(salt: str, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(sys.modules[type(client).__module__], "cache_salt", lambda version: salt)

    def never_empty(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(type(client), "flush_cache", leave_it)
        if isinstance(client, VllmServer):  # which would empty its cache as it is paused, too
            patch.setattr(VllmServer, "pause", pause_and_leave_it)

    expect_nothing_reused(version)
    with monkeypatch.context() as patch:
        always_salt_with("one", patch)
        expect_nothing_reused(version + 2)
    with monkeypatch.context() as patch:
        never_empty(patch)
        expect_nothing_reused(version + 4)
        always_salt_with("another", patch)  # under the first one the last model's are left
        serving.hold(0, version + 6)
        serving.expect_log_probs(_generate(serving)[0], 0)
        serving.hold(1, version + 7)  # proves weights only
        sample, share = _generate(serving)
        assert share > 0.5
        assert serving.difference(sample, 1).max() > 100 * TOLERANCE, "it computes on model 0's keys and values"

        words = r"reuses keys and values of older weights: directly after an update, \d{3} of a canary prompt's 392 tok"
        expect_refused(0, version + 8, words)
        serving.hold(1, version + 9)  # sound again by its weights, with the cache that it had
        score_end = type(client).score_end

        async def uncounted(self: Any, sequence: Sequence[int], num_tokens: int, timeout_s: float) -> ScoredEnd:
            return replace(await score_end(self, sequence, num_tokens, timeout_s), num_cached_tokens=0)

        patch.setattr(type(client), "score_end", uncounted)
        expect_refused(0, version + 10, "other log-probs than the actor where it may use its prefix cache")
    serving.hold(1, version + 11)
    sample, share = _generate(serving)
    assert share == 0
    serving.expect_log_probs(sample, 1)
