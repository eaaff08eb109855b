"""Preflight against numbers worked out by hand, its verdicts, and what it says is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from megatron_fipo import cli
from megatron_fipo.config import (
    BatchSection,
    Config,
    DataSection,
    DataSourceConfig,
    FipoConfig,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RolloutSection,
    SamplingSection,
    ServersSection,
    TrainSection,
)
from megatron_fipo.convert.hf_config import model_shape
from megatron_fipo.preflight.findings import (
    FAILS,
    MISSING,
    WARNS,
    Finding,
    batch_findings,
    file_findings,
    objective_findings,
    update_noise,
)
from megatron_fipo.preflight.hardware import GIB, GPUS
from megatron_fipo.preflight.host_memory import HostMemory, host_memory
from megatron_fipo.preflight.memory import (
    RESERVE_GIB,
    RESIDUE_GIB,
    SERVER_RESIDUE_GIB,
    layer_activations,
    microbatches_in_flight,
    training_memory,
)
from megatron_fipo.preflight.parameters import matmul_parameters, stage_parameters, whole_parameters
from megatron_fipo.preflight.peaks import Peak
from megatron_fipo.preflight.plan import Plan, make_plan
from megatron_fipo.preflight.rollout_plan import placement_problems, rollout_plan
from megatron_fipo.preflight.server_memory import server_memory
from megatron_fipo.preflight.work import Assumptions, batch_plan, forward_flops


def qwen(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "initializer_range": 0.02,
    }


QWEN_7B = qwen(28, 3584, 18944, 28, 4)
QWEN_32B = qwen(64, 5120, 27648, 40, 8)
QWEN_72B = qwen(80, 8192, 29568, 64, 8)
SHAPE_7B, SHAPE_32B, SHAPE_72B = (model_shape(raw, "test") for raw in (QWEN_7B, QWEN_32B, QWEN_72B))

RECIPE = Config(
    model=ModelSection(path="Qwen2.5-32B", dtype="bfloat16"),
    rollout=RolloutSection(
        num_prompts=512, num_samples_per_prompt=16, max_prompt_tokens=2048, max_response_tokens=20480
    ),
    train=TrainSection(num_minibatches=8),
    parallel=ParallelSection(tp=8, cp=2, sequence_parallel=True),
    batch=BatchSection(max_tokens_per_microbatch=22528),
)
"""Of examples/qwen2_5_32b, but for the servers."""


def test_parameters_of_the_published_models() -> None:
    assert whole_parameters(SHAPE_7B) == 7_615_616_512
    assert whole_parameters(SHAPE_32B) == 32_763_876_352
    assert whole_parameters(SHAPE_72B) == 72_706_203_648


def test_parameters_of_a_model_with_normalised_heads() -> None:
    raw = qwen(36, 4096, 12288, 32, 8) | {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151936}
    assert whole_parameters(model_shape(raw, "Qwen3-8B")) == 8_190_735_360


def test_parameters_of_the_32b_model_by_hand() -> None:
    """Embedding and output layer, then of each layer: queries, keys and values, output, MLP, norms; the final norm."""
    layer = (5120 * 5120 + 5120) + 2 * (5120 * 1024 + 1024) + 5120 * 5120 + 3 * 5120 * 27648 + 2 * 5120
    assert layer == 487_605_248
    assert whole_parameters(SHAPE_32B) == 2 * 152064 * 5120 + 64 * layer + 5120
    assert matmul_parameters(SHAPE_32B) == 64 * (layer - 2 * 5120 - 5120 - 2 * 1024) + 152064 * 5120
    tied = replace(SHAPE_32B, tied_embeddings=True)
    assert whole_parameters(SHAPE_32B) - whole_parameters(tied) == 152064 * 5120


def test_parameters_of_a_rank() -> None:
    """Eight ways: 152,576 padded rows, matrices in eighths, norms whole."""
    (only,) = stage_parameters(SHAPE_32B, ParallelSection(tp=8))
    assert only.output_rows == 19_072
    assert only.parameters == 2 * 19_072 * 5120 + 64 * ((487_605_248 - 10_240) // 8 + 10_240) + 5120
    assert only.parameters == 4_096_717_824


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [SHAPE_7B, SHAPE_72B])
def test_stages_and_ranks_add_up(shape: Any, tied: bool) -> None:
    shape = replace(shape, tied_embeddings=tied)
    tp, pp = 4, 4
    held = tp * sum(stage.parameters for stage in stage_parameters(shape, ParallelSection(tp=tp, pp=pp)))
    norms = (tp - 1) * (2 * shape.num_layers + 1) * shape.hidden_size
    ends = 2  # a tied matrix lies at both ends of a pipeline
    vocabulary = ends * shape.padded_vocab_size(tp) * shape.hidden_size
    own = (1 if tied else 2) * shape.vocab_size * shape.hidden_size
    assert held == whole_parameters(shape) - own + vocabulary + norms


def test_memory_of_the_32b_recipe_by_hand() -> None:
    """What tests/unit/test_preflight_32b.py leaves out."""
    (stage,) = training_memory(with_servers(RECIPE), SHAPE_32B, 128)
    # 512 MiB hold 7,037 tokens of 19,072 float32 logits, in whole tiles 6,912; their gradient is in bfloat16.
    logits = 6_912 * 19_072 * 6 + 19_072 * 5120 * 2 + 11_264 * (4 * 5120 + 20)
    assert stage.log_probs * GIB == pytest.approx(logits)
    parts = stage.weights + stage.gradients + stage.optimizer + stage.activations + stage.log_probs
    assert stage.training == pytest.approx(parts + RESERVE_GIB + SERVER_RESIDUE_GIB)


def with_servers(config: Config) -> Config:
    """Generation elsewhere: no whole model on the trainer's GPUs."""
    servers = ServersSection(tp=4, num_per_node=2, placement="colocated")
    return replace(config, rollout=replace(config.rollout, engine="sglang"), servers=servers)


