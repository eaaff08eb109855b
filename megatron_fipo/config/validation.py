"""What values demand of each other, and what runs but hardly means what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any
from urllib.parse import urlsplit

from megatron_fipo.config.environment import looks_secret, reference_of, variables_in, without_secrets
from megatron_fipo.config.errors import ConfigError
from megatron_fipo.config.milestones import milestone_problems
from megatron_fipo.config.rules import value_problems
from megatron_fipo.config.schema import (
    ALGORITHMS,
    FP8_ALIGNMENT,
    PROCEDURAL_KINDS,
    REPOSITORY_NAME,
    Config,
    DataSourceConfig,
    FipoConfig,
    ServersSection,
)
from megatron_fipo.config.verifiers import verifier_problems, verifier_weights

_DEFINING_KEYS = ("objective.future_kl", "objective.loss_aggregation", "advantages.estimator")
"""Keys without which an algorithm would not be what its name says, where its preset sets them."""

_KEY_OPTIONS = {"--api-key", "--admin-api-key"}
_SECRET_OPTION = re.compile(
    r"passw(or)?d|passphrase|secret|credential|(api|access|private|auth|admin)[-_]?key|(hf|api|auth|access|bearer)[-_]?token"
)
"""Options of servers that take a secret. Most that speak of tokens mean those that a model reads."""

LONGEST_FOR_SEQUENCE_RATIOS = 2048
"""Tokens beyond which a whole response's probability ratio says little: a bias of 1e-3 a token is a factor of 8."""
WIDEST_GEOMETRIC_RATIO = 1.1
"""rollout_ratio_max beyond which the mean ratio of a response is hardly ever masked."""


def validate(config: Config, world_size: int | None = None, *, is_for_training: bool = True) -> None:
    """Refuse what cannot run, before any model is built.

    Args:
        config: as `load_config` returned it.
        world_size: number of processes; None leaves out what depends on it.
        is_for_training: false leaves out what only training needs: its data, batches, objective and layout.

    Raises:
        ConfigError: naming for every problem the key, its value, the rule and what to do.
    """
    problems = list(value_problems(config, ""))
    if not problems:  # combinations divide by values that must be sound first
        problems += _data_problems(config, is_for_training)
        problems += _server_problems(config)
        if is_for_training:
            problems += _algorithm_problems(config)
            problems += _batch_problems(config)
            problems += _objective_problems(config)
            problems += _precision_problems(config)
            problems += _layout_problems(config, world_size)
            problems += milestone_problems(config)
            problems += _push_problems(config)
    if problems:
        raise ConfigError.of(problems)


def _algorithm_problems(config: Config) -> Iterator[str]:
    preset = ALGORITHMS[config.algorithm]
    for key in _DEFINING_KEYS:
        section, name = key.split(".")
        wanted, value = preset.get(section, {}).get(name), getattr(getattr(config, section), name)
        if wanted is not None and value != wanted:
            others = [
                other
                for other, values in ALGORITHMS.items()
                if name in values.get(section, {}) and values[section][name] == value
            ]
            remedy = f"take algorithm={' or '.join(others)}" if others else "take an algorithm that leaves it open"
            yield (
                f"{key}={_yaml_scalar(value)}: contradicts algorithm={config.algorithm}, which is {key}="
                f"{_yaml_scalar(wanted)}. Remove the key, or {remedy}."
            )


def _data_problems(config: Config, is_for_training: bool) -> Iterator[str]:
    if is_for_training and not config.data.train:
        yield "data.train is empty: a run needs at least one source of prompts, such as data.train.<name>.kind=jsonl."
    for part in ("train", "evaluation") if is_for_training else ("evaluation",):
        for name, source in getattr(config.data, part).items():
            yield from _source_problems(f"data.{part}.{name}", source, is_evaluation=part == "evaluation")
    if config.verifier.trusted:
        sources = (*config.data.train.values(), *config.data.evaluation.values())
        in_use = {name for source in sources for name in verifier_weights(source)}
        for name in sorted(set(config.verifier.trusted) - in_use):
            yield (
                f"verifier.trusted: {name!r} is no verifier in use; these are {', '.join(sorted(in_use))}. Remove it, "
                "or spell it as the source does."
            )


