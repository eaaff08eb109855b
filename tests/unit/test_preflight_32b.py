"""Preflight of the 32B recipe against numbers that were worked out by hand, each in the comment above it.

Qwen2.5-32B: 64 layers, H = 5,120, F = 27,648, 40 heads and 8 key-value heads of 128, 152,064 rows, no tied matrices.
tp 8 x cp 2 x dp 8 on 128 H100 of 79.6 GiB; 22,528 tokens a microbatch, 11,264 on each GPU; SGLang servers of 4 GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import load_config
from megatron_fipo.preflight.hardware import GIB
from megatron_fipo.preflight.plan import Plan
from megatron_fipo.preflight.tables import Options, plan_of
from megatron_fipo.preflight.work import Assumptions

FOLDER = Path(__file__).parents[2] / "examples/qwen2_5_32b"
EXACT = 1e-6
ROUNDED = 5e-4
"""Of numbers that the comments round to four digits."""


def planned(*overrides: str, gpu: str = "h100-80gb", **assumptions: Any) -> Plan:
    config = load_config(FOLDER / "fipo.yaml", list(overrides))
    sizes = str(FOLDER / "model_config.json")
    assumed = Assumptions(response_tokens=10_240, prompt_tokens=512, **assumptions)
    return plan_of(config, Options(128, 8, gpu, sizes, check_files=False, assumptions=assumed))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned()


def peak(plan: Plan, moment: str) -> Any:
    return {peak.moment: peak for peak in plan.peaks}[moment]


def test_the_recipe_has_this_layout(plan: Plan) -> None:
    parallel = plan.config.parallel
    assert (parallel.tp, parallel.pp, parallel.cp, plan.batch.data_ranks) == (8, 1, 2, 8)
    assert (plan.config.batch.max_tokens_per_microbatch, plan.config.model.recompute) == (22_528, "none")


def test_weights_gradients_and_optimizer(plan: Plan) -> None:
    (stage,) = plan.stages
    # Of a layer over 8 ranks: queries, keys, values 5,120 x 7,168 with 7,168 biases; output 5,120 x 5,120; MLP
    # 3 x 5,120 x 27,648: 487,595,008 / 8 = 60,949,376; two norms whole: 10,240. Vocabulary: 152,576 rows with padding,
    # 19,072 a rank, twice. 64 x 60,959,616 + 2 x 19,072 x 5,120 + 5,120 = 4,096,717,824.
    assert stage.parameters == 4_096_717_824
    # x 2 bytes = 8.193 GB = 7.631 GiB; x 4 = 15.261 GiB; x 12 over the 16 ranks that share them = 2.862 GiB.
    assert stage.weights == pytest.approx(7.631, rel=ROUNDED)
    assert stage.gradients == pytest.approx(15.261, rel=ROUNDED)
    assert stage.optimizer == pytest.approx(2.862, rel=ROUNDED)


def activations_gib(bytes_per_token_and_layer: float, working: float) -> float:
    return 11_264 * (64 * bytes_per_token_and_layer + working) / GIB


def test_activations(plan: Plan) -> None:
    """A token and layer keeps, of eighths: norms 4 x 5,120 = 20,480 numbers (2,560); queries and output 2 x 5,120 and
    keys and values 2 x 1,024 (1,536); the MLP 3 x 27,648 (10,368). 14,464 x 2 bytes + 5 heads x 4 = 28,948.

    Beside them one layer's backward works on gradients of the MLP, 10,368 x 2 bytes, and two rows of 5,120 x 2:
    41,216. 11,264 x (64 x 28,948 + 41,216) = 21.333 GB = 19.868 GiB.
    """
    (stage,) = plan.stages
    assert activations_gib(28_948, 41_216) == pytest.approx(19.868, rel=ROUNDED)
    assert stage.activations == pytest.approx(activations_gib(28_948, 41_216), rel=EXACT)
    # Negative control: with unfused rotary embeddings, as it was, 31,508 bytes.
    assert stage.activations != pytest.approx(activations_gib(31_508, 41_216), rel=0.05)


def test_activations_that_are_recomputed() -> None:
    """selective drops the MLP with its norm's output, 640 + 10,368 numbers: 28,948 - 22,016 = 6,932 bytes are kept, and
    one layer's 22,016 come back in its backward. full keeps the layer's input, 640 x 2 bytes."""
    (selective,) = planned("model.recompute=selective").stages
    assert selective.activations == pytest.approx(activations_gib(6_932, 41_216 + 22_016), rel=EXACT)
    (full,) = planned("model.recompute=full").stages
    assert full.activations == pytest.approx(activations_gib(1_280, 41_216 + 28_948 - 1_280), rel=EXACT)


@pytest.mark.parametrize(
    ("recipe", "gpu", "copies"),
    [
        ("none", "h100-80gb", 0),
        ("tensorwise", "h100-80gb", 2),
        ("blockwise", "h100-80gb", 2),
        ("tensorwise", "b200", 1),
        ("mxfp8", "b200", 2.0625),
    ],
)
def test_fp8_copies_of_weights(recipe: str, gpu: str, copies: float) -> None:
    """Matrices of the layers on a rank: 64 x 487,587,840 / 8 = 3,900,702,720, of which the MLPs' are 3,397,386,240. Two
    copies of a byte are 7.266 GiB."""
    (stage,) = planned(f"model.fp8={recipe}", gpu=gpu).stages
    assert stage.fp8_weights == pytest.approx(copies * 3_900_702_720 / GIB, rel=EXACT)
    assert stage.fp8_weights == pytest.approx(7.266 * copies / 2, rel=ROUNDED)
    (without,) = planned(gpu=gpu).stages
    assert stage.training - without.training == pytest.approx(stage.fp8_weights), "they count"
    (selective,) = planned(f"model.fp8={recipe}", "model.recompute=selective", gpu=gpu).stages
    kept = 3_900_702_720 - 3_397_386_240 * 63 / 64  # of the layer in backward, the MLP's, too
    assert selective.fp8_weights == pytest.approx(copies * kept / GIB, rel=EXACT)


def test_the_servers_cache(plan: Plan) -> None:
    """Free before SGLang loads: 79.6 - 0.5 (the trainer's context) - 1.0 (its own) = 78.1 GiB. Weights:
    32,763,876,352 x 2 / 4 = 15.257 GiB. Pool: 0.8 x 78.1 - 15.257 = 47.223 GiB. A token: 64 layers x 2 heads x 128 x 2
    x 2 bytes = 65,536, so that 773,702 fit."""
    assert plan.server.weights == pytest.approx(15.257, rel=ROUNDED)
    assert plan.server.pool == pytest.approx(47.223, rel=ROUNDED)
    assert plan.server.pool_tokens == pytest.approx(773_702, abs=2)
    # Negative controls: 0.8 of the whole GPU, as was promised; and beside an actor that was built first (31 GiB).
    assert plan.server.pool != pytest.approx(0.8 * 79.6 - 15.257, rel=0.02)
    assert plan.server.pool != pytest.approx(0.8 * (78.1 - 31) - 15.257, rel=0.5)


def test_the_peaks(plan: Plan) -> None:
    (stage,) = plan.stages
    # The actor from update to update: 7.631 + 15.261 + 2.862 = 25.754. While it is built its weights are there twice:
    # 33.385, with 3.0 of a trainer's context, NCCL and tables. No server has started yet.
    assert peak(plan, "the actor is built").total == pytest.approx(33.385 + 3.0, rel=ROUNDED)
    # An update: activations, log-probs, the reserve of 6.0 and the released server's 2.0.
    update = peak(plan, "an update")
    assert update.total == pytest.approx(25.754 + 19.868 + stage.log_probs + 8.0, rel=ROUNDED)
    assert update.total == pytest.approx(stage.training, rel=EXACT)
    # On the way: a bucket of 0.5 GiB, one of the embedding's 152,064 x 5,120 x 2 = 1.450 GiB, and the embedding whole
    # and in parts, 2.900: 4.850. With the actor, the server's 15.257 and 5.0: 50.861.
    handover = peak(plan, "weights go over")
    assert handover.on_the_way == pytest.approx(4.850, rel=ROUNDED)
    assert handover.total == pytest.approx(50.861, rel=ROUNDED)
    # Negative control: 2 buckets of 512 MiB and the update's reserve, as it was.
    assert handover.total != pytest.approx(25.754 + 6.0 + 15.257 + 3.0 + 3.900, rel=0.02)
    # Generating: 0.8 x 78.1 = 62.48 of weights and cache, the server's 1.0 + 1.0 + 3.0 and the trainer's 3.0.
    assert peak(plan, "responses are generated").total == pytest.approx(62.48 + 5.0 + 3.0, rel=ROUNDED)
    assert peak(plan, "a server starts").total == pytest.approx(62.48 + 5.0 + 0.5, rel=ROUNDED)


def test_flops(plan: Plan) -> None:
    """A token: 2 x (64 x 487,587,840 + 152,064 x 5,120) = 6.3968e10; attention over 10,752 tokens, half of the pairs:
    64 x 2 x 5,120 x 10,752 = 7.0464e9. A sequence: 10,752 x 7.1015e10 = 7.6355e14."""
    sequence = 7.6355e14
    assert plan.cost.flops["old log-probs"] == pytest.approx(8_192 * sequence, rel=ROUNDED)
    assert plan.cost.flops["updates"] == pytest.approx(3 * 8_192 * sequence, rel=ROUNDED)
    # Logits anew: 2 x 152,064 x 5,120 x 10,752 = 1.6742e13 a sequence. Attention is not recomputed.
    assert plan.cost.flops["recompute"] == pytest.approx(8_192 * 1.6742e13, rel=ROUNDED)
    # selective: also the MLP, 2 x 64 x 424,673,280 x 10,752 = 5.8446e14. The attention's 7.5763e13 would be far off.
    selective = planned("model.recompute=selective").cost.flops["recompute"]
    assert selective == pytest.approx(8_192 * (1.6742e13 + 5.8446e14), rel=ROUNDED)
    assert selective != pytest.approx(8_192 * (1.6742e13 + 7.5763e13), rel=0.5)
    full = planned("model.recompute=full").cost.flops["recompute"]
    assert full == pytest.approx(8_192 * sequence, rel=ROUNDED)


def test_waits(plan: Plan) -> None:
    """Tensor parallelism: 4 x 7/8 x 5,120 x 2 bytes = 35,840 a token, layer and pass, at 351 GB/s 102.1 ns. The ring:
    2 x 128 x 2 = 512 bytes at 45 GB/s, 11.4 ns, beside half of an attention of 2 x 5,120 x 10,752 / 8 = 1.3763e7
    operations at 494.5 TFLOP/s, 27.8 ns: hidden. A rank has 8,192 x 10,752 / 16 = 5.505e6 tokens: x 64 layers x 102.1
    ns = 35.98 s a pass; log-probs are one, updates two."""
    assert plan.cost.waiting_seconds == pytest.approx(3 * 35.98, rel=1e-3)
    # Work at half the peak of 128 x 989 TFLOP/s: 4 x 8,192 x 7.6355e14 + 1.3715e17 = 2.5157e19 in 397.5 s.
    busy = plan.cost.seconds["log-probs"] + plan.cost.seconds["updates"] - plan.cost.waiting_seconds
    assert busy == pytest.approx(397.5, rel=1e-3)
    # Useful are 2.5020e19 operations, in 505.4 s on a peak of 1.2659e17.
    assert plan.cost.mfu == pytest.approx(0.391, rel=1e-3)
    # Four ranks in a ring, over four nodes: three steps of 11.4 ns beside 3/4 of 27.8 ns; 13.3 ns stay, twice that in
    # backward. 2.7525e6 tokens a rank of 45,056 (dp 4, cp 4 has as many as dp 8, cp 2): x 64 x 4 x 13.3 ns.
    wider = planned("parallel.cp=4", "batch.max_tokens_per_microbatch=45056")
    assert wider.cost.waiting_seconds - plan.cost.waiting_seconds == pytest.approx(
        5.505e6 * 64 * 4 * 13.26e-9, rel=0.01
    )
    given = planned(mfu=0.391)
    assert given.cost.waiting_seconds == 0
    both = ("log-probs", "updates")
    recomputed = plan.cost.flops["recompute"] / (128 * 989e12 * 0.391)
    assert sum(given.cost.seconds[name] for name in both) == pytest.approx(505.4 + recomputed, rel=1e-3)


def test_recompute_waits_for_what_it_exchanges_anew(plan: Plan) -> None:
    """Half of a forward pass's exchanges are the MLP's."""
    selective, full = (planned(f"model.recompute={name}").cost for name in ("selective", "full"))
    assert selective.waiting_seconds == pytest.approx(3.5 * 35.98, rel=1e-3)
    assert full.waiting_seconds == pytest.approx(4 * 35.98, rel=1e-3)


def test_fp8_leaves_the_output_layer_and_what_waits(plan: Plan) -> None:
    fp8 = planned("model.fp8=tensorwise")
    assert fp8.cost.waiting_seconds == pytest.approx(plan.cost.waiting_seconds)
    # Layers' products: 2 x 64 x 487,587,840 = 6.2411e10 of 7.1015e10 a token, at 989/1,979 of the time.
    share = 6.2411e10 / 7.1015e10
    busy = plan.cost.seconds["log-probs"] - plan.cost.waiting_seconds / 3
    fp8_busy = fp8.cost.seconds["log-probs"] - fp8.cost.waiting_seconds / 3
    assert fp8_busy / busy == pytest.approx(1 - share * (1 - 989 / 1979), rel=1e-3)
    # The recomputed MLP is in FP8, too; the logits are not.
    selective = planned("model.fp8=tensorwise", "model.recompute=selective")
    more = (selective.cost.seconds["updates"] - fp8.cost.seconds["updates"]) - 0.5 * 35.98
    assert more == pytest.approx(8_192 * 5.8446e14 * 989 / 1979 / (128 * 494.5e12), rel=2e-3)


def test_float32_recomputes_attention_instead(plan: Plan) -> None:
    float32 = replace(plan.config, model=replace(plan.config.model, dtype="float32", recompute="selective"))
    sizes = str(FOLDER / "model_config.json")
    assumed = Assumptions(response_tokens=10_240, prompt_tokens=512)
    cost = plan_of(float32, Options(128, 8, "h200", sizes, check_files=False, assumptions=assumed)).cost
    assert cost.flops["recompute"] == pytest.approx(8_192 * (1.6742e13 + 7.5763e13), rel=ROUNDED)
