"""What the rollout code asks of an inference server, whichever engine it runs.

The folders `sglang` and `vllm` say how one server is started and speak its HTTP routes. Everything else here (`pool`
starts and watches servers, `sending` shares requests out, `sync` brings weights in, `proof` shows that they arrived)
knows this module only. `setup` chooses.

All coroutines run on the pool's event loop. Token spans are half open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from megatron_fipo.rollout.engine import GenerationRequest
from megatron_fipo.rollout.servers.http import ServerConnection
from megatron_fipo.rollout.servers.weight_buckets import Bucket, TensorSpec


@dataclass(frozen=True)
class LaunchSpec:
    """One server to be started.

    Attributes:
        python: interpreter that has the engine installed.
        model_path: Hugging Face folder: config, tokenizer and the first weights.
        host, port: where it listens; the port was free a moment ago.
        dtype: float32 or bfloat16, the actor's.
        tp: tensor-parallel size.
        device: cpu or cuda.
        gpus: CUDA devices that it may see, in order, tp of them, by number or UUID as CUDA_VISIBLE_DEVICES takes them;
            empty on the CPU, and for an attached server whose GPUs are not known.
        cpu_cores: on the CPU, the cores of each tensor-parallel rank; empty on CUDA.
        memory_fraction: share of the device's memory for weights and cache, in (0, 1).
        max_total_tokens: size of the key-value cache in tokens; None lets the engine choose from memory_fraction.
        max_running_requests: sequences decoded at a time.
        weight_version: version of the weights in model_path, which the server reports.
        releases_memory: whether release_memory will be called (colocated placement).
        reproducible: whether tokens must be drawn from their request's seed, at whatever it costs in speed. Engines
            that do so anyway ignore it.
        keeps_in_flight: whether an update leaves the keys and values of requests in flight as they are; else they are
            computed anew.
        seed: seed of the engine's own random numbers.
        extra_args: what the user appends to the command line.
        key: shown with every request; the server answers nobody else. It is random for a server that the run starts; an
            attached server has its owner's, or "" if it asks for none. No text about the specification holds it.
    """

    python: str
    model_path: Path
    host: str
    port: int
    dtype: str
    weight_version: str
    tp: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    gpus: tuple[str, ...] = ()
    cpu_cores: tuple[tuple[int, ...], ...] = ()
    memory_fraction: float = 0.8
    max_total_tokens: int | None = None
    max_running_requests: int = 256
    releases_memory: bool = False
    reproducible: bool = False
    keeps_in_flight: bool = False
    seed: int = 0
    extra_args: tuple[str, ...] = ()
    key: str = field(default="", repr=False)


NOT_THE_TRAINERS: Mapping[str, str | None] = {
    "PYTORCH_ALLOC_CONF": None,
    "PYTORCH_CUDA_ALLOC_CONF": None,
    "CUDA_DEVICE_MAX_CONNECTIONS": None,
    "CUDNN_HOME": None,
}
"""Changes to a server's environment on GPUs that take out what the trainer set for itself. Memory that can be released
lies in pools that do not work with expandable segments; the single hardware queue serves training's communication; the
server's torch has another cuDNN."""


@dataclass(frozen=True)
class LaunchPlan:
    """How to start a process: its command line, and what changes in the environment (None removes a variable)."""

    command: tuple[str, ...]
    environment: Mapping[str, str | None] = field(default_factory=dict, repr=False)  # a key is in it


@dataclass(frozen=True)
class ServerInfo:
    """What a server says about itself."""

    model_path: str
    weight_version: str


@dataclass(frozen=True)
class Completion:
    """One response as a server gave it.

    Attributes:
        token_ids: the response after the prompt and prefix, its stop token included where one was sampled.
        log_probs: one for each token, of log_softmax(logits / temperature) before top-p.
        finish_reason: stop, length or abort.
        version_spans: (weight version, first token, one past the last), without gaps over token_ids; empty where
            token_ids is.
        num_cached_tokens: prompt tokens whose keys and values were there already.
    """

    token_ids: Sequence[int]
    log_probs: Sequence[float]
    finish_reason: Literal["stop", "length", "abort"]
    version_spans: Sequence[tuple[str, int, int]]
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class ScoredEnd:
    """Log-probs of a sequence's last tokens, computed on what the prefix cache holds of those before.

    Attributes:
        log_probs: one for each token, at temperature 1.
        num_cached_tokens: tokens before them whose keys and values were there already.
    """

    log_probs: Sequence[float]
    num_cached_tokens: int


@dataclass(frozen=True)
class GroupAddress:
    """A process group of the trainer's sending process (rank 0) and, after it, every server's tensor-parallel ranks.

    Members meet as `torch.distributed.rendezvous("tcp://host:port", rank, world_size)` does (a TCPStore whose clients
    wait for all), and make the group over PrefixStore(name, store).
    """

    host: str
    port: int
    name: str
    backend: Literal["gloo", "nccl"]
    world_size: int
    first_rank: int
    """Rank of this server's tensor-parallel rank 0; the others follow."""


class ExpectedChecksums(Protocol):
    """Computes, from the weights as they are sent, what `InferenceServer.checksums` must answer after one update.

    It holds no more weights than those of one layer that the server fuses (q with k and v, gate with up).
    """

    def add(self, name: str, tensor: Tensor) -> None:
        """Take account of a tensor under its Hugging Face name, in the dtype in which the server holds it."""
        ...

    def expected(self) -> dict[str, str]:
        """Checksums by the names that the server uses (with its rank where tp > 1).

        Raises:
            ValueError: if a tensor that the server fuses with others came without them.
        """
        ...


