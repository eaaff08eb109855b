"""The in-process rollout engine against transformers' plain forward pass, and against itself under other batching."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_fipo.rollout.engine import GenerationRequest, NotFiniteError, SamplingParams, Turn, sample_seed
from megatron_fipo.rollout.in_process import decode_batch
from megatron_fipo.rollout.in_process.engine import InProcessEngine, copy_weights, find_stop_token_ids
from megatron_fipo.rollout.in_process.token_sampling import _nucleus, request_uniforms, sample_tokens
from tests.models import load, save_random_model

pytestmark = pytest.mark.slow

VOCAB = 20
EOS = 1
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("qwen2"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return load(folder)


def engine_of(folder: Path, **options: Any) -> InProcessEngine:
    return InProcessEngine(folder, **({"max_batch_size": 8} | options))


def request(index: int, *, prompt: tuple[int, ...] | None = None, **options: Any) -> GenerationRequest:
    """Request number `index`: prompts of 2 … 13 tokens, shared by three requests each."""
    group = index // 3
    generator = torch.Generator().manual_seed(group)
    tokens = torch.randint(2, VOCAB, (2 + (5 * group) % 12,), generator=generator).tolist()
    sampling = {"max_tokens": 24} | {k: options.pop(k) for k in ("max_tokens", "temperature", "top_p") if k in options}
    return GenerationRequest(
        sample_id=str(index),
        group_id=group,
        sample_index=index % 3,
        prompt_ids=prompt or tuple(tokens),
        sampling=SamplingParams(**sampling),
        seed=options.pop("seed", sample_seed(7, 0, group, index % 3)),
        **options,
    )


def generate(engine: InProcessEngine, requests: list[GenerationRequest]) -> list[Turn]:
    async def together() -> list[Turn]:
        return await asyncio.gather(*map(engine.generate, requests))

    return asyncio.run(together())


@torch.no_grad()
def plain_log_probs(model: PreTrainedModel, sample: Turn, temperature: float = 1.0) -> Tensor:
    """Log-probs of a response by one unpadded forward pass without a cache."""
    tokens = torch.cat([sample.prompt_ids, sample.response_ids])
    logits = model(tokens[None]).logits[0, len(sample.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, sample.response_ids[:, None]).squeeze(1)


def largest_error(model: PreTrainedModel, samples: list[Turn], temperature: float = 1.0) -> float:
    return max(float((s.rollout_log_probs - plain_log_probs(model, s, temperature)).abs().max()) for s in samples)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_log_probs_are_those_of_a_plain_forward(tmp_path: Path, family: str, temperature: float) -> None:
    """24 requests with prompts of seven lengths through 8 slots: rows join, move and leave all the time."""
    folder = save_random_model(tmp_path, family)
    samples = generate(engine_of(folder), [request(i, temperature=temperature, max_tokens=5 + i) for i in range(24)])
    assert len({len(s.prompt_ids) for s in samples}) >= 5
    assert len({len(s.response_ids) for s in samples}) >= 5
    assert largest_error(load(folder), samples, temperature) < TOLERANCE


@pytest.mark.parametrize("broken", ["positions", "mask"])
def test_negative_control_wrong_positions_and_missing_mask_are_noticed(
    folder: Path, reference: PreTrainedModel, broken: str
) -> None:
    engine = engine_of(folder)
    forward = engine.model.forward

    def sabotaged(**inputs: Any) -> Any:
        if "position_ids" in inputs and broken == "positions":
            # As if every row were as long as the longest: what a batch padded in front does without position_ids.
            inputs["position_ids"] = inputs["position_ids"].max().expand_as(inputs["position_ids"])
        if "position_ids" in inputs and broken == "mask":
            inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
        return forward(**inputs)

    engine.model.forward = sabotaged
    assert largest_error(reference, generate(engine, [request(i) for i in range(24)])) > 100 * TOLERANCE


THIRTY = [request(i, max_tokens=6 + i, top_p=[1.0, 0.8][i % 2]) for i in range(30)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Turn]:
    """Each of the thirty requests by itself."""
    engine = engine_of(folder)
    return [generate(engine, [request])[0] for request in THIRTY]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_response_does_not_depend_on_its_batch(folder: Path, alone: list[Turn], batch_size: int) -> None:
    together = generate(engine_of(folder, max_batch_size=batch_size), THIRTY)
    backwards = generate(engine_of(folder, max_batch_size=batch_size), THIRTY[::-1])[::-1]
    for a, b, c in zip(alone, together, backwards, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist() == c.response_ids.tolist()
        assert (a.prompt_id, a.sample_index) == (b.prompt_id, b.sample_index) == (c.prompt_id, c.sample_index)
        assert (a.rollout_log_probs - b.rollout_log_probs).abs().max() < TOLERANCE
    # The comparison means something: responses differ, and end in both ways.
    assert len({tuple(s.response_ids.tolist()) for s in alone}) > 25
    assert {s.finish_reason for s in alone} == {"stop", "length"}


def test_another_seed_gives_another_response(folder: Path) -> None:
    first, second = generate(engine_of(folder), [request(0, seed=1), request(0, seed=2)])
    assert first.response_ids.tolist() != second.response_ids.tolist()


def test_a_prefix_is_continued_as_if_never_interrupted(folder: Path) -> None:
    engine = engine_of(folder, policy_version=4)
    whole = max(generate(engine, [request(i) for i in range(12)]), key=lambda s: len(s.response_ids))
    index = 3 * whole.prompt_id + whole.sample_index
    tokens = tuple(whole.response_ids.tolist())
    assert len(tokens) > 8
    for cut in (1, 5, len(tokens) - 1):
        (rest,) = generate(engine, [request(index, prefix=tokens[:cut])])
        assert tuple(rest.response_ids.tolist()) == tokens[cut:]
        assert (rest.rollout_log_probs - whole.rollout_log_probs[cut:]).abs().max() < TOLERANCE
        assert rest.policy_versions == [(4, cut, len(tokens))]
        assert rest.finish_reason == whole.finish_reason
    # Negative control: with random numbers that start over, the continuation goes elsewhere.
    (restarted,) = generate(engine, [request(index, prompt=whole_prompt(whole) + tokens[:5])])
    assert tuple(restarted.response_ids.tolist())[: len(tokens) - 5] != tokens[5:]


def whole_prompt(sample: Turn) -> tuple[int, ...]:
    return tuple(sample.prompt_ids.tolist())


def test_stop_tokens_end_a_response_and_stay_in_it(folder: Path) -> None:
    samples = generate(engine_of(folder, stop_token_ids=(EOS, 5)), [request(i) for i in range(12)])
    for sample in samples:
        *body, last = sample.response_ids.tolist()
        assert not {EOS, 5} & set(body)
        assert sample.finish_reason == ("stop" if last in (EOS, 5) else "length")
        assert sample.finish_reason == "stop" or len(sample.response_ids) == 24
        assert sample.policy_versions == [(0, 0, len(sample.response_ids))]
    assert {s.response_ids[-1].item() for s in samples} >= {EOS, 5}


def test_temperature_zero_is_greedy_with_log_probs_of_temperature_one(folder: Path, reference: PreTrainedModel) -> None:
    (sample,) = generate(engine_of(folder), [request(0, temperature=0.0)])
    tokens = sample.prompt_ids
    with torch.no_grad():
        for expected in sample.response_ids:
            assert reference(tokens[None]).logits[0, -1].argmax() == expected
            tokens = torch.cat([tokens, expected[None]])
    assert largest_error(reference, [sample]) < TOLERANCE


def test_frequencies_are_the_models_probabilities(folder: Path, reference: PreTrainedModel) -> None:
    """Chi-square of 4,000 first tokens; the 99.9% quantile for 19 degrees of freedom is 43.8."""
    prompt, count = (3, 4, 5), 4000
    engine = engine_of(folder, max_batch_size=500)
    requests = [request(i, prompt=prompt, max_tokens=1, seed=sample_seed(0, 0, 0, i)) for i in range(count)]
    drawn = Counter(int(s.response_ids[0]) for s in generate(engine, requests))
    with torch.no_grad():
        logits = reference(torch.tensor([prompt])).logits[0, -1]

    def chi_square(probabilities: Tensor) -> float:
        return sum((drawn[token] - count * float(p)) ** 2 / (count * float(p)) for token, p in enumerate(probabilities))

    assert chi_square(logits.softmax(-1)) < 43.8
    assert chi_square((logits / 1.2).softmax(-1)) > 43.8  # negative control: another temperature is told apart


def test_top_p_draws_from_the_fewest_tokens_that_reach_it() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    uniforms = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    n = len(uniforms)
    logits, ones = probabilities.log().expand(n, -1), torch.ones(n)

    def draw(top_p: float) -> dict[int, int]:
        tokens, log_probs = sample_tokens(logits, ones, uniforms, torch.full((n,), top_p))
        torch.testing.assert_close(log_probs, probabilities.log()[tokens])  # before top-p
        return dict(Counter(tokens.tolist()))

    assert draw(1.0) == {0: 50, 1: 400, 2: 100, 3: 300, 4: 150}
    # {1, 3} reach 0.7 in float32 arithmetic only just or not; 0.69 and 0.71 are clear. 1000 * 0.4 / 0.7 = 571.4.
    assert draw(0.69) == {1: 572, 3: 428}
    assert set(draw(0.71)) == {1, 3, 4}
    assert draw(0.1) == {1: 1000}


def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort() -> None:
    """Sharp rows end within the first tokens that are put in order, flat ones far beyond; weights have many ties."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([8.0, 3.0, 1.0, 0.3, 0.0, 1.0])[:, None]
    logits = (torch.randn(6, 5000, generator=generator) * scale).mul(4).round().div(4)
    top_p = torch.tensor([0.5, 0.9, 0.7, 0.97, 0.3001, 1.0])
    weights = logits.double().softmax(-1)
    sizes = []
    for row, kept in enumerate(_nucleus(weights, top_p)):
        tokens = sorted(range(5000), key=lambda token, w=weights[row]: (-w[token].item(), token))  # type: ignore[misc]
        expected, total = set(), 0.0
        for token in tokens:
            if total >= float(top_p[row]) and top_p[row] < 1:
                break
            expected.add(token)
            total += weights[row, token].item()
        assert set(kept.nonzero().flatten().tolist()) == expected
        assert torch.equal(kept[kept > 0], weights[row][kept > 0])
        sizes.append(len(expected))
    assert min(sizes) < 10
    assert 256 < sizes[2] < 5000
    assert sizes[4:] == [1501, 5000]


