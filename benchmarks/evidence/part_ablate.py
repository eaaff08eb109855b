"""Measures what each switch is worth: an update with one thing changed, beside the update as the project makes it.

Variants are patches of this process, made from outside. One that changes nothing here, because the code or the machine
lacks what it would change, is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import models
from benchmarks.evidence.models import Measured, Packing, Size
from benchmarks.evidence.patching import megatron_fields, patched
from benchmarks.evidence.report import Settings, SkipCase
from benchmarks.evidence.workbench import Workbench, workbench
from megatron_fipo.actor import schedule
from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import ModelSection
from megatron_fipo.parallel import vocab_log_probs as log_probs_module

BASE = "as it is"
SAME_MODE = "log-probs beside the update's own"
_FUSED = "fuse_wgrad_accumulation"
_ENGINE = "Transformer Engine"


@dataclass(frozen=True)
class Variant:
    """One change.

    Attributes:
        recompute: model.recompute.
        during: entered around building and measuring, given the packing.
        change: changes the actor once it is built; raises SkipCase where there is nothing to change.
        model: further keys of the configuration's section model.
        needs_engine: whether it has a meaning only with Transformer Engine.
    """

    recompute: str = "none"
    during: Callable[[Packing], AbstractContextManager[Any]] = lambda packing: nullcontext()
    change: Callable[[Actor], None] = lambda actor: None
    model: tuple[tuple[str, str], ...] = ()
    needs_engine: bool = False


def _recomputes(*modules: str) -> Callable[[Packing], AbstractContextManager[Any]]:
    changes = {"recompute_granularity": "selective", "recompute_modules": list(modules)}
    return lambda packing: megatron_fields(**changes)


def _lengths(packing: Packing, *, padded: bool) -> AbstractContextManager[None]:
    """Give attention each sequence's length with its padding, or without."""
    original = schedule.packed_sequence_params

    def changed(*args: Any, **kwargs: Any) -> Any:
        params = original(*args, **kwargs)
        whole = params.cu_seqlens_q_padded
        real = torch.tensor([0, *packing.lengths], dtype=whole.dtype).cumsum(0).to(whole)
        assert len(real) == len(whole), "one microbatch holds the whole packing"
        params.cu_seqlens_q = params.cu_seqlens_kv = whole if padded else real
        return params

    return patched(schedule, packed_sequence_params=changed)


def _set_fused(actor: Actor, is_fused: bool) -> None:
    modules = [module for model in actor.models for module in model.modules() if hasattr(module, _FUSED)]
    if not modules:
        raise SkipCase(f"no module has {_FUSED}: the layers are not Transformer Engine's")
    for module in modules:
        setattr(module, _FUSED, is_fused)


def _logits_in(dtype: torch.dtype, packing: Packing) -> AbstractContextManager[None]:
    """Round the output layer's products to bfloat16, or keep the float32 that they are summed up in."""

    def logits(hidden: Tensor, weight: Tensor, temperature: float = 1.0) -> Tensor:
        if dtype == torch.bfloat16:
            product = (hidden @ weight.t()).float()
        elif hidden.is_cuda:
            product = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        else:
            product = hidden.float() @ weight.t().float()
        return product if temperature == 1.0 else product.div_(temperature)

    return patched(log_probs_module, _logits=logits)


def _plain_rows(packing: Packing) -> AbstractContextManager[None]:
    """Send a chunk's logits through PyTorch's own kernels instead of the project's."""
    if not hasattr(log_probs_module, "_row_functions"):
        raise SkipCase("this revision has no kernels of its own for a chunk's logits")
    from megatron_fipo.parallel import logit_rows  # type: ignore[attr-defined]

    plain = (logit_rows.row_sums, logit_rows.logit_gradient)
    return patched(log_probs_module, _row_functions=lambda on: plain)


VARIANTS: dict[str, Variant] = {
    BASE: Variant(),
    "RoPE fused": Variant(during=lambda packing: megatron_fields(apply_rope_fusion=True), needs_engine=True),
    "RoPE not fused": Variant(during=lambda packing: megatron_fields(apply_rope_fusion=False)),
    "recompute selective": Variant(recompute="selective"),
    "recompute full": Variant(recompute="full"),
    "recompute core_attn": Variant(during=_recomputes("core_attn")),
    "recompute mlp": Variant(during=_recomputes("mlp")),
    "cu_seqlens with padding": Variant(during=partial(_lengths, padded=True)),
    "cu_seqlens without padding": Variant(during=partial(_lengths, padded=False)),
    "weight gradients fused": Variant(change=lambda actor: _set_fused(actor, True)),
    "weight gradients not fused": Variant(change=lambda actor: _set_fused(actor, False)),
    "logits in bfloat16": Variant(during=partial(_logits_in, torch.bfloat16)),
    "logits in float32": Variant(during=partial(_logits_in, torch.float32)),
    "log-probs by PyTorch's kernels": Variant(during=_plain_rows),
    "Megatron's layers": Variant(model=(("transformer_engine", "off"),), needs_engine=True),
}