def _source_problems(key: str, source: DataSourceConfig, is_evaluation: bool) -> Iterator[str]:
    if source.kind in PROCEDURAL_KINDS:
        if source.path:
            yield f"{key}.path={source.path}: kind={source.kind} reads no file. Remove it, or change the kind."
        if is_evaluation and (source.num_prompts is None or source.seed is None):
            missing = [name for name in ("num_prompts", "seed") if getattr(source, name) is None]
            yield (
                f"{key}: an evaluation source must be finite and the same in every run, and kind={source.kind} makes "
                f"prompts without end. Set {' and '.join(f'{key}.{name}' for name in missing)}."
            )
    elif not source.path:
        what = "a data set on the hub, such as openai/gsm8k" if source.kind == "hub" else "a file"
        yield f"{key}.path is empty: kind={source.kind} reads {what}. Set it."
    elif source.seed is not None:
        yield f"{key}.seed={source.seed}: only procedural sources draw by one. Remove it; run.seed shuffles."
    elif source.params:
        yield f"{key}.params={source.params}: kind={source.kind} takes no parameters. Remove them."
    yield from _hub_source_problems(key, source)
    if source.kind == "reasoning_gym" and not source.task:
        yield f"{key}.task is empty: kind=reasoning_gym needs the name of a data set, such as task=chain_sum."
    if source.kind != "reasoning_gym" and source.task:
        yield f"{key}.task={source.task}: only kind=reasoning_gym has tasks. Remove it."
    if source.schema != "columns":
        if source.kind in PROCEDURAL_KINDS:
            yield f"{key}.schema={source.schema}: kind={source.kind} reads no file. Remove it."
        for name, default in (("prompt_field", "prompt"), ("answer_field", "answer")):
            if getattr(source, name) != default:
                yield (
                    f"{key}.{name}={getattr(source, name)}: schema={source.schema} knows its columns and would not "
                    f"read it. Remove {name}, or set {key}.schema=columns."
                )
    yield from verifier_problems(key, source)
    if source.system_prompt and not source.chat_template:
        yield f"{key}.system_prompt is set, but chat_template=false leaves it out. Set {key}.chat_template=true."


def _push_problems(config: Config) -> Iterator[str]:
    section = config.checkpoint
    if section.push_to_hub and not section.export_huggingface:
        yield (
            f"checkpoint.push_to_hub={section.push_to_hub}: pushes the exported model, and "
            "checkpoint.export_huggingface=false exports none. Set that to true, or push_to_hub to empty."
        )


def _hub_source_problems(key: str, source: DataSourceConfig) -> Iterator[str]:
    if source.kind != "hub":
        for name in ("subset", "split", "revision"):
            if value := getattr(source, name):
                yield f"{key}.{name}={value}: only kind=hub reads a data set of the hub. Remove it, or set kind=hub."
        return
    if source.path and not REPOSITORY_NAME.fullmatch(source.path):
        yield (
            f"{key}.path={source.path}: kind=hub takes a data set's name on the Hugging Face hub, such as "
            "openai/gsm8k. A file here is read with kind=jsonl or kind=parquet."
        )
    if not source.split:
        yield f"{key}.split is empty: kind=hub reads one split. Set it, such as {key}.split=train."


def _batch_problems(config: Config) -> Iterator[str]:
    rollout, reward, train = config.rollout, config.reward, config.train
    if rollout.num_prompts % train.num_minibatches:
        divisors = [str(n) for n in range(1, rollout.num_prompts + 1) if rollout.num_prompts % n == 0]
        yield (
            f"train.num_minibatches={train.num_minibatches}: must divide rollout.num_prompts={rollout.num_prompts}: "
            f"a minibatch holds whole groups. Set it to one of {', '.join(divisors)}."
        )
    if reward.correct <= reward.incorrect:
        yield f"reward.correct={reward.correct}: must be above reward.incorrect={reward.incorrect}."
    if reward.overlong_buffer_tokens >= rollout.max_response_tokens:
        yield (
            f"reward.overlong_buffer_tokens={reward.overlong_buffer_tokens}: must be below rollout.max_response_tokens="
            f"{rollout.max_response_tokens}, at whose end the buffer lies. Lower it, or set 0 to turn the penalty off."
        )


