"""How vLLM servers are started, and where the log of a dead one says why."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from megatron_fipo.convert.hf_config import ModelShape, read_model_shape
from megatron_fipo.rollout.servers import plugins
from megatron_fipo.rollout.servers.api import NOT_THE_TRAINERS, LaunchPlan, LaunchSpec
from megatron_fipo.rollout.servers.http import ServerConnection
from megatron_fipo.rollout.servers.plugins.server_guard import KEY_VARIABLE
from megatron_fipo.rollout.servers.vllm.client import NAME_PREFIX, VllmServer

_BLOCK_TOKENS = 128
"""vLLM's unit of the cache on the CPU; elsewhere it is smaller."""
_ERROR_LINE = re.compile(
    r"^(?:\(\w+ pid=\d+\) )?(?:ERROR \S+ \S+ \[[^]]*\] )?"  # what vLLM puts before a line of its log
    r"((?:[\w.]+\.)?\w*(?:Error|Exception|Exit)\b.*(?:\n  Value error, .*)?|.*\bout of memory\b.*)",
    re.MULTILINE,
)
_LINE_LIMIT = 500
_SECONDHAND = ("Engine core initialization failed", "See root cause above", "Worker failed with error")
"""Text in lines by which one process reports the death of another."""
_CPU_LAUNCHER = str(Path(plugins.__file__).resolve().parent / "vllm_cpu_launcher.py")


class VllmAdapter:
    """A `ServerAdapter`."""

    name = "vllm"

    def launch_plan(self, spec: LaunchSpec) -> LaunchPlan:
        """Command and environment of a server.

        Raises:
            ValueError: if memory should be released on the CPU, or the model in spec.model_path is not supported.
        """
        arguments = [
            *("--model", str(spec.model_path), "--host", spec.host, "--port", str(spec.port)),
            *("--dtype", spec.dtype, "--tensor-parallel-size", str(spec.tp), "--seed", str(spec.seed)),
            *("--max-num-seqs", str(spec.max_running_requests)),
            *("--served-model-name", NAME_PREFIX + spec.weight_version),
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
            # With prefill in chunks, vLLM's workers on the CPU crash on requests with a seed.
            arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
            cores = "|".join(",".join(map(str, rank)) for rank in spec.cpu_cores) or "nobind"
            # Without Dynamo the first request does not wait for a C++ compiler.
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment |= {"CUDA_VISIBLE_DEVICES": ",".join(spec.gpus), **NOT_THE_TRAINERS}
            if spec.releases_memory:
                arguments.append("--enable-sleep-mode")
        if spec.max_total_tokens is None:
            arguments += ["--gpu-memory-utilization", str(spec.memory_fraction)]  # of the host's memory on the CPU
        else:
            shape = read_model_shape(spec.model_path)
            arguments += ["--kv-cache-memory-bytes", str(_cache_bytes(shape, spec, spec.max_total_tokens))]
            # vLLM does not start with a cache that does not hold a whole sequence of the longest length.
            arguments += ["--max-model-len", str(min(shape.max_position_embeddings, spec.max_total_tokens))]
        server = (_CPU_LAUNCHER,) if spec.device == "cpu" else ("-m", "vllm.entrypoints.openai.api_server")
        return LaunchPlan((spec.python, *server, *arguments, *spec.extra_args), environment)

    def connect(self, connection: ServerConnection, spec: LaunchSpec) -> VllmServer:
        """The client of one server."""
        return VllmServer(connection, spec)

    def reason_of_exit(self, log: str) -> str:
        """The log's last errors, but for those that report the death of another process; else its last lines."""
        found = [match.group(1).strip() for match in _ERROR_LINE.finditer(log)]
        own = [words for words in found if not any(part in words for part in _SECONDHAND)]
        different = list(dict.fromkeys(own or found)) or log.strip().splitlines()[-5:]
        return "\n".join(words[:_LINE_LIMIT] for words in different[-5:])


def _cache_bytes(shape: ModelShape, spec: LaunchSpec, tokens: int) -> int:
    """Memory that each tensor-parallel rank needs for the keys and values of this many tokens."""
    heads = max(1, shape.num_query_groups // spec.tp)
    element = torch.empty((), dtype=getattr(torch, spec.dtype)).element_size()
    blocks = -(-tokens // _BLOCK_TOKENS) + 1  # vLLM keeps one empty
    return blocks * _BLOCK_TOKENS * 2 * shape.num_layers * heads * shape.head_dim * element
