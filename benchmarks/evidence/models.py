"""Real actors of the published sizes with random weights, real microbatches, and the real loss.

Weights are made in place: the folder that an actor is built from holds a config.json and nothing else, and the one
function that would read weights from it is replaced. Everything else is the project's own.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from torch import Tensor, nn

from benchmarks.evidence import machine
from benchmarks.evidence.measuring import GIB, gib, peak_memory, time_calls
from benchmarks.evidence.report import Settings
from megatron_fipo.actor import trained
from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import (
    BatchSection,
    Config,
    ModelSection,
    ParallelSection,
    RolloutSection,
    ServersSection,
    TrainSection,
)
from megatron_fipo.convert.hf_config import ModelShape, read_model_shape
from megatron_fipo.parallel.batch import build_minibatches
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.preflight.memory import training_memory
from megatron_fipo.preflight.work import forward_flops
from megatron_fipo.rl.objective import LossOutput
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory

PAD_TOKEN = 0
LOGIT_STD = 4.0
"""Standard deviation of random logits: the largest of 152,064 is then about 18, as in a trained model, where bfloat16
steps by 0.125."""
_GAIN, _RESIDUAL_GAIN = 0.6, 6.0
"""Standard deviations of matrices, as multiples of 1 / sqrt(inputs): Qwen2.5's own 0.02, and more for those that write
into the residual. With tied embeddings a token would otherwise predict itself with certainty."""
_DRIFT = 0.02
"""Standard deviation of a token's log-prob shift between old and current policy, so that Future-KL and clipping have
something to do."""


@dataclass(frozen=True)
class Size:
    """A model's sizes, those of Qwen2.5.

    Attributes:
        built: numbers of layers of which actors are built; the last is the usual one.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    vocab: int
    tied: bool
    built: tuple[int, ...]

    def raw(self, layers: int, longest: int) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "vocab_size": self.vocab,
            "max_position_embeddings": max(longest, 32768),
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "eos_token_id": 1,
            "pad_token_id": PAD_TOKEN,
            "initializer_range": 0.02,
            "torch_dtype": "bfloat16",
        }


_PUBLISHED = {
    size.name: size
    for size in (
        Size("0.5b", 896, 4864, 24, 14, 2, 151936, True, (24,)),
        Size("1.5b", 1536, 8960, 28, 12, 2, 151936, True, (28,)),
        # Weights, gradients and Adam's state of all 28 layers are 137 GB: two cuts give the time of one layer.
        Size("7b", 3584, 18944, 28, 28, 4, 152064, False, (2, 6)),
        Size("32b", 5120, 27648, 64, 40, 8, 152064, False, (4,)),
    )
}


def size_of(name: str, tiny: bool) -> Size:
    """A size by its name; tiny shrinks it, but keeps tied embeddings and the number of cuts."""
    size = _PUBLISHED[name]
    if not tiny:
        return size
    built = (1, 2) if len(size.built) > 1 else (2,)
    return replace(size, hidden=64, intermediate=128, layers=3, heads=8, groups=4, vocab=384, built=built)


