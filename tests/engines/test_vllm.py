"""Rollouts from a real vLLM server on the CPU: tokens and log-probs, weights in three ways, faults."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from megatron_fipo.rl.trajectory import Trajectory
from megatron_fipo.rollout.engine import SamplingParams
from megatron_fipo.rollout.servers.api import Completion, LaunchSpec
from megatron_fipo.rollout.servers.http import ServerRefusedError
from megatron_fipo.rollout.servers.packers import Packers
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.sealed import seal
from megatron_fipo.rollout.servers.process import ServerProcess
from megatron_fipo.rollout.servers.proof import CanaryError
from megatron_fipo.rollout.servers.sync import WeightSync
from megatron_fipo.rollout.servers.transfers import Method, make_transfer
from megatron_fipo.rollout.servers.vllm.launch import VllmAdapter
from megatron_fipo.rollout.servers.weight_buckets import Bucket, TensorSpec
from tests.engines.attaching import expect_two_nodes_to_share
from tests.engines.caching import expect_nothing_older_is_reused
from tests.engines.guarding import FROM_A_PAGE, JSON, WITH_KEY, ask, expect_key_nowhere, expect_strangers_refused
from tests.engines.serving import (
    CONTEXT_TOKENS,
    GROUP_SIZE,
    KEY,
    PROMPT_TOKENS,
    SIZES,
    TIMEOUT_S,
    TOLERANCE,
    Serving,
    launch_spec,
    request,
    scores,
)
from tests.models import save_random_model

pytestmark = pytest.mark.vllm

MANY_TOKENS = 4000
"""Seconds of decoding: what a test does to running requests happens before all have ended, on a busy machine too."""


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving("vllm", tmp_path_factory.mktemp("vllm"))
    yield serving
    serving.close()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Over two tensor-parallel ranks, in bfloat16, with one key-value head for both and a tied output layer."""
    serving = Serving(
        "vllm",
        tmp_path_factory.mktemp("vllm-tp2"),
        family="qwen3",
        tp=2,
        dtype=torch.bfloat16,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
    )
    yield serving
    serving.close()


def test_log_probs_are_those_of_the_model(serving: Serving) -> None:
    serving.hold(0, version=1)
    temperatures = [1.0, 0.7, 0.0] * 4
    samples = serving.generate(*(request(i, temperature=t) for i, t in enumerate(temperatures)))
    for sample, temperature in zip(samples, temperatures, strict=True):
        assert sample.finish_reason in ("stop", "length")
        serving.expect_log_probs(sample, 0, temperature or 1.0)
        assert sample.policy_versions == [(1, 0, len(sample.response_ids))]
    assert serving.difference(samples[0], 1).max() > 100 * TOLERANCE, "the comparison tells models apart"
    assert serving.difference(samples[1], 0, 1.0).max() > 100 * TOLERANCE, "and temperatures"


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
    requests = [replace(request(i, 2), prompt_ids=prompt) for i, prompt in enumerate(prompts)]
    for sample in serving.generate(*requests):
        serving.expect_log_probs(sample, 0)


def test_nucleus_sampling_gives_no_log_probs_that_mean_something_else(serving: Serving) -> None:
    sample = serving.generate(request(0, top_p=0.3))[0]
    assert len(sample.response_ids) > 1
    assert sample.rollout_log_probs.isnan().all()


