"""Rollouts from a real SGLang server on the CPU, over two tensor-parallel ranks: tokens, log-probs, weights, canary."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.rollout.engine import Turn
from megatron_fipo.rollout.servers.api import Completion
from megatron_fipo.rollout.servers.cuda_handles import CudaHandle
from megatron_fipo.rollout.servers.http import ServerError, ServerRefusedError
from megatron_fipo.rollout.servers.proof import canary_sequences
from megatron_fipo.rollout.servers.server import State
from megatron_fipo.rollout.servers.sglang.checksums import gpu_hash
from megatron_fipo.rollout.servers.sglang.client import SglangServer, _serialize
from megatron_fipo.rollout.servers.sglang.launch import LAUNCHERS
from megatron_fipo.rollout.servers.transfers import Method
from megatron_fipo.rollout.servers.weight_buckets import Bucket, TensorSpec, pack
from tests.engines.attaching import expect_two_nodes_to_share
from tests.engines.environments import server_python
from tests.engines.serving import CONTEXT_TOKENS, STOP, TOLERANCE, VOCABULARY, Serving, request, scores

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving("sglang", tmp_path_factory.mktemp("sglang"), tp=2)
    yield serving
    serving.close()


def test_the_gpu_hash_is_sglangs_own() -> None:
    """On GPUs its checksums are another hash, written anew here; SGLang's kernel runs under Triton's interpreter."""
    sizes = [1, 5, 32768, 98311]
    command = [str(server_python("sglang")), str(Path(__file__).with_name("triton_hash.py")), *map(str, sizes)]
    theirs = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True, timeout=300
    )
    ours = [
        gpu_hash(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)))
        for size in sizes
    ]
    assert theirs.stdout.split() == ours


@pytest.mark.parametrize(
    ("visible", "answer"),
    [
        (["GPU-5", "GPU-4"], "device 1 a torch.float32 [2, 2] 0 16"),
        (["GPU-4"], "device 0 a torch.float32 [2, 2] 0 16"),
        (["GPU-0", "GPU-1"], "Invalid device_uuid=GPU-4"),
    ],
)
def test_a_handle_opens_on_the_gpu_that_it_names(visible: list[str], answer: str) -> None:
    """By SGLang's own reading of what it is sent. A server that does not see the GPU dies of that error."""
    flat = torch.zeros(16, dtype=torch.uint8)
    # What torch says of a CUDA tensor, the device left out.
    arguments = (torch.Tensor, flat.shape, flat.stride(), 0, type(flat._typed_storage()), flat.dtype, None)
    arguments += (b"memory", 16, 0, False, b"counter", 0, b"event", True)
    spec = TensorSpec("a", torch.float32, (2, 2), 0, 16)
    bucket = Bucket(flat, (spec,), {"4": CudaHandle("GPU-4", arguments)})
    command = [
        str(server_python("sglang")),
        str(Path(__file__).with_name("cuda_payload.py")),
        LAUNCHERS["cpu"],
        *visible,
    ]
    payload = _serialize(bucket, bucket.handles["4"])
    theirs = subprocess.run(command, input=payload, capture_output=True, text=True, check=True, timeout=300)
    assert theirs.stdout.strip().splitlines()[-1] == answer


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_model(serving: Serving, temperature: float) -> None:
    serving.hold(model=1, version=5)
    samples = serving.generate(*(request(index, 40, temperature=temperature) for index in range(8)))
    for index, sample in enumerate(samples):
        assert (sample.prompt_id, sample.sample_index) == divmod(index, 4)
        assert sample.prompt_ids.tolist() == list(request(index, 40).prompt_ids)
        assert sample.policy_versions == [(5, 0, len(sample.response_ids))]
        serving.expect_log_probs(sample, model=1, temperature=temperature)
    assert len({tuple(sample.response_ids.tolist()) for sample in samples}) == 8
    with pytest.raises(AssertionError):  # the other model's are not these
        serving.expect_log_probs(samples[0], model=0, temperature=temperature)


def test_log_probs_under_a_nucleus_are_of_the_whole_distribution(serving: Serving) -> None:
    serving.hold(model=0, version=6)
    (sample,) = serving.generate(request(0, 40, top_p=0.5))
    serving.expect_log_probs(sample, model=0)


def test_a_stop_token_ends_the_response_and_stays_in_it(serving: Serving) -> None:
    samples = serving.generate(*(request(index, 600) for index in range(32)))
    stopped = [sample for sample in samples if sample.finish_reason == "stop"]
    assert stopped, "32 x 600 tokens over a vocabulary of 1,000 hold the stop token"
    for sample in samples:
        has_stop = STOP in sample.response_ids.tolist()
        assert has_stop == (sample.finish_reason == "stop")
        assert not has_stop or sample.response_ids.tolist().index(STOP) == len(sample.response_ids) - 1
        assert sample.finish_reason == "stop" or len(sample.response_ids) == 600


