"""The run's configuration as frozen dataclasses, the presets of the algorithms, and the names of what sources may use.

The docstring under a field is its entry in the reference of all keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

# OmegaConf resolves these annotations at run time, hence Optional, Dict and List rather than the newer spellings.


@dataclass(frozen=True)
class RunSection:
    """Name, place and seed of the run."""

    name: str = "fipo"
    """Name shown in the console and in the trackers."""
    output_dir: str = "outputs/${run.name}"
    """Folder of everything the run writes; ${run.name} stands for the name above."""
    seed: int = 0
    """Seed of data order, sampling and dropout-free initialisation; results depend on it, never on the rank count."""
    num_sample_prints: int = 3
    """Sample responses shown before and after training."""


@dataclass(frozen=True)
class ModelSection:
    """Which model is trained and in which precision."""

    path: str = ""
    """Folder with a Hugging Face checkpoint (config, safetensors, tokenizer). A relative path starts from the current
    folder, or, where that has none, from the configuration file's. Or a model's name on the Hugging Face hub, such as
    Qwen/Qwen2.5-0.5B, which each node fetches once."""
    revision: Optional[str] = None
    """Branch, tag or commit of a name on the hub; null takes main. The commit it stands at is recorded and kept."""
    dtype: str = "float32"
    """Arithmetic of the actor's forward and backward: float32 or bfloat16 (bfloat16 keeps float32 main weights)."""
    fp8: str = "none"
    """The layers' matrix products in FP8 through Transformer Engine, over bfloat16 weights: none, tensorwise (a scale
    for each tensor), blockwise (for 128 numbers) or mxfp8 (for 32; Blackwell). Attention and output layer stay as they
    are."""
    transformer_engine: str = "auto"
    """Layers in bfloat16 on GPUs: auto takes Transformer Engine's, and refuses to start long sequences or context
    parallelism where it is not installed; off takes Megatron's own. In float32 and on CPUs they are Megatron's."""
    recompute: str = "none"
    """What backward computes again instead of keeping it: none; selective, which on GPUs in bfloat16 is each layer's
    MLP (about a quarter more arithmetic in an update; attention is fused there and keeps no scores), elsewhere core
    attention; full, every layer (a third more)."""
    log_prob_chunk_mib: float = 512.0
    """MiB of float32 logits when log-probs are computed: so many tokens as this holds go through the output layer at a
    time. Beside it an update holds their gradient: on a GPU half as much in bfloat16 and nothing in float32, on a CPU
    as much again."""


@dataclass(frozen=True)
class DataSourceConfig:
    """One source of prompts."""

    kind: str = ""
    """jsonl, parquet, hub, chain_arithmetic or reasoning_gym."""
    path: str = ""
    """File of a jsonl or parquet source; a relative path is looked for as model.path is. With kind=hub a data set's
    name on the Hugging Face hub, such as openai/gsm8k."""
    subset: str = ""
    """Subset (configuration) of a data set on the hub, such as main; empty takes its only or its default one."""
    split: str = ""
    """Split of a data set on the hub, such as train or test."""
    revision: Optional[str] = None
    """Branch, tag or commit of a data set on the hub; null takes main. The commit it stands at is recorded and kept."""
    task: str = ""
    """Name of the reasoning-gym data set."""
    params: Dict[str, Any] = field(default_factory=dict)
    """Parameters of a procedural source, passed on by name."""
    num_prompts: Optional[int] = None
    """Use only the first so many prompts; required for a procedural source used for evaluation."""
    seed: Optional[int] = None
    """Seed of a procedural source; None takes run.seed. Give held-out data a fixed seed of its own."""
    schema: str = "columns"
    """How a file's rows are read: columns (prompt_field and answer_field), or as published: dapo_math (DAPO-Math-17k
    and its AIME 2024), aime (problem, answer), gsm8k (question, answer behind ####), humaneval, mbpp."""
    deduplicate: bool = True
    """Keep the first of a file's rows with the same prompt; DAPO-Math-17k as published has each a hundred times."""
    prompt_field: str = "prompt"
    """Column that holds the prompt: a string, or a list of chat messages. Read with schema=columns only."""
    answer_field: str = "answer"
    """Column that holds the reference answer; a dot descends into a struct (reward_model.ground_truth). Read with
    schema=columns only."""
    prompt_template: str = "{prompt}"
    """Text around the prompt; {prompt} is replaced."""
    system_prompt: str = ""
    """System message in front of the chat; needs chat_template=true."""
    chat_template: bool = False
    """Format the prompt with the tokenizer's chat template; false feeds the text as it is."""
    verifier: Any = ""
    """Judge of its responses: math (last \\boxed{} or "Answer:"), math_answer (DAPO's "Answer:" line), math_boxed,
    exact, code (Python against tests), code_unprotected (the same without a sandbox), reasoning_gym, chain_arithmetic,
    a reward model as http://host:port/path, or your own as package.module:function. A list names several; a response is
    right if each that counts gives 1."""
    verifier_weights: List[float] = field(default_factory=list)
    """Weights of several verifiers in the mean that is the score; empty weighs them alike. With 0 a verifier's score is
    shown in the metrics and does not count."""
    weight: int = 1
    """Prompts taken from this source in each round over the sources."""