def test_without_sequence_parallelism_norms_are_kept_whole() -> None:
    whole = replace(RECIPE, parallel=replace(RECIPE.parallel, sequence_parallel=False))
    difference = layer_activations(whole, SHAPE_32B).kept - layer_activations(RECIPE, SHAPE_32B).kept
    assert difference == 2 * 4 * 5120 * 7 / 8


def test_microbatches_in_flight() -> None:
    config = replace(RECIPE, parallel=ParallelSection(pp=4))
    assert [microbatches_in_flight(config, stage) for stage in range(4)] == [4, 3, 2, 1]
    interleaved = replace(RECIPE, parallel=ParallelSection(pp=4, virtual_pp=2))
    assert microbatches_in_flight(interleaved, 0) == 4 * (1 + 3 / 8)


def test_the_in_process_engine_and_a_reference_policy_cost_their_weights() -> None:
    (plain,) = training_memory(with_servers(RECIPE), SHAPE_32B, 128)
    (in_process,) = training_memory(RECIPE, SHAPE_32B, 128)
    assert in_process.training - plain.training == pytest.approx(2 * 32_763_876_352 / GIB - SERVER_RESIDUE_GIB)
    with_kl = with_servers(replace(RECIPE, objective=replace(RECIPE.objective, kl_coefficient=0.1)))
    (reference,) = training_memory(with_kl, SHAPE_32B, 128)
    assert (reference.training - plain.training) * GIB == pytest.approx(2 * 4_096_717_824)


def server_of(config: Config, shape: Any = SHAPE_32B, lasting: float = 0.0) -> Any:
    return server_memory(config, shape, GPUS["h100-80gb"], rollout_plan(config, 128, 8), lasting)


def served(engine: str = "sglang", **section: Any) -> Config:
    """The recipe with other servers."""
    servers = replace(with_servers(RECIPE).servers, **section)
    return replace(with_servers(RECIPE), rollout=replace(RECIPE.rollout, engine=engine), servers=servers)


def test_keys_and_values_of_a_server() -> None:
    """64 layers x 8 heads x 128 x 2 (keys, values) x 2 bytes, over 4 GPUs."""
    server = server_of(served())
    assert server.bytes_per_token == 64 * 8 * 128 * 2 * 2 // 4 == 65_536
    assert server.weights * GIB == 2 * 32_763_876_352 / 4
    assert server.pool_tokens == int(server.pool * GIB / 65_536)
    assert server_of(served(tp=8, num_per_node=1), SHAPE_7B).bytes_per_token == 28 * 128 * 2 * 2, "heads are not split"