class InferenceServer(Protocol):
    """The HTTP side of one running server.

    Every method raises the errors of `http`: `ServerUnreachableError` where no whole answer came (the caller
    may ask again elsewhere), `ServerRefusedError` with the server's own words where it said no.
    """

    url: str
    """Control address of this server (generation may go through a router instead)."""

    async def health(self, timeout_s: float) -> None:
        """Return if the server would generate now. A server that is loading, hangs or is dead raises."""
        ...

    async def info(self) -> ServerInfo:
        """Its model and weight version."""
        ...

    async def generate(
        self,
        request: GenerationRequest,
        request_id: str,
        stop_token_ids: Sequence[int],
        timeout_s: float,
        connection: ServerConnection | None = None,
    ) -> Completion:
        """Generate one response. Keys and values are reused under the `cache_salt` of the server's weights only.

        Args:
            request: prompt, prefix, sampling and seed. The server gets prompt + prefix as its prompt, and max_tokens
                less the prefix.
            request_id: a name for `cancel`; unique among all requests that this server ever gets.
            stop_token_ids: tokens that end a response.
            timeout_s: longest wait for the whole answer.
            connection: where to send it instead of this server's own address: a router.

        Raises:
            ServerRefusedError: also if the answer lacks log-probs or its lengths disagree.
        """
        ...

    async def cancel(self, request_id: str) -> None:
        """End one request, which answers with what it has, finish_reason "abort". Unknown ids are no error."""
        ...

    async def abort_all(self) -> None:
        """End every request; each answers with what it has, finish_reason "abort"."""
        ...

    async def score(self, sequences: Sequence[Sequence[int]], timeout_s: float) -> list[list[float]]:
        """Log-probs at temperature 1 of each sequence's tokens from the second on: len(sequence) - 1 numbers each.

        The prefix cache must not hide any: all positions are computed anew.
        """
        ...

    async def score_end(self, sequence: Sequence[int], num_tokens: int, timeout_s: float) -> ScoredEnd:
        """Log-probs of a sequence's last tokens, by way of the prefix cache, as `generate` uses it.

        Of what `num_cached_tokens` counts, none was there only because of this very question.
        """
        ...

    async def pause(self) -> None:
        """Hold generation where it is, so that weights can change; requests in flight continue after `resume`."""
        ...

    async def resume(self) -> None:
        """Continue after `pause`."""
        ...

    # --- weights: begin_update, then buckets one way or the other or a folder, then end_update -----------------------

    async def begin_update(self) -> None:
        """Open an update. Nothing is in flight, or generation is paused."""
        ...

    async def load_bucket(self, bucket: Bucket, timeout_s: float) -> None:
        """Take tensors over: by value from the CPU, or by CUDA IPC handle, each rank from its own GPU.

        The buffer may be overwritten after this returns.
        """
        ...

    async def join_group(self, address: GroupAddress, timeout_s: float) -> None:
        """Join the process group; returns once all its ranks are there, so the sender joins at the same time."""
        ...

    async def receive_bucket(self, specs: Sequence[TensorSpec], group_name: str, timeout_s: float) -> None:
        """Receive `flat` by one broadcast from rank 0 of the group, which the sender issues at the same time."""
        ...

    async def leave_group(self, group_name: str) -> None:
        """Leave the process group."""
        ...

    async def load_folder(self, folder: Path, timeout_s: float) -> None:
        """Read all weights from a Hugging Face folder that the server's host can see."""
        ...

    async def end_update(self, version: str) -> None:
        """Close the update: post-process, forget cached keys and values, and report `version` from now on.

        What should be cached all the same is not found any more: the `cache_salt` is another one.
        """
        ...

    def expected_checksums(self) -> ExpectedChecksums:
        """A new computation of checksums for this server's layout (its tensor-parallel size, what it fuses)."""
        ...

    async def checksums(self, timeout_s: float) -> dict[str, str]:
        """Checksums of the weights it holds, under the names of `ExpectedChecksums.expected`."""
        ...

    # --- memory, for placement beside the actor ----------------------------------------------------------------------

    async def release_memory(self) -> None:
        """Give the memory of weights and cache back. Generation is paused, and stays so until `resume`."""
        ...

    async def resume_memory(self, part: Literal["weights", "cache"]) -> None:
        """Take memory for the weights (whose values are then undefined until an update) or for the cache.

        Generation is paused: with one part alone a server that computed anything would touch memory that is not there.
        """
        ...


class ServerAdapter(Protocol):
    """One kind of server."""

    name: str
    """sglang or vllm."""

    def launch_plan(self, spec: LaunchSpec) -> LaunchPlan:
        """How to start a server.

        Raises:
            ValueError: naming the config key, if this engine cannot do what the spec asks.
        """
        ...

    def connect(self, connection: ServerConnection, spec: LaunchSpec) -> InferenceServer:
        """The client of a server at `connection`. Sends nothing yet.

        Args:
            spec: what it was started with; for an attached server what the config says (dtype, tp, device count).
        """
        ...

    def reason_of_exit(self, log: str) -> str:
        """The lines of a dead server's log that say why it ended."""
        ...