@dataclass(frozen=True)
class DataSection:
    """Prompts to train on and to evaluate on."""

    train: Dict[str, DataSourceConfig] = field(default_factory=dict)
    """Training sources by name."""
    evaluation: Dict[str, DataSourceConfig] = field(default_factory=dict)
    """Evaluation sources by name; each must be finite."""
    overlong_prompts: str = "error"
    """What happens to a prompt longer than rollout.max_prompt_tokens: error or skip (skips are counted and logged)."""


@dataclass(frozen=True)
class RolloutSection:
    """How responses are generated."""

    engine: str = "in_process"
    """in_process: transformers in the trainer's own processes; sglang or vllm: servers on every node (servers.*)."""
    num_prompts: int = 16
    """Groups that one step trains on."""
    num_samples_per_prompt: int = 16
    """Responses to each prompt: the size of a group."""
    num_prompts_per_round: Optional[int] = None
    """Prompts of each round of generation; null takes num_prompts first, then twice what the batch still lacks."""
    temperature: float = 1.0
    """Sampling temperature; training log-probs are taken at the same temperature."""
    top_p: float = 1.0
    """Nucleus sampling threshold; 1 samples from the whole distribution."""
    max_prompt_tokens: int = 1024
    """Longest prompt."""
    max_response_tokens: int = 1024
    """Longest response."""
    max_batch_size: int = 128
    """Sequences that one process decodes at a time (in-process engine)."""


@dataclass(frozen=True)
class ServersSection:
    """Inference servers of rollout.engine=sglang and vllm. Each node's first rank owns its node's."""

    urls: List[str] = field(default_factory=list)
    """Running servers to attach to (http://host:port), dealt out to the nodes; empty starts servers."""
    api_key_env: Optional[str] = None
    """Name of the environment variable that holds the key of the servers in urls; the key itself stands nowhere."""
    python: Optional[str] = None
    """Interpreter that has the engine installed; null takes the trainer's."""
    num_per_node: int = 1
    """Servers started on each node."""
    tp: int = 1
    """Tensor-parallel size of each server."""
    device: str = "auto"
    """cpu, cuda, or auto: the trainer's."""
    placement: str = "dedicated"
    """dedicated: servers have devices of their own; colocated: they share the actor's, memory goes to and fro."""
    gpus: List[int] = field(default_factory=list)
    """Each node's GPUs for servers, in order; empty takes the trainer's (colocated). For attached servers: where they
    run, which weight_sync=tensor must know."""
    memory_fraction: float = 0.8
    """Share of a GPU's memory for a server's weights and cache."""
    max_total_tokens: Optional[int] = None
    """Tokens in a server's cache; null fills memory_fraction, and on the CPU fits the concurrent requests."""
    max_concurrent_requests: int = 256
    """Requests in flight at each server."""
    base_port: Optional[int] = None
    """Port of each node's first server, others following; null takes free ones."""
    router: bool = False
    """Put sglang-router before each node's servers; without it each group goes where least is in flight."""
    reproducible: bool = False
    """Draw tokens from each sample's seed where that costs speed (SGLang on GPUs); vLLM does so anyway."""
    extra_args: List[str] = field(default_factory=list)
    """Appended to each server's command line."""
    weight_sync: str = "tensor"
    """How weights get in: tensor (on GPUs by CUDA IPC, each server's rank from the trainer's rank on its own GPU; by
    value on a CPU), distributed (NCCL, gloo) or disk."""
    bucket_mib: int = 512
    """Weights are sent in buckets of so many MiB; two are held at a time, with tensor on every GPU."""
    keep_snapshot: bool = True
    """Keep the newest weights on disk, so that a server that died comes back with them; disk needs it. One process of
    the run writes them, for all nodes."""
    snapshot_dir: Optional[str] = None
    """Folder of those snapshots, which all nodes must see; null takes the run's."""
    request_timeout_s: float = 3600.0
    """Longest wait for one response; it is then asked for again."""
    sync_timeout_s: float = 600.0
    """Longest wait for a server to take over one bucket, or to compute its checksums."""
    start_timeout_s: float = 900.0
    """Longest wait for a server to come up."""
    health_interval_s: float = 10.0
    """Time between two looks at a server's health."""
    health_timeout_s: float = 60.0
    """A server that does not answer for so long hangs; it is killed and restarted."""
    max_restarts: int = 3
    """Restarts of each server in a run; the next death stops the run, unless others are left."""
    canary_sequences: int = 4
    """Fixed sequences whose log-probs are compared with the actor's after each handover; 0 compares checksums only."""
    canary_tolerance: Optional[float] = None
    """Largest mean |log-prob difference| there; null takes 1e-4 in float32, 0.05 in bfloat16
    and 0.1 with model.fp8."""


