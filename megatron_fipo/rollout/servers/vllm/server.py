"""vLLM servers: command line, HTTP routes (those of 0.32), and what they answer.

vLLM differs from what `server_api` asks for in places that this module makes up for or refuses:
- Its log-probs at top_p < 1 are renormalised over the nucleus. Such completions carry NaN, not another quantity.
- It cuts a response short at its context length, raises temperatures below 0.01 to 0.01 and ignores unknown sampling
  parameters without a word. The first two are errors here; of the last none are sent.
- It has no command-line option for the version of the first weights, and reports "default". The version stands in the
  name under which the model is served, which every answer repeats.
- Its own checksums are SHA-256 on the host, minutes for a large model, and on the CPU they cover no linear layer. Ours
  come from `plugins.megatron_fipo_vllm.worker`, which is loaded into its workers and takes weights over as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_fipo.convert.hf_config import ModelShape, read_model_shape
from megatron_fipo.rollout.engine import GenerationRequest
from megatron_fipo.rollout.servers import plugins
from megatron_fipo.rollout.servers.api import (
    NOT_THE_TRAINERS,
    Bucket,
    Completion,
    GroupAddress,
    LaunchPlan,
    LaunchSpec,
    ServerInfo,
    TensorSpec,
)
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
from megatron_fipo.rollout.servers.plugins.server_guard import KEY_VARIABLE
from megatron_fipo.rollout.servers.vllm.checksums import VllmLedger

_CONTROL_TIMEOUT_S = 60.0
"""For routes that only change a state."""
_FIRST_VERSION = "default"
"""What vLLM calls the weights that it was started with."""
_DEAD_ENGINE = "EngineCore encountered an issue"
"""In the answers of a server whose other processes are gone, until it is gone itself."""
_NAME_PREFIX = "weights-"
"""Of the name under which a model is served that a launch plan of this module started."""
_UPDATING = "updating"
"""Version of a server between the beginning and the end of an update; no sample may carry it."""
_REQUEST_PREFIX = "generate-tokens-"
"""Put by vLLM before the ids of requests to its generate route; it aborts by the whole id alone."""
_MIN_TEMPERATURE = 0.01
_LOWEST_LOG_PROB = -9999.0
"""What vLLM writes for minus infinity and for NaN."""
_BLOCK_TOKENS = 128
"""vLLM's unit of the cache on the CPU; elsewhere it is smaller."""
_TOKEN_BYTES = 1024
"""More than an answer takes for one token, its log-prob and what vLLM tells beside it."""
_MEMORY_TAGS = {"weights": "weights", "cache": "kv_cache"}
_LAST_WORDS = re.compile(
    r"^(?:\(\w+ pid=\d+\) )?(?:ERROR \S+ \S+ \[[^]]*\] )?"  # what vLLM puts before a line of its log
    r"((?:[\w.]+\.)?\w*(?:Error|Exception|Exit)\b.*(?:\n  Value error, .*)?|.*\bout of memory\b.*)",
    re.MULTILINE,
)
_LINE_LIMIT = 500
_CPU_LAUNCHER = str(Path(plugins.__file__).resolve().parent / "vllm_cpu_launcher.py")
_SECONDHAND = ("Engine core initialization failed", "See root cause above", "Worker failed with error")
"""In lines by which one process reports the death of another."""


