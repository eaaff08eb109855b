"""How SGLang servers and sglang-router are started, and where the log of a dead one says why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.rollout.servers import plugins
from megatron_fipo.rollout.servers.api import NOT_THE_TRAINERS, LaunchPlan, LaunchSpec
from megatron_fipo.rollout.servers.http import ServerConnection
from megatron_fipo.rollout.servers.plugins.server_guard import KEY_VARIABLE
from megatron_fipo.rollout.servers.process import free_port
from megatron_fipo.rollout.servers.sglang.client import SglangServer

_ERROR_LINE = re.compile(r"^\s*(?:\[[^\]]*\]\s*)?(?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*|.*\bout of memory\b.*", re.M)
_PLUGINS = Path(plugins.__file__).resolve().parent
LAUNCHERS = {"cuda": str(_PLUGINS / "sglang_launcher.py"), "cpu": str(_PLUGINS / "sglang_cpu_launcher.py")}
"""Scripts that start a server or a router, by device."""


class SglangAdapter:
    """A `ServerAdapter`."""

    name = "sglang"

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
        return LaunchPlan((spec.python, LAUNCHERS[spec.device], *arguments, *spec.extra_args), environment)

    def connect(self, connection: ServerConnection, spec: LaunchSpec) -> SglangServer:
        """The client of one server."""
        return SglangServer(connection, spec)

    def reason_of_exit(self, log: str) -> str:
        """The log's last lines that name an error, or its last lines."""
        found = list(dict.fromkeys(match.group().strip() for match in _ERROR_LINE.finditer(log)))
        # What was raised first is the cause; SGLang's parent then reports the death of its child.
        return "\n".join(found[-3:]) if found else "\n".join(log.strip().splitlines()[-5:])


def router_plan(spec: LaunchSpec, urls: Sequence[str], port: int) -> LaunchPlan:
    """How to start sglang-router before servers; it keeps requests with a common beginning together.

    Args:
        spec: specification of one of the servers; the router is installed beside it.
        urls: the servers' addresses.
        port: where the router listens.
    """
    arguments = ["--worker-urls", *urls, "--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware"]
    # Whether a request is sent again, and whether a server lives, is decided by the pool, not by the router.
    arguments += ["--disable-retries", "--disable-circuit-breaker"]
    arguments += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    return LaunchPlan((spec.python, LAUNCHERS[spec.device], "router", *arguments), {KEY_VARIABLE: spec.key})