def test_mixed_rows_sample_each_by_its_own_parameters() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(3, -1)
    temperature = torch.tensor([0.0, 1.0, 2.0])
    tokens, log_probs = sample_tokens(logits, temperature, torch.full((3,), 0.05, dtype=torch.float64))
    # exp(0, 1, 2) sums to 11.1073: token 0 has probability 0.0900; at temperature 2, 1/(1 + 1.6487 + 2.7183) = 0.1863.
    assert tokens.tolist() == [2, 0, 0]
    torch.testing.assert_close(log_probs.exp(), torch.tensor([0.6652, 0.0900, 0.1863]), atol=5e-5, rtol=0)


def test_the_largest_uniform_number_stays_inside_the_vocabulary() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, -torch.inf]).expand(2, -1)
    uniforms = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_tokens(logits, torch.ones(2), uniforms)[0].tolist() == [0, 2]


def test_uniform_numbers_are_a_function_of_seed_and_position() -> None:
    whole = request_uniforms(5, 0, 50)
    assert (request_uniforms(5, 20, 40) == whole[20:40]).all()
    assert not (request_uniforms(6, 0, 50) == whole).any()
    with pytest.raises(ValueError, match="seed must lie in"):
        request_uniforms(-1, 0, 1)


def test_sample_seed_is_stable_and_separates_its_arguments() -> None:
    assert sample_seed(0, 0, 0, 0) == 5854343820274218872
    seeds = {sample_seed(*key) for key in [(1, 23, 4, 5), (12, 3, 4, 5), (1, 2, 34, 5), (1, 2, 3, 45), (0, 1, 2, 3)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_shared_prompt_is_prefilled_once(folder: Path) -> None:
    """Also by requests that join while another response to the same prompt is being decoded."""
    engine = engine_of(folder, max_batch_size=4)
    prompt = tuple(range(2, 12))
    shapes: list[tuple[int, ...]] = []

    def note(module: object, args: object, inputs: dict[str, torch.Tensor]) -> None:
        shapes.append(tuple(inputs["input_ids"].shape))

    engine.model.register_forward_pre_hook(note, with_kwargs=True)
    generate(engine, [request(i, prompt=prompt, max_tokens=2 + i, seed=i) for i in range(12)])
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 9)], "all but the prompt's last token, in one row"
    assert len(shapes) > 12