class VllmAdapter:
    """A `ServerAdapter`."""

    name = "vllm"
    has_router = False

    def launch_plan(self, spec: LaunchSpec) -> LaunchPlan:
        """Command and environment of a server.

        Raises:
            ValueError: if memory is to be released on the CPU, or the model in spec.model_path is not supported.
        """
        arguments = [
            *("--model", str(spec.model_path), "--host", spec.host, "--port", str(spec.port)),
            *("--dtype", spec.dtype, "--tensor-parallel-size", str(spec.tp), "--seed", str(spec.seed)),
            *("--max-num-seqs", str(spec.max_running_requests)),
            *("--served-model-name", _NAME_PREFIX + spec.weight_version),
            # The route that takes and gives token ids; log-probs after the temperature; no sampling from the model's
            # generation_config.json.
            *("--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
            *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log", "--skip-tokenizer-init"),
            *("--worker-extension-cls", "megatron_fipo_vllm.worker.WeightExtension"),
            # vLLM's own key guards some routes only; this one asks for the run's before all of them.
            *("--middleware", "server_guard.ServerGuard"),
        ]
        environment: dict[str, str | None] = {
            "PYTHONPATH": str(Path(plugins.__file__).resolve().parent),
            "PYTHONDONTWRITEBYTECODE": None,
            "VLLM_SERVER_DEV_MODE": "1",  # weight, pause and abort routes
            KEY_VARIABLE: spec.key,
            "VLLM_API_KEY": None,  # the user's, for another server
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_RPC_BASE_PATH": None,  # its sockets lie with its temporary files, which go when it does
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",  # longer than clients keep connections: none breaks as it is used
            "HF_HUB_OFFLINE": "1",  # the model is a folder
            "TORCHELASTIC_USE_AGENT_STORE": None,  # else process groups would look for torchrun's store
        }
        if spec.device == "cpu":
            if spec.releases_memory:
                raise ValueError(
                    "servers.placement=colocated: vLLM cannot release its memory on the CPU. Take dedicated servers."
                )
            # With prefill in chunks, vLLM's workers on the CPU die of requests with a seed.
            arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
            cores = "|".join(",".join(map(str, rank)) for rank in spec.cpu_cores) or "nobind"
            # Without Dynamo the first request does not wait for a C++ compiler.
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment |= {"CUDA_VISIBLE_DEVICES": ",".join(spec.gpus), **NOT_THE_TRAINERS}
            if spec.releases_memory:
                arguments.append("--enable-sleep-mode")
        context_tokens = spec.context_tokens
        if spec.max_total_tokens is None:
            arguments += ["--gpu-memory-utilization", str(spec.memory_fraction)]  # of the host's memory on the CPU
        else:
            shape = read_model_shape(spec.model_path)
            arguments += ["--kv-cache-memory-bytes", str(_cache_bytes(shape, spec, spec.max_total_tokens))]
            # vLLM does not start with a cache that does not hold a whole sequence of the longest length.
            context_tokens = context_tokens or min(shape.max_position_embeddings, spec.max_total_tokens)
        if context_tokens is not None:
            arguments += ["--max-model-len", str(context_tokens)]
        server = (_CPU_LAUNCHER,) if spec.device == "cpu" else ("-m", "vllm.entrypoints.openai.api_server")
        return LaunchPlan((spec.python, *server, *arguments, *spec.extra_args), environment)

    def connect(self, connection: ServerConnection, spec: LaunchSpec) -> VllmServer:
        """The client of one server."""
        return VllmServer(connection, spec)

    def reason_of_exit(self, log: str) -> str:
        """The log's last errors that are not another process's death, or its last lines."""
        found = [match.group(1).strip() for match in _LAST_WORDS.finditer(log)]
        own = [words for words in found if not any(part in words for part in _SECONDHAND)]
        different = list(dict.fromkeys(own or found)) or log.strip().splitlines()[-5:]
        return "\n".join(words[:_LINE_LIMIT] for words in different[-5:])


class VllmServer:
    """An `InferenceServer`."""

    def __init__(self, connection: ServerConnection, spec: LaunchSpec) -> None:
        self.url = connection.url
        self._connection, self._spec = connection, spec

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

    async def pause(self) -> None:
        await self._post("/pause?mode=keep")

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
        # Whatever a half-written server should generate after all is marked, and refused by who reads the version.
        await self._post("/update_weight_version", {"new_version": _UPDATING})
        await self._call("fipo_begin_update", timeout_s=_CONTROL_TIMEOUT_S)

    async def load_bucket(self, bucket: Bucket, timeout_s: float) -> None:
        messages = [
            await asyncio.to_thread(pack, bucket.flat)
            if handle is None
            else pack_handle(handle.device_uuid, handle.arguments)
            for handle in bucket.handles_on(self._spec)
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
        await self._call("fipo_end_update", timeout_s=_CONTROL_TIMEOUT_S)
        await self.flush_cache()
        await self._post("/update_weight_version", {"new_version": version})

    def ledger(self) -> VllmLedger:
        return VllmLedger(read_model_shape(self._spec.model_path), self._spec.tp)

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

    async def _generate(
        self, connection: ServerConnection, body: Mapping[str, Any], timeout_s: float, num_tokens: int = 1
    ) -> Any:
        """Ask for a response; its answer may be as long as so many tokens make it."""
        longest = ANSWER_BYTES + num_tokens * _TOKEN_BYTES
        try:
            return await connection.post("/inference/v1/generate", body, timeout_s=timeout_s, longest_answer=longest)
        except ServerRefusedError as error:
            if _DEAD_ENGINE in str(error):  # it did not refuse: it died while it worked on the request
                raise ServerUnreachableError(str(error)) from error
            raise

    def _completion(self, answer: Any) -> Completion:
        """From the answer to a request for one response.

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
        details = answer["usage"].get("prompt_tokens_details") or {}
        num_cached_tokens = details.get("cached_tokens") or 0
        return join_completion(
            self.url, choice["token_ids"] or [], scored, choice["finish_reason"], spans, num_cached_tokens
        )

    def _finite(self, log_prob: float) -> float:
        if log_prob <= _LOWEST_LOG_PROB:
            raise ServerRefusedError(f"{self.url} gave a log-prob that is not finite (as {log_prob})", 200)
        return log_prob

    def _version(self, reported: Any, model_name: Any) -> str:
        """Version of the weights, from the one reported and the model's name; the spec's for another's server."""
        if not isinstance(reported, str) or not isinstance(model_name, str):
            raise TypeError("a version of the weights and the name of a model are texts")
        if reported != _FIRST_VERSION:
            return reported
        ours = model_name.startswith(_NAME_PREFIX)
        return model_name.removeprefix(_NAME_PREFIX) if ours else self._spec.weight_version

    async def _post(self, route: str, body: Mapping[str, Any] | None = None) -> Any:
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
        answer = await self._connection.post("/collective_rpc", body, timeout_s=timeout_s)
        with reading(self.url):
            for rank, result in enumerate(answer["results"]):
                if "error" in result:
                    raise ServerRefusedError(
                        f"{self.url}, tensor-parallel rank {rank}, {method}: {result['error']}", 200
                    )
            return [result["value"] for result in answer["results"]]


def _cache_bytes(shape: ModelShape, spec: LaunchSpec, tokens: int) -> int:
    """Memory that each tensor-parallel rank needs for the keys and values of so many tokens."""
    heads = max(1, shape.num_query_groups // spec.tp)
    element = torch.empty((), dtype=getattr(torch, spec.dtype)).element_size()
    blocks = -(-tokens // _BLOCK_TOKENS) + 1  # vLLM keeps one empty
    return blocks * _BLOCK_TOKENS * 2 * shape.num_layers * heads * shape.head_dim * element


def _continued_seed(seed: int, num_prefix_tokens: int) -> int:
    """Seed of a response that goes on after a prefix: vLLM's random numbers start anew and must not repeat."""
    if not num_prefix_tokens:
        return seed
    key = f"{seed}/{num_prefix_tokens}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


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
