"""Under which name both engines' clients have servers reuse keys and values, and how they score through the cache."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams
from megatron_fipo.rollout.servers.api import InferenceServer, LaunchSpec, ScoredEnd
from megatron_fipo.rollout.servers.cache_salt import cache_salt
from megatron_fipo.rollout.servers.http import ServerConnection, ServerRefusedError
from megatron_fipo.rollout.servers.setup import ADAPTERS

SPEC = LaunchSpec("python", Path("model"), "127.0.0.1", 1, "float32", weight_version="7")
REQUEST = GenerationRequest("sample", 0, 0, (5, 6, 7), SamplingParams(1), seed=1)
SEQUENCE = [11, 12, 13, 14, 15]
GENERATE = {"sglang": "/generate", "vllm": "/inference/v1/generate"}
SPANS = [{"version": "7", "start": 0, "end": 1}]
SALT = {"sglang": "extra_key", "vllm": "cache_salt"}


class Played:
    """A server that answers every question alike, and keeps those for responses and log-probs."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.bodies: list[dict[str, Any]] = []
        self.num_scores = 2
        """Tokens of which SGLang's tells log-probs."""
        self.other_tokens: tuple[int, ...] = (14, 15)
        """Tokens of which vLLM's tells log-probs beside the one that it has drawn."""

    def answer(self, body: dict[str, Any]) -> Any:
        self.bodies.append(body)
        if self.engine == "sglang":
            scores = [[None, 13, None], [-4.0, 14, None], [-5.0, 15, None]][: self.num_scores + 1]
            meta = {"finish_reason": {"type": "length"}, "input_token_logprobs": scores, "cached_tokens": 2}
            meta |= {"output_token_logprobs": [[-0.5, 8, None]], "weight_versions": SPANS}
            return {"output_ids": [8], "meta_info": meta}
        others = [{"token_id": token, "logprob": float(10 - token)} for token in self.other_tokens]
        content = [{"token_id": 8, "logprob": -0.5, "top_logprobs": others}]
        choice = {"token_ids": [8], "finish_reason": "length", "logprobs": {"content": content}}
        choice["weight_versions"] = SPANS
        # Longer prompts find what the first has left.
        usage = {"prompt_tokens_details": {"cached_tokens": len(body["token_ids"]) - 1}}
        return {"model": "weights-7", "usage": usage, "choices": [choice]}

    def use(self, act: Callable[[InferenceServer], Awaitable[Any]]) -> Any:
        """Have a client of this server do something."""

        async def other(_: web.Request) -> web.Response:
            return web.json_response({"success": True, "results": []})

        async def generate(request: web.Request) -> web.Response:
            return web.json_response(self.answer(await request.json()))

        async def run() -> Any:
            application = web.Application()
            application.router.add_post(GENERATE[self.engine], generate)
            application.router.add_post("/{route:.*}", other)
            async with TestServer(application) as server, aiohttp.ClientSession() as session:
                connection = ServerConnection(session, str(server.make_url("/")))
                return await act(ADAPTERS[self.engine]().connect(connection, SPEC))

        return asyncio.run(run())


@pytest.fixture(params=["sglang", "vllm"])
def played(request: pytest.FixtureRequest) -> Played:
    return Played(request.param)


def test_every_version_has_a_name_of_its_own(played: Played) -> None:
    async def act(client: InferenceServer) -> None:
        for version in ("7", "8", "9"):
            if version != "7":
                await client.end_update(version)
            await client.generate(REQUEST, f"id-{version}", [1], 10.0)
            await client.score_end(SEQUENCE, 2, 10.0)

    played.use(act)
    salts = [body[SALT[played.engine]] for body in played.bodies]
    each = len(salts) // 3
    assert salts == [cache_salt(version) for version in ("7", "8", "9") for _ in range(each)]
    assert len(set(salts)) == 3
    assert "7" != cache_salt("7") == cache_salt("7"), "that of another run may mean other weights"


def test_an_update_that_fails_at_its_end_has_changed_the_name(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is not known then."""

    async def act(client: InferenceServer) -> None:
        async def refuse() -> None:
            raise ServerRefusedError("not now", 400)

        monkeypatch.setattr(client, "flush_cache", refuse)
        with pytest.raises(ServerRefusedError, match="not now"):
            await client.end_update("8")
        await client.generate(REQUEST, "id", [1], 10.0)

    played.use(act)
    assert [body[SALT[played.engine]] for body in played.bodies] == [cache_salt("8")]


def test_the_end_of_a_sequence_is_scored_on_what_is_cached(played: Played) -> None:
    assert played.use(lambda client: client.score_end(SEQUENCE, 2, 10.0)) == ScoredEnd([-4.0, -5.0], 2)
    if played.engine == "sglang":
        (body,) = played.bodies
        assert (body["input_ids"], body["logprob_start_len"]) == (SEQUENCE, 2), "positions 0 and 1 may be cached"
        assert body["sampling_params"]["max_new_tokens"] == 0
    else:
        assert [body["token_ids"] for body in played.bodies] == [SEQUENCE[:3], SEQUENCE[:4]]
        assert [body["sampling_params"]["logprob_token_ids"] for body in played.bodies] == [[14, 14], [15, 15]]
        assert all("prompt_logprobs" not in body["sampling_params"] for body in played.bodies)


def test_a_score_that_lacks_its_token_is_refused(played: Played) -> None:
    played.num_scores, played.other_tokens = 1, (14,)
    words = {"sglang": "scored 1 of the 2 tokens", "vllm": "form that is not known here .KeyError: 15"}
    with pytest.raises(ServerRefusedError, match=words[played.engine]):
        played.use(lambda client: client.score_end(SEQUENCE, 2, 10.0))