@dataclass(frozen=True)
class VerifierSection:
    """The pool of processes that judges responses."""

    num_workers: int = 1
    """Worker processes on each rank."""
    timeout_s: float = 10.0
    """Longest time for one response; one that takes longer is killed, reported, and its group dropped."""
    trusted: List[str] = field(default_factory=list)
    """Names of verifiers in use that judge with the environment, files, network and rights of the run instead of
    confined (docs/security.md): for a function that needs a GPU, a server or threads."""


@dataclass(frozen=True)
class RewardSection:
    """From verdicts to rewards."""

    correct: float = 1.0
    """Reward of an accepted answer."""
    incorrect: float = -1.0
    """Reward of any other."""
    overlong_buffer_tokens: int = 0
    """Length at the end of max_response_tokens over which the overlong penalty grows; 0 turns it off."""
    overlong_penalty: float = 1.0
    """Largest overlong penalty."""
    mask_truncated: bool = False
    """Leave responses cut at max_response_tokens out of the loss."""


@dataclass(frozen=True)
class SamplingSection:
    """Dynamic sampling (DAPO): only groups with mixed rewards carry a signal."""

    dynamic: bool = True
    """Drop groups whose rewards are all equal and go on sampling until the batch is full."""
    max_generation_rounds: int = 10
    """Rounds of generation after which a batch that is still not full stops the run."""
    max_surplus_age_steps: int = 0
    """Steps that groups beyond the batch are kept for; 0 discards them, as the paper does."""
    allow_short_batch: bool = False
    """Train on the groups there are when the rounds are used up, instead of stopping."""


@dataclass(frozen=True)
class AdvantageSection:
    """Group-relative advantages."""

    estimator: str = "group_std"
    """group_std: (R - mean)/(std + 1e-6); group_mean: R - mean (Dr. GRPO); leave_one_out (RLOO)."""