def test_what_engines_make_of_a_gpu() -> None:
    """SGLang counts memory_fraction from what is free before it loads, vLLM from the whole GPU."""
    weights = 2 * 32_763_876_352 / 4 / GIB
    # 79.6 GiB without the contexts of trainer (0.5) and server (1.0).
    assert server_of(served()).pool == pytest.approx(0.8 * 78.1 - weights, rel=1e-9)
    assert server_of(served(memory_fraction=0.7)).pool == pytest.approx(0.7 * 78.1 - weights, rel=1e-9)
    # On GPUs of its own no trainer's context, but CUDA graphs (1.0) are captured before the pool is sized.
    apart = served(placement="dedicated", num_per_node=1, gpus=[4, 5, 6, 7])
    assert server_of(apart).pool == pytest.approx(0.8 * 78.6 - weights - 1.0, rel=1e-9)
    # vLLM takes graphs (1.0) and activations (3.0) out of its share.
    assert server_of(served("vllm")).pool == pytest.approx(0.8 * 79.6 - weights - 4.0, rel=1e-9)
    assert server_of(served(max_total_tokens=100_000)).pool_tokens == 100_000
    assert server_of(RECIPE, lasting=20.0).pool == pytest.approx(79.6 - 20.0 - RESERVE_GIB - 4 * weights, rel=1e-9)


def test_flops_of_a_forward_pass() -> None:
    assert forward_flops(SHAPE_32B, 1) == 2 * 31_984_189_440 + 2 * 64 * 40 * 128
    attention = forward_flops(SHAPE_32B, 20_000) - 20_000 * 2 * 31_984_189_440
    # Scores and their product with the values: 2 * 2 * 5120 a pair of tokens and layer, half of the pairs.
    assert attention == 64 * 4 * 5120 * 20_000**2 / 2