def _objective_problems(config: Config) -> Iterator[str]:
    objective = config.objective
    if objective.future_kl and objective.old_log_probs == "rollout":
        yield (
            "objective.old_log_probs=rollout: rollout log-probs as π_old are refused with future_kl=true, because "
            "Future-KL sums up the engine's numerical differences over many tokens. Set objective.old_log_probs=actor."
        )
    if objective.future_kl and objective.dual_clip is None:
        yield (
            "objective.dual_clip=null: Future-KL leaves out tokens with a ratio above dual_clip and needs a number. "
            "Set objective.dual_clip=10."
        )
    if objective.rollout_correction != "none" and objective.old_log_probs == "rollout":
        yield (
            f"objective.rollout_correction={objective.rollout_correction}: with objective.old_log_probs=rollout the "
            "old policy is the engine's, and there is nothing to correct. Set objective.old_log_probs=actor, or "
            "rollout_correction=none."
        )
    if objective.influence_min > objective.influence_max:
        yield (
            f"objective.influence_min={objective.influence_min}: must not be above objective.influence_max="
            f"{objective.influence_max}."
        )
    if objective.loss_aggregation == "sequence_sum" and objective.sequence_sum_tokens is None:
        yield (
            "objective.sequence_sum_tokens=null: loss_aggregation=sequence_sum divides by a constant length. Set it, "
            f"usually to rollout.max_response_tokens={config.rollout.max_response_tokens}."
        )


def check_objective(objective: FipoConfig) -> None:
    """Refuse an objective that a run would refuse, for whoever builds one without a run's configuration.

    Raises:
        ConfigError: as `validate`.
    """
    problems = list(value_problems(objective, "objective."))
    if problems := problems or list(_objective_problems(replace(Config(), objective=objective))):
        raise ConfigError.of(problems, "the objective")


def _server_problems(config: Config) -> Iterator[str]:
    servers = config.servers
    if config.rollout.engine == "in_process":
        return
    for url in servers.urls:
        if not re.fullmatch(r"http://[^\s/:]+:\d+/?", url):
            yield f"servers.urls: {url!r} is not of the form http://host:port."
    if servers.router and config.rollout.engine != "sglang":
        yield f"servers.router=true: sglang-router speaks to SGLang only, and rollout.engine={config.rollout.engine}."
    if servers.router and servers.urls:
        yield "servers.router=true: a router is put before servers that are started here. Remove servers.urls, or it."
    if servers.weight_sync == "disk" and not servers.keep_snapshot:
        yield "servers.keep_snapshot=false: weight_sync=disk hands weights over as a snapshot. Set keep_snapshot=true."
    if servers.weight_sync == "distributed" and servers.placement == "colocated":
        yield (
            "servers.weight_sync=distributed: NCCL joins no two processes on one GPU, and placement=colocated puts "
            "server and actor there. Set weight_sync=tensor."
        )
    if servers.gpus and not servers.urls and len(servers.gpus) != servers.num_per_node * servers.tp:
        yield (
            f"servers.gpus={servers.gpus}: servers.num_per_node={servers.num_per_node} x servers.tp={servers.tp} take "
            f"{servers.num_per_node * servers.tp}."
        )
    if servers.base_port is not None and servers.base_port + servers.num_per_node > 65536:
        yield (
            f"servers.base_port={servers.base_port}: the last of servers.num_per_node={servers.num_per_node} ports "
            "would be beyond 65535. Lower it."
        )
    if servers.device == "cuda" and servers.placement == "dedicated" and not (servers.gpus or servers.urls):
        yield "servers.gpus is empty: placement=dedicated needs GPUs of its own. Name them, or set placement=colocated."
    yield from server_device_problems(config, servers.device)
    yield from _server_key_problems(config)
    if config.rollout.engine == "vllm":
        yield from _vllm_problems(config)


