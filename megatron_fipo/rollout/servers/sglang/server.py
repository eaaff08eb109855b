"""SGLang servers: command line, HTTP routes (those of 0.5.21 and later), and what their checksums cover."""

from __future__ import annotations

import base64
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch.multiprocessing import reductions

from megatron_fipo.convert.hf_config import read_model_shape
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
from megatron_fipo.rollout.servers.cuda_handles import DEVICE_ARGUMENT, CudaHandle
from megatron_fipo.rollout.servers.http import (
    ANSWER_BYTES,
    ServerConnection,
    ServerRefusedError,
    ServerUnreachableError,
    reading,
)
from megatron_fipo.rollout.servers.plugins.server_guard import KEY_VARIABLE
from megatron_fipo.rollout.servers.process import free_port
from megatron_fipo.rollout.servers.sglang.checksums import SglangLedger

_CONTROL_TIMEOUT_S = 60.0
"""For routes that only change a state."""
_LAST_WORDS = re.compile(r"^\s*(?:\[[^\]]*\]\s*)?(?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*|.*\bout of memory\b.*", re.M)
_PLUGINS = Path(plugins.__file__).resolve().parent
_LAUNCHERS = {"cuda": str(_PLUGINS / "sglang_launcher.py"), "cpu": str(_PLUGINS / "sglang_cpu_launcher.py")}
_TOKEN_BYTES = 512
"""More than an answer takes for one token, its log-prob and what SGLang tells beside it."""
_MEMORY_TAGS = {"weights": "weights", "cache": "kv_cache"}


class SglangAdapter:
    """A `ServerAdapter`."""

    name = "sglang"
    has_router = True

    def launch_plan(self, spec: LaunchSpec) -> LaunchPlan:
        """Command and environment of a server.

        Raises:
            ValueError: if draws from each request's seed are asked for where SGLang has none (CPU).
        """
        arguments = [
            *("--model-path", str(spec.model_path)),
            *("--host", spec.host, "--port", str(spec.port)),
            *("--dtype", spec.dtype, "--tp", str(spec.tp), "--device", spec.device),
            *("--mem-fraction-static", str(spec.memory_fraction)),
            *("--max-running-requests", str(spec.max_running_requests)),
            *("--weight-version", spec.weight_version, "--random-seed", str(spec.seed)),
            # Tokens in, tokens out; warming up would only delay readiness, which is asked for by a real request.
            *("--sampling-defaults", "openai"),  # not the model's generation_config.json
            *("--skip-tokenizer-init", "--skip-server-warmup", "--sleep-on-idle"),
        ]
        if spec.max_total_tokens is not None:
            arguments += ["--max-total-tokens", str(spec.max_total_tokens)]
        if spec.context_tokens is not None:
            arguments += ["--context-length", str(spec.context_tokens)]
        if spec.reproducible:
            if spec.device == "cpu":
                raise ValueError(
                    "servers.reproducible=true: SGLang draws tokens from their request's seed on GPUs only. Set it to "
                    "false, or take rollout.engine=vllm."
                )
            arguments.append("--enable-deterministic-inference")
        environment: dict[str, str | None] = {"PYTHONDONTWRITEBYTECODE": None, KEY_VARIABLE: spec.key}
        if spec.device == "cpu":
            arguments += ["--attention-backend", "torch_native"]
            cores = "|".join(",".join(map(str, rank)) for rank in spec.cpu_cores)
            threads = str(min(map(len, spec.cpu_cores)))
            environment |= {"SGLANG_CPU_OMP_THREADS_BIND": cores, "OMP_NUM_THREADS": threads}
        else:
            environment |= {"CUDA_VISIBLE_DEVICES": ",".join(spec.gpus), **NOT_THE_TRAINERS}
            if spec.releases_memory:
                arguments.append("--enable-memory-saver")
            if spec.dtype == "bfloat16":
                # Logits as the actor has them: float32 sums of bfloat16 products, not rounded to bfloat16 again.
                arguments.append("--enable-fp32-lm-head")
        return LaunchPlan((spec.python, _LAUNCHERS[spec.device], *arguments, *spec.extra_args), environment)

    def connect(self, connection: ServerConnection, spec: LaunchSpec) -> SglangServer:
        """The client of one server."""
        return SglangServer(connection, spec)

    def reason_of_exit(self, log: str) -> str:
        """The log's last lines that name an error, or its last lines."""
        found = list(dict.fromkeys(match.group().strip() for match in _LAST_WORDS.finditer(log)))
        # What was raised first is the cause; SGLang's parent then reports the death of its child.
        return "\n".join(found[-3:]) if found else "\n".join(log.strip().splitlines()[-5:])