def test_batch_arithmetic_of_the_recipe() -> None:
    rollout = replace(RECIPE.rollout, num_prompts_per_round=2048)
    plan = batch_plan(replace(RECIPE, rollout=rollout), 128, Assumptions(response_tokens=8000, prompt_tokens=200))
    assert (plan.prompts_generated, plan.rounds) == (2048, 1)
    assert (plan.samples, plan.samples_generated) == (8192, 32_768)
    assert (plan.updates, plan.samples_per_update, plan.data_ranks) == (8, 1024, 8)
    assert plan.microbatches == -(-128 * 8200 // 22_528) == 47
    assert plan.bubble == 0
    scarce = batch_plan(replace(RECIPE, rollout=rollout), 128, Assumptions(kept_share=0.2))
    assert (scarce.prompts_generated, scarce.rounds) == (4096, 2)
    # Without a round size: 512, then twice the 256 that lack.
    open_ended = batch_plan(RECIPE, 128, Assumptions(kept_share=0.5))
    assert (open_ended.prompts_generated, open_ended.rounds) == (1024, 2)
    static = replace(RECIPE, sampling=SamplingSection(dynamic=False))
    assert batch_plan(static, 128, Assumptions()).prompts_generated == 512


def test_a_stream_begins_what_it_needs_and_a_margin() -> None:
    """512 at a kept half: 1,024, and two standard deviations of sqrt(512 / 2) / (1 / 2) = 32. Rounds have no say."""
    streaming = replace(RECIPE, sampling=SamplingSection(streaming=True))
    for per_round in (None, 2048):
        config = replace(streaming, rollout=replace(RECIPE.rollout, num_prompts_per_round=per_round))
        plan = batch_plan(config, 128, Assumptions(kept_share=0.5))
        assert (plan.prompts_needed, plan.prompts_generated, plan.rounds) == (1024, 1088, 1)
        assert plan.samples_generated == 1088 * 16
    whole = replace(streaming, sampling=SamplingSection(streaming=True, dynamic=False))
    assert batch_plan(whole, 128, Assumptions()).prompts_generated == 512


def carrying(num_steps: int, **sampling: Any) -> Config:
    """The recipe with carry-over."""
    rollout = replace(RECIPE.rollout, max_staleness_steps=num_steps)
    return replace(RECIPE, rollout=rollout, sampling=SamplingSection(streaming=True, **sampling))


def test_carry_over_generates_what_it_uses_and_begins_more() -> None:
    """1,024 prompts at a kept half; 2,048 of two steps, less two standard deviations of sqrt(1024 / 2) / (1 / 2)."""
    plan = batch_plan(carrying(1), 128, Assumptions(kept_share=0.5))
    assert (plan.prompts_needed, plan.prompts_generated, plan.prompts_ahead, plan.rounds) == (1024, 1024, 1957, 1)
    assert plan.samples_generated == 1024 * 16
    assert batch_plan(carrying(0), 128, Assumptions(kept_share=0.5)).prompts_ahead == 0
    whole = batch_plan(carrying(2, dynamic=False), 128, Assumptions())
    assert (whole.prompts_generated, whole.prompts_ahead) == (512, 1536)


def test_carry_over_that_may_not_begin_as_many_is_warned_about() -> None:
    """3 * 512 / 0.2 = 7,680 prompts of three steps, less 2 * sqrt(1536 * 0.8) / 0.2 = 350.5."""

    def findings(num_steps: int, rounds: int) -> list[Finding]:
        config = carrying(num_steps, max_generation_rounds=rounds)
        return list(batch_findings(config, batch_plan(config, 128, Assumptions(kept_share=0.2))))

    (found,) = findings(2, 10)
    assert found.level == WARNS
    assert "would begin 7,329 prompts ahead" in found.text
    assert "allows 5,120" in found.text
    assert findings(2, 15) == findings(0, 10) == []
    (found,) = findings(2, 4)
    assert found.level == FAILS


def test_a_stream_that_would_end_too_soon_fails() -> None:
    """At most max_generation_rounds times the batch, or the round: 1,024 prompts are needed."""

    def findings(**sampling: Any) -> list[str]:
        config = replace(RECIPE, sampling=SamplingSection(streaming=True, **sampling))
        return [finding.text for finding in batch_findings(config, batch_plan(config, 128, Assumptions()))]

    (text,) = findings(max_generation_rounds=1)
    assert "1,024 prompts are needed" in text
    assert "allows 512" in text
    assert findings(max_generation_rounds=2) == []


def test_pipeline_bubble() -> None:
    config = replace(RECIPE, parallel=ParallelSection(tp=8, pp=4, sequence_parallel=True))
    plan = batch_plan(config, 128, Assumptions(response_tokens=8000, prompt_tokens=200))
    assert plan.bubble == pytest.approx(3 / (plan.microbatches + 3))


def test_seconds_follow_the_assumptions() -> None:
    assumptions = Assumptions(mfu=0.4, rollout_tokens_per_s=1000, response_tokens=10_000, prompt_tokens=500)
    config = with_servers(RECIPE)
    plan = make_plan(config, QWEN_32B, GPUS["h100-80gb"], 128, assumptions, check_files=False)
    sequence = forward_flops(SHAPE_32B, 10_500)
    assert plan.cost.flops["updates"] == 3 * 8192 * sequence
    assert plan.cost.flops["old log-probs"] == 8192 * sequence
    assert "reference log-probs" in plan.cost.flops
    peak = 128 * 989e12 * 0.4
    assert plan.cost.seconds["log-probs"] == pytest.approx(8192 * sequence / peak)
    output_layer = 2 * 152064 * 5120 * 10_500 * 8192
    assert plan.cost.flops["recompute"] == output_layer
    assert plan.cost.seconds["updates"] == pytest.approx((3 * 8192 * sequence + output_layer) / peak)
    generated = plan.batch.samples_generated * 10_000
    assert plan.cost.seconds["generation"] == pytest.approx(generated / (1000 * plan.rollout.num_gpus))
    assert plan.cost.rollout_limit == "given"
    slower = make_plan(config, QWEN_32B, GPUS["h100-80gb"], 128, replace(assumptions, mfu=0.2), check_files=False)
    assert slower.cost.seconds["updates"] == pytest.approx(2 * plan.cost.seconds["updates"])


def test_fp8_halves_the_time_of_the_layers_products() -> None:
    config = with_servers(replace(RECIPE, model=replace(RECIPE.model, fp8="tensorwise")))
    assumptions = Assumptions(mfu=0.4, response_tokens=10_000, prompt_tokens=500)
    plans = [
        make_plan(some, QWEN_32B, GPUS["h100-80gb"], 128, assumptions, check_files=False)
        for some in (with_servers(RECIPE), config)
    ]
    layers = 2 * 64 * 5120 * (2 * (40 + 8) * 128 + 3 * 27648) * 10_500
    share = layers / forward_flops(SHAPE_32B, 10_500)
    assert 0.7 < share < 0.95
    expected = 1 - share * (1 - 989 / 1979)
    without, with_fp8 = (plan.cost.seconds for plan in plans)
    assert with_fp8["log-probs"] / without["log-probs"] == pytest.approx(expected)
    # What is recomputed for the updates is the output layer, which stays in bfloat16.
    updates, recomputed = plans[0].cost.flops["updates"], plans[0].cost.flops["recompute"]
    ratio = (updates * expected + recomputed) / (updates + recomputed)
    assert with_fp8["updates"] / without["updates"] == pytest.approx(ratio)
    assert with_fp8["generation"] == without["generation"]


@pytest.mark.parametrize(
    ("gpu", "recipe", "words"),
    [
        ("a100-80gb", "tensorwise", "not for a100-80gb: it has no FP8"),
        ("h100-80gb", "mxfp8", "not for h100-80gb: it computes tensorwise and blockwise"),
        ("b200", "mxfp8", ""),
    ],
)
def test_fp8_that_the_gpu_does_not_compute_fails(gpu: str, recipe: str, words: str) -> None:
    config = with_servers(replace(RECIPE, model=replace(RECIPE.model, fp8=recipe)))
    plan = make_plan(config, QWEN_32B, GPUS[gpu], 128, Assumptions(), check_files=False)
    found = [finding.text for finding in plan.findings if finding.level == FAILS and "fp8" in finding.text]
    assert len(found) == bool(words)
    assert all(words in text for text in found)


def test_one_long_response_bounds_generation() -> None:
    """With carry-over it may take as many steps more as its bound says."""
    seconds = []
    for bound in (0, 1):
        rollout = replace(carrying(bound).rollout, num_prompts=8, num_samples_per_prompt=2)
        few = with_servers(replace(carrying(bound), rollout=rollout))
        plan = make_plan(few, QWEN_32B, GPUS["h100-80gb"], 128, Assumptions(), check_files=False)
        assert plan.cost.rollout_limit == "the longest response"
        seconds.append(plan.cost.seconds["generation"])
    assert seconds[1] == pytest.approx(seconds[0] / 2)


# --- findings --------------------------------------------------------------------------------------------------------


def levels(findings: Any) -> set[str]:
    return {finding.level for finding in findings}


def test_too_little_memory_fails_and_names_what_takes_it() -> None:
    crowded = with_servers(replace(RECIPE, parallel=ParallelSection(tp=2)))
    plan = make_plan(crowded, QWEN_32B, GPUS["h100-80gb"], 128, Assumptions(), check_files=False)
    assert not plan.fits
    (first, *_) = [finding for finding in plan.findings if finding.level == FAILS]
    assert "training takes" in first.text
    assert "activations: raise parallel.cp" in first.text
    roomy = make_plan(with_servers(RECIPE), QWEN_32B, GPUS["h200"], 128, Assumptions(), check_files=False)
    assert roomy.fits


def test_a_server_without_room_for_one_response_fails() -> None:
    """In process, the whole 32B model leaves nothing for keys and values."""
    plan = make_plan(RECIPE, QWEN_32B, GPUS["h100-80gb"], 128, Assumptions(), check_files=False)
    assert any(finding.level == FAILS and "room for keys and values" in finding.text for finding in plan.findings)


def test_one_update_per_step_is_inert() -> None:
    once = replace(RECIPE, train=TrainSection(num_minibatches=1))
    assert any("FIPO is inert" in finding.text for finding in objective_findings(once, QWEN_32B))
    assert not any("FIPO is" in finding.text for finding in objective_findings(RECIPE, QWEN_32B))


def test_a_learning_rate_below_the_precision_is_noise() -> None:
    """0.02 lies between 2^-6 and 2^-5: bfloat16 is spaced by 2^-13 there, float32 by 2^-29."""
    noise = update_noise(RECIPE, QWEN_32B)
    assert noise.spacing == 2**-13
    assert noise.changed_share == pytest.approx(7e-6 / 2**-13)
    assert noise.signal_to_noise == pytest.approx((5120 * 7e-6 * 2**13) ** 0.5)
    assert noise.signal_to_noise > 1, "the paper's learning rate is not dominated by noise"
    tiny = replace(RECIPE, optimizer=OptimizerSection(learning_rate=1e-9))
    assert any("dominated by noise" in finding.text for finding in objective_findings(tiny, QWEN_32B))
    float32 = replace(tiny, model=replace(RECIPE.model, dtype="float32"))
    assert update_noise(float32, QWEN_32B).spacing == 2**-29
    assert not any("dominated by noise" in finding.text for finding in objective_findings(float32, QWEN_32B))
    dapo = replace(tiny, objective=FipoConfig(future_kl=False))
    assert not any("dominated by noise" in finding.text for finding in objective_findings(dapo, QWEN_32B))


def test_placement_of_servers() -> None:
    plan = rollout_plan(with_servers(RECIPE), 128, 8)
    assert (plan.num_gpus, plan.num_nodes, plan.tp, plan.is_dedicated) == (128, 16, 4, False)
    # Half of each node's GPUs serve: 128 training GPUs take 32 nodes.
    servers = ServersSection(tp=4, placement="dedicated", gpus=[4, 5, 6, 7])
    dedicated = replace(with_servers(RECIPE), servers=servers)
    plan = rollout_plan(dedicated, 128, 8)
    assert (plan.num_gpus, plan.num_nodes, plan.is_dedicated) == (128, 32, True)
    assert list(placement_problems(dedicated, plan, 128, 8)) == []
    urls = ["http://a:1", "http://b:2"]
    attached = rollout_plan(replace(dedicated, servers=ServersSection(tp=4, urls=urls)), 128, 8)
    assert attached.num_gpus == 8
    for wrong, words in (
        (ServersSection(tp=4, num_per_node=1, placement="colocated"), "the others wait"),
        (ServersSection(tp=8, num_per_node=2, placement="colocated"), "take 16 of a node's 8 GPUs"),
        (ServersSection(tp=8, placement="dedicated"), "leave none to the trainer"),
    ):
        config = replace(with_servers(RECIPE), servers=wrong)
        (problem,) = placement_problems(config, rollout_plan(config, 128, 8), 128, 8)
        assert words in problem


def plan_of(config: Config, model: dict[str, Any] = QWEN_32B, **assumptions: Any) -> Plan:
    return make_plan(config, model, GPUS["h100-80gb"], 128, Assumptions(**assumptions), check_files=False)


def peak_of(plan: Plan, moment: str) -> Peak:
    (found,) = [peak for peak in plan.peaks if peak.moment == moment]
    return found


def fails_of(plan: Plan) -> list[str]:
    return [finding.text for finding in plan.findings if finding.level == FAILS]


def test_moments_of_each_placement() -> None:
    """Colocated servers start and generate on the trainer's GPUs; dedicated ones never hold the actor."""
    built, *later = ["the actor is built", "an update", "weights go over"]
    colocated = [peak.moment for peak in plan_of(served()).peaks]
    assert colocated == [built, "a server starts", *later, "responses are generated"]
    apart = plan_of(served(placement="dedicated", num_per_node=1, gpus=[4, 5, 6, 7]))
    assert [peak.moment for peak in apart.peaks] == [built, "a server generates on GPUs of its own", *later]
    assert peak_of(apart, "weights go over").server_weights == 0
    in_process = plan_of(RECIPE, QWEN_7B)
    assert [peak.moment for peak in in_process.peaks] == [built, "an update"]
    assert peak_of(in_process, "an update").server_weights == pytest.approx(2 * 7_615_616_512 / GIB)


def test_a_servers_share_that_leaves_the_trainer_no_room_fails() -> None:
    greedy = plan_of(served(memory_fraction=0.95))
    # Its own 0.95 of 78.1, context, graphs and activations, beside the trainer's context and NCCL.
    assert peak_of(greedy, "responses are generated").total == pytest.approx(0.95 * 78.1 + 1 + 1 + 3 + RESIDUE_GIB)
    texts = fails_of(greedy)
    assert any("when responses are generated" in text and "Lower servers.memory_fraction" in text for text in texts)
    assert not fails_of(plan_of(served()))


def test_vllm_does_not_start_on_less_than_its_share() -> None:
    (text, *_) = [text for text in fails_of(plan_of(served("vllm", memory_fraction=0.99))) if "vLLM does not" in text]
    assert "Lower it to 0.98" in text  # 78.1 of 79.6 GiB are free
    assert not any("vLLM does not" in text for text in fails_of(plan_of(served("vllm", memory_fraction=0.98))))
    assert not any("vLLM does not" in text for text in fails_of(plan_of(served(memory_fraction=0.99))))


def test_both_policies_are_there_while_weights_go_over() -> None:
    """Two copies of 72B on 8 GPUs each: neither alone is too much, both together are."""
    config = replace(with_servers(RECIPE), servers=ServersSection(tp=2, num_per_node=4, placement="colocated"))
    config = replace(config, model=replace(config.model, recompute="full"))
    plan = plan_of(config, QWEN_72B)
    lasting = (2 + 4 + 12 / 16) * stage_parameters(SHAPE_72B, config.parallel)[0].parameters / GIB
    server = 2 * 72_706_203_648 / 2 / GIB
    largest = 2 * 152064 * 8192 / GIB
    peak = peak_of(plan, "weights go over")
    assert peak.total == pytest.approx(lasting + server + RESIDUE_GIB + SERVER_RESIDUE_GIB + 0.5 + 3 * largest)
    assert peak.total > 79.6
    assert max(stage.training for stage in plan.stages) < 79.6
    assert any("when weights go over" in text and "servers.tp" in text for text in fails_of(plan))


def test_host_memory_by_hand() -> None:
    config = with_servers(RECIPE)
    stages, rollout = training_memory(config, SHAPE_32B, 128), rollout_plan(config, 128, 8)
    host = host_memory(config, SHAPE_32B, stages, rollout, 8)
    assert host.actor == pytest.approx(8 * (2 + 12 / 16) * 4_096_717_824 / GIB, rel=1e-9)
    assert host.snapshot == pytest.approx(2 * 32_763_876_352 / GIB, rel=1e-9), "one copy, in the servers' precision"
    without = replace(config, servers=replace(config.servers, keep_snapshot=False))
    assert host_memory(without, SHAPE_32B, stages, rollout, 8) == replace(host, snapshot=0.0)
    dedicated = replace(config, servers=replace(config.servers, placement="dedicated"))
    assert plan_of(dedicated, QWEN_32B).host == replace(host, actor=0.0)
    assert plan_of(RECIPE, QWEN_7B).host == HostMemory(0.0, 0.0), "generation in process"


@pytest.fixture
def here(tmp_path: Path) -> Config:
    """A model folder and two data files, all there."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN_7B))
    (model / "tokenizer.json").write_text("{}")
    (model / "model-1.safetensors").write_text("")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    table = pa.table({"prompt": [[{"role": "user", "content": "1+1"}]], "reward_model": [{"ground_truth": "2"}]})
    parquet.write_table(table, tmp_path / "train.parquet")
    (tmp_path / "test.jsonl").write_text('\n{"prompt": "1+2", "answer": "3"}\n')
    train = DataSourceConfig(
        kind="parquet", path=str(tmp_path / "train.parquet"), answer_field="reward_model.ground_truth", verifier="math"
    )
    test = DataSourceConfig(kind="jsonl", path=str(tmp_path / "test.jsonl"), verifier="math")
    data = DataSection(train={"math": train}, evaluation={"aime": test})
    return replace(RECIPE, model=ModelSection(path=str(model), dtype="bfloat16"), data=data)


def test_nothing_is_missing_where_everything_is_there(here: Config) -> None:
    assert list(file_findings(here)) == []


@pytest.mark.parametrize(
    ("breaking", "words"),
    [
        ("model/config.json", "config.json does not exist"),
        ("model/tokenizer.json", "holds no tokenizer"),
        ("model/model-1.safetensors", "lacks 1 of 1 weight files, such as model-1.safetensors"),
        ("train.parquet", "data.train.math.path"),
        ("test.jsonl", "data.evaluation.aime.path"),
    ],
)
def test_a_missing_file_is_named(here: Config, tmp_path: Path, breaking: str, words: str) -> None:
    (tmp_path / breaking).unlink()
    (finding,) = file_findings(here)
    assert finding.level == MISSING
    assert words in finding.text


def test_a_missing_column_is_named_with_those_that_exist(here: Config, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"prompt": "1+2", "solution": {"final": "3"}}\n')
    (finding,) = file_findings(here)
    assert "answer_field=answer" in finding.text
    assert "prompt, solution, solution.final" in finding.text
    wrong = replace(here.data.train["math"], answer_field="reward_model.answer")
    (_, train) = sorted(
        file_findings(replace(here, data=replace(here.data, train={"math": wrong}))), key=lambda finding: finding.text
    )
    assert "reward_model.ground_truth" in train.text


def test_published_schemas_know_their_columns(here: Config) -> None:
    published = replace(here.data.train["math"], schema="dapo_math", answer_field="answer")
    assert list(file_findings(replace(here, data=replace(here.data, train={"math": published})))) == []
    wrong = replace(published, schema="gsm8k")
    (finding,) = file_findings(replace(here, data=replace(here.data, train={"math": wrong})))
    assert finding.level == MISSING
    assert "schema=gsm8k" in finding.text
    assert "no column 'question'" in finding.text


@pytest.mark.parametrize("content", ["", "[1]", "not json"])
def test_a_file_that_is_no_jsonl_is_named(here: Config, tmp_path: Path, content: str) -> None:
    (tmp_path / "test.jsonl").write_text(content)
    (finding,) = file_findings(here)
    assert "cannot be read as jsonl" in finding.text


# --- the command -----------------------------------------------------------------------------------------------------

SMALL = """
run: {name: small}
model: {path: NOWHERE, dtype: bfloat16}
data: {train: {sums: {kind: chain_arithmetic, verifier: chain_arithmetic}}}
rollout: {num_prompts: 64, max_response_tokens: 1024, max_prompt_tokens: 256}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """(configuration, the 7B model's config.json)."""
    config, model = tmp_path / "small.yaml", tmp_path / "config.json"
    config.write_text(SMALL.replace("NOWHERE", str(tmp_path / "nowhere")))
    model.write_text(json.dumps(QWEN_7B))
    return str(config), str(model)


def test_exit_codes(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    config, model = files
    sizes = ["--model-config", model, "--world-size", "8"]
    fitting = ["parallel.tp=4", "parallel.sequence_parallel=true", "model.recompute=full"]
    assert cli.main(["preflight", config, *fitting, *sizes, "--sizes-only"]) == 0
    output = capsys.readouterr().out
    assert "Verdict: fits 8 x h100-80gb" in output
    assert "7,615,616,512" in output
    assert cli.main(["preflight", config, *fitting, *sizes]) == 1
    assert "is missing here" in capsys.readouterr().out
    assert cli.main(["preflight", config, *sizes, "--sizes-only"]) == 1
    assert "FAILS: training takes" in capsys.readouterr().out
    for bad, words in (
        (["parallel.tp=3", *sizes], "8 processes cannot hold"),
        (["parallel.tp=16", "--model-config", model, "--world-size", "16"], "num_attention_heads=28"),
        (["--world-size", "8"], "Name the model's config.json with --model-config"),
        ([*sizes, "--gpu", "abacus"], "--gpu abacus: must be one of a100-80gb"),
        ([*sizes, "--mfu", "35"], "mfu=35.0: must be above 0 and at most 1"),
        (["rollout.nonsense=1", *sizes], "nonsense"),
        ([*sizes, "--model-config", config], "is not valid JSON"),
    ):
        assert cli.main(["preflight", config, *bad]) == 2, bad
        assert words in capsys.readouterr().err


def test_it_imports_neither_torch_nor_transformers(files: tuple[str, str]) -> None:
    config, model = files
    arguments = ["preflight", config, "--model-config", model, "--sizes-only"]
    code = (
        f"import sys; from megatron_fipo import cli; cli.main({arguments!r}); "
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_only_warnings_leave_the_verdict_alone() -> None:
    assert levels([Finding(WARNS, "x")]) == {WARNS}
    once = with_servers(replace(RECIPE, train=TrainSection(num_minibatches=1)))
    plan = make_plan(once, QWEN_32B, GPUS["h100-80gb"], 128, Assumptions(), check_files=False)
    assert WARNS in levels(plan.findings)
    assert plan.fits


@pytest.mark.parametrize(("method", "levels"), [("tensor", [FAILS]), ("distributed", [])])
def test_servers_that_weights_cannot_reach_fail_where_there_are_gpus(method: str, levels: list[str]) -> None:
    """No rank of the trainer is on a dedicated server's GPU, so none can share memory with it."""
    servers = ServersSection(tp=4, placement="dedicated", gpus=[4, 5, 6, 7], weight_sync=method)
    config = replace(with_servers(RECIPE), servers=servers)
    plan = make_plan(config, QWEN_32B, GPUS["h100-80gb"], 128, Assumptions(), check_files=False)
    assert [finding.level for finding in plan.findings if "weight_sync=tensor" in finding.text] == levels
