"""A checkpoint goes on with the other Adam: saved by torch's on CPUs, loaded by Transformer Engine's on GPUs, and back.

Transformer Engine does not run without a GPU. What stands in for its Adam keeps its contract as far as a checkpoint can
see it: where the step count lies and of which type it must be, what a parameter group holds, and which state it takes
when it is loaded (transformer_engine/pytorch/optimizers/fused_adam.py). It updates by torch's own formula, so that both
must go the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import optimizer as core_optimizer
from megatron.core.optimizer import distrib_optimizer
from torch.optim.adamw import adamw

from megatron_fipo.actor import optimizer_state
from megatron_fipo.actor.actor import Actor
from megatron_fipo.checkpoint.torch_dist import Keeping, begin_checkpoint, load_checkpoint
from tests.parallel import layouts
from tests.parallel.layouts import Case, Outcome, config_of, layout, train_step, whole_weights
from tests.parallel.ranks import RankError, run_ranks


class FusedAdam(torch.optim.Optimizer):
    """An Adam that counts an integer for each parameter group."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: Any,
        eps: float,
        weight_decay: float,
        adam_w_mode: bool,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode
        assert not capturable
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for state in state_dict["state"].values():
            assert state.keys() <= {"exp_avg", "exp_avg_sq"}, f"a state that it does not know: {state.keys()}"
        super().load_state_dict(state_dict)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            if type(group["step"]) is not int:
                raise TypeError(f"incompatible function arguments: step={group['step']}")
            assert group["bias_correction"]
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adamw(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in parameters],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


@contextmanager
def fused() -> Iterator[None]:
    """Megatron as it is where Transformer Engine can be imported, as far as its choice of an Adam goes."""
    with (
        mock.patch.multiple(core_optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.multiple(distrib_optimizer, Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
    ):
        yield


def _goes_on(saves_fused: bool, goes_on_fused: bool, num_steps: int, model: str, folder: str) -> None:
    """Train, save, and go on with each Adam: the same weights after another step."""
    config, weights = config_of(Case("alone", max_tokens=400), model), []
    with layout(config.parallel) as ranks:
        with fused() if saves_fused else nullcontext():
            actor = Actor(config, ranks)
            for step in range(num_steps):
                train_step(actor, config, step, Outcome())
            saved = begin_checkpoint(actor, folder, num_steps, {}, Keeping(last=1), asynchronous=False).finish()
            train_step(actor, config, num_steps, Outcome())
            weights.append(whole_weights(actor))
        with fused() if goes_on_fused else nullcontext():
            actor = Actor(config, ranks)
            assert isinstance(actor.optimizer.chained_optimizers[0].optimizer, FusedAdam) is goes_on_fused
            load_checkpoint(actor, saved)
            train_step(actor, config, num_steps, Outcome())
            weights.append(whole_weights(actor))
            begin_checkpoint(
                actor, folder, num_steps + 1, {}, Keeping(last=1), asynchronous=False
            ).finish()  # and it can be saved again
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return layouts.save_models(tmp_path_factory.mktemp("models"), num_layers=2)["qwen2"]


@pytest.mark.parametrize("num_steps", [1, 0], ids=["after updates", "before any"])
@pytest.mark.parametrize(
    ("saves_fused", "goes_on_fused"),
    [(False, True), (True, False), (True, True)],
    ids=["torch's to fused", "fused to torch's", "fused to fused"],
)
def test_a_checkpoint_goes_on_with_either_adam(
    model: str, tmp_path: Path, saves_fused: bool, goes_on_fused: bool, num_steps: int
) -> None:
    run_ranks(_goes_on, 1, saves_fused, goes_on_fused, num_steps, model, str(tmp_path), timeout_s=120)


def _goes_on_with_what_was_saved(model: str, folder: str) -> None:
    with mock.patch.object(optimizer_state, "separate_adam_steps"):
        _goes_on(False, True, 1, model, folder)


def test_what_torchs_adam_saved_does_not_fit_the_fused_one_as_it_is(model: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"KeyError: 'bias_correction'|incompatible function arguments: step=3\.0"):
        run_ranks(_goes_on_with_what_was_saved, 1, model, str(tmp_path), timeout_s=120)