@dataclass(frozen=True)
class FipoConfig:
    """The objective. FIPO and the methods it is compared with are settings of `rl.objective.policy_loss`."""

    clip_ratio_low: float = 0.2
    """The ratio is clipped below at 1 - clip_ratio_low."""
    clip_ratio_high: float = 0.28
    """The ratio is clipped above at 1 + clip_ratio_high."""
    dual_clip: Optional[float] = 10.0
    """Where the weighted advantage is negative, the loss is at most `-f*A*dual_clip`; null: none (not for FIPO)."""
    future_kl: bool = True
    """Weight advantages by Future-KL and filter sequences (FIPO); false leaves every weight at 1."""
    half_life_tokens: float = 32.0
    """Distance in tokens at which a later token's influence has halved."""
    influence_min: float = 1.0
    """Lower end of the influence weights."""
    influence_max: float = 1.2
    """Upper end of the influence weights."""
    safety_ratio: float = 10.0
    """Where the advantage is negative and the ratio above this, the weight is clipped to [0.8, 1.0]."""
    max_dual_clipped_tokens: int = 1
    """A response with more tokens of negative advantage and ratio above dual_clip leaves the loss altogether."""
    filter_extreme_ratios: bool = True
    """Tokens with a ratio above dual_clip stay out of Future-KL; false is the paper's ablation."""
    loss_aggregation: str = "token_mean"
    """token_mean; sequence_mean: mean of responses' token means (GRPO); sequence_sum: by a fixed length (Dr. GRPO)."""
    sequence_sum_tokens: Optional[int] = None
    """The constant length of sequence_sum; required there, usually rollout.max_response_tokens."""
    kl_coefficient: float = 0.0
    """Weight of the KL penalty against the frozen starting policy (k3 estimator); 0 builds no reference."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    old_log_probs: str = "actor"
    """Old policy's log-probs: actor (recomputed before the step's first update) or rollout (refused with future_kl)."""
    rollout_correction: str = "none"
    """For the engine's numerical differences: none, token_truncated (truncated importance sampling), token_masked,
    sequence_masked (masked importance sampling) or geometric_masked; see rl/rollout_correction.py."""
    rollout_ratio_min: float = 0.5
    """Least accepted ratio of the actor's to the engine's probability; of a token, or of a whole response."""
    rollout_ratio_max: float = 2.0
    """Largest such ratio: token_truncated cuts the weight there, the others mask what lies above."""


@dataclass(frozen=True)
class TrainSection:
    """Steps and updates."""

    num_steps: int = 100
    """Steps to run; one step is one batch of rollouts."""
    num_minibatches: int = 4
    """Minibatches that a step's groups are cut into, by prompt; each is one update."""
    num_epochs: int = 1
    """Times that each step's minibatches are gone through."""
    stop_when: str = ""
    """End the run before num_steps once a metric of a step or an evaluation is beyond a bound, such as
    evaluation/held_out/avg@32 >= 0.9 or policy/entropy/mean <= 0.05; empty: never."""
    resume: bool = True
    """Go on from the newest checkpoint in the run's folder where there is one."""


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW with a linear warm-up, then constant or falling."""

    learning_rate: float = 1e-6
    """Learning rate after the warm-up."""
    num_warmup_steps: int = 10
    """Steps (not updates) over which the rate rises linearly from 0."""
    schedule: str = "constant"
    """After the warm-up: constant, or down to min_learning_rate in a straight line (linear) or half a wave (cosine)."""
    min_learning_rate: float = 0.0
    """Where a linear or cosine schedule arrives one step after its end, and then stays."""
    num_decay_steps: Optional[int] = None
    """Steps, warm-up included, at whose end a linear or cosine schedule has arrived; null takes train.num_steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases are exempt."""
    adam_beta1: float = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: float = 0.999
    """Decay of the squared gradient's running mean."""
    adam_epsilon: float = 1e-8
    """Added to the denominator."""
    gradient_clip: float = 1.0
    """Largest gradient norm over all parameters; 0 turns clipping off."""
    distributed: bool = True
    """Shard the optimizer's state over data- and context-parallel ranks."""


@dataclass(frozen=True)
class ParallelSection:
    """Megatron's layout. What the product leaves of the world size is data parallel."""

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size."""
    virtual_pp: Optional[int] = None
    """Model chunks on each pipeline stage (interleaved schedule); needs pp > 1."""
    cp: int = 1
    """Context-parallel size: each sequence is cut into 2*cp chunks, two on each rank."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence; needs tp > 1."""
    timeout_s: float = 1800.0
    """Longest wait inside one collective."""


@dataclass(frozen=True)
class BatchSection:
    """Packing."""

    max_tokens_per_microbatch: int = 16384
    """Token budget of a microbatch over all its context-parallel ranks, padding included."""
    pad_multiple: Optional[int] = None
    """Sequences are padded to a multiple of this; null takes the least that the layout needs."""


@dataclass(frozen=True)
class EvaluationSection:
    """Evaluation during the run."""

    every_num_steps: int = 0
    """Evaluate after every so many steps; 0 only before and after training."""
    num_samples_per_prompt: int = 32
    """Responses to each evaluation prompt: k of avg@k, cons@k, pass@k."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 0.7
    """Nucleus sampling threshold."""
    max_response_tokens: Optional[int] = None
    """Longest response; null takes rollout.max_response_tokens."""


@dataclass(frozen=True)
class MetricsSection:
    """Where metrics go."""

    console: bool = True
    """One line a step, with progress bars for rollout and updates."""
    jsonl: bool = True
    """metrics.jsonl in the run's folder."""
    tensorboard: bool = True
    """TensorBoard events in the run's folder."""
    num_samples_per_step: int = 4
    """Responses of each training step that are kept in samples/ of the run's folder, for `megatron-fipo samples`; 0
    keeps none."""
    wandb: str = "off"
    """Weights & Biases: off, online or offline."""
    wandb_project: str = "megatron_fipo"
    """Project on Weights & Biases."""


