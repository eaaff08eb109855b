"""The trained model: where it comes from, how it is computed, laid out and optimized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from megatron_fipo.config.declaration import key, seconds
from megatron_fipo.config.sections.reasons import OPTIMIZER_STATE
from megatron_fipo.config.text_rules import names_a_model, not_blank

# OmegaConf resolves these annotations at run time, hence Optional, Dict and List rather than the newer spellings.

FP8_ALIGNMENT = {"none": 1, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Value of model.fp8 -> number that must divide both sizes of a rank's matrices (Transformer Engine's blocks)."""


@dataclass(frozen=True)
class ModelSection:
    """Which model is trained and in which precision."""

    path: str = key("", check=names_a_model, text="path")
    """Folder with a Hugging Face checkpoint (config, safetensors, tokenizer). A relative path starts from the current
    folder, or, where that has none, from the configuration file's. Or a model's name on the Hugging Face hub, such as
    Qwen/Qwen2.5-0.5B, which each node fetches once."""
    revision: Optional[str] = key(None, check=not_blank, text="name")
    """Branch, tag or commit of a name on the hub; null takes main. The commit it points to is recorded and kept."""
    dtype: str = key("float32", choices=("float32", "bfloat16"), fixed_because=OPTIMIZER_STATE)
    """Arithmetic of the actor's forward and backward: float32 or bfloat16 (bfloat16 keeps float32 main weights)."""
    fp8: str = key("none", choices=tuple(FP8_ALIGNMENT))
    """The layers' matrix products in FP8 through Transformer Engine, over bfloat16 weights: none, tensorwise (a scale
    for each tensor), blockwise (for 128 numbers) or mxfp8 (for 32; Blackwell). Attention and output layer stay as they
    are."""
    transformer_engine: str = key("auto", choices=("auto", "off"), changes_results=False)
    """Layers in bfloat16 on GPUs: auto takes Transformer Engine's, and refuses to start long sequences or context
    parallelism where it is not installed; off takes Megatron's own. In float32 and on CPUs they are Megatron's."""
    recompute: str = key("none", choices=("none", "selective", "full"), changes_results=False)
    """What backward computes again instead of keeping it: none; selective, which on GPUs in bfloat16 is each layer's
    MLP (about a quarter more arithmetic in an update; attention is fused there and keeps no scores), elsewhere core
    attention; full, every layer (a third more)."""
    log_prob_chunk_mib: float = key(512.0, above=0, changes_results=False)
    """MiB of float32 logits when log-probs are computed: as many tokens as it holds go through the output layer at a
    time. Beside it an update holds their gradient: on a GPU half as much in bfloat16 and nothing in float32, on a CPU
    as much again."""


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW with a linear warm-up, then constant or falling."""

    learning_rate: float = key(1e-6, least=0)
    """Learning rate after the warm-up."""
    num_warmup_steps: int = key(10, least=0)
    """Steps (not updates) over which the rate rises linearly from 0."""
    schedule: str = key("constant", choices=("constant", "linear", "cosine"))
    """After the warm-up: constant, or down to min_learning_rate in a straight line (linear) or half a wave (cosine)."""
    min_learning_rate: float = key(0.0, least=0)
    """Rate that a linear or cosine schedule reaches one step after its end, and then keeps."""
    num_decay_steps: Optional[int] = key(None, least=1)
    """Steps, warm-up included, after which a linear or cosine schedule ends; null takes train.num_steps."""
    weight_decay: float = key(0.1, least=0)
    """Decoupled weight decay; norms and biases are exempt."""
    adam_beta1: float = key(0.9, least=0, below=1)
    """Decay of the gradient's running mean."""
    adam_beta2: float = key(0.999, least=0, below=1)
    """Decay of the squared gradient's running mean."""
    adam_epsilon: float = key(1e-8, above=0)
    """Added to the denominator."""
    gradient_clip: float = key(1.0, least=0)
    """Largest gradient norm over all parameters; 0 turns clipping off."""
    distributed: bool = key(True, fixed_because=OPTIMIZER_STATE)
    """Shard the optimizer's state over data- and context-parallel ranks."""


@dataclass(frozen=True)
class ParallelSection:
    """Megatron's layout. The world size divided by tp * pp * cp is the data-parallel size."""

    tp: int = key(1, least=1)
    """Tensor-parallel size."""
    pp: int = key(1, least=1)
    """Pipeline-parallel size."""
    virtual_pp: Optional[int] = key(None, least=2, null_means="for the plain schedule")
    """Model chunks on each pipeline stage (interleaved schedule); needs pp > 1."""
    cp: int = key(1, least=1)
    """Context-parallel size: each sequence is cut into 2*cp chunks, two on each rank."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence; needs tp > 1."""
    timeout_s: float = seconds(1800.0)
    """Longest wait inside one collective."""


@dataclass(frozen=True)
class BatchSection:
    """Packing of sequences into microbatches."""

    max_tokens_per_microbatch: int = key(16384, least=1)
    """Token budget of a microbatch over all its context-parallel ranks, padding included."""
    pad_multiple: Optional[int] = key(None, least=1)
    """Sequences are padded to a multiple of this; null takes the least that the layout needs."""
