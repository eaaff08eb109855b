"""The examples of docs/library.md run: TRL's and verl's against stand-ins with their public signatures."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_fipo
from megatron_fipo import FipoConfig, cli, padded_policy_loss
from tests.unit.test_padded import packed_arguments, padded_batch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/library.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CONFIG = FipoConfig(influence_min=0.8, influence_max=1.2)
"""What the examples use."""
BATCH = {name: padded_batch()[name] for name in ("log_probs", "old_log_probs", "advantages", "response_mask")}


def run_block(imports: str) -> dict[str, Any]:
    """Namespace of the one block of the page that has this line."""
    (block,) = [block for block in BLOCKS if imports in block]
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, "docs/library.md", "exec"), namespace)
    return namespace


def expected_loss(log_probs: Tensor) -> Tensor:
    output = padded_policy_loss(log_probs, *list(BATCH.values())[1:], config=CONFIG)
    return output.loss_sum / output.normalizer


def test_every_python_block_is_run_by_a_test() -> None:
    firsts = (
        *("from megatron_fipo import FipoConfig, future_kl", "def update(", "def packed_loss(", "def sharded_loss("),
        *("class FipoTrainer", "def fipo_loss", "def loss("),
    )
    assert len(BLOCKS) == len(firsts)
    assert [sum(first in block for block in BLOCKS) for first in firsts] == [1] * len(firsts)
    imported = run_block(firsts[0]).keys()
    assert set(megatron_fipo.__all__) - {"__version__"} <= imported, "the page names all that is exported"


@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64, torch.float32])
def test_a_loop_of_ones_own(mask_type: torch.dtype) -> None:
    parameter = BATCH["log_probs"].clone().requires_grad_()
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    update = run_block("def update(")["update"]
    copy = BATCH["log_probs"].clone().requires_grad_()
    expected_loss(copy).backward()  # type: ignore[no-untyped-call]
    old_log_probs, advantages, mask = list(BATCH.values())[1:]
    weight = update(optimizer, lambda: parameter * 1, old_log_probs, advantages, mask.to(mask_type))
    assert copy.grad is not None
    torch.testing.assert_close(parameter.detach(), BATCH["log_probs"] - 0.5 * copy.grad)
    assert float(weight) != 1.0


def test_packed_sequences() -> None:
    arguments = packed_arguments(padded_batch())
    names = ("log_probs", "old_log_probs", "advantages", "response_mask", "cu_seqlens")
    loss = run_block("def packed_loss(")["packed_loss"](*(arguments[name] for name in names))
    torch.testing.assert_close(loss, expected_loss(BATCH["log_probs"]))
    arguments["cu_seqlens"] = torch.tensor([0, len(arguments["log_probs"])])
    other = run_block("def packed_loss(")["packed_loss"](*(arguments[name] for name in names))
    assert abs(float(other - loss)) > 1e-4, "one long sequence is another loss"


def test_the_page_of_torch_conforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [block for block in BLOCKS if "def loss(" in block]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, text, status in (("my_trainer", block, 0), ("my_other", block.replace("clamp(0.8, 1)", "clamp(0.8)"), 1)):
        (tmp_path / f"{name}.py").write_text(text)
        assert cli.main(["conformance", f"{name}:loss"]) == status
        monkeypatch.delitem(sys.modules, name)
    assert "not compared: normalizer, token_loss." in capsys.readouterr().out


# --- TRL ------------------------------------------------------------------------------------------------------------


class GRPOTrainerStandIn:
    """What the example uses of trl.GRPOTrainer 1.16, two processes and 2 of 8 microbatches in an update."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs
        self._metrics: dict[str, defaultdict[str, list[float]]] = {
            "train": defaultdict(list), "eval": defaultdict(list)
        }  # fmt: skip
        self.accelerator = SimpleNamespace(num_processes=2)
        self.args = SimpleNamespace(steps_per_generation=8)
        self.current_gradient_accumulation_steps = 2

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        return self._compute_loss(model, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        raise AssertionError("the example overrides this")

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assert input_ids.shape == attention_mask.shape == (4, 5 + 19)
        assert logits_to_keep == 19
        return self.log_probs, torch.rand(4, 19) if compute_entropy else None, None


def trl_inputs() -> dict[str, Any]:
    mask = BATCH["response_mask"].long()
    return {
        "prompt_ids": torch.ones(4, 5, dtype=torch.int64),
        "prompt_mask": torch.ones(4, 5, dtype=torch.int64),
        "completion_ids": torch.ones(4, 19, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": BATCH["advantages"],
        "old_per_token_logps": BATCH["old_log_probs"],
        "num_items_in_batch": 8 * mask.sum(),  # of a whole batch of rollouts, on both processes
    }


def test_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", module("trl", GRPOTrainer=GRPOTrainerStandIn))
    log_probs = BATCH["log_probs"].clone().requires_grad_()
    trainer = run_block("class FipoTrainer")["FipoTrainer"](log_probs)
    inputs = trl_inputs()
    loss = trainer.compute_loss(SimpleNamespace(training=True), inputs)

    output = padded_policy_loss(log_probs, *list(BATCH.values())[1:], config=CONFIG)
    num_tokens = int(inputs["completion_mask"].sum())
    torch.testing.assert_close(loss, output.loss_sum / (num_tokens * 8 / 2 * 2 / 8))
    loss.backward()
    assert log_probs.grad is not None
    assert bool(log_probs.grad.any())
    (weight,) = trainer._metrics["train"]["fipo/influence_weight"]
    assert weight == pytest.approx(float(output.influence_weights[BATCH["response_mask"]].mean()))
    with pytest.raises(ValueError, match="One update a batch is DAPO"):
        trainer.compute_loss(SimpleNamespace(training=True), inputs | {"old_per_token_logps": None})


# --- verl -----------------------------------------------------------------------------------------------------------


def vanilla_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """PPO's clipped loss with dual clip, which is what verl's "vanilla" computes, in words of our own."""
    assert loss_agg_mode == "token-mean"
    assert rollout_is_weights is None
    ratio = (log_prob - old_log_prob).clamp(-20, 20).exp()
    bounded = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    loss = -torch.minimum(advantages * ratio, advantages * bounded)
    loss = torch.where(advantages < 0, loss.clamp(max=-advantages * config.clip_ratio_c), loss)
    return (loss * response_mask).sum() / response_mask.sum(), {"actor/ppo_kl": 0.0}


def test_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: dict[str, Any] = {"vanilla": vanilla_loss}

    def register_policy_loss(name: str) -> Any:
        return lambda function: registry.setdefault(name, function)

    stand_in = module(
        "verl.trainer.ppo.core_algos",
        register_policy_loss=register_policy_loss,
        get_policy_loss_fn=registry.__getitem__,
    )
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, module(name))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    run_block("def fipo_loss")

    log_prob = BATCH["log_probs"].clone().requires_grad_()
    loss, metrics = registry["fipo"](
        old_log_prob=BATCH["old_log_probs"],
        log_prob=log_prob,
        advantages=BATCH["advantages"][:, None].expand(4, 19),
        response_mask=BATCH["response_mask"],
        loss_agg_mode="token-mean",
        config=SimpleNamespace(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=10.0),
        rollout_is_weights=None,
    )
    ours = BATCH["log_probs"].clone().requires_grad_()
    expected = expected_loss(ours)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(log_prob.grad, ours.grad)
    assert set(metrics) == {"actor/ppo_kl", "actor/fipo_weight"}
    assert metrics["actor/fipo_weight"] != 1.0


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made


def test_the_light_installation_suffices() -> None:
    """With every dependency but torch, omegaconf and pyyaml refused, what the page imports can be had and runs.

    The command needs rich on top.
    """
    code = """
import sys
for name in ("megatron", "transformers", "tokenizers", "huggingface_hub", "safetensors", "tensorboard",
             "math_verify", "reasoning_gym", "pyarrow", "aiohttp", "psutil"):
    sys.modules[name] = None
sys.modules["rich"] = None
import torch
import torch.distributed as dist
from megatron_fipo import *
zeros = torch.zeros(2, 3)
print(float(padded_policy_loss(zeros, zeros, torch.ones(2), torch.ones(2, 3), FipoConfig()).loss_sum))
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sequences = ShardedSequences.of(torch.tensor([0, 4, 6]), dist.group.WORLD)
tokens = TokenValues(torch.zeros(6), torch.zeros(6), torch.ones(6), torch.ones(6, dtype=torch.bool))
print(float(policy_loss(tokens, sequences, FipoConfig()).loss_sum))
del sys.modules["rich"]
from megatron_fipo import cli
print(cli.main(["conformance", "megatron_fipo:padded_policy_loss"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    lines = run.stdout.splitlines()
    assert (lines[:2], lines[-1:]) == (["-6.0", "-6.0"], ["0"]), run.stderr
