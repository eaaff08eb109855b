"""Checks that the actor's model and transformers' compute the same logits from the same text.

One model is in memory at a time: transformers' runs in a process of its own, leaves its logits in a file, and ends;
then the actor's model runs on as many processes as its layout has.

Shapes: T tokens of all passages, V vocabulary, H hidden size.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_fipo.actor.hidden_states import unwrap
from megatron_fipo.actor.model import build_model, packed_sequence_params
from megatron_fipo.config import ModelSection, ParallelSection
from megatron_fipo.config.model_layout import division_problems
from megatron_fipo.convert.checkpoint_pickles import check_pickles
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.convert.stream import load_weights
from megatron_fipo.convert.torch_dist import is_torch_dist
from megatron_fipo.convert.torch_dist_writer import EXTRA_STATE
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.parallel import cpu
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.local_ranks import run_local_ranks

BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of a logit, over the largest logit, that rounding accounts for. A wrong weight gives about 1."""

PASSAGES = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "
    "\u201cand what is the use of a book,\u201d thought Alice \u201cwithout pictures or conversations?\u201d",
    "Let n be a positive integer. Show that the sum of the first n odd numbers is n^2: 1 + 3 + 5 + ... + (2n - 1) = "
    "n^2. For n = 1 both sides are 1. If it holds for n, then adding 2n + 1 gives n^2 + 2n + 1 = (n + 1)^2.",
    "def greatest_common_divisor(a: int, b: int) -> int:\n    while b:\n        a, b = b, a % b\n    return a\n",
    "Habe nun, ach! Philosophie, Juristerei und Medizin, und leider auch Theologie durchaus studiert, mit hei\u00dfem "
    "Bem\u00fchn. \u5b66\u800c\u65f6\u4e60\u4e4b\uff0c\u4e0d\u4ea6\u8bf4\u4e4e\uff1f",
)
"""Public-domain text (Carroll, Goethe, Confucius), a proof and a program."""

_LONGEST = 512
_RANKS: dict[str, Any] = {
    # The first silences what the second imports.
    "preload": ["megatron_fipo.quiet", "megatron_fipo.convert.offline.logits"],
    "timeout_s": 3600.0,
}
"""Arguments of `run_local_ranks` with which the processes are started."""


