"""Trainers that attach to running servers: what each of their ranks does and expects, in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_fipo.config import Config, ParallelSection, load_config, validate
from megatron_fipo.environments.single_turn import SingleTurn, decode_with, judge_in
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.trajectory import Prompt, Trajectory
from megatron_fipo.rollout.engine import NO_PLACES, SamplingParams
from megatron_fipo.rollout.generation import GroupGenerator, build_engine, share_of
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.rollout.servers.api import InferenceServer
from megatron_fipo.rollout.servers.engine import ServerEngine
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.proof import canary_sequences
from megatron_fipo.rollout.servers.setup import build_server_engine
from megatron_fipo.verifiers.pool import VerifierPool
from tests.engines.serving import (
    GROUP_SIZE,
    KEY,
    SIZES,
    STOP,
    TOLERANCE,
    VOCABULARY,
    Serving,
    log_probs,
    request,
    scores,
)
from tests.models import load, save_random_model
from tests.parallel.layouts import layout
from tests.parallel.ranks import run_ranks

KEY_ENV = "KEY_OF_RUNNING_SERVERS"
NUM_PROMPTS, NUM_SAMPLES = 3, 2


def attached_config(engine: str, model: Path, urls: Sequence[str], *overrides: str) -> Config:
    """A run's, with running servers on the CPU."""
    config = load_config(
        None,
        [
            f"model.path={model}",
            "data.train.sums.kind=chain_arithmetic",
            "data.train.sums.verifier=chain_arithmetic",
            f"rollout.engine={engine}",
            f"servers.urls=[{','.join(urls)}]",
            f"servers.api_key_env={KEY_ENV}",
            "servers.device=cpu",
            "servers.bucket_mib=1",
            *overrides,
        ],
    )
    validate(config)
    return config


# --- on ranks --------------------------------------------------------------------------------------------------------


@contextmanager
def rank_of_node(local_ranks: Sequence[int]) -> Iterator[ParallelGroups]:
    """This rank's groups, where rank i is number local_ranks[i] of its node."""
    os.environ[KEY_ENV] = KEY
    os.environ["LOCAL_RANK"] = str(local_ranks[int(os.environ["RANK"])])
    with layout(ParallelSection()) as ranks:
        yield ranks


def shares(
    engine: str, model: Path, folder: Path, local_ranks: Sequence[int], num_urls: int
) -> tuple[tuple[int, int] | None, list[str]]:
    """This rank's share of the prompts, and the ports that it would attach to."""
    with rank_of_node(local_ranks) as ranks:
        config = attached_config(engine, model, [f"http://host:{index}" for index in range(1, num_urls + 1)])
        built = build_server_engine(config, ranks, [STOP], folder)
        try:
            assert (built.owned is None) == (built.share is None)
            return built.share, [] if built.owned is None else [f"{s.host}:{s.port}" for s in built.owned.pool.specs]
        finally:
            built.close()


def expect_no_server(model: Path, folder: Path, url: str) -> None:
    """Of two nodes, of which the first is to attach where nothing listens, both stop with its words."""
    with rank_of_node([0, 0]) as ranks:
        for engine in ("sglang", "vllm"):
            config = attached_config(engine, model, [url], "servers.start_timeout_s=0.5")
            words = rf"^{engine}-0 was not ready after 0\.5 s \(servers\.start_timeout_s\): {url}/.*Cannot connect"
            servers = build_engine(config, ranks, share_of(config, ranks), None, folder)
            assert isinstance(servers, ServerEngine)
            with pytest.raises(ServerError, match=words):
                servers.start()
            servers.close()