@dataclass(frozen=True)
class CheckpointSection:
    """What is saved, and when."""

    every_num_steps: int = 0
    """Save after every so many steps; 0 only at the end and when the run is interrupted."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted."""
    keep_every_num_steps: int = 0
    """Checkpoints after every so many steps are never deleted; 0 deletes all beyond keep_last."""
    keep_best: str = ""
    """Score of the evaluations, such as evaluation/held_out/avg@32: the model of the best one so far is kept in best/,
    in Hugging Face format; empty keeps none."""
    asynchronous: bool = False
    """Write the periodic checkpoints in a process beside each rank's while training goes on."""
    export_huggingface: bool = True
    """Write the trained model as a Hugging Face folder at the end."""
    push_to_hub: str = ""
    """Repository on the Hugging Face hub (me/my-model) that gets this folder and a model card; empty: none. The token
    is that of `hf auth login` or HF_TOKEN, and is looked at before training."""
    hub_private: bool = True
    """Make that repository private; one that exists and is public is refused."""
    export_with_checkpoints: bool = False
    """Also write one into each periodic checkpoint, as its subfolder huggingface."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    algorithm: str = "fipo"
    """Preset that fills in what the file leaves open: fipo, dapo, grpo, grpo_sequence_mean, dr_grpo or rloo."""
    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    servers: ServersSection = field(default_factory=ServersSection)
    verifier: VerifierSection = field(default_factory=VerifierSection)
    reward: RewardSection = field(default_factory=RewardSection)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    advantages: AdvantageSection = field(default_factory=AdvantageSection)
    objective: FipoConfig = field(default_factory=FipoConfig)
    train: TrainSection = field(default_factory=TrainSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    batch: BatchSection = field(default_factory=BatchSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)


ALGORITHMS: dict[str, dict[str, Any]] = {
    "fipo": {"objective": {"future_kl": True}},
    "dapo": {"objective": {"future_kl": False}},
    "grpo": {
        "objective": {"future_kl": False, "clip_ratio_high": 0.2, "dual_clip": None},
        "sampling": {"dynamic": False},
    },
    "grpo_sequence_mean": {
        "objective": {
            "future_kl": False,
            "clip_ratio_high": 0.2,
            "dual_clip": None,
            "loss_aggregation": "sequence_mean",
        },
        "sampling": {"dynamic": False},
    },
    "dr_grpo": {
        "objective": {
            "future_kl": False,
            "clip_ratio_high": 0.2,
            "dual_clip": None,
            "loss_aggregation": "sequence_sum",
        },
        "advantages": {"estimator": "group_mean"},
        "sampling": {"dynamic": False},
    },
    "rloo": {
        "objective": {"future_kl": False},
        "advantages": {"estimator": "leave_one_out"},
        "sampling": {"dynamic": False},
    },
}
"""What each algorithm sets; a key the user sets wins, except where `validate` names a contradiction."""

FILE_KINDS = ("jsonl", "parquet", "hub")
"""Kinds of source that read files: one that is here, or a data set's on the Hugging Face hub."""
PROCEDURAL_KINDS = ("chain_arithmetic", "reasoning_gym")
"""Kinds of source that make their prompts, without end."""
SOURCE_KINDS = (*FILE_KINDS, *PROCEDURAL_KINDS)
"""What data.*.kind may be."""

REPOSITORY_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
"""A repository on the Hugging Face hub: owner/name."""

VERIFIERS = (
    "chain_arithmetic",
    "reasoning_gym",
    "math",
    "exact",
    "math_answer",
    "math_boxed",
    "code",
    "code_unprotected",
)
"""What data.*.verifier may be, besides a function of one's own (package.module:function) and a reward model's URL."""

SCHEMAS = ("columns", "dapo_math", "aime", "gsm8k", "humaneval", "mbpp")
"""What data.*.schema may be."""

FP8_ALIGNMENT = {"none": 1, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""What model.fp8 may be, and of what both sizes of a rank's matrices must be multiples: Transformer Engine's blocks."""