def test_a_prefix_is_continued(serving: Serving) -> None:
    """Greedy, so that whole and continued must agree."""
    serving.hold(model=0, version=7)
    (whole,) = serving.generate(request(0, 24, temperature=0.0))
    prefix = tuple(whole.response_ids[:10].tolist())
    (rest,) = serving.generate(request(0, 24, prefix=prefix, temperature=0.0))
    assert rest.response_ids.tolist() == whole.response_ids[10:].tolist()
    assert rest.policy_versions == [(7, 10, 24)]
    torch.testing.assert_close(rest.rollout_log_probs, whole.rollout_log_probs[10:], atol=1e-4, rtol=0)


def test_groups_share_their_prompts_cache(serving: Serving) -> None:
    serving.hold(model=0, version=8)  # empties the cache
    serving.engine.metrics()
    serving.generate(request(0, 2))
    serving.generate(*(request(index, 2) for index in (1, 2, 3)))
    share = serving.engine.metrics()["rollout/cached_prompt_share"]
    assert share.value() > 0.5  # three of four prompts, but for each one's last token


def test_scores_are_the_models_log_probs(serving: Serving) -> None:
    serving.hold(model=1, version=9)
    sequences = canary_sequences(VOCABULARY, 3, num_tokens=30)
    expected = [scores(serving.models[1], sequence).tolist() for sequence in sequences]
    serving.engine.check_log_probs(sequences, expected)
    serving.engine.check_log_probs(sequences, expected)  # once more, now that prompts are in the cache
    wrong = [scores(serving.models[0], sequence).tolist() for sequence in sequences]
    with pytest.raises(ServerError, match="other log-probs than the actor"):
        serving.engine.check_log_probs(sequences, wrong)
    with pytest.raises(RuntimeError, match=r"(?s)no server can generate.*other log-probs"):
        serving.generate(request(0, 4))
    serving.hold(model=1, version=10)
    serving.generate(request(0, 4))


def test_aborted_and_cancelled_requests(serving: Serving) -> None:
    serving.hold(model=0, version=11)
    serving.engine.stop_token_ids = frozenset()

    async def run() -> None:
        tasks = [asyncio.ensure_future(serving.engine.generate(request(index, 1500))) for index in range(4)]
        await _until_tokens_flow(serving)
        tasks[0].cancel()
        serving.engine.abort()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        for sample in results[1:]:
            assert not isinstance(sample, BaseException)
            assert sample.finish_reason == "abort"
            assert 0 < len(sample.response_ids) < 1500
            serving.expect_log_probs(sample, model=0)

    try:
        asyncio.run(run())
        (after,) = serving.generate(request(0, 4))  # the next call is not aborted
        assert after.finish_reason == "length"
    finally:
        serving.engine.stop_token_ids = frozenset({STOP})