@dataclass(frozen=True)
class LogitsComparison:
    """How far the actor's logits are from transformers'.

    Attributes:
        num_tokens: number of positions compared.
        largest_difference: the largest difference between two logits, in absolute value.
        largest_logit: the largest of transformers' logits, in absolute value.
        same_best_token: number of positions at which both find the same token likeliest.
        bound: the largest largest_difference / largest_logit that rounding accounts for.
    """

    num_tokens: int
    largest_difference: float
    largest_logit: float
    same_best_token: int
    bound: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is within rounding. NaN is not."""
        return self.largest_difference <= self.bound * self.largest_logit

    def __str__(self) -> str:
        relative = self.largest_difference / self.largest_logit
        return (
            f"logits of {self.num_tokens} tokens: largest difference {self.largest_difference:.2e}, "
            f"{relative:.1e} of the largest logit {self.largest_logit:.1f} (bound {self.bound:.0e}); "
            f"same likeliest token at {self.same_best_token} of {self.num_tokens}"
        )


def compare_logits(
    hugging_face: str | Path,
    megatron: str | Path | None,
    *,
    tp: int,
    pp: int,
    dtype: str = "float32",
    passages: Sequence[str] = PASSAGES,
) -> LogitsComparison:
    """Run text through transformers' model and the actor's.

    Args:
        hugging_face: folder with weights and tokenizer.
        megatron: checkpoint that the actor's model is loaded from; None: the Hugging Face folder, as in training.
        tp, pp: the actor's layout; tp * pp processes are started on this machine.
        dtype: dtype that both compute in, float32 or bfloat16.

    Raises:
        ValueError: if there is no tokenizer, or the model does not divide into the layout.
        RankError: if a process fails, with its traceback.
    """
    folder = Path(hugging_face)
    shape = read_model_shape(folder)
    parallel = ParallelSection(tp=tp, pp=pp)
    sizes = {
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
    }
    if problems := division_problems(sizes, parallel):  # they name configuration keys; here these are options
        raise ValueError("\n".join(re.sub(r"parallel\.(\w+)=", r"--\1 ", str(problem)) for problem in problems))
    sequences = _tokenize(folder, passages)
    with tempfile.TemporaryDirectory() as scratch:
        file = str(Path(scratch) / "logits.safetensors")
        run_local_ranks(_transformers_logits, 1, str(folder), sequences, dtype, file, **_RANKS)
        checkpoint = None if megatron is None else str(megatron)
        parts = run_local_ranks(
            _compare_on_rank, tp * pp, str(folder), checkpoint, sequences, parallel, dtype, file, **_RANKS
        )
    found = [part for part in parts if part is not None]
    best = torch.stack([part.best for part in found])
    tokens = torch.stack([part.best_token for part in found]).gather(0, best.argmax(0, keepdim=True))[0]
    return LogitsComparison(
        num_tokens=len(tokens),
        largest_difference=max(part.largest_difference for part in found),
        largest_logit=found[0].largest_logit,
        same_best_token=int((tokens == found[0].reference_token).sum()),
        bound=BOUNDS[dtype],
    )


def _tokenize(folder: Path, passages: Sequence[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    sequences = [tokenizer(passage)["input_ids"][:_LONGEST] for passage in passages]
    whole = [sequence for sequence in sequences if sequence]
    if not whole:
        raise ValueError(f"the tokenizer of {folder} makes no token of the text.")
    return whole


def _transformers_logits(folder: str, sequences: list[list[int]], dtype: str, file: str) -> None:
    """Write transformers' logits [T, V], float32."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    with torch.no_grad():
        logits = [model(torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in sequences]
    save_file({"logits": torch.cat(logits)}, file)


@dataclass(frozen=True)
class _Part:
    """The comparison of one tensor-parallel rank of the last stage, among its rows of the vocabulary."""

    largest_difference: float
    largest_logit: float
    best: Tensor
    best_token: Tensor
    reference_token: Tensor


def _compare_on_rank(
    folder: str, checkpoint: str | None, sequences: list[list[int]], parallel: ParallelSection, dtype: str, file: str
) -> _Part | None:
    torch.set_num_threads(1)
    cpu.install()
    ranks = parallel_groups.initialize(parallel, seed=0)
    shape = read_model_shape(folder)
    chunks = build_model(shape, ModelSection(path=folder, dtype=dtype), parallel, ranks)
    models = [unwrap(chunk) for chunk in chunks]
    if checkpoint is not None and is_torch_dist(Path(checkpoint)):
        load_torch_dist(models, checkpoint, ranks)
    else:
        load_weights(models, checkpoint or folder, shape, tp_size=ranks.tp.size(), tp_rank=ranks.tp.rank())
    hidden = _last_hidden_states(chunks[0], sequences, dtype)
    if not ranks.is_last_stage:
        return None
    weight = models[-1].output_weight()
    logits = (hidden.squeeze(1) @ weight.T).detach().float().cpu()
    first = ranks.tp.rank() * len(weight)
    logits = logits[:, : max(shape.vocab_size - first, 0)]  # without the padding
    reference = load_file(file)["logits"]
    own = reference[:, first : first + logits.shape[1]]
    difference = (logits - own).abs_()
    best, token = F.pad(logits, (0, 1), value=-torch.inf).max(dim=1)
    return _Part(
        # NaN counts as an infinite difference: a comparison with NaN would be False.
        float(difference.nan_to_num_(nan=torch.inf).max()) if difference.numel() else 0.0,
        float(reference.abs().max()),
        best,
        token + first,
        reference.argmax(dim=1),
    )


def load_torch_dist(models: Sequence[nn.Module], checkpoint: str | Path, ranks: ParallelGroups) -> None:
    """Load a checkpoint's weights into this rank's part of a model, whatever layout it was saved in. Collective.

    Extra states are left as they are: without FP8 there is nothing in them.
    """
    check_pickles(checkpoint)
    states: dict[str, Any] = {}
    for number, model in enumerate(models):
        state = model.sharded_state_dict(metadata={"dp_cp_group": ranks.dp_cp})  # type: ignore[operator]
        states[f"model{number}"] = {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, at Megatron's calls
        loaded = dist_checkpointing.load(states, str(checkpoint))
    for number, model in enumerate(models):
        missing, unexpected = model.load_state_dict(loaded[f"model{number}"], strict=False)
        left_out = [name for name in missing if not name.endswith(EXTRA_STATE)]
        assert not left_out, f"not loaded: {left_out}"
        assert not unexpected, f"loaded for nothing: {unexpected}"


def _last_hidden_states(chunk: nn.Module, sequences: list[list[int]], dtype: str) -> Tensor:
    """The hidden states [T, 1, H] before the output layer on the last pipeline stage; empty elsewhere."""
    device = parallel_groups.device()
    cu_seqlens_on_host = torch.tensor([0] + [len(sequence) for sequence in sequences]).cumsum(0)
    cu_seqlens = cu_seqlens_on_host.to(device, torch.int32)
    input_ids = torch.tensor([token for sequence in sequences for token in sequence], device=device)
    position_ids = torch.cat([torch.arange(len(sequence), device=device) for sequence in sequences])

    def forward_step(iterator: Iterator[int], model: nn.Module) -> tuple[Tensor, Any]:
        next(iterator)
        keywords = {"fp32_output": False} if dtype == "bfloat16" else {}
        params = packed_sequence_params(cu_seqlens, cu_seqlens_on_host)
        hidden = model(input_ids[None], position_ids[None], None, packed_seq_params=params, **keywords)
        return hidden, lambda output, non_loss_data: output

    chunk.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="When using async grad allreduce")  # there are no gradients
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([0]),
            model=chunk,
            num_microbatches=1,
            seq_length=len(input_ids),
            micro_batch_size=1,
            decoder_seq_length=len(input_ids),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[0] if outputs else torch.empty(0)