def _server_key_problems(config: Config) -> Iterator[str]:
    """Who may speak to servers. No value is repeated here: what stands in the wrong place may be the key."""
    servers = config.servers
    if servers.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", servers.api_key_env):
        yield (
            "servers.api_key_env: is not the name of an environment variable in capitals (its value is not shown). "
            "Name the one that holds the servers' key; the key itself must not stand in a configuration."
        )
    if servers.api_key_env is not None and not servers.urls:
        yield (
            "servers.api_key_env: is for the servers in servers.urls, and that is empty; those that a run starts get a "
            "random key. Remove it."
        )
    if servers.urls and servers.api_key_env is None and config.rollout.engine == "vllm":
        yield (
            "servers.api_key_env=null: the worker extension of a vLLM server takes orders from whoever has its key. "
            "Start the servers with MEGATRON_FIPO_SERVER_KEY in their environment, and name here the variable of the "
            "trainer's environment that holds the same text."
        )
    yield from _secret_argument_problems(servers.extra_args)
    if named := sorted(_KEY_OPTIONS & {argument.partition("=")[0] for argument in servers.extra_args}):
        yield (
            f"servers.extra_args: {', '.join(named)} would replace the random key that the run gives its servers, and "
            "everybody on the host reads command lines. Remove it; for servers with a key of yours, start them "
            "yourself, and set servers.urls and servers.api_key_env."
        )


def _secret_argument_problems(arguments: Sequence[str]) -> Iterator[str]:
    """Everybody on a host reads the command lines of its processes, and a log may repeat them."""
    for index, argument in enumerate(arguments):
        option = argument.partition("=")[0]
        source = reference_of(("servers", "extra_args", index), argument) or without_secrets(argument)
        if named := [name for name in variables_in(source) if looks_secret(name)]:
            what = f"the environment variable {named[0]} is a secret, by its name, which"
        elif option.startswith("--") and option not in _KEY_OPTIONS and _SECRET_OPTION.search(option):
            what = f"the value of {option} is a secret, by its name, which"
        else:
            continue
        yield (
            f"servers.extra_args: {what} everybody on the host could read from the server's command line. Remove it. "
            "Servers have the run's environment: set the variable that the engine reads (such as HF_TOKEN) before the "
            "run is started; or start the servers yourself, and set servers.urls."
        )


def server_device_problems(config: Config, device: str) -> Iterator[str]:
    """What servers.* demand of each other where the servers' device is known; validation knows it if it is named.

    Args:
        device: cpu, cuda, or auto where nothing can be said yet.
    """
    servers = config.servers
    if config.rollout.engine == "in_process" or device != "cuda" or servers.weight_sync != "tensor":
        return
    if servers.placement == "dedicated":
        yield (
            "servers.weight_sync=tensor: hands each server memory of its own GPU (CUDA IPC), and placement=dedicated "
            "means GPUs that no rank of the trainer is on. Set servers.weight_sync=distributed (NCCL), or "
            "placement=colocated."
        )
    elif servers.urls and not servers.gpus:
        yield (
            "servers.gpus is empty: weight_sync=tensor hands each server memory of its own GPU (CUDA IPC), and which "
            "GPUs the servers of servers.urls run on cannot be seen. Name them in the servers' order, or set "
            "placement=dedicated and weight_sync=distributed."
        )


def _vllm_problems(config: Config) -> Iterator[str]:
    """Sampling that vLLM changes or rejects; it would say so at the first request, or not at all."""
    if config.rollout.top_p < 1:
        yield (
            f"rollout.top_p={config.rollout.top_p}: vLLM gives log-probs that are renormalised over the nucleus, which "
            "compare with no actor's. Set rollout.top_p=1, or take rollout.engine=sglang."
        )
    for section in ("rollout", "evaluation"):
        temperature = getattr(config, section).temperature
        if 0 < temperature < 0.01 or temperature > 2:
            yield f"{section}.temperature={temperature}: vLLM samples at 0, or between 0.01 and 2."