def test_prefill_in_several_chunks(folder: Path, reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_batch, "PREFILL_TOKENS", 16)
    assert largest_error(reference, generate(engine_of(folder), [request(i) for i in range(24)])) < TOLERANCE


def test_the_cache_goes_by_the_name_that_transformers_gives_it(
    folder: Path, reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 5.24 calls it `cache`, earlier ones `past_key_values`; nobody is to read a warning about that."""
    plain = type(reference).forward
    name = "cache" if "cache" in inspect.signature(plain).parameters else "past_key_values"
    other = "past_key_values" if name == "cache" else "cache"

    def renamed(self: PreTrainedModel, input_ids: Tensor | None = None, **options: Any) -> Any:
        assert name not in options
        return plain(self, input_ids, **{name: options.pop(other, None)}, **options)

    parameters = inspect.signature(plain).parameters.values()
    renamed_parameters = [p.replace(name=other) if p.name == name else p for p in parameters]
    expected = generate(engine_of(folder), [request(i) for i in range(4)])
    monkeypatch.setattr(renamed, "__signature__", inspect.Signature(renamed_parameters), raising=False)
    monkeypatch.setattr(type(reference), "forward", renamed)
    got = generate(engine_of(folder), [request(i) for i in range(4)])
    assert [s.response_ids.tolist() for s in got] == [s.response_ids.tolist() for s in expected]


def test_a_prefill_that_fails_fails_its_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that finds no memory does. All requests get the error: what waits would wait for ever."""
    engine = engine_of(folder, max_batch_size=2)

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("no room for the prefill")

    async def outcomes() -> list[Any]:
        together = asyncio.gather(*(engine.generate(request(i)) for i in range(5)), return_exceptions=True)
        return await asyncio.wait_for(together, timeout=120)

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.model), "forward", full)
        assert [str(outcome) for outcome in asyncio.run(outcomes())] == ["no room for the prefill"] * 5
    assert all(isinstance(outcome, Turn) for outcome in asyncio.run(outcomes()))


