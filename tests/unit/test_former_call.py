"""The former call of `policy_loss` gives what today's gives, bit for bit, and says what to write in its place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo import FipoConfig, LossOutput, TokenValues, WholeSequences, policy_loss
from megatron_fipo.metrics.reductions import to_plain
from megatron_fipo.rl.sequences import count_per_sequence, sequence_ids_of
from tests.unit.test_objective import FIPO, batch, zigzag_rows

PLACES = ("log_probs", "old_log_probs", "advantages", "response_mask", "cu_seqlens")
CONFIGS = {
    "fipo": FIPO,
    "dapo": FipoConfig(future_kl=False),
    "kl and entropy": replace(FIPO, kl_coefficient=0.1, entropy_coefficient=0.01),
    "sequence_mean": replace(FIPO, loss_aggregation="sequence_mean"),
    "masked": replace(FIPO, rollout_correction="token_masked", loss_aggregation="sequence_sum", sequence_sum_tokens=64),
}
WORDS = r"is deprecated. Write policy_loss\(TokenValues\(.*WholeSequences\(cu_seqlens"
IN_PLACES = "every argument in its place"
BY_NAME = "every argument by name"
FORMS = (IN_PLACES, BY_NAME)


def extras() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    old = batch()["old_log_probs"]
    noise = {name: torch.rand(len(old), generator=generator) for name in ("reference", "rollout", "entropy")}
    return {
        "reference_log_probs": old + noise["reference"],
        "rollout_log_probs": old + noise["rollout"],
        "entropy": noise["entropy"],
    }


def differences(one: tuple[LossOutput, Tensor], other: tuple[LossOutput, Tensor]) -> set[str]:
    """What of two losses and their gradients differs, down to the last bit."""
    found = set() if torch.equal(one[1], other[1]) else {"gradient"}
    mine, theirs = ({**vars(output), "metrics": to_plain(output.metrics)} for output, _ in (one, other))
    return found | {name for name in mine if not same(mine[name], theirs[name])}


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(value, theirs[name]) for name, value in mine.items())
    return torch.equal(mine, theirs) if isinstance(mine, Tensor) else bool(mine == theirs)


def with_gradient(log_probs: Tensor, loss: Callable[[Tensor], LossOutput]) -> tuple[LossOutput, Tensor]:
    leaf = log_probs.clone().requires_grad_()
    output = loss(leaf)
    output.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return output, leaf.grad


def former(form: str, config: FipoConfig) -> tuple[LossOutput, Tensor]:
    inputs = batch()

    def loss(log_probs: Tensor) -> LossOutput:
        given: list[Any] = [log_probs, *(inputs[name] for name in PLACES[1:]), config]
        places = given if form == IN_PLACES else []
        names = {} if form == IN_PLACES else dict(zip((*PLACES, "config"), given, strict=True))
        with pytest.warns(DeprecationWarning, match=WORDS):
            return policy_loss(*places, **names, **extras())

    return with_gradient(inputs["log_probs"], loss)


def todays(config: FipoConfig) -> tuple[LossOutput, Tensor]:
    inputs = batch()
    cu_seqlens = inputs.pop("cu_seqlens")

    def loss(log_probs: Tensor) -> LossOutput:
        tokens = TokenValues(**{**inputs, "log_probs": log_probs}, **extras())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return policy_loss(tokens, WholeSequences(cu_seqlens), config)

    return with_gradient(inputs["log_probs"], loss)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_former_call_gives_the_same_bits(name: str, form: str) -> None:
    assert differences(former(form, CONFIGS[name]), todays(CONFIGS[name])) == set()


def test_a_difference_would_be_seen() -> None:
    others = differences(former(IN_PLACES, FIPO), todays(replace(FIPO, half_life_tokens=32.001)))
    assert {"gradient", "loss_sum", "future_kl", "influence_weights", "metrics"} <= others


def test_the_warning_points_at_the_line_that_calls() -> None:
    inputs = batch()
    with pytest.warns(DeprecationWarning, match=WORDS) as caught:
        policy_loss(**inputs, config=FIPO)  # type: ignore[call-arg]
    assert caught[0].filename == __file__


def _shard(config: FipoConfig, cp: int, rank: int, *, is_former: bool) -> tuple[LossOutput, Tensor]:
    """A context-parallel rank's loss, its suffix sum and its sum over ranks being known functions."""
    inputs = batch()
    cu = inputs.pop("cu_seqlens")
    rows = zigzag_rows(cu, cp, rank)
    whole_ids = sequence_ids_of(cu, int(cu[-1]), torch.device("cpu"))
    ids, counts = whole_ids[rows], count_per_sequence(inputs["response_mask"], whole_ids, len(cu) - 1)
    per_token = {name: value[rows] for name, value in {**inputs, **extras()}.items()}

    def suffix_sum(x: Tensor, flags: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        assert torch.equal(cu_seqlens, cu)
        return x.cumsum(0), 2 * count_per_sequence(flags, ids, len(cu) - 1)

    class Sequences:
        num, response_tokens, counts_here = len(cu) - 1, counts, rank == 0

        def __init__(self) -> None:
            self.ids = ids

        def suffix_sum(self, x: Tensor, flags: Tensor, half_life_tokens: float) -> tuple[Tensor, Tensor]:
            return suffix_sum(x, flags, cu)

        def total(self, per_sequence: Tensor) -> Tensor:
            return 3 * per_sequence

    def loss(log_probs: Tensor) -> LossOutput:
        tokens = {**per_token, "log_probs": log_probs}
        if not is_former:
            return policy_loss(TokenValues(**tokens), Sequences(), config)
        with pytest.warns(DeprecationWarning, match=WORDS):
            return policy_loss(  # type: ignore[call-arg]
                **tokens,
                cu_seqlens=cu,
                config=config,
                suffix_sum=suffix_sum,
                sequence_ids=ids,
                response_token_counts=counts,
                counts_sequences=rank == 0,
                sum_over_shards=lambda own: 3 * own,
            )

    return with_gradient(per_token["log_probs"], loss)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["none", "token_masked", "sequence_masked"])
def test_the_former_call_of_a_rank_gives_the_same_bits(kind: str, rank: int) -> None:
    config = replace(CONFIGS["masked"], rollout_correction=kind)
    one, other = (_shard(config, 2, rank, is_former=is_former) for is_former in (True, False))
    assert differences(one, other) == set()
    assert differences(one, _shard(config, 2, 1 - rank, is_former=False))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 44])}, ValueError, "cu_seqlens ends at 44 but there are 88 tokens"),
        ({"sequence_ids": torch.zeros(88, dtype=torch.int64)}, ValueError, "needs response_token_counts"),
        ({"sequence_ids": torch.arange(3), "response_token_counts": torch.ones(4)}, ValueError, "have 3 tokens"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages has shape \(3,\)"),
        ({"gamma": 0.9}, TypeError, "unexpected keyword argument 'gamma'"),
    ],
)
def test_the_former_call_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    config = CONFIGS["sequence_mean"]
    with pytest.warns(DeprecationWarning, match=WORDS), pytest.raises(error, match=message):
        policy_loss(**{**batch(), **changes}, config=config)  # type: ignore[call-arg]
