"""SGLang servers under test: a pool, an engine over it, and the models that it may be given."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_fipo.rl.types import Sample
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams
from megatron_fipo.rollout.event_loop import EventLoopThread
from megatron_fipo.rollout.server_api import InferenceServer, LaunchSpec
from megatron_fipo.rollout.server_engine import ServerEngine
from megatron_fipo.rollout.server_process import free_port
from megatron_fipo.rollout.servers import ServerPool, WatchSettings
from megatron_fipo.rollout.sglang import SglangAdapter, router_plan
from megatron_fipo.rollout.weight_buckets import SnapshotWriter
from megatron_fipo.rollout.weight_sync import Method, WeightSync
from tests.engines.environments import server_python
from tests.models import load, save_random_model

VOCABULARY = 1000
"""No multiple of 64: the server pads it."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
}
STOP = 1
TOLERANCE = 1e-4
TIMEOUT_S = 120.0


def launch_spec(model: Path, tp: int = 1, dtype: torch.dtype = torch.float32, index: int = 0) -> LaunchSpec:
    """A small server on the CPU, on a free port."""
    num_cores = os.cpu_count() or 1
    return LaunchSpec(
        python=str(server_python("sglang")),
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
    )


def request(
    index: int,
    num_tokens: int,
    prefix: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> GenerationRequest:
    """Sample `index`, four to a group; groups differ in their prompts."""
    group, sample_index = divmod(index, 4)
    return GenerationRequest(
        sample_id=f"sample-{index}",
        group_id=group,
        sample_index=sample_index,
        prompt_ids=tuple(2 + (group + position) % (VOCABULARY - 2) for position in range(12)),
        sampling=SamplingParams(num_tokens, temperature, top_p),
        seed=index if seed is None else seed,
        prefix=prefix,
    )


class Serving:
    """Servers, and two models with other weights."""

    def __init__(
        self,
        folder: Path,
        *,
        num_servers: int = 1,
        tp: int = 1,
        router: bool = False,
        stop: tuple[int, ...] = (STOP,),
        settings: WatchSettings | None = None,
        **changes: object,
    ) -> None:
        self.folders = [save_random_model(folder / f"model{seed}", seed=seed, **(SIZES | changes)) for seed in (0, 1)]
        self.models: list[PreTrainedModel] = [load(path) for path in self.folders]
        self.loop = EventLoopThread()
        specs = [launch_spec(self.folders[0], tp, index=index) for index in range(num_servers)]
        self.pool = ServerPool(
            SglangAdapter(),
            specs,
            log_folder=folder / "logs",
            settings=settings or WatchSettings(start_timeout_s=300.0, health_timeout_s=20.0),
            router=partial(router_plan, specs[0]) if router else None,
        )
        self.snapshots = SnapshotWriter(folder / "snapshots", self.folders[0])
        self.engine = ServerEngine(
            self.pool,
            self.loop,
            self.sync("tensor"),
            agree=lambda problem: [problem],
            stop_token_ids=stop,
            vocab_size=VOCABULARY,
            max_concurrent_requests=64,
            request_timeout_s=TIMEOUT_S,
            canary_tolerance=TOLERANCE,
        )
        self.engine.start()

    def sync(self, method: Method) -> WeightSync:
        """A way to bring weights in, by buckets so small that layers lie across their ends."""
        return WeightSync(
            self.pool,
            self.loop,
            method=method,
            bucket_bytes=100_000,
            dtype=torch.float32,
            device=torch.device("cpu"),
            timeout_s=TIMEOUT_S,
            snapshots=self.snapshots,
        )

    @property
    def clients(self) -> list[InferenceServer]:
        return [server.client for server in self.pool.servers]

    def weights(self, model: int) -> list[tuple[str, Tensor]]:
        """What the actor would send."""
        return list(self.models[model].state_dict().items())

    def hold(self, model: int, version: int) -> None:
        """Give all servers the weights of a model."""
        self.engine.update_weights(self.weights(model), version)

    def generate(
        self,
        *requests: GenerationRequest,
        meanwhile: Callable[[], None] | None = None,
        when: Callable[[], bool] = lambda: True,
    ) -> list[Sample]:
        """Samples in the order of the requests.

        Args:
            meanwhile: called while they are generated, once `when` says so.
        """

        async def gather() -> list[Sample]:
            tasks = [asyncio.ensure_future(self.engine.generate(each)) for each in requests]
            if meanwhile is not None:
                while not when():
                    assert not all(task.done() for task in tasks), "everything was generated before"
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(meanwhile)
            return list(await asyncio.gather(*tasks))

        return asyncio.run(gather())

    def expect_log_probs(self, sample: Sample, model: int, temperature: float = 1.0) -> None:
        """The sample's log-probs must be the model's."""
        expected = log_probs(self.models[model], sample, temperature)
        assert len(sample.response_ids) > 0
        torch.testing.assert_close(sample.rollout_log_probs, expected, atol=TOLERANCE, rtol=0)

    def close(self) -> None:
        self.engine.close()


@torch.no_grad()
def log_probs(model: PreTrainedModel, sample: Sample, temperature: float = 1.0) -> Tensor:
    """float32 [R], of a sample's response by transformers."""
    ids = torch.cat([sample.prompt_ids, sample.response_ids])
    logits = model(ids[None]).logits[0, len(sample.prompt_ids) - 1 : -1] / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, sample.response_ids[:, None]).squeeze(1)
