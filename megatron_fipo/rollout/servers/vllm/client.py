"""The HTTP side of a vLLM server. The routes are those of vLLM 0.32.

vLLM differs from what `api` asks for in places that this module makes up for or refuses:
- Its log-probs at top_p < 1 are renormalised over the nucleus. Such completions carry NaN, not another quantity.
- It cuts a response short at its context length, raises temperatures below 0.01 to 0.01 and ignores unknown sampling
  parameters without a word. The first two are errors here, and no unknown parameter is sent.
- It has no command-line option for the version of the first weights, and reports "default". The version stands in the
  name under which the model is served, which every answer repeats.
- Its own checksums are SHA-256 on the host, minutes for a large model, and on the CPU they cover no linear layer. Ours
  come from `plugins.megatron_fipo_vllm.worker`, which is loaded into its workers and takes weights over as well.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.rollout.engine import GenerationRequest
from megatron_fipo.rollout.servers.api import Completion, GroupAddress, LaunchSpec, ScoredEnd, ServerInfo
from megatron_fipo.rollout.servers.cache_salt import cache_salt
from megatron_fipo.rollout.servers.completions import join_completion
from megatron_fipo.rollout.servers.http import (
    ANSWER_BYTES,
    ServerConnection,
    ServerRefusedError,
    ServerUnreachableError,
    reading,
)
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.sealed import seal
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.transport import pack, pack_handle
from megatron_fipo.rollout.servers.vllm.checksums import VllmExpectedChecksums
from megatron_fipo.rollout.servers.weight_buckets import Bucket, TensorSpec
from megatron_fipo.system.digests import hashed_seed

_CONTROL_TIMEOUT_S = 60.0
"""Time-out of routes that only change a state."""
_FIRST_VERSION = "default"
"""What vLLM calls the weights that it was started with."""
_DEAD_ENGINE = "EngineCore encountered an issue"
"""Error text of a vLLM whose engine process has died while its HTTP process still answers."""
NAME_PREFIX = "weights-"
"""A server that is started here serves its model under a name of this and the version of its first weights."""
_UPDATING = "updating"
"""What a server reports between the beginning and the end of an update. No response may carry it."""
_REQUEST_PREFIX = "generate-tokens-"
"""vLLM puts this before the ids of requests to its generate route, and aborts a request by the whole id only."""
_MIN_TEMPERATURE = 0.01
_LOWEST_LOG_PROB = -9999.0
"""What vLLM writes for minus infinity and for NaN."""
_TOKEN_BYTES = 1024
"""More than an answer takes for one token, its log-prob and what vLLM tells beside it."""
_MEMORY_TAGS = {"weights": "weights", "cache": "kv_cache"}


class VllmServer:
    """An `InferenceServer`."""

    def __init__(self, connection: ServerConnection, spec: LaunchSpec) -> None:
        self.url = connection.url
        self._connection, self._spec = connection, spec
        self._cache_salt = cache_salt(spec.weight_version)

    async def health(self, timeout_s: float) -> None:
        """Have one token generated: the server's own /health does not notice a worker that hangs."""
        body = {"token_ids": [0], "sampling_params": {"max_tokens": 1, "temperature": 0.0, "detokenize": False}}
        await self._generate(self._connection, body, timeout_s)

    async def info(self) -> ServerInfo:
        models = await self._connection.get("/v1/models", timeout_s=_CONTROL_TIMEOUT_S)
        weights = await self._connection.get("/weight_info", timeout_s=_CONTROL_TIMEOUT_S)
        with reading(self.url):
            model = models["data"][0]
            return ServerInfo(str(model["root"]), self._version(weights["weight_version"], model["id"]))

    async def generate(
        self,
        request: GenerationRequest,
        request_id: str,
        stop_token_ids: Sequence[int],
        timeout_s: float,
        connection: ServerConnection | None = None,
    ) -> Completion:
        sampling = request.sampling
        if 0 < sampling.temperature < _MIN_TEMPERATURE:
            raise ValueError(
                f"vLLM samples at a temperature of 0 or at least {_MIN_TEMPERATURE}; got {sampling.temperature}"
            )
        max_tokens = sampling.max_tokens - len(request.prefix)
        parameters = {
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": _continued_seed(request.seed, len(request.prefix)),
            "stop_token_ids": list(stop_token_ids),
            "ignore_eos": True,  # stop_token_ids alone decide
            "logprobs": 0,
            "detokenize": False,
        }
        body = {
            "request_id": request_id,
            "token_ids": [*request.prompt_ids, *request.prefix],
            "cache_salt": self._cache_salt,
            "sampling_params": parameters,
        }
        answer = await self._generate(connection or self._connection, body, timeout_s, max_tokens)
        with reading(self.url):
            completion = self._completion(answer)
        if completion.finish_reason == "length" and len(completion.token_ids) < max_tokens:
            raise ServerRefusedError(
                f"{self.url} generated {len(completion.token_ids)} of up to {max_tokens} tokens after "
                f"{len(body['token_ids'])}: its context is full. Raise servers.max_total_tokens, "
                "or lower rollout.max_response_tokens.",
                200,
            )
        if sampling.top_p < 1 and sampling.temperature > 0:
            return Completion(
                completion.token_ids,
                [math.nan] * len(completion.token_ids),
                completion.finish_reason,
                completion.version_spans,
                completion.num_cached_tokens,
            )
        return completion

    async def cancel(self, request_id: str) -> None:
        await self._post("/abort_requests", {"request_ids": [_REQUEST_PREFIX + request_id]})

    async def abort_all(self) -> None:
        await self._post("/abort_requests", {})

    async def score(self, sequences: Sequence[Sequence[int]], timeout_s: float) -> list[list[float]]:
        return list(await asyncio.gather(*(self._score(sequence, timeout_s) for sequence in sequences)))

    async def score_end(self, sequence: Sequence[int], num_tokens: int, timeout_s: float) -> ScoredEnd:
        places = range(len(sequence) - num_tokens, len(sequence))
        # The first alone: others at the same time would find in the cache what it has just computed.
        first = await self._score_one(sequence, places[0], timeout_s)
        rest = await asyncio.gather(*(self._score_one(sequence, place, timeout_s) for place in places[1:]))
        return ScoredEnd([end.log_probs[0] for end in (first, *rest)], first.num_cached_tokens)

    async def pause(self) -> None:
        await self._post(f"/pause?mode=keep&clear_cache={'false' if self._spec.keeps_in_flight else 'true'}")

    async def resume(self) -> None:
        await self._post("/resume")

    async def flush_cache(self) -> None:
        # Requests that a pause holds are sent back to the queue: their keys and values are computed anew.
        answer = await self._post("/reset_prefix_cache?reset_running_requests=true")
        with reading(self.url):
            is_forgotten = answer["success"]
        if not is_forgotten:
            raise ServerRefusedError(f"{self.url}/reset_prefix_cache did not forget its keys and values", 200)

    async def begin_update(self) -> None:
        # Should a half-written server generate after all, its response bears this version, and is refused for it.
        await self._post("/update_weight_version", {"new_version": _UPDATING})
        await self._call("fipo_begin_update", timeout_s=_CONTROL_TIMEOUT_S)

    async def load_bucket(self, bucket: Bucket, timeout_s: float) -> None:
        messages = [
            await asyncio.to_thread(pack, bucket.flat)
            if handle is None
            else pack_handle(handle.device_uuid, handle.arguments)
            for handle in bucket.handles_on(self._spec.gpus, self._spec.tp)
        ]
        await self._call("fipo_load_bucket", messages, _wire(bucket.specs), timeout_s=timeout_s)

    async def join_group(self, address: GroupAddress, timeout_s: float) -> None:
        where = (address.host, address.port, address.name, address.backend, address.world_size, address.first_rank)
        await self._call("fipo_join_group", *where, timeout_s, timeout_s=timeout_s)

    async def receive_bucket(self, specs: Sequence[TensorSpec], group_name: str, timeout_s: float) -> None:
        await self._call("fipo_receive_bucket", _wire(specs), group_name, timeout_s=timeout_s)

    async def leave_group(self, group_name: str) -> None:
        await self._call("fipo_leave_group", group_name, timeout_s=_CONTROL_TIMEOUT_S)

    async def load_folder(self, folder: Path, timeout_s: float) -> None:
        await self._call("fipo_load_folder", str(folder), timeout_s=timeout_s)

    async def end_update(self, version: str) -> None:
        self._cache_salt = cache_salt(version)
        await self._call("fipo_end_update", timeout_s=_CONTROL_TIMEOUT_S)
        if not self._spec.keeps_in_flight:  # otherwise only the cache's salt keeps others from finding what is there
            await self.flush_cache()
        await self._post("/update_weight_version", {"new_version": version})

    def expected_checksums(self) -> VllmExpectedChecksums:
        return VllmExpectedChecksums(read_model_shape(self._spec.model_path), self._spec.tp)

    async def checksums(self, timeout_s: float) -> dict[str, str]:
        ranks = await self._call("fipo_checksums", timeout_s=timeout_s)
        if len(ranks) != self._spec.tp:
            raise ServerRefusedError(
                f"{self.url} has {len(ranks)} tensor-parallel ranks; servers.tp={self._spec.tp}", 200
            )
        with reading(self.url):
            return {name: str(checksum) for rank in ranks for name, checksum in rank.items()}

    async def release_memory(self) -> None:
        await self._post("/sleep?level=2")

    async def resume_memory(self, part: Literal["weights", "cache"]) -> None:
        await self._post(f"/wake_up?tags={_MEMORY_TAGS[part]}")

    async def _score(self, sequence: Sequence[int], timeout_s: float) -> list[float]:
        body = {
            "token_ids": list(sequence),
            # prompt_logprobs are of temperature 1 always, and keep the prefix cache out.
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False},
        }
        answer = await self._generate(self._connection, body, timeout_s, len(sequence))
        with reading(self.url):
            entries = (answer.get("prompt_logprobs") or [None])[1:]
            if len(entries) != len(sequence) - 1:
                raise ServerRefusedError(
                    f"{self.url} scored {len(entries)} of {len(sequence) - 1} tokens of a canary sequence", 200
                )
            pairs = zip(sequence[1:], entries, strict=True)
            return [self._finite(entry[str(token)]["logprob"]) for token, entry in pairs]

    async def _score_one(self, sequence: Sequence[int], place: int, timeout_s: float) -> ScoredEnd:
        """Score the token at one place, which is at least 1: prompt_logprobs would keep the cache out."""
        token = sequence[place]
        # Beside the sampled token's, as many log-probs are told as `logprobs` says, the sampled token's among them.
        asked = {"logprobs": 2, "logprob_token_ids": [token, token]}
        body = {
            "token_ids": list(sequence[:place]),
            "cache_salt": self._cache_salt,
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "ignore_eos": True, **asked},
        }
        answer = await self._generate(self._connection, body, timeout_s)
        with reading(self.url):
            (sampled,) = answer["choices"][0]["logprobs"]["content"]
            found = {entry["token_id"]: entry["logprob"] for entry in (sampled, *sampled["top_logprobs"])}
            return ScoredEnd([self._finite(found[token])], _num_cached_tokens(answer))

    async def _generate(
        self, connection: ServerConnection, body: Mapping[str, Any], timeout_s: float, num_tokens: int = 1
    ) -> Any:
        """Ask for a response. The answer may be as long as this number of tokens makes it."""
        longest = ANSWER_BYTES + num_tokens * _TOKEN_BYTES
        with _unless_dead():
            return await connection.post("/inference/v1/generate", body, timeout_s=timeout_s, longest_answer=longest)

    def _completion(self, answer: Any) -> Completion:
        """The response in the answer to a request for one.

        Raises:
            ServerRefusedError: if it is not whole, or its parts disagree.
        """
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not choices or len(choices) != 1:
            raise ServerRefusedError(f"{self.url} gave no response: {str(answer)[:200]}", 200)
        choice = choices[0]
        content = (choice["logprobs"] or {}).get("content") or []
        scored = [(entry["token_id"], self._finite(entry["logprob"])) for entry in content]
        spans = [
            (self._version(span["version"], answer["model"]), span["start"], span["end"])
            for span in choice["weight_versions"] or []
        ]
        return join_completion(
            self.url, choice["token_ids"] or [], scored, choice["finish_reason"], spans, _num_cached_tokens(answer)
        )

    def _finite(self, log_prob: float) -> float:
        if log_prob <= _LOWEST_LOG_PROB:
            raise ServerRefusedError(f"{self.url} gave a log-prob that is not finite (as {log_prob})", 200)
        return log_prob

    def _version(self, reported: Any, model_name: Any) -> str:
        """Version of the weights that a server has reported.

        Where that is vLLM's word for its first weights, the version stands in the name of the model; for a server that
        somebody else started it stands in the specification.
        """
        if not isinstance(reported, str) or not isinstance(model_name, str):
            raise TypeError("a version of the weights and the name of a model are texts")
        if reported != _FIRST_VERSION:
            return reported
        ours = model_name.startswith(NAME_PREFIX)
        return model_name.removeprefix(NAME_PREFIX) if ours else self._spec.weight_version

    async def _post(self, route: str, body: Mapping[str, Any] | None = None) -> Any:
        with _unless_dead():
            return await self._connection.post(route, body, timeout_s=_CONTROL_TIMEOUT_S)

    async def _call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a method of every worker, sealed with the key.

        Returns:
            What they returned, in the order of ranks.

        Raises:
            ServerRefusedError: with the error of the first rank that failed.
        """
        sealed = await asyncio.to_thread(seal, self._spec.key, method, arguments)  # a bucket's values take a while
        body = {"method": method, "args": sealed, "timeout": timeout_s}
        with _unless_dead():
            answer = await self._connection.post("/collective_rpc", body, timeout_s=timeout_s)
        with reading(self.url):
            for rank, result in enumerate(answer["results"]):
                if "error" in result:
                    raise ServerRefusedError(
                        f"{self.url}, tensor-parallel rank {rank}, {method}: {result['error']}", 200
                    )
            return [result["value"] for result in answer["results"]]


def _num_cached_tokens(answer: Mapping[str, Any]) -> int:
    """Prompt tokens that came from the prefix cache."""
    details = answer["usage"].get("prompt_tokens_details") or {}
    return details.get("cached_tokens") or 0


@contextmanager
def _unless_dead() -> Iterator[None]:
    """Tell apart a server that refuses from one whose engine died while it worked on the request.

    Raises:
        ServerUnreachableError: if its engine died.
    """
    try:
        yield
    except ServerRefusedError as error:
        if _DEAD_ENGINE in str(error):
            raise ServerUnreachableError(str(error)) from error
        raise


def _continued_seed(seed: int, num_prefix_tokens: int) -> int:
    """Seed of a response that continues a prefix: vLLM's random numbers start anew there, and must not repeat."""
    return hashed_seed(seed, num_prefix_tokens) if num_prefix_tokens else seed


def _wire(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "dtype": str(spec.dtype).removeprefix("torch."),
            "shape": list(spec.shape),
            "start": spec.start,
            "stop": spec.stop,
        }
        for spec in specs
    ]
