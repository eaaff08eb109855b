"""Rollouts from a real vLLM server on the CPU: tokens and log-probs, weights in three ways, faults."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_fipo.rl.types import Sample
from megatron_fipo.rollout.canary import CanaryError
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams
from megatron_fipo.rollout.event_loop import EventLoopThread
from megatron_fipo.rollout.server_api import Bucket, Completion, InferenceServer, LaunchSpec, TensorSpec
from megatron_fipo.rollout.server_engine import ServerEngine
from megatron_fipo.rollout.server_http import ServerRefusedError
from megatron_fipo.rollout.server_process import ServerProcess, free_port
from megatron_fipo.rollout.servers import ServerPool, WatchSettings
from megatron_fipo.rollout.vllm import VllmAdapter
from megatron_fipo.rollout.weight_buckets import SnapshotWriter
from megatron_fipo.rollout.weight_sync import WeightSync
from tests.engines.environments import server_python
from tests.models import load, save_random_model

pytestmark = pytest.mark.vllm

VOCABULARY = 1000
"""No multiple of 64: the server pads it."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
}
STOP = 1
TOLERANCE = 1e-4
TIMEOUT_S = 120.0


def launch_spec(model: Path, tp: int = 1, dtype: torch.dtype = torch.float32) -> LaunchSpec:
    return LaunchSpec(
        python=str(server_python("vllm")),
        model_path=model,
        host="127.0.0.1",
        port=free_port(),
        dtype=str(dtype).removeprefix("torch."),
        weight_version="0",
        tp=tp,
        cpu_cores=tuple((rank % (os.cpu_count() or 1),) for rank in range(tp)),
        max_total_tokens=16384,
        max_running_requests=64,
        context_tokens=4096,
    )