def test_a_response_that_is_aborted_with_its_stop_token_is_whole(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server calls it aborted: nothing could go on from there."""
    serving.hold(model=0, version=12)
    stop = frozenset(range(0, VOCABULARY, 10))
    serving.engine.stop_token_ids = stop
    answers: list[Completion] = []
    generate = SglangServer.generate

    async def noted(self: SglangServer, *arguments: Any) -> Completion:
        answers.append(await generate(self, *arguments))
        return answers[-1]

    monkeypatch.setattr(SglangServer, "generate", noted)

    async def aborted_at_the_first_end() -> list[Turn]:
        tasks = [asyncio.ensure_future(serving.engine.generate(request(index, 1500))) for index in range(64)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        serving.engine.abort()
        return list(await asyncio.gather(*tasks))

    def is_whole(answer: Completion) -> bool:
        return answer.finish_reason == "abort" and len(answer.token_ids) > 0 and answer.token_ids[-1] in stop

    turns: list[Turn] = []
    try:
        while not any(map(is_whole, answers)):
            assert len(turns) < 20 * 64, "of ten responses in flight one ends as it is aborted"
            turns += asyncio.run(aborted_at_the_first_end())
    finally:
        serving.engine.stop_token_ids = frozenset({STOP})
    for turn in turns:
        ids = turn.response_ids.tolist()
        assert turn.finish_reason == ("stop" if ids and ids[-1] in stop else "abort")


async def _until_tokens_flow(serving: Serving) -> None:
    """Wait until the server reports that it decodes."""
    log = serving.pool.servers[0].log
    assert log is not None
    start = log.stat().st_size
    while b"Decode batch" not in log.read_bytes()[start:]:
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be at least 0"),
        ({"top_p": 0.0}, ValueError, "top_p must lie in"),
        ({"num_tokens": 0}, ValueError, "leaves nothing after a prefix of 0"),
        ({"seed": 2**63}, ServerRefusedError, "(?i)sampling_seed"),
        ({"num_tokens": CONTEXT_TOKENS}, ServerRefusedError, "(?i)context"),
    ],
)
def test_what_cannot_be_sampled_is_an_error(
    serving: Serving, changes: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        serving.generate(request(0, **({"num_tokens": 8} | changes)))  # type: ignore[arg-type]
    serving.generate(request(0, 4))  # the server still is there


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tensor", "distributed", "disk"])
def test_weights_arrive(serving: Serving, method: Method) -> None:
    serving.owned.sync = serving.sync(method)
    for model, version in ((1, 20), (0, 21)):
        serving.hold(model, version)
        (sample,) = serving.generate(request(0, 16))
        assert sample.policy_versions == [(version, 0, len(sample.response_ids))]
        serving.expect_log_probs(sample, model)
    metrics = serving.engine.metrics()
    assert metrics["weight_sync/gigabytes"].value() == pytest.approx(
        sum(tensor.numel() * 4 for _, tensor in serving.weights(0)) / 1e9
    )
    serving.owned.sync.close()
    serving.owned.sync = serving.sync("tensor")


def test_an_update_in_mid_response_shows_in_its_spans(serving: Serving) -> None:
    serving.hold(model=0, version=30)
    serving.engine.stop_token_ids = frozenset()

    async def run() -> None:
        task = asyncio.ensure_future(serving.engine.generate(request(0, 900)))
        await _until_tokens_flow(serving)
        await asyncio.to_thread(serving.hold, 1, 31)
        sample = await task
        (_, zero, first), (_, second, length) = sample.policy_versions
        assert [span[0] for span in sample.policy_versions] == [30, 31]
        assert (zero, second, length) == (0, first, 900)
        assert serving.difference(sample, 0)[:first].max() < TOLERANCE
        # The cache was computed anew, so that everything after the update is the new model's.
        assert serving.difference(sample, 1)[first + 1 :].max() < TOLERANCE

    try:
        asyncio.run(run())
    finally:
        serving.engine.stop_token_ids = frozenset({STOP})


def test_what_is_in_flight_may_go_on_with_its_old_keys_and_values(serving: Serving) -> None:
    """Then what the new weights write is not what the actor would; what is asked for later is."""
    serving.hold(model=0, version=32)
    serving.engine.stop_token_ids = frozenset()
    client, spec = serving.client, serving.client._spec

    async def run() -> tuple[Turn, Turn]:
        task = asyncio.ensure_future(serving.engine.generate(request(0, 900)))
        await _until_tokens_flow(serving)
        await asyncio.to_thread(serving.hold, 1, 33)
        sample = await task
        return sample, await serving.engine.generate(request(1, 50))

    client._spec = replace(spec, keeps_in_flight=True)
    try:
        sample, later = asyncio.run(run())
    finally:
        client._spec = spec
        serving.engine.stop_token_ids = frozenset({STOP})
    (_, _, first), (_, _, length) = sample.policy_versions
    assert [span[0] for span in sample.policy_versions] == [32, 33]
    assert length == 900
    assert serving.difference(sample, 0)[:first].max() < TOLERANCE
    assert serving.difference(sample, 1)[first + 1 :].max() > 10 * TOLERANCE
    assert serving.difference(later, 1).max() < TOLERANCE, "its prompt was in the cache, by the old weights"


def _corrupt(weights: list[tuple[str, Tensor]], name: str) -> list[tuple[str, Tensor]]:
    """One value of one tensor is off by its last bit."""
    changed = dict(weights)
    tensor = changed[name].clone()
    tensor.view(-1).view(torch.int32)[7] ^= 1
    changed[name] = tensor
    return list(changed.items())


def _swap(weights: list[tuple[str, Tensor]], first: str, second: str) -> list[tuple[str, Tensor]]:
    changed = dict(weights)
    changed[first], changed[second] = changed[second], changed[first]
    return list(changed.items())


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("corrupt", "1 tensors differ: model.layers.1.mlp.gate_up_proj.weight \\(rank 0\\)"),
        (
            "swap",
            "model.layers.0.input_layernorm.weight \\(rank 0\\), model.layers.0.input_layernorm.weight \\(rank 1\\)",
        ),
        ("skip", "model.layers.0.mlp.down_proj.weight \\(rank 0\\), model.layers.0.mlp.down_proj.weight \\(rank 1\\)"),
    ],
)
def test_checksums_catch_what_goes_wrong_on_the_way(
    serving: Serving, fault: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent differs from what the ledger saw; the server cannot tell, the canary must."""
    serving.hold(model=0, version=40)
    client = serving.client
    real = type(client).load_bucket
    layer = "model.layers."

    async def tampered(self: object, bucket: object, timeout_s: float) -> None:
        tensors = [(name, tensor.clone()) for name, tensor in bucket.tensors()]  # type: ignore[attr-defined]
        names = [name for name, _ in tensors]
        if fault == "corrupt" and f"{layer}1.mlp.up_proj.weight" in names:
            # Row 0 of up is rank 0's.
            tensors = _corrupt(tensors, f"{layer}1.mlp.up_proj.weight")
        if fault == "swap" and f"{layer}0.input_layernorm.weight" in names:
            tensors = _swap(tensors, f"{layer}0.input_layernorm.weight", f"{layer}0.post_attention_layernorm.weight")
        if fault == "skip":
            tensors = [(name, tensor) for name, tensor in tensors if name != f"{layer}0.mlp.down_proj.weight"]
        for changed in pack(tensors, 2**20, torch.float32, torch.device("cpu")):
            await real(self, changed, timeout_s)  # type: ignore[arg-type]

    monkeypatch.setattr(type(client), "load_bucket", tampered)
    with pytest.raises(ServerError, match=f"does not hold the weights that were sent to it: .*{named}"):
        serving.hold(model=1, version=41)
    assert serving.pool.servers[0].state is State.STALE
    with pytest.raises(RuntimeError, match="no server can generate"):
        serving.generate(request(0, 4))
    monkeypatch.undo()
    serving.hold(model=1, version=42)
    (sample,) = serving.generate(request(0, 16))
    serving.expect_log_probs(sample, model=1)


def test_a_stream_without_a_tensor_is_caught_and_drained(serving: Serving) -> None:
    drained = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in serving.weights(0):
            if name != "model.layers.1.mlp.gate_proj.weight":
                yield name, tensor
        drained.append(True)

    with pytest.raises(ServerError, match=r"weights lack gate_proj of model\.layers\.1\.mlp\.gate_up_proj\.weight"):
        serving.engine.update_weights(stream(), 50)
    assert drained
    serving.hold(model=0, version=51)


@pytest.mark.parametrize("method", ["tensor", "distributed", "disk"])
def test_an_update_that_breaks_off_stops_generation(serving: Serving, method: Method) -> None:
    """The actor's stream ends in an error half-way: neither old nor new weights are there."""
    serving.hold(model=0, version=60)
    serving.owned.sync = serving.sync(method)

    def stream() -> Iterator[tuple[str, Tensor]]:
        weights = serving.weights(1)
        yield from weights[: len(weights) // 2]
        raise OSError("the actor's rank 3 is gone")

    with pytest.raises(ServerError, match="the actor's rank 3 is gone"):
        serving.engine.update_weights(stream(), 61)
    with pytest.raises(RuntimeError, match=r"(?s)no server can generate.*rank 3 is gone"):
        serving.generate(request(0, 4))
    serving.hold(model=1, version=62)
    (sample,) = serving.generate(request(0, 16))
    assert sample.policy_versions[0][0] == 62
    serving.expect_log_probs(sample, model=1)
    serving.owned.sync.close()
    serving.owned.sync = serving.sync("tensor")


def test_memory_is_released_and_resumed_around_an_update(serving: Serving) -> None:
    serving.hold(model=0, version=65)
    serving.engine.release_memory()
    with pytest.raises(RuntimeError, match="memory is released"):
        serving.generate(request(0, 4))
    serving.hold(model=1, version=66)
    with pytest.raises(RuntimeError, match="memory is released"):  # the caches' part still is
        serving.generate(request(0, 4))
    serving.engine.resume_memory()
    (sample,) = serving.generate(request(0, 16))
    assert sample.policy_versions[0][0] == 66
    serving.expect_log_probs(sample, model=1)


def test_a_trainer_elsewhere_attaches_and_leaves_the_server_running(serving: Serving, tmp_path: Path) -> None:
    expect_two_nodes_to_share("sglang", serving, tmp_path)


def test_a_wrong_shape_stops_generation(serving: Serving) -> None:
    """The last test on this server, which SGLang's assertion about shapes ends: with such weights it never comes back.

    An update goes on without a server that dies, so the fault may be heard of when a response is asked for.
    """
    weights = dict(serving.weights(0))
    weights["model.norm.weight"] = torch.ones(64)

    def update_and_generate() -> None:
        serving.engine.update_weights(weights.items(), 70)
        serving.generate(request(0, 4))

    with pytest.raises(RuntimeError, match="no server"):
        update_and_generate()