def _precision_problems(config: Config) -> Iterator[str]:
    model = config.model
    if model.fp8 != "none" and model.dtype != "bfloat16":
        yield (
            f"model.fp8={model.fp8}: FP8 products are taken of bfloat16 numbers, and model.dtype={model.dtype}. Set "
            "model.dtype=bfloat16, or model.fp8=none."
        )
    if model.fp8 != "none" and model.transformer_engine == "off":
        yield (
            f"model.transformer_engine=off: model.fp8={model.fp8} is computed by Transformer Engine alone. Set "
            "model.transformer_engine=auto, or model.fp8=none."
        )


def _layout_problems(config: Config, world_size: int | None) -> Iterator[str]:
    parallel, rollout, batch = config.parallel, config.rollout, config.batch
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel=true: needs parallel.tp above 1. Set it to false."
    if parallel.virtual_pp is not None and parallel.pp == 1:
        yield f"parallel.virtual_pp={parallel.virtual_pp}: needs parallel.pp above 1. Set it to null."
    model_parallel = parallel.tp * parallel.pp * parallel.cp
    if world_size is not None and world_size < 1:
        yield f"{world_size} processes (the world size) run nothing: it must be at least 1."
    elif world_size is not None and world_size % model_parallel:
        yield (
            f"{world_size} processes cannot hold whole copies of the model: tp={parallel.tp} x pp={parallel.pp} x "
            f"cp={parallel.cp} takes {model_parallel} each. Start a multiple of {model_parallel}, or lower parallel.*."
        )
    needed = required_pad_multiple(config)
    if pad_multiple(config) % needed:
        yield (
            f"batch.pad_multiple={batch.pad_multiple}: cp={parallel.cp}, tp={parallel.tp} and sequence_parallel="
            f"{_yaml_scalar(parallel.sequence_parallel)} need sequences padded to a multiple of {needed}. "
            f"Set it to {needed}, a multiple of that, or null."
        )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    whole = microbatch_token_multiple(config)
    padded = -(-longest // whole) * whole
    if padded > batch.max_tokens_per_microbatch:
        yield (
            f"batch.max_tokens_per_microbatch={batch.max_tokens_per_microbatch}: one sequence of "
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} + rollout.max_response_tokens="
            f"{rollout.max_response_tokens} takes {padded} tokens with padding. Raise it to at least {padded}."
        )


def _yaml_scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def required_pad_multiple(config: Config) -> int:
    """Least multiple to which every sequence of a microbatch must be padded.

    Context parallelism cuts a sequence into 2*cp chunks; sequence parallelism then cuts the tokens of one
    context-parallel rank, T / cp, into tp parts.
    """
    parallel = config.parallel
    zigzag = 2 * parallel.cp if parallel.cp > 1 else 1
    return math.lcm(zigzag, parallel.cp * parallel.tp) if parallel.sequence_parallel else zigzag


def pad_multiple(config: Config) -> int:
    """Multiple to which sequences are padded: the configured one, or the least that the layout allows."""
    return config.batch.pad_multiple or required_pad_multiple(config)


def microbatch_token_multiple(config: Config) -> int:
    """Multiple to which a microbatch's tokens must add up: FP8 products want whole blocks of rows on every rank."""
    parallel = config.parallel
    shards = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    return math.lcm(pad_multiple(config), shards * FP8_ALIGNMENT[config.model.fp8])


def updates_per_step(config: Config) -> int:
    """Optimizer steps that one batch of rollouts gets."""
    return config.train.num_minibatches * config.train.num_epochs