@dataclass(frozen=True)
class Packing:
    """Lengths of the sequences of one microbatch."""

    name: str
    lengths: tuple[int, ...]
    pad_multiple: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return sum(self.lengths)

    @property
    def padded(self) -> int:
        multiple = self.pad_multiple or 1
        return sum(-(-length // multiple) * multiple for length in self.lengths)


def even_packings(tiny: bool) -> list[Packing]:
    """The same tokens as one, two and twenty sequences."""
    whole = 160 if tiny else 20480
    return [Packing(f"{n} x {whole // n}", (whole // n,) * n) for n in (1, 2, 20)]


def uneven_packing(tiny: bool) -> Packing:
    """Eight sequences of very different lengths, none a multiple of what each is padded to."""
    shares = (1, 2, 3, 5, 8, 13, 30, 98)
    unit, multiple = (1, 4) if tiny else (127, 64)
    return Packing("8 uneven", tuple(share * unit for share in shares), multiple)


def write_folder(folder: Path, size: Size, layers: int, longest: int) -> str:
    """A folder with config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(size.raw(layers, longest)), encoding="utf-8")
    return str(folder)


def config_for(
    folder: str,
    packing: Packing,
    *,
    recompute: str = "none",
    fp8: str = "none",
    parallel: ParallelSection | None = None,
    **model: str,
) -> Config:
    """The configuration of an actor that trains on one microbatch at a time, beside servers on other GPUs."""
    longest = max(packing.lengths)
    multiple = packing.pad_multiple or 1
    tokens = -(-max(packing.padded, longest) // 4096) * 4096 if fp8 != "none" else packing.padded
    return Config(
        model=ModelSection(
            path=folder,
            dtype="bfloat16",
            fp8=fp8,
            recompute=recompute,
            **(layer_choice() | model),  # type: ignore
        ),
        rollout=RolloutSection(engine="sglang", max_prompt_tokens=max(longest // 16, 1), max_response_tokens=longest),
        servers=ServersSection(placement="dedicated"),
        train=TrainSection(num_minibatches=1),
        parallel=parallel or ParallelSection(),
        batch=BatchSection(max_tokens_per_microbatch=tokens, pad_multiple=None if multiple == 1 else multiple),
    )


def layer_choice() -> dict[str, str]:
    """Keys that ask for Megatron's layers where Transformer Engine is missing: long sequences are refused otherwise."""
    has_key = "transformer_engine" in {field.name for field in fields(ModelSection)}
    return {"transformer_engine": "off"} if has_key and not HAVE_TE else {}


@contextmanager
def random_weights_in_place(seed: int = 0) -> Iterator[None]:
    """Actors that are built inside get random weights, the same for the same names and sizes, and read no file."""
    original = trained.load_weights

    def fill(chunks: Sequence[nn.Module], *_: Any, tp_rank: int = 0, **__: Any) -> None:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                _fill(parameter, name, seed, tp_rank)

    trained.load_weights = fill  # type: ignore[assignment]
    try:
        yield
    finally:
        trained.load_weights = original


_IN_THE_NEXT_MODULE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Names of norms in Transformer Engine's layers, where they belong to the product behind them, and in Megatron's."""


@torch.no_grad()
def _fill(parameter: nn.Parameter, name: str, seed: int, tp_rank: int) -> None:
    # Shards of a matrix must differ from rank to rank; parameters that each rank holds whole must be equal.
    rank = tp_rank if getattr(parameter, "tensor_model_parallel", False) else 0
    for transformer_engines, megatrons in _IN_THE_NEXT_MODULE.items():
        name = name.replace(transformer_engines, megatrons)
    generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{seed} {name} {rank}".encode()))
    if parameter.dim() == 1:
        parameter.normal_(0.0, 0.1, generator=generator)
        if not name.endswith("bias"):
            parameter.add_(1.0)
    elif "embedding" in name or "output_layer" in name:
        parameter.normal_(0.0, LOGIT_STD / parameter.shape[1] ** 0.5, generator=generator)
    else:
        gain = _RESIDUAL_GAIN if "linear_proj" in name or "linear_fc2" in name else _GAIN
        parameter.normal_(0.0, gain / parameter.shape[1] ** 0.5, generator=generator)


def build_actor(config: Config, ranks: ParallelGroups) -> Actor:
    """A real actor with random weights. Collective over all ranks."""
    with random_weights_in_place():
        return Actor(config, ranks)


def make_groups(packing: Packing, vocab_size: int) -> list[Group]:
    """A group of one sample for each length: a short prompt, then the response, advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for index, length in enumerate(packing.lengths):
        prompt = max(length // 16, 1) if length > 1 else 1
        response = length - prompt
        sample = Trajectory.of_response(
            prompt_id=index,
            sample_index=0,
            prompt_ids=torch.randint(2, vocab_size, (prompt,), generator=generator),
            response_ids=torch.randint(2, vocab_size, (response,), generator=generator),
            rollout_log_probs=_DRIFT * torch.randn(response, generator=generator),
            finish_reason="stop",
            advantage=(1.0, -1.0)[index % 2],
        )
        groups.append(Group(Prompt(index, "made", "", (), "exact", None), [sample]))
    return groups


def make_microbatches(actor: Actor, config: Config, packing: Packing) -> list[PackedBatch]:
    """This rank's microbatches of one update, with the log-probs of an old policy near the actor's. Collective."""
    groups = make_groups(packing, actor.shape.vocab_size)
    (microbatches,) = build_minibatches(groups, config, actor.ranks, PAD_TOKEN)
    for batch, log_probs in zip(microbatches, actor.log_probs(microbatches), strict=False):
        batch.old_log_probs = log_probs - batch.rollout_log_probs
    return microbatches


def loss_of(config: Config, ranks: ParallelGroups) -> Callable[[Tensor, Tensor, PackedBatch], LossOutput]:
    """The trainer's loss."""

    def loss(log_probs: Tensor, entropy: Tensor, batch: PackedBatch) -> LossOutput:
        return Objective(config.objective, ranks.cp)(log_probs, entropy, batch)

    return loss


def predicted_parts(config: Config, shape: ModelShape, world_size: int = 1) -> dict[str, float]:
    """GiB on each GPU at the peak of an update, by preflight, without its reserve for what PyTorch does not count."""
    stage = training_memory(config, shape, world_size)[0]
    names = ("weights", "gradients", "optimizer", "activations", "fp8_weights", "log_probs")
    return {name: round(getattr(stage, name), 4) for name in names}


def fitting_recompute(folder: str, packing: Packing, device: str) -> str:
    """Return "none" if preflight says that training fits on this GPU, else "full"; "none" on a CPU."""
    if device != "cuda":
        return "none"
    config, shape = config_for(folder, packing), read_model_shape(folder)
    stage = training_memory(config, shape, 1)[0]
    return "none" if stage.training < torch.cuda.get_device_properties(0).total_memory / GIB else "full"


def training_flops(shape: ModelShape, packing: Packing) -> float:
    """FLOPs of forward and backward over the packing: three forward passes by preflight's count; no recompute."""
    return 3 * sum(forward_flops(shape, length) for length in packing.lengths)


@dataclass
class Measured:
    """The measurements of an actor.

    Attributes:
        values: the values that the schema promises for an actor.
        log_probs: float32 log-probs of all rows, under the weights that it was built with, on the CPU.
        microbatches: microbatches of the update that was measured.
    """

    values: dict[str, Any]
    log_probs: Tensor
    grad_norm: float
    microbatches: list[PackedBatch]


def measure_actor(
    actor: Actor, config: Config, size: Size, packing: Packing, settings: Settings, world_size: int = 1
) -> Measured:
    """Times, rates and memory of log-probs and updates of one packing. Collective."""
    microbatches = make_microbatches(actor, config, packing)
    found = actor.log_probs(microbatches)
    log_probs = torch.cat([part.cpu() for part in found]) if found else torch.empty(0)
    steps = itertools.count()
    loss = loss_of(config, actor.ranks)

    def update() -> float:
        return actor.update(microbatches, loss, next(steps)).grad_norm

    grad_norm = update()  # the weights of all variants are still the same; and Adam's state comes into being
    with peak_memory(settings.device) as peak:
        update()
    log_probs_time = time_calls(lambda: actor.log_probs(microbatches), settings)
    update_time = time_calls(update, settings)
    clock = machine.sm_clock_mhz(settings.device)
    flops = training_flops(actor.shape, packing)
    gpu = machine.known_gpu(settings.device)
    rate = flops / world_size / (update_time.median_ms / 1e3)
    parts = predicted_parts(config, actor.shape, world_size)
    seen = machine.backends(actor)
    values = {
        "model": size.name,
        "layers_built": actor.shape.num_layers,
        "layers": seen["layers"],
        "attention": seen["attention"],
        "packing": packing.name,
        "tokens": packing.tokens,
        "recompute": config.model.recompute,
        "fp8": config.model.fp8,
        "log_probs_ms": round(log_probs_time.median_ms, 3),
        "update_ms": round(update_time.median_ms, 3),
        "update_repeats": len(update_time.calls_ms),
        "tokens_per_s": round(packing.tokens / (update_time.median_ms / 1e3), 1),
        "update_tflop": round(flops / 1e12, 6),
        "tflop_per_s": round(rate / 1e12, 4),
        "mfu": round(rate / gpu.peak_flops, 4) if gpu else None,
        "peak_gib": gib(peak.peak_bytes),
        "peak_reserved_gib": None if peak.reserved_bytes is None else gib(peak.reserved_bytes),
        "predicted_gib": round(sum(parts.values()), 4),
        "predicted_parts_gib": parts,
        "grad_norm": grad_norm,
        "clock_sm_mhz": clock,
    }
    return Measured(values, log_probs, grad_norm, microbatches)


def against_base(measured: Measured, base: Measured) -> dict[str, float]:
    """How a variant's numbers differ from the base's, over the tokens of responses."""
    mask = torch.cat([batch.response_mask.cpu() for batch in base.microbatches])
    own_mask = torch.cat([batch.response_mask.cpu() for batch in measured.microbatches])
    difference = (measured.log_probs[own_mask] - base.log_probs[mask]).abs()
    return {
        "mean_log_prob_difference": float(difference.mean()),
        "max_log_prob_difference": float(difference.max()),
        "grad_norm_ratio": measured.grad_norm / base.grad_norm,
        "update_time_ratio": round(measured.values["update_ms"] / base.values["update_ms"], 4),
    }
