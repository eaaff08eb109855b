"""Servers under test: a pool, an engine over it, and the models that it may be given."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_fipo.config import ServersSection
from megatron_fipo.rl.trajectory import Trajectory
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams
from megatron_fipo.rollout.servers.api import InferenceServer, LaunchSpec
from megatron_fipo.rollout.servers.engine import EngineSettings, OwnedServers, ServerEngine
from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.packers import Packers
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.process import free_port
from megatron_fipo.rollout.servers.sending import Sender
from megatron_fipo.rollout.servers.setup import ADAPTERS
from megatron_fipo.rollout.servers.sglang.launch import router_plan
from megatron_fipo.rollout.servers.snapshots import SnapshotWriter
from megatron_fipo.rollout.servers.sync import WeightSync
from megatron_fipo.rollout.servers.transfers import Method, make_transfer
from tests.engines.environments import server_python
from tests.models import load, save_random_model

VOCABULARY = 1000
"""No multiple of 64: the server pads it."""
CONTEXT_TOKENS = 4096
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
}
STOP = 1
TOLERANCE = 1e-4
TIMEOUT_S = 120.0
GROUP_SIZE = 4
KEY = "key-of-the-servers-under-test"
PROMPT_TOKENS = 12


def launch_spec(
    engine: str, model: Path, tp: int = 1, dtype: torch.dtype = torch.float32, index: int = 0
) -> LaunchSpec:
    """A small server on the CPU, on a free port."""
    num_cores = os.cpu_count() or 1
    return LaunchSpec(
        python=str(server_python(engine)),
        model_path=model,
        host="127.0.0.1",
        port=free_port(),
        dtype=str(dtype).removeprefix("torch."),
        weight_version="0",
        tp=tp,
        cpu_cores=tuple(((index + rank) % num_cores,) for rank in range(tp)),
        max_total_tokens=32768,
        memory_fraction=0.3,
        max_running_requests=64,
        key=KEY,
    )


def request(
    index: int,
    num_tokens: int = 24,
    prefix: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> GenerationRequest:
    """Sample `index`, four to a group; groups differ in their prompts."""
    group, sample_index = divmod(index, GROUP_SIZE)
    return GenerationRequest(
        sample_id=f"sample-{index}",
        group_id=group,
        sample_index=sample_index,
        prompt_ids=tuple(2 + (group + position) % (VOCABULARY - 2) for position in range(PROMPT_TOKENS)),
        sampling=SamplingParams(num_tokens, temperature, top_p),
        seed=index if seed is None else seed,
        prefix=prefix,
    )


class Serving:
    """Servers, and two models with other weights."""

    def __init__(
        self,
        engine: str,
        folder: Path,
        *,
        family: str = "qwen2",
        dtype: torch.dtype = torch.float32,
        num_servers: int = 1,
        tp: int = 1,
        router: bool = False,
        stop: tuple[int, ...] = (STOP,),
        settings: ServersSection | None = None,
        **changes: object,
    ) -> None:
        self.dtype = dtype
        self.folders = [
            save_random_model(folder / f"model{seed}", family, seed, **(SIZES | changes)) for seed in (0, 1)
        ]
        self.models: list[PreTrainedModel] = [load(path).to(dtype) for path in self.folders]
        self.loop = EventLoopThread()
        specs = [launch_spec(engine, self.folders[0], tp, dtype, index) for index in range(num_servers)]
        self.pool = ServerPool(
            ADAPTERS[engine](),
            specs,
            settings or ServersSection(start_timeout_s=300.0, health_timeout_s=20.0),
            log_folder=folder / "logs",
            router=partial(router_plan, specs[0]) if router else None,
        )
        self.snapshots = SnapshotWriter(folder / "snapshots", self.folders[0])
        self.owned = OwnedServers(self.pool, self.loop, Sender(self.pool, 64, TIMEOUT_S), self.sync("tensor"))
        engine_settings = EngineSettings(
            vocab_size=VOCABULARY,
            stop_token_ids=frozenset(stop),
            score_timeout_s=TIMEOUT_S,
            canary_tolerance=TOLERANCE,
            num_canaries=2,
            canary_tokens=30,
            cache_canary_tokens=400,
        )
        self.engine = ServerEngine(self.owned, engine_settings, agree=lambda problem: [problem])
        self.engine.start()

    def sync(self, method: Method) -> WeightSync:
        """A way to bring weights in, by buckets so small that layers lie across their ends."""
        return WeightSync(
            self.pool,
            self.loop,
            make_transfer(method, TIMEOUT_S),
            Packers(100_000, self.dtype, torch.device("cpu")),
            TIMEOUT_S,
            self.snapshots,
        )

    @property
    def clients(self) -> list[InferenceServer]:
        return [server.client for server in self.pool.servers]

    @property
    def client(self) -> InferenceServer:
        """The only server's."""
        (client,) = self.clients
        return client

    def weights(self, model: int) -> list[tuple[str, Tensor]]:
        """What the actor would send: output weights that are the embedding's are not sent."""
        tied = self.models[model].config.tie_word_embeddings
        state = self.models[model].state_dict()
        return [(name, tensor) for name, tensor in state.items() if not (tied and name == "lm_head.weight")]

    def hold(self, model: int, version: int) -> None:
        """Give all servers the weights of a model."""
        self.engine.update_weights(self.weights(model), version)

    def generate(
        self,
        *requests: GenerationRequest,
        meanwhile: Callable[[], None] | None = None,
        when: Callable[[], bool] = lambda: True,
    ) -> list[Trajectory]:
        """Samples in the order of the requests.

        Args:
            meanwhile: called while they are generated, once `when` says so.
        """

        async def gather() -> list[Trajectory]:
            tasks = [asyncio.ensure_future(self.engine.generate(each)) for each in requests]
            if meanwhile is not None:
                while not when():
                    assert not all(task.done() for task in tasks), "everything was generated before"
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(meanwhile)
            return list(await asyncio.gather(*tasks))

        return asyncio.run(gather())

    def expect_log_probs(self, sample: Trajectory, model: int, temperature: float = 1.0) -> None:
        """The sample's log-probs must be the model's."""
        assert len(sample.response_ids) > 0
        expected = log_probs(self.models[model], sample, temperature)
        torch.testing.assert_close(sample.rollout_log_probs, expected, atol=TOLERANCE, rtol=0)

    def difference(self, sample: Trajectory, model: int, temperature: float = 1.0) -> Tensor:
        """float32 [R], |log-probs of the sample - the model's|."""
        return (sample.rollout_log_probs - log_probs(self.models[model], sample, temperature)).abs()

    def close(self) -> None:
        self.engine.close()


def log_probs(model: PreTrainedModel, sample: Trajectory, temperature: float = 1.0) -> Tensor:
    """float32 [R], of a sample's response by transformers."""
    ids = torch.cat([sample.prompt_ids, sample.response_ids])
    return scores(model, ids.tolist(), temperature)[len(sample.prompt_ids) - 1 :]


@torch.no_grad()
def scores(model: PreTrainedModel, sequence: Sequence[int], temperature: float = 1.0) -> Tensor:
    """float32 [L - 1], log-probs of a sequence's tokens from the second on, by transformers."""
    ids = torch.tensor(sequence)
    logits = model(ids[None]).logits[0, :-1].float() / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None]).squeeze(1)