class NumberTokenizer:
    """Token ids as text."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def _broken_off(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Half of a model's weights, then an error."""
    weights = list(policy.state_dict().items())
    yield from weights[: len(weights) // 2]
    raise OSError("the actor is gone")


def expect_other_model_refused(engine: str, model: Path, folder: Path, url: str, tp: int) -> None:
    """Before anything is written to the server: SGLang's would die of it."""
    with rank_of_node([0]) as ranks:
        config = attached_config(engine, model, [url], f"servers.tp={tp}")
        words = rf"{engine}-0 \({url}, .* whose hidden_size is 128; that of model\.path={model} is 64\."
        servers = build_engine(config, ranks, share_of(config, ranks), None, folder)
        assert isinstance(servers, ServerEngine)
        with pytest.raises(ServerError, match=words):
            servers.start()
        servers.close()


def roll_out_on_two_nodes(engine: str, models: Sequence[Path], folder: Path, url: str, tp: int) -> list[list[int]]:
    """Rollouts of both nodes from one server, to which the first attaches, with each way for weights to get in.

    Returns:
        The responses.
    """
    policies = [load(path) for path in models]
    prompts = [
        Prompt(one.group_id, "sums", "", one.prompt_ids, "chain_arithmetic", "1")
        for one in (request(GROUP_SIZE * index) for index in range(NUM_PROMPTS))
    ]
    responses = []
    with rank_of_node([0, 0]) as ranks, VerifierPool(verifiers=["chain_arithmetic"]) as verifiers:
        ledger = RolloutLedger(folder / "rollouts", ranks.rank, "", str)
        environment = SingleTurn(judge_in(verifiers), decode_with(NumberTokenizer()))
        for number, method in enumerate(("tensor", "distributed", "disk")):
            config = attached_config(engine, models[0], [url], f"servers.tp={tp}", f"servers.weight_sync={method}")
            servers = build_engine(config, ranks, share_of(config, ranks), None, folder)
            assert isinstance(servers, ServerEngine)
            servers.start()
            generator = GroupGenerator(servers, environment, ranks, 0, ledger, lambda: None)
            try:
                policy = policies[(number + 1) % 2]
                version = 100 + number
                servers.update_weights(policy.state_dict().items(), version)
                sequences = canary_sequences(VOCABULARY, 2, num_tokens=16)
                servers.check_log_probs(sequences, [scores(policy, each).tolist() for each in sequences])
                own: list[Trajectory] = []
                own_prompts = prompts[NO_PLACES if generator.share is None else generator.share.places]
                groups = generator.generate(own_prompts, NUM_SAMPLES, SamplingParams(24), number, own.append)
                assert len(own) == (NUM_PROMPTS * NUM_SAMPLES if ranks.rank == 0 else 0), "one node has the server"
                groups = exchange.broadcast_object(groups, ranks.world)
                assert [group.prompt for group in groups] == prompts
                samples = [sample for group in groups for sample in group.samples]
                for sample in samples:
                    assert sample.policy_versions == [(version, 0, len(sample.response_ids))]
                    expected = log_probs(policy, sample)
                    torch.testing.assert_close(sample.rollout_log_probs, expected, atol=TOLERANCE, rtol=0)
                responses += [sample.response_ids.tolist() for sample in samples]
                wrong = [scores(policies[number % 2], each).tolist() for each in sequences]
                with pytest.raises(ServerError, match="other log-probs than the actor"):
                    servers.check_log_probs(sequences, wrong)
                # The server stays paused, its update open; whoever attaches next gets on with it all the same.
                with pytest.raises(ServerError, match="the actor is gone"):
                    servers.update_weights(_broken_off(policy), version + 1)
            finally:
                servers.close()
    assert len({tuple(response) for response in responses}) == 3 * NUM_PROMPTS * NUM_SAMPLES
    return responses


# --- where the server was started ------------------------------------------------------------------------------------


async def _load(client: InferenceServer, folder: Path) -> None:
    """Weights from a folder that can be read: SGLang names the last one, which another test may have removed."""
    await client.pause()
    await client.begin_update()
    await client.load_folder(folder, timeout_s=60.0)
    await client.end_update("109")
    await client.resume()


def expect_two_nodes_to_share(engine: str, serving: Serving, folder: Path) -> None:
    """A trainer elsewhere uses a server that was started here, which runs on afterwards."""
    (server,) = serving.pool.servers
    assert server.process is not None
    restarts = serving.pool.num_restarts
    arguments = (engine, serving.folders, folder, server.client.url, server.spec.tp)
    serving.loop.run(_load(server.client, serving.folders[0]))
    other = save_random_model(folder / "other", **(SIZES | {"hidden_size": 64}))
    run_ranks(expect_other_model_refused, 1, engine, other, *arguments[2:])
    first, second = run_ranks(roll_out_on_two_nodes, 2, *arguments)
    assert first == second
    assert server.process.exit_status is None
    assert serving.pool.num_restarts == restarts
    serving.hold(0, version=110)
    (sample,) = serving.generate(request(0))
    assert sample.policy_versions == [(110, 0, len(sample.response_ids))]
    serving.expect_log_probs(sample, 0)
