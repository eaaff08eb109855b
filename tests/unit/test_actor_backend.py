"""Whose layers are taken, and what is refused for want of Transformer Engine."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.extensions import transformer_engine as extension

from megatron_fipo.actor import backend, precision
from megatron_fipo.actor.backend import LONGEST_UNASKED, check_layers, layers_in_use, uses_transformer_engine
from megatron_fipo.config import Config, ModelSection, ParallelSection, RolloutSection


@contextmanager
def machine(*, has_cuda: bool, has_engine: bool) -> Iterator[None]:
    """A machine with GPUs or without, on which Megatron could import Transformer Engine or could not."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=has_cuda),
        mock.patch.object(extension, "HAVE_TE", has_engine),
    ):
        yield


def config_of(*, dtype: str = "bfloat16", engine: str = "auto", cp: int = 1, tokens: int = LONGEST_UNASKED) -> Config:
    return Config(
        model=ModelSection(dtype=dtype, transformer_engine=engine),
        rollout=RolloutSection(max_prompt_tokens=1000, max_response_tokens=tokens - 1000),
        parallel=ParallelSection(cp=cp),
    )


@pytest.fixture
def broken_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Transformer Engine that was built for another torch, as Python finds it."""
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "pytorch" / "__init__.py").write_text(
        "raise ImportError('transformer_engine_torch.so: undefined symbol: _ZN3c104cuda9SetDeviceEab')\n"
    )
    (package / "pytorch" / "fp8.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("has_cuda", "has_engine", "dtype", "wanted", "expected"),
    [
        (True, True, "bfloat16", "auto", True),
        (True, True, "bfloat16", "off", False),
        (True, True, "float32", "auto", False),  # it attends to packed sequences in half precision only
        (True, False, "bfloat16", "auto", False),
        (False, True, "bfloat16", "auto", False),
    ],
)
def test_transformer_engine_is_used_where_it_can_be(
    has_cuda: bool, has_engine: bool, dtype: str, wanted: str, expected: bool
) -> None:
    with machine(has_cuda=has_cuda, has_engine=has_engine):
        assert uses_transformer_engine(ModelSection(dtype=dtype, transformer_engine=wanted)) is expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (config_of(cp=2), r"is not installed, and parallel\.cp=2 spreads sequences over GPUs\. .* or set model\.trans"),
        (config_of(tokens=4097), r"sequences may have rollout\.max_prompt_tokens \+ .* = 4097 tokens \(more than 4096"),
        (config_of(cp=4, tokens=20480), r"parallel\.cp=4 .* and sequences may have .* = 20480 tokens"),
        (config_of(), ""),
        (config_of(engine="off", cp=4, tokens=20480), ""),
        (config_of(dtype="float32", cp=4, tokens=20480), ""),
    ],
)
def test_what_is_refused_without_it(config: Config, words: str) -> None:
    with (
        machine(has_cuda=True, has_engine=False),
        pytest.raises(ValueError, match=words) if words else nullcontext(),
    ):
        check_layers(config)


@pytest.mark.parametrize(("has_cuda", "has_engine"), [(True, True), (False, False)])
def test_nothing_is_refused_with_it_or_on_a_cpu(has_cuda: bool, has_engine: bool) -> None:
    with machine(has_cuda=has_cuda, has_engine=has_engine):
        check_layers(config_of(cp=4, tokens=20480))


@pytest.mark.usefixtures("broken_installation")
def test_a_broken_installation_is_told_with_its_own_error() -> None:
    symbol = r"\(ImportError: transformer_engine_torch\.so: undefined symbol: _ZN3c104cuda9SetDeviceEab\)"
    with machine(has_cuda=True, has_engine=False):
        assert not uses_transformer_engine(ModelSection(dtype="bfloat16")), "it is found, and cannot be imported"
        with pytest.raises(ValueError, match=rf"cannot be imported {symbol}\. .*{torch.__version__.split('+')[0]}"):
            check_layers(config_of())
        check_layers(config_of(engine="off"))
        with pytest.raises(ValueError, match=rf"model\.fp8=tensorwise: .* which cannot be imported {symbol}"):
            precision.check_fp8("tensorwise")


def test_an_installation_that_is_not_there_has_no_error() -> None:
    with machine(has_cuda=True, has_engine=False):
        assert backend.import_error() is None


@pytest.mark.parametrize(
    ("config", "has_cuda", "has_engine", "words"),
    [
        (config_of(), True, True, "Transformer Engine 2.20.2; attention: its cuDNN or flash-attn"),
        (config_of(), True, False, "Megatron's own; attention: torch's flash kernel (varlen_attn)"),
        (config_of(dtype="float32"), True, True, "Megatron's own; attention: torch's scaled_dot_product_attention"),
        (config_of(), False, False, "Megatron's own; attention: torch's scaled_dot_product_attention"),
    ],
)
def test_one_line_names_the_layers(config: Config, has_cuda: bool, has_engine: bool, words: str) -> None:
    with (
        machine(has_cuda=has_cuda, has_engine=has_engine),
        mock.patch.object(backend, "get_te_version", return_value="2.20.2"),
    ):
        assert layers_in_use(config.model, head_dim=128).startswith(words)


def test_fp8_asks_for_transformer_engine() -> None:
    from megatron_fipo.config.cross_rules.training import precision_problems

    config = config_of(engine="off")
    assert not list(precision_problems(config))
    (problem,) = precision_problems(replace(config, model=replace(config.model, fp8="tensorwise")))
    assert str(problem).startswith(
        "model.transformer_engine=off: model.fp8=tensorwise is computed by Transformer Engine"
    )