def test_a_prompt_of_one_token(folder: Path, reference: PreTrainedModel) -> None:
    assert largest_error(reference, generate(engine_of(folder), [request(0, prompt=(3,)), request(4)])) < TOLERANCE


def test_waiting_requests_fill_free_slots(folder: Path) -> None:
    """One long and 14 short responses in 2 slots take about as many steps as the long one, not seven times as many."""
    engine = engine_of(folder, max_batch_size=2, stop_token_ids=())
    generate(engine, [request(0, max_tokens=56), *(request(3 * i, max_tokens=4) for i in range(1, 15))])
    assert engine._batch.num_steps == 56


def test_samples_are_ordinary_tensors(folder: Path) -> None:
    """Not inference tensors, which autograd refuses to save."""
    (sample,) = generate(engine_of(folder), [request(0)])
    weight = torch.ones((), requires_grad=True)
    (sample.rollout_log_probs * weight).sum().backward()
    assert not sample.response_ids.is_inference()


def test_others_run_between_tokens_and_on_token_streams(folder: Path) -> None:
    engine = engine_of(folder, stop_token_ids=())
    turns, streamed = 0, []

    async def count_turns(task: asyncio.Task[Turn]) -> None:
        nonlocal turns
        while not task.done():
            turns += 1
            await asyncio.sleep(0)

    async def main() -> Turn:
        task = asyncio.ensure_future(engine.generate(request(0), on_token=streamed.append))
        await count_turns(task)
        return await task

    sample = asyncio.run(main())
    assert streamed == sample.response_ids.tolist()
    assert turns >= len(streamed)


def test_abort_returns_what_there_is(folder: Path) -> None:
    """One request is being decoded, one waits; later requests are not touched."""
    engine = engine_of(folder, max_batch_size=1, stop_token_ids=())
    streamed: list[int] = []

    def on_token(token: int) -> None:
        streamed.append(token)
        if len(streamed) == 5:
            engine.abort()

    async def main() -> list[Turn]:
        first = asyncio.ensure_future(engine.generate(request(0), on_token=on_token))
        second = asyncio.ensure_future(engine.generate(request(1)))
        aborted = [await first, await second]
        return [*aborted, await engine.generate(request(2))]

    first, second, third = asyncio.run(main())
    assert (first.finish_reason, second.finish_reason, third.finish_reason) == ("abort", "abort", "length")
    assert first.response_ids.tolist() == streamed
    assert len(streamed) == len(first.rollout_log_probs) == 5
    assert first.policy_versions == [(0, 0, 5)]
    assert (len(second.response_ids), second.policy_versions) == (0, [])