class Serving:
    """One server in a pool of its own, with the models that it may hold."""

    def __init__(self, folder: Path, family: str, tp: int, dtype: torch.dtype, **changes: object) -> None:
        self.dtype = dtype
        self.folders = [
            save_random_model(folder / f"model{seed}", family, seed, **(SIZES | changes)) for seed in (0, 1)
        ]
        self.models = [load(path).to(dtype) for path in self.folders]
        self.spec = launch_spec(self.folders[0], tp, dtype)
        self.loop = EventLoopThread()
        settings = WatchSettings(start_timeout_s=300.0, health_timeout_s=20.0)
        self.pool = ServerPool(VllmAdapter(), [self.spec], log_folder=folder / "logs", settings=settings)
        self.snapshots = SnapshotWriter(folder / "snapshots", self.folders[0])
        self.engine = ServerEngine(
            self.pool,
            self.loop,
            self.sync("tensor"),
            agree=lambda problem: [problem],
            share=(0, 1),
            stop_token_ids=[STOP],
            vocab_size=VOCABULARY,
            max_concurrent_requests=64,
            request_timeout_s=TIMEOUT_S,
            canary_tolerance=TOLERANCE,
        )
        self.engine.start()

    def sync(self, method: str) -> WeightSync:
        """A way to bring weights into the pool, in buckets so small that layers lie across their ends."""
        assert method in ("tensor", "distributed", "disk")
        return WeightSync(
            self.pool,
            self.loop,
            method=method,  # type: ignore[arg-type]
            bucket_bytes=100_000,
            dtype=self.dtype,
            device=torch.device("cpu"),
            timeout_s=TIMEOUT_S,
            snapshots=self.snapshots,
        )

    @property
    def client(self) -> InferenceServer:
        return self.pool.servers[0].client

    def weights(self, model: int) -> list[tuple[str, Tensor]]:
        """What the actor would send: tied output weights are not sent."""
        tied = self.models[model].config.tie_word_embeddings
        state = self.models[model].state_dict()
        return [(name, tensor) for name, tensor in state.items() if not (tied and name == "lm_head.weight")]

    def hold(self, model: int, version: int) -> None:
        """Give the server the weights of a model."""
        self.engine.update_weights(self.weights(model), version)

    def generate(self, *requests: GenerationRequest) -> list[Sample]:
        async def gather() -> list[Sample]:
            return list(await asyncio.gather(*(self.engine.generate(request) for request in requests)))

        return asyncio.run(gather())

    def close(self) -> None:
        self.engine.close()


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("vllm"), "qwen2", tp=1, dtype=torch.float32)
    yield serving
    serving.close()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Over two tensor-parallel ranks, in bfloat16, with one key-value head for both and a tied output layer."""
    serving = Serving(
        tmp_path_factory.mktemp("vllm-tp2"),
        "qwen3",
        tp=2,
        dtype=torch.bfloat16,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
    )
    yield serving
    serving.close()


def request(index: int, max_tokens: int = 24, prefix: tuple[int, ...] = (), **sampling: float) -> GenerationRequest:
    return GenerationRequest(
        sample_id=f"sample{index}",
        group_id=index // 2,
        sample_index=index % 2,
        prompt_ids=tuple(5 + (index // 2 * 7 + position * 3) % 900 for position in range(8)),
        sampling=SamplingParams(max_tokens, **sampling),
        seed=1000 + index,
        prefix=prefix,
    )


def reference(model: PreTrainedModel, sample: Sample, temperature: float = 1.0) -> Tensor:
    """transformers' log-probs of a sample's response."""
    tokens = torch.cat([sample.prompt_ids, sample.response_ids])
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].float()
    log_probs = torch.log_softmax(logits[len(sample.prompt_ids) - 1 : -1] / temperature, dim=-1)
    return log_probs.gather(1, sample.response_ids[:, None])[:, 0]


def difference(serving: Serving, model: int, sample: Sample, temperature: float = 1.0) -> float:
    expected = reference(serving.models[model], sample, temperature)
    return float((expected - sample.rollout_log_probs).abs().max())


def test_log_probs_are_those_of_the_model(serving: Serving) -> None:
    serving.hold(0, version=1)
    temperatures = [1.0, 0.7, 0.0] * 4
    samples = serving.generate(*(request(i, temperature=t) for i, t in enumerate(temperatures)))
    for sample, temperature in zip(samples, temperatures, strict=True):
        assert sample.finish_reason in ("stop", "length")
        assert difference(serving, 0, sample, temperature or 1.0) < TOLERANCE
        assert sample.policy_versions == [(1, 0, len(sample.response_ids))]
    assert difference(serving, 1, samples[0]) > 100 * TOLERANCE, "the comparison tells models apart"
    assert difference(serving, 0, samples[1], 1.0) > 100 * TOLERANCE, "and temperatures"


def test_a_seed_makes_a_response_whatever_else_runs(serving: Serving) -> None:
    alone = serving.generate(request(3))[0].response_ids
    among_others = serving.generate(*(request(i) for i in range(8)))[3].response_ids
    assert alone.tolist() == among_others.tolist()
    other_seed = serving.generate(replace(request(3), seed=4))[0].response_ids
    assert alone.tolist() != other_seed.tolist()


def test_a_stop_token_ends_the_response_and_stays_in_it(serving: Serving) -> None:
    whole = serving.generate(request(0, temperature=0.0))[0].response_ids.tolist()
    stop = whole[5]
    completion = serving.loop.run(
        serving.client.generate(request(0, temperature=0.0), "stop", [stop], timeout_s=TIMEOUT_S)
    )
    assert completion.finish_reason == "stop"
    assert completion.token_ids == whole[: whole.index(stop) + 1]


def test_a_prefix_is_continued(serving: Serving) -> None:
    whole = serving.generate(request(0, temperature=0.0))[0]
    prefix = tuple(whole.response_ids[:10].tolist())
    rest = serving.generate(request(0, prefix=prefix, temperature=0.0))[0]
    assert rest.response_ids.tolist() == whole.response_ids[10:].tolist()
    assert torch.allclose(rest.rollout_log_probs, whole.rollout_log_probs[10:], atol=TOLERANCE)


def test_more_prompt_tokens_than_one_forward_pass_takes(serving: Serving) -> None:
    """Prompts that do not fit into a pass wait for the next; a worker on the CPU dies of one that is cut in two."""
    prompts = [tuple(5 + (index + position) % 900 for position in range(1000)) for index in range(24)]
    requests = [replace(request(i, max_tokens=2), prompt_ids=prompt) for i, prompt in enumerate(prompts)]
    for sample in serving.generate(*requests):
        assert difference(serving, 0, sample) < TOLERANCE


def test_nucleus_sampling_gives_no_log_probs_that_mean_something_else(serving: Serving) -> None:
    sample = serving.generate(request(0, top_p=0.3))[0]
    assert len(sample.response_ids) > 1
    assert sample.rollout_log_probs.isnan().all()


def test_scores_are_the_models_log_probs(serving: Serving) -> None:
    sequences = [[5, 900, 17, 4, 4, 4, 33], [7, 8]] * 3
    scores = serving.loop.run(serving.client.score(sequences, TIMEOUT_S))
    for sequence, score in zip(sequences, scores, strict=True):
        with torch.no_grad():
            log_probs = torch.log_softmax(serving.models[0](torch.tensor([sequence])).logits[0].float(), dim=-1)
        expected = [log_probs[i, token].item() for i, token in enumerate(sequence[1:])]
        assert score == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("method", ["tensor", "distributed", "disk"])
def test_weights_arrive(serving: Serving, method: str) -> None:
    sync = serving.sync(method)
    for version, model in ((21, 1), (22, 0), (23, 1)):
        report = sync.run(serving.weights(model), str(version))
        assert report.num_buckets > 4
        sample = serving.generate(request(4))[0]
        assert sample.policy_versions == [(version, 0, len(sample.response_ids))]
        assert difference(serving, model, sample) < TOLERANCE
        assert difference(serving, 1 - model, sample) > 100 * TOLERANCE
    sync.close()


def test_an_update_in_mid_response_shows_in_its_spans(serving: Serving) -> None:
    serving.hold(0, version=31)
    client = serving.client

    async def update_meanwhile() -> None:
        await client.pause()
        await client.begin_update()
        await client.load_bucket(bucket_of(serving.weights(1)), TIMEOUT_S)
        await client.end_update("32")
        await client.resume()

    async def both() -> list[Sample]:
        tasks = [asyncio.ensure_future(serving.engine.generate(request(i, max_tokens=800))) for i in range(4)]
        await wait_until_running(serving, 2, tasks)
        await serving.loop.run_here(update_meanwhile())
        return list(await asyncio.gather(*tasks))

    samples = asyncio.run(both())
    crossing = [sample for sample in samples if len(sample.policy_versions) == 2]
    assert crossing
    for sample in crossing:
        (old, start, change), (new, again, stop) = sample.policy_versions
        assert (old, new, start, again, stop) == (31, 32, 0, change, len(sample.response_ids))
        for model, span in ((0, slice(0, change)), (1, slice(change, stop))):
            expected = reference(serving.models[model], sample)[span]
            assert torch.allclose(expected, sample.rollout_log_probs[span], atol=TOLERANCE)


def test_cancelled_and_aborted_requests_give_what_they_have(serving: Serving) -> None:
    client = serving.client

    async def run() -> list[Completion]:
        cancelled, aborted = (
            asyncio.ensure_future(client.generate(request(i, max_tokens=4000), f"long{i}", [], TIMEOUT_S))
            for i in range(2)
        )
        await wait_until_running(serving, 2, [cancelled, aborted])
        await client.cancel("long0")
        await cancelled
        assert not aborted.done()
        await client.abort_all()
        return [await cancelled, await aborted]

    completions = serving.loop.run(run())
    for completion in completions:
        assert completion.finish_reason == "abort"
        assert 0 < len(completion.token_ids) == len(completion.log_probs) < 4000
        assert [span[1:] for span in completion.version_spans] == [(0, len(completion.token_ids))]
    serving.loop.run(client.cancel("never heard of"))


@pytest.mark.parametrize(
    ("sampling", "error", "words"),
    [
        ({"temperature": 5.0}, ServerRefusedError, r"temperature must be in \[0, 2\], got 5"),
        ({"temperature": 0.001}, ValueError, "temperature of 0 or at least 0.01"),
        ({"max_tokens": 5000}, ServerRefusedError, r"4088 of up to 5000 tokens after 8: its context is full"),
    ],
)
def test_what_the_server_would_change_or_reject_is_an_error(
    serving: Serving, sampling: dict[str, float], error: type[Exception], words: str
) -> None:
    one = replace(request(0), sampling=SamplingParams(**({"max_tokens": 8} | sampling)))  # type: ignore[arg-type]
    with pytest.raises(error, match=words):
        serving.loop.run(serving.client.generate(one, "rejected", [], TIMEOUT_S))


def test_an_incomplete_update_is_refused_and_a_whole_one_repairs_it(serving: Serving) -> None:
    client, run = serving.client, serving.loop.run
    with pytest.raises(ServerRefusedError, match="fipo_end_update: RuntimeError: no update is open"):
        run(client.end_update("41"))
    run(client.begin_update())
    assert run(client.info()).weight_version == "updating"
    run(client.load_bucket(bucket_of(serving.weights(0)[:4]), TIMEOUT_S))
    with pytest.raises(ServerRefusedError, match=r"the update lacks lm_head\.weight, .* and \d+ more"):
        run(client.end_update("41"))
    with pytest.raises(ServerRefusedError, match=r"ValueError: .*/nowhere holds no \*\.safetensors"):
        run(client.load_folder(Path("/nowhere"), TIMEOUT_S))
    with pytest.raises(ServerRefusedError, match="not in the group 'absent'"):
        run(client.receive_bucket(bucket_of(serving.weights(0)).specs, "absent", TIMEOUT_S))
    serving.hold(1, version=42)
    sample = serving.generate(request(0))[0]
    assert sample.policy_versions == [(42, 0, len(sample.response_ids))]
    assert difference(serving, 1, sample) < TOLERANCE


@pytest.mark.parametrize("method", ["tensor", "distributed", "disk"])
def test_weights_arrive_over_two_ranks(sharded: Serving, method: str) -> None:
    sync = sharded.sync(method)
    for version, model in ((1, 1), (2, 0)):
        sync.run(sharded.weights(model), str(version))  # compares every checksum
        sample = sharded.generate(request(0))[0]
        assert sample.policy_versions == [(version, 0, len(sample.response_ids))]
        mean = (reference(sharded.models[model], sample) - sample.rollout_log_probs).abs().mean()
        other = (reference(sharded.models[1 - model], sample) - sample.rollout_log_probs).abs().mean()
        assert mean < 0.05 < other
    sync.close()


@pytest.mark.parametrize("fault", ["corrupt", "swap", "skip", "shift"])
def test_checksums_catch_what_goes_wrong_on_the_way(
    sharded: Serving, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = sharded.client
    send = client.load_bucket

    async def spoil(bucket: Bucket, timeout_s: float) -> None:
        tensors = {name: tensor.clone() for name, tensor in bucket.tensors()}
        victim = "model.layers.1.self_attn.k_proj.weight"
        if fault == "corrupt":
            tensors[victim].view(torch.int16).view(-1)[-1] ^= 1  # the last bit of one number's mantissa
        elif fault == "swap":
            layers = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
            tensors[layers[0]], tensors[layers[1]] = tensors[layers[1]], tensors[layers[0]]
        elif fault == "skip":
            del tensors[victim]
        else:
            tensors[victim] = tensors[victim].roll(1, dims=0)
        await send(bucket_of(list(tensors.items())), timeout_s)

    sync = WeightSync(
        sharded.pool,
        sharded.loop,
        method="tensor",
        bucket_bytes=10**9,  # all in one
        dtype=sharded.dtype,
        device=None,
        timeout_s=TIMEOUT_S,
        snapshots=None,
    )
    with monkeypatch.context() as patch:
        patch.setattr(client, "load_bucket", spoil)
        with pytest.raises(CanaryError, match=r"down_proj" if fault == "swap" else r"layers\.1\.self_attn\.qkv_proj"):
            sync.run(sharded.weights(1), "5")
    sync.run(sharded.weights(1), "6")


@pytest.mark.parametrize("victim", ["server", "worker"])
def test_a_killed_server_comes_back_with_its_weights_and_no_response_is_lost(serving: Serving, victim: str) -> None:
    serving.hold(1, version=51)
    requests = [request(i, max_tokens=400) for i in range(16)]

    async def kill_meanwhile() -> list[Sample]:
        tasks = [asyncio.ensure_future(serving.engine.generate(one)) for one in requests]
        await wait_until_running(serving, 4, tasks)
        process = serving.pool.servers[0].process
        assert process is not None
        assert process.pid is not None
        os.kill(process.pid if victim == "server" else worker_of(process.pid), signal.SIGKILL)
        return list(await asyncio.gather(*tasks))

    restarts = serving.pool.num_restarts
    samples = asyncio.run(kill_meanwhile())
    assert serving.pool.num_restarts == restarts + 1
    assert [(sample.prompt_id, sample.sample_index) for sample in samples] == [(i // 2, i % 2) for i in range(16)]
    for sample in samples:
        assert sample.policy_versions == [(51, 0, len(sample.response_ids))]
        assert difference(serving, 1, sample) < TOLERANCE


def test_a_wrong_model_is_told_in_the_servers_words(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"], "model_type": "qwen2"}')
    words = words_of_death(replace(launch_spec(folder), max_total_tokens=None), tmp_path)
    assert "Model architectures ['NoSuchForCausalLM'] are not supported" in words


def test_a_taken_port_is_told_in_the_servers_words(tmp_path: Path) -> None:
    spec = launch_spec(save_random_model(tmp_path / "model", "qwen2", **SIZES))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = words_of_death(replace(spec, port=taken.getsockname()[1]), tmp_path)
    assert words == "OSError: [Errno 98] Address already in use"


def test_too_little_memory_is_told_in_the_servers_words(tmp_path: Path) -> None:
    spec = launch_spec(save_random_model(tmp_path / "model", "qwen2", **SIZES))
    words = words_of_death(replace(spec, max_total_tokens=10**12), tmp_path)
    assert words.startswith("ValueError: Available memory on node 0")
    assert "Decrease --kv-cache-memory-bytes" in words


def words_of_death(spec: LaunchSpec, folder: Path) -> str:
    """Start a server that cannot come up, wait for its end, and return what the adapter finds in its log."""
    adapter = VllmAdapter()
    process = ServerProcess(adapter.launch_plan(spec), folder / "server.log")
    process.wait()
    assert process.exit_status != 0
    return adapter.reason_of_exit(process.log_tail())


def worker_of(pid: int) -> int:
    """The process that computes, below a server's."""
    (worker,) = (
        child for child in psutil.Process(pid).children(recursive=True) if "Worker" in "".join(child.cmdline())
    )
    return worker.pid


async def wait_until_running(serving: Serving, number: int, requests: Sequence[asyncio.Future[Any]]) -> None:
    """Return once the server decodes so many of these requests at a time."""
    connection = serving.client._connection  # type: ignore[attr-defined]
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            text = await serving.loop.run_here(connection.get("/metrics", timeout_s=TIMEOUT_S))
            running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
            if running and float(running[0].rpartition(" ")[2]) >= number:
                return
            ended = [request.result() for request in requests if request.done()]
            assert not ended, f"{ended} ended before {number} ran at the same time"
            await asyncio.sleep(0.02)  # a server asked without a pause has no time for its requests


def bucket_of(tensors: list[tuple[str, Tensor]]) -> Bucket:
    flat, specs, start = [], [], 0
    for name, tensor in tensors:
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape), start, start + len(raw)))
        flat.append(raw)
        start += len(raw)
    return Bucket(torch.cat(flat), tuple(specs))
