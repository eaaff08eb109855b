"""How responses are generated, and by which servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional

from megatron_fipo.config.declaration import key, seconds
from megatron_fipo.config.sections.reasons import WHOLE_DISTRIBUTION

# OmegaConf resolves these annotations at run time, hence Optional, Dict and List rather than the newer spellings.


def _all_different(value: List[int]) -> str:
    """The rule for a list of GPUs; empty where it is kept."""
    return "" if len({*value}) == len(value) else "must be different numbers from 0 on"


@dataclass(frozen=True)
class RolloutSection:
    """How responses are generated."""

    engine: str = key("in_process", choices=("in_process", "sglang", "vllm"), changes_results=False)
    """in_process: transformers in the trainer's own processes; sglang or vllm: servers on every node (servers.*)."""
    num_prompts: int = key(16, least=1)
    """Groups that one step trains on."""
    num_samples_per_prompt: int = key(16, least=2, because="advantages compare the responses to one prompt")
    """Responses to each prompt: the size of a group."""
    num_prompts_per_round: Optional[int] = key(None, least=1)
    """Prompts of each round of generation; null takes num_prompts first, then twice what the batch still lacks."""
    temperature: float = key(
        1.0, above=0, because="training samples its responses", remedy="evaluation.temperature=0 evaluates greedily"
    )
    """Sampling temperature; training log-probs are taken at the same temperature."""
    top_p: float = key(1.0, above=0, most=1, because=WHOLE_DISTRIBUTION)
    """Nucleus sampling threshold; 1 samples from the whole distribution."""
    max_prompt_tokens: int = key(1024, least=1)
    """Longest prompt."""
    max_response_tokens: int = key(1024, least=1)
    """Longest response."""
    max_staleness_steps: int = key(0, least=0)
    """Steps by which the weights that wrote a token may be older than those that the step that trains on it starts
    with: responses that are unfinished when a batch is full go on in the next step, and prompts are begun so many steps
    ahead. 0 generates on-policy; more needs sampling.streaming."""
    too_stale: str = key("drop", choices=("drop", "mask"))
    """What becomes of a response with tokens that are older than max_staleness_steps: drop throws it away and begins it
    anew, mask goes on with it and leaves these tokens out of the loss."""
    overlap: bool = False
    """Generate for the next step while a step trains, on servers with devices of their own. New weights come while
    responses are being written. Needs max_staleness_steps of 1 or more."""
    in_flight: str = key("retract", choices=("retract", "in_place"))
    """With overlap, what becomes of responses that are being written when new weights come: retract computes all of
    their keys and values anew with these, in_place goes on with the old ones, which costs nothing and makes the rest of
    these responses other than the actor would write."""
    max_batch_size: int = key(128, least=1, changes_results=False)
    """Sequences that one process decodes at a time (in-process engine)."""


@dataclass(frozen=True)
class ServersSection:
    """Inference servers of rollout.engine=sglang and vllm. Each node's first rank owns the node's servers."""

    urls: List[str] = key([])
    """Running servers to attach to (http://host:port), dealt out to the nodes; empty starts servers."""
    api_key_env: Optional[str] = None
    """Name of the environment variable that holds the key of the servers in urls; the key itself stands nowhere."""
    python: Optional[str] = key(None, text="path")
    """Interpreter that has the engine installed; null takes the trainer's."""
    num_per_node: int = key(1, least=1)
    """Servers started on each node."""
    tp: int = key(1, least=1)
    """Tensor-parallel size of each server."""
    device: str = key("auto", choices=("auto", "cpu", "cuda"))
    """cpu, cuda, or auto: the trainer's."""
    placement: str = key("dedicated", choices=("dedicated", "colocated"))
    """dedicated: servers have devices of their own; colocated: they share the actor's and take turns with the
    memory."""
    gpus: List[int] = key([], least=0, check=_all_different)
    """Each node's GPUs for servers, in order; empty takes the trainer's (colocated). For attached servers: where they
    run, which weight_sync=tensor must know."""
    memory_fraction: float = key(0.8, above=0, below=1)
    """Share of a GPU's memory for a server's weights and cache."""
    max_total_tokens: Optional[int] = key(None, least=1)
    """Tokens in a server's cache; null fills memory_fraction, and on the CPU fits the concurrent requests."""
    max_concurrent_requests: int = key(256, least=1)
    """Requests in flight at each server."""
    base_port: Optional[int] = key(None, least=1024, most=65535)
    """Port of each node's first server, others following; null takes free ones."""
    router: bool = False
    """Put sglang-router before each node's servers; without it each group goes to the server with the fewest requests
    in flight, and on to another one when that is full."""
    reproducible: bool = False
    """Draw tokens from each sample's seed where that costs speed (SGLang on GPUs); vLLM does so anyway."""
    extra_args: List[str] = key([])
    """Appended to each server's command line."""
    weight_sync: str = key("tensor", choices=("tensor", "distributed", "disk"))
    """How weights get in: tensor (on GPUs by CUDA IPC, each server's rank from the trainer's rank on its own GPU; by
    value on a CPU), distributed (NCCL, gloo) or disk."""
    bucket_mib: int = key(512, least=1)
    """Weights are sent in buckets of this many MiB; two are held at a time, with weight_sync=tensor on every GPU."""
    keep_snapshot: bool = True
    """Keep the newest weights on disk, so that a server that died comes back with them; disk needs it. One process of
    the run writes them, for all nodes, while the run goes on; its host's memory holds a copy of the model."""
    snapshot_dir: Optional[str] = key(None, text="path")
    """Folder of those snapshots, which all nodes must see; null takes the run's."""
    request_timeout_s: float = seconds(3600.0)
    """Longest wait for one response; it is then asked for again."""
    sync_timeout_s: float = seconds(600.0)
    """Longest wait for a server to take over one bucket, or to compute its checksums after an update."""
    start_timeout_s: float = seconds(900.0)
    """Longest wait for a server to come up, and for the checksums of one that came back."""
    health_interval_s: float = seconds(10.0)
    """Time between two looks at a server's health."""
    health_timeout_s: float = seconds(60.0)
    """A server that does not answer for this long counts as hung; it is killed and restarted."""
    max_restarts: int = key(3, least=0)
    """Restarts of each server in a run; the next death stops the run, unless others are left."""
    canary_sequences: int = key(4, least=0)
    """Fixed sequences whose log-probs are compared with the actor's after each handover, with one more by way of the
    prefix cache; 0 compares checksums only."""
    canary_tolerance: Optional[float] = key(None, above=0)
    """Largest mean |log-prob difference| there; null takes 1e-4 in float32, 0.05 in bfloat16
    and 0.1 with model.fp8."""


@dataclass(frozen=True)
class SamplingSection:
    """Dynamic sampling (DAPO): only groups of right and wrong responses carry a signal."""

    dynamic: bool = True
    """Drop groups whose responses are all right or all wrong, by the verifier's judgement before rewards are shaped,
    and go on sampling until the batch is full."""
    streaming: bool = False
    """Generate without rounds: begin responses in the order of prompts as slots become free, judge each as it ends, and
    stop when the batch is full in that order."""
    max_generation_rounds: int = key(10, least=1)
    """Rounds of generation after which a batch that is still not full stops the run; with streaming, so many times the
    prompts of a round."""
    max_surplus_age_steps: int = key(0, least=0)
    """Steps that groups beyond the batch are kept for; 0 discards them, as the paper does."""
    allow_short_batch: bool = False
    """Train on the groups there are when the rounds are used up, instead of stopping."""
