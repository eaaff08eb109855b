"""Rules between the keys of inference servers: which they are, where they run, how weights reach them, their keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from megatron_fipo.config.environment import looks_secret, reference_of, variables_in, without_secrets
from megatron_fipo.config.errors import NOT_SHOWN, Problem
from megatron_fipo.config.sections import Config

_KEY_OPTIONS = {"--api-key", "--admin-api-key"}
_SECRET_OPTION = re.compile(
    r"passw(or)?d|passphrase|secret|credential|(api|access|private|auth|admin)[-_]?key|(hf|api|auth|access|bearer)[-_]?token"
)
"""Options of servers that take a secret. In most other options, "token" means a model's tokens."""


def server_problems(config: Config) -> Iterator[Problem]:
    """What is wrong between keys of servers.*, and with what their engine samples."""
    servers, engine = config.servers, config.rollout.engine
    if engine == "in_process":
        return
    for url in servers.urls:
        if not re.fullmatch(r"http://[^\s/:]+:\d+/?", url):
            yield Problem("servers.urls", NOT_SHOWN, f"{url!r} is not of the form http://host:port")
    if servers.router and engine != "sglang":
        yield Problem("servers.router", True, f"sglang-router speaks to SGLang only, and rollout.engine={engine}")
    if servers.router and servers.urls:
        yield Problem(
            "servers.router",
            True,
            "a router is put before servers that are started here",
            "Remove servers.urls, or it",
        )
    if servers.weight_sync == "disk" and not servers.keep_snapshot:
        yield Problem(
            "servers.keep_snapshot",
            False,
            "weight_sync=disk hands weights over as a snapshot",
            "Set keep_snapshot=true",
        )
    yield from _placement_problems(config)
    yield from _device_problems(config, servers.device)
    yield from _key_problems(config)
    if engine == "vllm":
        yield from _vllm_problems(config)


def _placement_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the servers' GPUs and ports."""
    servers = config.servers
    if servers.weight_sync == "distributed" and servers.placement == "colocated":
        yield Problem(
            "servers.weight_sync",
            "distributed",
            "NCCL joins no two processes on one GPU, and placement=colocated puts server and actor there",
            "Set weight_sync=tensor",
        )
    if servers.gpus and not servers.urls and len(servers.gpus) != servers.num_per_node * servers.tp:
        yield Problem(
            "servers.gpus",
            servers.gpus,
            f"servers.num_per_node={servers.num_per_node} x servers.tp={servers.tp} take "
            f"{servers.num_per_node * servers.tp}",
        )
    if servers.base_port is not None and servers.base_port + servers.num_per_node > 65536:
        yield Problem(
            "servers.base_port",
            servers.base_port,
            f"the last of servers.num_per_node={servers.num_per_node} ports would be beyond 65535",
            "Lower it",
        )
    if servers.device == "cuda" and servers.placement == "dedicated" and not (servers.gpus or servers.urls):
        yield Problem(
            "servers.gpus",
            [],
            "placement=dedicated needs GPUs of its own",
            "Name them, or set placement=colocated",
        )


def server_device_problems(config: Config, device: str) -> Iterator[str]:
    """Broken rules between keys of servers.* that depend on the servers' device, as sentences.

    Validation checks them if the configuration names the device; a run checks them once it knows the device.

    Args:
        device: cpu, cuda, or auto where nothing can be said yet.
    """
    return map(str, _device_problems(config, device))


def _device_problems(config: Config, device: str) -> Iterator[Problem]:
    servers = config.servers
    if config.rollout.engine == "in_process" or device != "cuda" or servers.weight_sync != "tensor":
        return
    if servers.placement == "dedicated":
        yield Problem(
            "servers.weight_sync",
            "tensor",
            "hands each server memory of its own GPU (CUDA IPC), and placement=dedicated means GPUs that no rank of "
            "the trainer is on",
            "Set servers.weight_sync=distributed (NCCL), or placement=colocated",
        )
    elif servers.urls and not servers.gpus:
        yield Problem(
            "servers.gpus",
            [],
            "weight_sync=tensor hands each server memory of its own GPU (CUDA IPC), and which GPUs the servers of "
            "servers.urls run on cannot be seen",
            "Name them in the servers' order, or set placement=dedicated and weight_sync=distributed",
        )


def _key_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the servers' keys. No value is repeated: one in the wrong place may be a key itself."""
    servers = config.servers
    if servers.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", servers.api_key_env):
        yield Problem(
            "servers.api_key_env",
            NOT_SHOWN,
            "is not the name of an environment variable in capitals (its value is not shown)",
            "Name the one that holds the servers' key; the key itself must not stand in a configuration",
        )
    if servers.api_key_env is not None and not servers.urls:
        yield Problem(
            "servers.api_key_env",
            NOT_SHOWN,
            "is for the servers in servers.urls, and that is empty; those that a run starts get a random key",
            "Remove it",
        )
    if servers.urls and servers.api_key_env is None and config.rollout.engine == "vllm":
        yield Problem(
            "servers.api_key_env",
            None,
            "the worker extension of a vLLM server takes orders from whoever has its key",
            "Start the servers with MEGATRON_FIPO_SERVER_KEY in their environment, and name here the variable of the "
            "trainer's environment that holds the same text",
        )
    yield from _secret_argument_problems(servers.extra_args)
    if named := sorted(_KEY_OPTIONS & {argument.partition("=")[0] for argument in servers.extra_args}):
        yield Problem(
            "servers.extra_args",
            NOT_SHOWN,
            f"{', '.join(named)} would replace the random key that the run gives its servers, and everybody on the "
            "host reads command lines",
            "Remove it; for servers with a key of yours, start them yourself, and set servers.urls and "
            "servers.api_key_env",
        )


def _secret_argument_problems(arguments: Sequence[str]) -> Iterator[Problem]:
    """Secrets in arguments: everybody on a host can read its processes' command lines, and a log may hold them."""
    for index, argument in enumerate(arguments):
        option = argument.partition("=")[0]
        source = reference_of(("servers", "extra_args", index), argument) or without_secrets(argument)
        if named := [name for name in variables_in(source) if looks_secret(name)]:
            what = f"the environment variable {named[0]} is a secret, by its name, which"
        elif option.startswith("--") and option not in _KEY_OPTIONS and _SECRET_OPTION.search(option):
            what = f"the value of {option} is a secret, by its name, which"
        else:
            continue
        yield Problem(
            "servers.extra_args",
            NOT_SHOWN,
            f"{what} everybody on the host could read from the server's command line",
            "Remove it. Servers have the run's environment: set the variable that the engine reads (such as HF_TOKEN) "
            "before the run is started; or start the servers yourself, and set servers.urls",
        )


def _vllm_problems(config: Config) -> Iterator[Problem]:
    """Sampling that vLLM changes or rejects; vLLM itself would say so at the first request, or not at all."""
    if config.rollout.top_p < 1:
        yield Problem(
            "rollout.top_p",
            config.rollout.top_p,
            "vLLM gives log-probs that are renormalised over the nucleus, which compare with no actor's",
            "Set rollout.top_p=1, or take rollout.engine=sglang",
        )
    for section in ("rollout", "evaluation"):
        temperature = getattr(config, section).temperature
        if 0 < temperature < 0.01 or temperature > 2:
            yield Problem(f"{section}.temperature", temperature, "vLLM samples at 0, or between 0.01 and 2")