def case_names(settings: Settings) -> list[str]:
    names = (BASE, SAME_MODE, *(name for name in VARIANTS if name != BASE))
    return [f"{size}: {name}" for size in settings.sizes or ("0.5b",) for name in names]


def prepared(settings: Settings) -> AbstractContextManager[Workbench]:
    return workbench()


def run_case(name: str, bench: Workbench, settings: Settings) -> dict[str, Any]:
    size_name, _, variant_name = name.partition(": ")
    size, packing = models.size_of(size_name, settings.tiny), models.uneven_packing(settings.tiny)
    if variant_name == SAME_MODE:
        return same_mode(size, packing, bench)
    base = _base(size, packing, bench, settings)
    variant = VARIANTS[variant_name]
    if variant.needs_engine and base.values["layers"] != _ENGINE:
        raise SkipCase(f"it takes {_ENGINE}'s layers, and these are {base.values['layers']}")
    measured = base if variant_name == BASE else _measure(variant, size, packing, bench, settings)
    return {
        "kind": "ablation",
        "variant": variant_name,
        **measured.values,
        **models.against_base(measured, base),
    }


def _base(size: Size, packing: Packing, bench: Workbench, settings: Settings) -> Measured:
    """The base that variants are compared with, measured once by each process."""
    if size.name not in bench.kept:
        bench.kept[size.name] = _measure(VARIANTS[BASE], size, packing, bench, settings)
        bench.note(bench.kept[size.name].values)
    measured: Measured = bench.kept[size.name]
    return measured


def _measure(variant: Variant, size: Size, packing: Packing, bench: Workbench, settings: Settings) -> Measured:
    known = {field.name for field in fields(ModelSection)}
    if missing := [key for key, _ in variant.model if key not in known]:
        raise SkipCase(f"this revision has no model.{missing[0]}")
    config = bench.config(size, size.built[-1], packing, recompute=variant.recompute, **dict(variant.model))
    with variant.during(packing):
        actor = models.build_actor(config, bench.ranks)
        variant.change(actor)
        return models.measure_actor(actor, config, size, packing, settings)


def same_mode(size: Size, packing: Packing, bench: Workbench) -> dict[str, Any]:
    """Measure whether old log-probs equal the update's own bit for bit, so that a step's first ratio is 1.

    They are also computed in evaluation and in training mode: kernels may differ between the two.
    """
    config = bench.config(size, size.built[-1], packing)
    actor = bench.build(config)
    microbatches = models.make_microbatches(actor, config, packing)
    passes = {
        "": actor.log_probs(microbatches)[0],
        "_when_repeated": actor.log_probs(microbatches)[0],
        "_in_eval_mode": _log_probs_in_mode(actor, microbatches, is_training=False),
        "_in_train_mode": _log_probs_in_mode(actor, microbatches, is_training=True),
    }
    seen: list[Tensor] = []
    loss = models.loss_of(config, bench.ranks)

    def noting(log_probs: Tensor, entropy: Tensor, batch: Any) -> Any:
        seen.append(log_probs.detach().clone())
        return loss(log_probs, entropy, batch)

    actor.update(microbatches, noting, 0)
    mask = microbatches[0].response_mask
    values: dict[str, Any] = {"kind": "same_mode", "tokens": int(mask.sum())}
    for name, found in passes.items():
        reference = passes[""] if name == "_when_repeated" else seen[0]
        difference = (found - reference)[mask].abs()
        values[f"equal{name}"] = not bool(difference.any())
        values[f"max_difference{name}"] = float(difference.max())
        values[f"differing_tokens{name}"] = int((difference > 0).sum())
    return values


def _log_probs_in_mode(actor: Actor, microbatches: list[Any], *, is_training: bool) -> Tensor:
    chunks = actor._chunks
    for chunk in chunks:  # whatever mode the actor asks for
        chunk.train = lambda mode=True, chunk=chunk: type(chunk).train(chunk, is_training)  # type: ignore[method-assign]
    try:
        return actor.log_probs(microbatches)[0]
    finally:
        for chunk in chunks:
            del chunk.train
