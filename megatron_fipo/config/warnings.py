"""Warnings about configurations that run, but probably not as intended; each is a registered function.

Warnings are full sentences for the console, each with an entry in docs/troubleshooting.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from megatron_fipo.config.derived import longest_sequence_tokens, updates_per_step
from megatron_fipo.config.sections import Config, ServersSection

LONGEST_FOR_SEQUENCE_RATIOS = 2048
"""Tokens beyond which a whole response's probability ratio says little: a bias of 1e-3 a token is a factor of 8."""
WIDEST_GEOMETRIC_RATIO = 1.1
"""rollout_ratio_max beyond which the mean ratio of a response is hardly ever masked."""

ModelConfig: TypeAlias = Mapping[str, Any]
_Warning: TypeAlias = Callable[[Config, ModelConfig], Iterator[str]]
_WARNINGS: list[_Warning] = []


def warns(warning: _Warning) -> _Warning:
    """Register a function that yields warnings; they are asked in the order in which they stand here."""
    _WARNINGS.append(warning)
    return warning


def warnings_for(config: Config, model_config: ModelConfig | None = None) -> list[str]:
    """Warnings about what runs, but probably not as intended; for the console, in full sentences.

    Args:
        config: valid.
        model_config: config.json of the model; None skips the warnings that need it.
    """
    return [text for warning in _WARNINGS for text in warning(config, model_config or {})]


@warns
def _inert_fipo(config: Config, model_config: ModelConfig) -> Iterator[str]:
    if config.objective.future_kl and updates_per_step(config) == 1:
        yield (
            "FIPO is inert: with one update per step (train.num_minibatches x train.num_epochs = 1) the policy has not "
            "moved when Future-KL is taken, every influence weight is 1, and this run is plain DAPO."
        )


@warns
def _inert_shadows(config: Config, model_config: ModelConfig) -> Iterator[str]:
    objective = config.objective
    if objective.shadow and not objective.future_kl and updates_per_step(config) == 1:
        yield (
            "objective.shadow shows nothing: with one update per step (train.num_minibatches x train.num_epochs = 1) "
            "the policy has not moved when Future-KL is taken, and it is 0 under all settings."
        )


@warns
def _equal_weights(config: Config, model_config: ModelConfig) -> Iterator[str]:
    objective = config.objective
    if objective.future_kl and objective.influence_min == objective.influence_max:
        yield f"influence weights cannot vary: objective.influence_min = influence_max = {objective.influence_max}."


@warns
def _behaviour_in_future_kl(config: Config, model_config: ModelConfig) -> Iterator[str]:
    objective = config.objective
    if objective.future_kl and objective.future_kl_reference == "behaviour":
        yield (
            "objective.future_kl_reference=behaviour is an ablation: Future-KL then sums up how far the actor lies "
            "from the policies that wrote the tokens, and influence weights follow staleness and the engine's rounding "
            "in place of credit. Train with proximal; objective.rollout_correction is for that gap."
        )


@warns
def _stale_without_correction(config: Config, model_config: ModelConfig) -> Iterator[str]:
    objective, staleness = config.objective, config.rollout.max_staleness_steps
    if staleness and objective.rollout_correction == "none" and objective.old_log_probs == "actor":
        yield (
            f"objective.rollout_correction=none with rollout.max_staleness_steps={staleness}: tokens of older weights "
            "count as if the weights of the step had written them. Remove the key for its default there, "
            "token_truncated."
        )


@warns
def _corrections(config: Config, model_config: ModelConfig) -> Iterator[str]:
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


@warns
def _trusted_verifiers(config: Config, model_config: ModelConfig) -> Iterator[str]:
    if config.verifier.trusted:
        yield (
            f"verifier.trusted: {', '.join(config.verifier.trusted)} judges what the model writes with all rights of "
            "this run, its environment, files and network. What goes wrong there goes wrong here."
        )


@warns
def _truncated_sampling(config: Config, model_config: ModelConfig) -> Iterator[str]:
    if config.rollout.top_p < 1:
        yield (
            f"rollout.top_p={config.rollout.top_p} samples from a truncated distribution, but log-probs are taken over "
            "the whole one: updates are biased. Training usually samples at top_p=1."
        )


@warns
def _open_servers(config: Config, model_config: ModelConfig) -> Iterator[str]:
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


@warns
def _unread_server_keys(config: Config, model_config: ModelConfig) -> Iterator[str]:
    if config.rollout.engine != "in_process":
        return
    given, default = asdict(config.servers), asdict(ServersSection())
    if changed := [f"servers.{name}" for name in given if given[name] != default[name]]:
        yield f"{', '.join(changed)}: not read with rollout.engine=in_process, which starts no servers."


@warns
def _endless_warm_up(config: Config, model_config: ModelConfig) -> Iterator[str]:
    if config.optimizer.num_warmup_steps > config.train.num_steps:  # the last step of the warm-up has the full rate
        yield (
            f"optimizer.num_warmup_steps={config.optimizer.num_warmup_steps} goes beyond the {config.train.num_steps} "
            f"steps: the learning rate never reaches {config.optimizer.learning_rate}."
        )


@warns
def _greedy_evaluation(config: Config, model_config: ModelConfig) -> Iterator[str]:
    evaluation = config.evaluation
    if evaluation.temperature == 0 and evaluation.num_samples_per_prompt > 1:
        yield f"evaluation.temperature=0 is greedy: all {evaluation.num_samples_per_prompt} responses will be alike."


@warns
def _untrained_positions(config: Config, model_config: ModelConfig) -> Iterator[str]:
    longest, positions = longest_sequence_tokens(config), model_config.get("max_position_embeddings")
    if positions is not None and longest > positions:
        yield (
            f"sequences of up to {longest} tokens (rollout.max_prompt_tokens + max_response_tokens) go beyond "
            f"the model's max_position_embeddings={positions}: it was never trained at those positions."
        )