def test_scores_are_the_models_log_probs(serving: Serving) -> None:
    sequences = [[5, 900, 17, 4, 4, 4, 33], [7, 8]] * 3
    found = serving.loop.run(serving.client.score(sequences, TIMEOUT_S))
    for sequence, score in zip(sequences, found, strict=True):
        assert score == pytest.approx(scores(serving.models[0], sequence).tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("method", ["tensor", "distributed", "disk"])
def test_weights_arrive(serving: Serving, method: Method) -> None:
    sync = serving.sync(method)
    for version, model in ((21, 1), (22, 0), (23, 1)):
        report = sync.run(serving.weights(model), str(version))
        assert report.num_buckets > 4
        sample = serving.generate(request(4))[0]
        assert sample.policy_versions == [(version, 0, len(sample.response_ids))]
        serving.expect_log_probs(sample, model)
        assert serving.difference(sample, 1 - model).max() > 100 * TOLERANCE
    sync.close()


def test_no_key_or_value_of_older_weights_is_reused(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_nothing_older_is_reused(serving, 60, monkeypatch)


@pytest.mark.parametrize("in_place", [False, True])
def test_an_update_in_mid_response_shows_in_its_spans(
    serving: Serving, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, what the new weights write on the old keys and values is not what the actor would."""
    serving.hold(0, version=31)
    client = serving.client
    monkeypatch.setattr(client, "_spec", replace(client._spec, keeps_in_flight=in_place))

    async def update_meanwhile() -> None:
        await client.pause()
        await client.begin_update()
        await client.load_bucket(bucket_of(serving.weights(1)), TIMEOUT_S)
        await client.end_update("32")
        await client.resume()

    async def both() -> list[Trajectory]:
        tasks = [asyncio.ensure_future(serving.engine.generate(request(i, MANY_TOKENS))) for i in range(4)]
        await wait_until_running(serving, 1, tasks)
        await serving.loop.run_here(update_meanwhile())
        return list(await asyncio.gather(*tasks))

    samples = asyncio.run(both())
    crossing = [sample for sample in samples if len(sample.policy_versions) == 2]
    assert crossing
    for sample in crossing:
        (old, start, change), (new, again, stop) = sample.policy_versions
        assert (old, new, start, again, stop) == (31, 32, 0, change, len(sample.response_ids))
        assert serving.difference(sample, 0)[:change].max() < TOLERANCE
        newer = serving.difference(sample, 1)[change:].max()
        assert newer > 10 * TOLERANCE if in_place else newer < TOLERANCE
    later = serving.generate(request(1, 50))
    assert serving.difference(later[0], 1).max() < TOLERANCE, "a prompt that was in the cache, by the old weights"


def test_cancelled_and_aborted_requests_give_what_they_have(serving: Serving) -> None:
    client = serving.client

    async def run() -> list[Completion]:
        cancelled, aborted = (
            asyncio.ensure_future(client.generate(request(i, MANY_TOKENS), f"long{i}", [], TIMEOUT_S)) for i in range(2)
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
        assert 0 < len(completion.token_ids) == len(completion.log_probs) < MANY_TOKENS
        assert [span[1:] for span in completion.version_spans] == [(0, len(completion.token_ids))]
    serving.loop.run(client.cancel("never heard of"))


@pytest.mark.parametrize(
    ("sampling", "error", "words"),
    [
        ({"temperature": 5.0}, ServerRefusedError, r"temperature must be in \[0, 2\], got 5"),
        ({"temperature": 0.001}, ValueError, "temperature of 0 or at least 0.01"),
        (
            {"max_tokens": 5000},
            ServerRefusedError,
            f"{CONTEXT_TOKENS - PROMPT_TOKENS} of up to 5000 tokens after {PROMPT_TOKENS}: its context is full",
        ),
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
    serving.expect_log_probs(sample, 1)


@pytest.mark.parametrize("method", ["tensor", "distributed", "disk"])
def test_weights_arrive_over_two_ranks(sharded: Serving, method: Method) -> None:
    sync = sharded.sync(method)
    for version, model in ((1, 1), (2, 0)):
        sync.run(sharded.weights(model), str(version))  # compares every checksum
        sample = sharded.generate(request(0))[0]
        assert sample.policy_versions == [(version, 0, len(sample.response_ids))]
        assert sharded.difference(sample, model).mean() < 0.05 < sharded.difference(sample, 1 - model).mean()
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
        make_transfer("tensor", TIMEOUT_S),
        Packers(10**9, sharded.dtype, None),  # all in one bucket
        TIMEOUT_S,
        None,
    )
    with monkeypatch.context() as patch:
        patch.setattr(client, "load_bucket", spoil)
        with pytest.raises(CanaryError, match=r"down_proj" if fault == "swap" else r"layers\.1\.self_attn\.qkv_proj"):
            sync.run(sharded.weights(1), "5")
    sync.run(sharded.weights(1), "6")


CALL: dict[str, Any] = {"method": "fipo_checksums", "args": []}


def test_strangers_and_web_pages_are_refused(serving: Serving) -> None:
    url = serving.client.url
    posts = [
        "/collective_rpc",
        "/pause",
        "/sleep",
        "/abort_requests",
        "/inference/v1/generate",
        "/update_weight_version",
    ]
    expect_strangers_refused(url, ["/v1/models", "/metrics", "/weight_info", "/openapi.json"], posts)
    for arguments in ([], seal(KEY[:-1], "fipo_checksums", []), seal(KEY, "fipo_end_update", [])):
        status, answer = ask(url, "/collective_rpc", CALL | {"args": arguments}, JSON | WITH_KEY)
        assert status == 200
        assert "PermissionError: fipo_checksums was called without this server's key" in answer, "the worker asks too"
        assert KEY not in answer
    log = serving.pool.servers[0].log
    assert log is not None
    expect_key_nowhere(serving, log.parents[1])
    assert serving.loop.run(serving.client.checksums(TIMEOUT_S)), "and the trainer goes on"


def test_without_the_guard_strangers_and_web_pages_get_through_to_all_but_the_weights(tmp_path: Path) -> None:
    """What the guard is for; the worker refuses unsealed calls by itself."""
    spec = launch_spec("vllm", save_random_model(tmp_path / "model", **SIZES))
    plan = VllmAdapter().launch_plan(spec)
    place = plan.command.index("--middleware")
    process = ServerProcess(replace(plan, command=plan.command[:place] + plan.command[place + 2 :]), tmp_path / "log")
    url = f"http://{spec.host}:{spec.port}"
    deadline = time.monotonic() + 300
    while True:
        assert process.exit_status is None, process.log_tail()
        assert time.monotonic() < deadline, process.log_tail()
        try:
            if ask(url, "/health")[0] == 200:
                break
        except OSError:
            time.sleep(0.25)
    try:
        assert ask(url, "/pause", {}, FROM_A_PAGE)[0] == 200
        status, answer = ask(url, "/collective_rpc", CALL, FROM_A_PAGE)
        assert (status, "PermissionError: fipo_checksums" in answer) == (200, True)
    finally:
        process.kill()


def test_a_trainer_elsewhere_attaches_and_leaves_the_server_running(serving: Serving, tmp_path: Path) -> None:
    expect_two_nodes_to_share("vllm", serving, tmp_path)


@pytest.mark.parametrize("victim", ["server", pytest.param("worker", marks=pytest.mark.long)])
def test_a_killed_server_comes_back_with_its_weights_and_no_response_is_lost(serving: Serving, victim: str) -> None:
    serving.hold(1, version=51)
    requests = [request(i, MANY_TOKENS) for i in range(8)]

    async def kill_meanwhile() -> list[Trajectory]:
        tasks = [asyncio.ensure_future(serving.engine.generate(one)) for one in requests]
        await wait_until_running(serving, 1, tasks)
        process = serving.pool.servers[0].process
        assert process is not None
        assert process.pid is not None
        os.kill(process.pid if victim == "server" else worker_of(process.pid), signal.SIGKILL)
        return list(await asyncio.gather(*tasks))

    restarts = serving.pool.num_restarts
    samples = asyncio.run(kill_meanwhile())
    assert serving.pool.num_restarts == restarts + 1
    assert [(sample.prompt_id, sample.sample_index) for sample in samples] == [divmod(i, GROUP_SIZE) for i in range(8)]
    for sample in samples:
        assert sample.policy_versions == [(51, 0, len(sample.response_ids))]
        serving.expect_log_probs(sample, 1)


def test_a_wrong_model_is_told_in_the_servers_words(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"], "model_type": "qwen2"}')
    words = words_of_death(replace(launch_spec("vllm", folder), max_total_tokens=None), tmp_path)
    assert "Model architectures ['NoSuchForCausalLM'] are not supported" in words


def test_a_taken_port_is_told_in_the_servers_words(tmp_path: Path) -> None:
    spec = launch_spec("vllm", save_random_model(tmp_path / "model", **SIZES))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = words_of_death(replace(spec, port=taken.getsockname()[1]), tmp_path)
    assert words == "OSError: [Errno 98] Address already in use"


def test_too_little_memory_is_told_in_the_servers_words(tmp_path: Path) -> None:
    spec = launch_spec("vllm", save_random_model(tmp_path / "model", **SIZES))
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
    """Return once the server decodes so many of these requests at a time, or more.

    The server answers between two of its steps: ask it for requests so long that some still run when the answer comes.
    """
    connection = serving.client._connection  # type: ignore[attr-defined]
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            text = await serving.loop.run_here(connection.get("/metrics", timeout_s=TIMEOUT_S))
            running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
            if running and float(running[0].rpartition(" ")[2]) >= number:
                return
            num_ended = len([request.result() for request in requests if request.done()])
            assert num_ended <= len(requests) - number, f"{num_ended} of {len(requests)} requests have ended before"
            await asyncio.sleep(0.1)  # a server asked without a pause has no time for its requests


def bucket_of(tensors: list[tuple[str, Tensor]]) -> Bucket:
    flat, specs, start = [], [], 0
    for name, tensor in tensors:
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape), start, start + len(raw)))
        flat.append(raw)
        start += len(raw)
    return Bucket(torch.cat(flat), tuple(specs))