def test_cancelling_frees_the_row(folder: Path) -> None:
    engine = engine_of(folder, max_batch_size=2, stop_token_ids=())

    async def main() -> tuple[list[Turn], int]:
        decoding = asyncio.ensure_future(engine.generate(request(0, max_tokens=400)))
        others = [asyncio.ensure_future(engine.generate(request(i))) for i in (1, 2, 3)]
        waiting = asyncio.ensure_future(engine.generate(request(4, max_tokens=400)))
        while engine._batch.num_steps < 5:
            await asyncio.sleep(0)
        decoding.cancel()
        waiting.cancel()
        samples = await asyncio.gather(*others)
        assert decoding.cancelled()
        assert waiting.cancelled()
        return samples, engine._batch.num_steps

    samples, num_steps = asyncio.run(main())
    assert [len(s.response_ids) for s in samples] == [24, 24, 24]
    assert num_steps < 60


def test_a_loop_that_ends_early_leaves_a_usable_engine(folder: Path) -> None:
    engine = engine_of(folder, stop_token_ids=())

    async def leave_early() -> None:
        task = asyncio.ensure_future(engine.generate(request(0, max_tokens=400)))
        while engine._batch.num_steps < 3:
            await asyncio.sleep(0)
        assert not task.done()

    asyncio.run(leave_early())
    (sample,) = generate(engine, [request(1)])
    (expected,) = generate(engine_of(folder, stop_token_ids=()), [request(1)])
    assert sample.response_ids.tolist() == expected.response_ids.tolist()


def test_weights_are_taken_over(folder: Path, tmp_path: Path) -> None:
    other = load(save_random_model(tmp_path, seed=1, tie_word_embeddings=True))
    engine = engine_of(folder)
    engine.update_weights(other.named_parameters(), policy_version=3)
    samples = generate(engine, [request(i) for i in range(6)])
    assert largest_error(other, samples) < TOLERANCE
    assert engine.policy_version == 3
    assert samples[0].policy_versions[0][0] == 3
    assert largest_error(load(folder), samples) > 100 * TOLERANCE


def test_an_incomplete_handover_names_the_tensors_and_stops_generation(
    folder: Path, reference: PreTrainedModel
) -> None:
    engine = engine_of(folder)
    good = dict(reference.named_parameters())
    drained = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in good.items():
            if name == "model.norm.weight":
                continue
            yield name, tensor[:-1] if name == "model.layers.0.mlp.up_proj.weight" else tensor
        yield "lm_head.weight", good["model.embed_tokens.weight"]
        yield "model.layers.9.mlp.up_proj.weight", torch.zeros(1)
        yield "model.layers.1.mlp.up_proj.weight", good["model.layers.1.mlp.up_proj.weight"]
        drained.append(True)

    with pytest.raises(ValueError, match="do not fit") as error:
        engine.update_weights(stream(), policy_version=1)
    message = str(error.value)
    assert "model.norm.weight is missing" in message
    assert "model.layers.0.mlp.up_proj.weight has shape [63, 32], the model's is [64, 32]" in message
    assert "lm_head.weight is tied to another parameter" in message
    assert "model.layers.9.mlp.up_proj.weight is unexpected" in message
    assert "model.layers.1.mlp.up_proj.weight came twice" in message
    assert message.count(";") == 4
    assert drained
    with pytest.raises(RuntimeError, match="policy version 1 did not finish"):
        generate(engine, [request(0)])
    engine.update_weights(good.items(), policy_version=2)
    assert largest_error(reference, generate(engine, [request(0)])) < TOLERANCE


def test_an_untied_output_layer_must_be_handed_over(tmp_path: Path) -> None:
    model = load(save_random_model(tmp_path, tie_word_embeddings=False))
    weights = {name: tensor for name, tensor in model.named_parameters() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        copy_weights(model, weights.items())


def test_weights_are_refused_while_requests_are_in_flight(folder: Path, reference: PreTrainedModel) -> None:
    engine = engine_of(folder)

    async def main() -> None:
        task = asyncio.ensure_future(engine.generate(request(0)))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="1 requests are in flight"):
            engine.update_weights(reference.named_parameters(), policy_version=1)
        assert (await task).policy_versions[0][0] == 0

    asyncio.run(main())