def router_plan(spec: LaunchSpec, urls: Sequence[str], port: int) -> LaunchPlan:
    """How to start sglang-router before servers; it keeps requests with a common beginning together.

    Args:
        spec: of one of the servers; the router is installed beside it.
        urls: the servers'.
        port: where the router listens.
    """
    arguments = ["--worker-urls", *urls, "--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware"]
    # Who sends again, and who lives, is decided in one place, which is not the router.
    arguments += ["--disable-retries", "--disable-circuit-breaker"]
    arguments += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    return LaunchPlan((spec.python, _LAUNCHERS[spec.device], "router", *arguments), {KEY_VARIABLE: spec.key})


class SglangServer:
    """An `InferenceServer`."""

    def __init__(self, connection: ServerConnection, spec: LaunchSpec) -> None:
        self.url = connection.url
        self._connection, self._spec = connection, spec

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
        body = {
            "input_ids": [list(sequence) for sequence in sequences],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,  # positions from here on are never taken from the prefix cache
        }
        longest = ANSWER_BYTES + sum(map(len, sequences)) * _TOKEN_BYTES
        answers = await self._connection.post("/generate", body, timeout_s=timeout_s, longest_answer=longest)
        with reading(self.url):
            scores = [
                [float(entry[0]) for entry in answer["meta_info"]["input_token_logprobs"][1:]] for answer in answers
            ]
            pairs = list(zip(sequences, scores, strict=True))
        for sequence, found in pairs:
            if len(found) != len(sequence) - 1:
                raise ServerRefusedError(
                    f"{self.url} scored {len(found)} of the {len(sequence) - 1} tokens of a canary sequence", 200
                )
        return scores

    async def pause(self) -> None:
        # "retract" sends running requests back to the queue: their keys and values are computed anew afterwards, with
        # the weights that then hold, and the cache can be flushed meanwhile.
        await self._post("/pause_generation", {"mode": "retract"})

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
            "serialized_named_tensors": [_serialize(bucket, handle) for handle in bucket.handles_on(self._spec)],
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
        await self._post("/end_weight_update", {})
        await self.flush_cache()
        await self._post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def ledger(self) -> SglangLedger:
        shape = read_model_shape(self._spec.model_path)
        return SglangLedger(shape, self._spec.tp, hashes_on_gpu=self._spec.device == "cuda")

    async def checksums(self, timeout_s: float) -> dict[str, str]:
        answer = await self._connection.post("/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
        with reading(self.url):
            ranks = sorted(answer["ranks"], key=lambda rank: int(rank["parallelism_info"][0]["tp_rank"]))
            if len(ranks) != self._spec.tp:
                raise ServerRefusedError(
                    f"{self.url} gave checksums of {len(ranks)} tensor-parallel ranks; servers.tp={self._spec.tp}", 200
                )
            return {
                SglangLedger.key(name, rank, len(ranks)): str(checksum)
                for rank, answer_of_rank in enumerate(ranks)
                for name, checksum in answer_of_rank["checksums"].items()
            }

    async def release_memory(self) -> None:
        await self._post("/release_memory_occupation", {"tags": list(_MEMORY_TAGS.values())})

    async def resume_memory(self, part: Literal["weights", "cache"]) -> None:
        await self._post("/resume_memory_occupation", {"tags": [_MEMORY_TAGS[part]]})

    async def _post(self, route: str, body: Mapping[str, Any]) -> Any:
        return await self._connection.post(route, body, timeout_s=_CONTROL_TIMEOUT_S)


def _completion(answer: Any, url: str) -> Completion:
    """From the answer to /generate.

    Raises:
        ServerRefusedError: if it is not a whole, consistent answer.
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
