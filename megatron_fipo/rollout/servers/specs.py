"""Makes each server's specification from the configuration: its device, its port, its key, how large it is."""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch

from megatron_fipo.config import Config, read_model_config
from megatron_fipo.rollout.servers.api import LaunchSpec
from megatron_fipo.rollout.servers.node_layout import visible_gpus
from megatron_fipo.rollout.servers.process import free_port

Device = Literal["cpu", "cuda"]

_CPU_CACHE_TOKENS = 2**18
"""Most tokens that a server on the CPU keeps in its cache if the configuration does not say."""


def device_of(config: Config) -> Device:
    """The device that the servers run on."""
    if config.servers.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if config.servers.device == "cpu" else "cuda"


def read_vocab_size(config: Config) -> int:
    """The model's vocab_size, from its config.json.

    Raises:
        ValueError: if a prompt with its response can reach the model's max_position_embeddings.
    """
    rollout = config.rollout
    model = read_model_config(config.model.path)
    longest, positions = _longest(config), model.get("max_position_embeddings")
    if positions is not None and longest >= positions:
        raise ValueError(
            f"rollout.engine={rollout.engine} serves sequences below the model's max_position_embeddings={positions} "
            f"and would cut responses short; rollout.max_prompt_tokens={rollout.max_prompt_tokens} + the longest "
            f"response are {longest}. Lower them, or raise max_position_embeddings in {config.model.path}/config.json."
        )
    return int(model["vocab_size"])


def launch_specs(config: Config, device: Device, urls: Sequence[str]) -> list[LaunchSpec]:
    """The specification of each server that this rank owns.

    Args:
        urls: addresses of the running servers to attach to; none where the rank starts servers.

    Raises:
        ValueError: if there are too few GPUs, or the key of running servers is not there.
    """
    section = config.servers
    num_servers = len(urls) or section.num_per_node
    # Where a server that somebody else started runs is known only if servers.gpus says so.
    needs_gpus = device == "cuda" and (section.gpus or not urls)
    gpus = _gpus(config, num_servers * section.tp) if needs_gpus else []
    cores = shared_cores(num_servers * section.tp) if device == "cpu" else []
    spec = _common_spec(config, device)
    specs = []
    for index in range(num_servers):
        host, port = _address(config, urls, index)
        own = slice(index * section.tp, (index + 1) * section.tp)
        specs.append(replace(spec, host=host, port=port, gpus=tuple(gpus[own]), cpu_cores=tuple(cores[own])))
    return specs


def _common_spec(config: Config, device: Device) -> LaunchSpec:
    """What the servers of this rank have in common."""
    section = config.servers
    max_total_tokens = section.max_total_tokens
    if max_total_tokens is None and device == "cpu":
        longest = _longest(config)
        max_total_tokens = max(2 * longest, min(section.max_concurrent_requests * longest, _CPU_CACHE_TOKENS))
    return LaunchSpec(
        python=section.python or sys.executable,
        model_path=Path(config.model.path).resolve(),
        host="127.0.0.1",
        port=0,
        dtype=config.model.dtype,
        weight_version="0",
        tp=section.tp,
        device=device,
        memory_fraction=section.memory_fraction,
        max_total_tokens=max_total_tokens,
        max_running_requests=section.max_concurrent_requests,
        releases_memory=section.placement == "colocated",
        reproducible=section.reproducible,
        keeps_in_flight=config.rollout.in_flight == "in_place",
        seed=config.run.seed,
        extra_args=tuple(section.extra_args),
        key=_key(config),
    )


def _address(config: Config, urls: Sequence[str], index: int) -> tuple[str, int]:
    """(host, port) of this rank's server number `index`."""
    host, base_port = "127.0.0.1", config.servers.base_port
    if urls:
        address = urlsplit(urls[index])
        return address.hostname or host, address.port or 0
    return host, free_port() if base_port is None else base_port + index


def _key(config: Config) -> str:
    """The key of this rank's servers: random where the run starts them, else the one that their owner gave them.

    Raises:
        ValueError: if its variable is not set, or holds what no header can.
    """
    name = config.servers.api_key_env
    if not config.servers.urls:
        return secrets.token_hex(32)
    if name is None:
        return ""
    key = os.environ.get(name, "")
    if not re.fullmatch(r"[!-~]+", key):
        what = "holds something other than printable ASCII without spaces" if key else "is not set or empty"
        raise ValueError(
            f"servers.api_key_env={name}: that environment variable {what}, on host {socket.gethostname()}. It must "
            "hold the key of the servers in servers.urls, for every rank with LOCAL_RANK 0."
        )
    return key


def _gpus(config: Config, num_needed: int) -> list[str]:
    """GPUs of this node for servers, by names that a process without CUDA_VISIBLE_DEVICES knows."""
    gpus = [str(gpu) for gpu in config.servers.gpus] or visible_gpus()
    if len(gpus) < num_needed:
        raise ValueError(
            f"servers.num_per_node={config.servers.num_per_node} x servers.tp={config.servers.tp} need {num_needed} "
            f"GPUs; there are {len(gpus)}. Lower one of them, or set servers.gpus."
        )
    return gpus


def shared_cores(num_ranks: int) -> list[tuple[int, ...]]:
    """This process's cores in equal parts, one for each server's rank; ranks share cores where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // num_ranks)
    return [tuple(cores[(rank * each + i) % len(cores)] for i in range(each)) for rank in range(num_ranks)]


def _longest(config: Config) -> int:
    """Tokens of the longest prompt with the longest response."""
    responses = (config.rollout.max_response_tokens, config.evaluation.max_response_tokens or 0)
    return config.rollout.max_prompt_tokens + max(responses)
