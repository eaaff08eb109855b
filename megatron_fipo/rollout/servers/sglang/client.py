"""The HTTP side of an SGLang server. The routes are those of SGLang 0.5.21 and later."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch.multiprocessing import reductions

from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.rollout.engine import GenerationRequest
from megatron_fipo.rollout.servers.api import Completion, GroupAddress, LaunchSpec, ScoredEnd, ServerInfo
from megatron_fipo.rollout.servers.cache_salt import cache_salt
from megatron_fipo.rollout.servers.completions import join_completion
from megatron_fipo.rollout.servers.cuda_handles import DEVICE_ARGUMENT, CudaHandle
from megatron_fipo.rollout.servers.http import (
    ANSWER_BYTES,
    ServerConnection,
    ServerRefusedError,
    ServerUnreachableError,
    reading,
)
from megatron_fipo.rollout.servers.sglang.checksums import SglangExpectedChecksums
from megatron_fipo.rollout.servers.weight_buckets import Bucket, TensorSpec

_CONTROL_TIMEOUT_S = 60.0
"""Time-out of routes that only change a state."""
_TOKEN_BYTES = 512
"""More than an answer takes for one token, its log-prob and what SGLang tells beside it."""
_MEMORY_TAGS = {"weights": "weights", "cache": "kv_cache"}


class SglangServer:
    """An `InferenceServer`."""

    def __init__(self, connection: ServerConnection, spec: LaunchSpec) -> None:
        self.url = connection.url
        self._connection, self._spec = connection, spec
        self._cache_salt = cache_salt(spec.weight_version)

    async def health(self, timeout_s: float) -> None:
        """Have one token generated, unless others are being generated anyway."""
        await self._connection.get("/health_generate", timeout_s=timeout_s)

    async def info(self) -> ServerInfo:
        answer = await self._connection.get("/model_info", timeout_s=_CONTROL_TIMEOUT_S)
        with reading(self.url):
            return ServerInfo(str(answer["model_path"]), str(answer["weight_version"]))

    async def generate(
        self,
        request: GenerationRequest,
        request_id: str,
        stop_token_ids: Sequence[int],
        timeout_s: float,
        connection: ServerConnection | None = None,
    ) -> Completion:
        sampling = request.sampling
        parameters: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens - len(request.prefix),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "sampling_seed": request.seed,
            "stop_token_ids": list(stop_token_ids),
            "ignore_eos": not stop_token_ids,
        }
        body = {
            "rid": request_id,
            "input_ids": [*request.prompt_ids, *request.prefix],
            "sampling_params": parameters,
            "return_logprob": True,
            "logprob_start_len": -1,
            "extra_key": self._cache_salt,
        }
        connection = connection or self._connection
        longest = ANSWER_BYTES + parameters["max_new_tokens"] * _TOKEN_BYTES
        answer = await connection.post("/generate", body, timeout_s=timeout_s, longest_answer=longest)
        with reading(connection.url):
            completion = _completion(answer, connection.url)
        if completion.finish_reason == "length" and len(completion.token_ids) < parameters["max_new_tokens"]:
            raise ServerRefusedError(
                f"{self.url} ended sample {request.sample_id!r} after {len(completion.token_ids)} of "
                f"{parameters['max_new_tokens']} tokens: its context or cache (servers.max_total_tokens) is too short",
                200,
            )
        return completion

    async def cancel(self, request_id: str) -> None:
        await self._post("/abort_request", {"rid": request_id})

    async def abort_all(self) -> None:
        await self._post("/abort_request", {"abort_all": True})

    async def score(self, sequences: Sequence[Sequence[int]], timeout_s: float) -> list[list[float]]:
        body = _scoring([list(sequence) for sequence in sequences], start=0)
        longest = ANSWER_BYTES + sum(map(len, sequences)) * _TOKEN_BYTES
        answers = await self._connection.post("/generate", body, timeout_s=timeout_s, longest_answer=longest)
        with reading(self.url):
            pairs = list(zip(sequences, answers, strict=True))
        return [self._scored(answer, len(sequence) - 1) for sequence, answer in pairs]

    async def score_end(self, sequence: Sequence[int], num_tokens: int, timeout_s: float) -> ScoredEnd:
        body = _scoring(list(sequence), start=len(sequence) - num_tokens - 1) | {"extra_key": self._cache_salt}
        longest = ANSWER_BYTES + num_tokens * _TOKEN_BYTES
        answer = await self._connection.post("/generate", body, timeout_s=timeout_s, longest_answer=longest)
        log_probs = self._scored(answer, num_tokens)
        with reading(self.url):
            return ScoredEnd(log_probs, int(answer["meta_info"]["cached_tokens"]))

    async def pause(self) -> None:
        # "retract" sends running requests back to the queue: their keys and values are computed anew afterwards, with
        # the weights that then hold, and the cache can be flushed meanwhile.
        await self._post("/pause_generation", {"mode": "in_place" if self._spec.keeps_in_flight else "retract"})

    async def resume(self) -> None:
        await self._post("/continue_generation", {})

    async def flush_cache(self) -> None:
        await self._post("/flush_cache", {})

    async def begin_update(self) -> None:
        try:
            await self._post("/begin_weight_update", {})
        except ServerRefusedError as error:
            if "already open" not in str(error):
                raise
            # An update that failed left it open. Everything is sent anew, so closing it loses nothing.
            await self._post("/end_weight_update", {})
            await self._post("/begin_weight_update", {})

    async def load_bucket(self, bucket: Bucket, timeout_s: float) -> None:
        # The version is set by end_update alone: a server that is half written must not report the new one.
        body = {
            "serialized_named_tensors": [_serialize(bucket, handle) for handle in self._handles(bucket)],
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._connection.post("/update_weights_from_tensor", body, timeout_s=timeout_s)

    async def join_group(self, address: GroupAddress, timeout_s: float) -> None:
        body = {
            "master_address": address.host,
            "master_port": address.port,
            "rank_offset": address.first_rank,
            "world_size": address.world_size,
            "group_name": address.name,
            "backend": address.backend,
        }
        await self._connection.post("/init_weights_update_group", body, timeout_s=timeout_s)

    async def receive_bucket(self, specs: Sequence[TensorSpec], group_name: str, timeout_s: float) -> None:
        body = {
            "names": [spec.name for spec in specs],
            "dtypes": [str(spec.dtype).removeprefix("torch.") for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._connection.post("/update_weights_from_distributed", body, timeout_s=timeout_s)

    async def leave_group(self, group_name: str) -> None:
        await self._post("/destroy_weights_update_group", {"group_name": group_name})

    async def load_folder(self, folder: Path, timeout_s: float) -> None:
        body = {"model_path": str(folder), "flush_cache": False}
        await self._connection.post("/update_weights_from_disk", body, timeout_s=timeout_s)

    async def end_update(self, version: str) -> None:
        self._cache_salt = cache_salt(version)
        await self._post("/end_weight_update", {})
        if not self._spec.keeps_in_flight:  # otherwise only the cache's salt keeps others from finding what is there
            await self.flush_cache()
        await self._post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def expected_checksums(self) -> SglangExpectedChecksums:
        shape = read_model_shape(self._spec.model_path)
        return SglangExpectedChecksums(shape, self._spec.tp, hashes_on_gpu=self._spec.device == "cuda")

    async def checksums(self, timeout_s: float) -> dict[str, str]:
        answer = await self._connection.post("/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
        with reading(self.url):
            ranks = sorted(answer["ranks"], key=lambda rank: int(rank["parallelism_info"][0]["tp_rank"]))
            if len(ranks) != self._spec.tp:
                raise ServerRefusedError(
                    f"{self.url} gave checksums of {len(ranks)} tensor-parallel ranks; servers.tp={self._spec.tp}", 200
                )
            return {
                SglangExpectedChecksums.key(name, rank, len(ranks)): str(checksum)
                for rank, answer_of_rank in enumerate(ranks)
                for name, checksum in answer_of_rank["checksums"].items()
            }

    async def release_memory(self) -> None:
        await self._post("/release_memory_occupation", {"tags": list(_MEMORY_TAGS.values())})

    async def resume_memory(self, part: Literal["weights", "cache"]) -> None:
        await self._post("/resume_memory_occupation", {"tags": [_MEMORY_TAGS[part]]})

    def _scored(self, answer: Any, num_tokens: int) -> list[float]:
        """The log-probs in an answer to what `_scoring` asks."""
        with reading(self.url):
            scores = [float(entry[0]) for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        if len(scores) != num_tokens:
            raise ServerRefusedError(
                f"{self.url} scored {len(scores)} of the {num_tokens} tokens of a canary sequence", 200
            )
        return scores

    def _handles(self, bucket: Bucket) -> list[CudaHandle | None]:
        return bucket.handles_on(self._spec.gpus, self._spec.tp)

    async def _post(self, route: str, body: Mapping[str, Any]) -> Any:
        return await self._connection.post(route, body, timeout_s=_CONTROL_TIMEOUT_S)


def _scoring(input_ids: Sequence[Any], start: int) -> dict[str, Any]:
    """What asks /generate for log-probs and no token.

    Args:
        input_ids: a sequence, or several.
        start: they are those of the tokens after this position, which with all later ones is never taken from the
            prefix cache.
    """
    return {
        "input_ids": input_ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": start,
    }


def _completion(answer: Any, url: str) -> Completion:
    """The response in an answer to /generate.

    Raises:
        ServerUnreachableError: if the answer holds no response.
        ServerRefusedError: if the response's parts do not fit together.
    """
    meta = answer.get("meta_info") if isinstance(answer, Mapping) else None
    if not isinstance(meta, Mapping) or "output_ids" not in answer:
        raise ServerUnreachableError(f"{url}/generate gave no response: {str(answer)[:200]}")
    scored = [(token_id, log_prob) for log_prob, token_id, *_ in meta.get("output_token_logprobs", [])]
    reason = (meta["finish_reason"] or {}).get("type")
    spans = [(span["version"], span["start"], span["end"]) for span in meta.get("weight_versions", [])]
    return join_completion(url, answer["output_ids"], scored, reason, spans, meta.get("cached_tokens", 0))


class _SharedTensor:
    """Pickles as SGLang's servers want a tensor in shared GPU memory: the UUID in the device's place."""

    def __init__(self, handle: CudaHandle) -> None:
        self._handle = handle

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        before, after = self._handle.arguments[:DEVICE_ARGUMENT], self._handle.arguments[DEVICE_ARGUMENT + 1 :]
        return reductions.rebuild_cuda_tensor, (*before, self._handle.device_uuid, *after)


def _serialize(bucket: Bucket, handle: CudaHandle | None) -> str:
    """A bucket for one tensor-parallel rank: the handle on that rank's GPU, or the values."""
    metadata = [
        SimpleNamespace(
            name=spec.name,
            shape=torch.Size(spec.shape),
            dtype=spec.dtype,
            start_idx=spec.start,
            end_idx=spec.stop,
            numel=spec.stop - spec.start,
        )
        for spec in bucket.specs
    ]
    # A bucket that is not full is the beginning of a larger one, all of which pickle would write.
    flat = bucket.flat.clone() if handle is None else _SharedTensor(handle)
    return base64.b64encode(pickle.dumps({"flattened_tensor": flat, "metadata": metadata})).decode()