def _correction_warnings(config: Config) -> Iterator[str]:
    objective, longest = config.objective, config.rollout.max_response_tokens
    if objective.rollout_correction == "sequence_masked" and longest > LONGEST_FOR_SEQUENCE_RATIOS:
        yield (
            "objective.rollout_correction=sequence_masked multiplies ratios over whole responses: at "
            f"rollout.max_response_tokens={longest} small differences mask most long ones. geometric_masked does not "
            "depend on the length."
        )
    if objective.rollout_correction == "geometric_masked" and objective.rollout_ratio_max > WIDEST_GEOMETRIC_RATIO:
        yield (
            f"objective.rollout_ratio_max={objective.rollout_ratio_max:g} hardly masks anything with "
            "rollout_correction=geometric_masked, whose ratio is a mean over the response's tokens: 0.999 to 1.001 is "
            "usual."
        )


def _unread_server_keys(config: Config) -> Iterator[str]:
    if config.rollout.engine != "in_process":
        return
    given, default = asdict(config.servers), asdict(ServersSection())
    if changed := [f"servers.{name}" for name in given if given[name] != default[name]]:
        yield f"{', '.join(changed)}: not read with rollout.engine=in_process, which starts no servers."


def _server_warnings(config: Config) -> Iterator[str]:
    servers = config.servers
    if config.rollout.engine == "in_process" or not servers.urls:
        return
    if servers.api_key_env is None:
        yield (
            "servers.api_key_env=null: whoever reaches the servers of servers.urls can change their weights, and run "
            "code in them: SGLang unpickles what is posted to it. Start them with a key, and name its variable."
        )
        return
    away = [url for url in servers.urls if urlsplit(url).hostname not in ("127.0.0.1", "localhost")]
    if away:
        yield (
            f"servers.api_key_env={servers.api_key_env}: the key goes to {', '.join(away)} as plain text (http), for "
            "whoever can read the network between. Keep it to a network that you trust, or go through a tunnel "
            "(ssh -L) to a port of 127.0.0.1."
        )


def warnings_for(config: Config, model_config: Mapping[str, Any] | None = None) -> list[str]:
    """What runs but hardly means what it says; for the console, in full sentences."""
    objective, rollout, evaluation = config.objective, config.rollout, config.evaluation
    found = []
    if objective.future_kl and updates_per_step(config) == 1:
        found.append(
            "FIPO is inert: with one update per step (train.num_minibatches x train.num_epochs = 1) the policy has not "
            "moved when Future-KL is taken, every influence weight is 1, and this run is plain DAPO."
        )
    if objective.future_kl and objective.influence_min == objective.influence_max:
        found.append(
            f"influence weights cannot vary: objective.influence_min = influence_max = {objective.influence_max}."
        )
    found += _correction_warnings(config)
    if config.verifier.trusted:
        found.append(
            f"verifier.trusted: {', '.join(config.verifier.trusted)} judges what the model writes with all rights of "
            "this run, its environment, files and network. What goes wrong there goes wrong here."
        )
    if rollout.top_p < 1:
        found.append(
            f"rollout.top_p={rollout.top_p} samples from a truncated distribution, but log-probs are taken over the "
            "whole one: updates are biased. Training usually samples at top_p=1."
        )
    found += _server_warnings(config)
    found += _unread_server_keys(config)
    if config.optimizer.num_warmup_steps > config.train.num_steps:  # the last step of the warm-up has the full rate
        found.append(
            f"optimizer.num_warmup_steps={config.optimizer.num_warmup_steps} goes beyond the {config.train.num_steps} "
            f"steps: the learning rate never reaches {config.optimizer.learning_rate}."
        )
    if evaluation.temperature == 0 and evaluation.num_samples_per_prompt > 1:
        found.append(
            f"evaluation.temperature=0 is greedy: all {evaluation.num_samples_per_prompt} responses will be alike."
        )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    positions = (model_config or {}).get("max_position_embeddings")
    if positions is not None and longest > positions:
        found.append(
            f"sequences of up to {longest} tokens (rollout.max_prompt_tokens + max_response_tokens) go beyond "
            f"the model's max_position_embeddings={positions}: it was never trained at those positions."
        )
    return found