def test_weights_that_are_not_finite_fail_every_request_with_the_reason(
    folder: Path, reference: PreTrainedModel
) -> None:
    engine = engine_of(folder, max_batch_size=2)
    engine.update_weights(((n, torch.full_like(p, torch.nan)) for n, p in reference.named_parameters()), 1)

    async def main() -> list[Turn | BaseException]:
        return await asyncio.gather(*(engine.generate(request(i)) for i in range(3)), return_exceptions=True)

    results = asyncio.run(main())
    assert [type(result) for result in results] == [NotFiniteError] * 3
    assert "response token 0 of sample '0'" in str(results[0])


def test_a_closed_engine_says_so(folder: Path) -> None:
    engine = engine_of(folder)

    async def main() -> None:
        task = asyncio.ensure_future(engine.generate(request(0)))
        await asyncio.sleep(0)
        engine.close()
        with pytest.raises(RuntimeError, match="was closed"):
            await task
        with pytest.raises(RuntimeError, match="it is closed"):
            await engine.generate(request(1))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": (VOCAB,)}, "prompt_ids reach from 20 to 20; the model has tokens 0 … 19"),
        ({"prefix": (-1,)}, "prefix reach from -1 to -1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0, and finite; got nan"),
        ({"temperature": float("inf")}, "temperature must be at least 0, and finite; got inf"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"max_tokens": 2, "prefix": (3, 4)}, "max_tokens=2 leaves nothing after a prefix of 2"),
        ({"prefix": (3, EOS)}, "prefix ends in stop token 1"),
    ],
)
def test_requests_that_break_a_rule(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(engine_of(folder), [request(0, **options)])


def test_an_empty_prompt_is_refused(folder: Path) -> None:
    empty = GenerationRequest("a", 0, 0, (), SamplingParams(max_tokens=1), 0)
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(engine_of(folder), [empty])


def test_stop_tokens_come_from_configs_and_tokenizer(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    assert find_stop_token_ids(tmp_path) == (EOS,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 1]}')
    assert find_stop_token_ids(tmp_path) == (1, 5)

    class Tokenizer:
        eos_token_id = 7

    assert find_stop_token_ids(tmp_path, Tokenizer()) == (1, 5, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": "1"}, "config.json is refused by transformers: .*'eos_token_id'"),
        ({"initializer_range": "wide"}, "config.json is refused by transformers: .*'initializer_range'"),
        ({"pad_token_id": VOCAB}, "pad_token_id=20 lies outside the vocabulary of 20"),
    ],
)
def test_a_configuration_that_transformers_cannot_use_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = save_random_model(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        engine_of(tmp_path)


def test_a_generation_config_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (save_random_model(tmp_path) / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be used"):
        find_stop_token_ids(tmp_path)


def test_a_model_that_names_no_end_is_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path, eos_token_id=None)
    with pytest.raises(ValueError, match="no response would ever end"):
        engine_of(tmp_path)


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ValueError, match="full attention in every layer"):
        engine_of(tmp_path)


def test_it_rests_after_the_steps_that_it_may_take(folder: Path) -> None:
    """With what is in flight, which goes on from there, and ends where it is aborted."""
    engine = engine_of(folder)
    num_rests = [0]

    def resting() -> None:
        num_rests[0] += 1

    async def stretches() -> tuple[list[int], list[Turn]]:
        engine.allow(0)
        calls = [asyncio.ensure_future(engine.generate(request(number, max_tokens=20))) for number in range(2)]
        await asyncio.sleep(0)
        steps = []
        for _ in range(3):
            engine.allow(4, resting)
            while not engine.is_at_rest:
                await asyncio.sleep(0)
            for _ in range(10):  # it stays where it is
                await asyncio.sleep(0.002)
            steps.append(engine._batch.num_steps)
        engine.abort()
        turns = [await call for call in calls]
        engine.allow(None)
        return steps, [*turns, await engine.generate(request(0, max_tokens=20))]

    steps, (first, second, whole) = asyncio.run(stretches())
    assert steps == [4, 8, 12]
    assert num_rests == [3]
    assert [(turn.finish_reason, len(turn.response_ids)) for turn in (first, second)] == [("abort", 12)] * 2
    assert first.response_ids.tolist() == whole.response_ids[:12].tolist()
