"""vLLM's worker extension: takes weights and answers with checksums, over /collective_rpc, with the server's key.

An update is `fipo_begin_update`, then any of `fipo_load_bucket`, `fipo_receive_bucket` and `fipo_load_folder`, then
`fipo_end_update`. In between, vLLM's layerwise reload buffers what arrives and writes a layer once it is whole: calling
`load_weights` on a served model would leave layers that were repacked after loading with the old packed copy.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from server_guard import own_key  # type: ignore[import-not-found]  # its folder is this server's PYTHONPATH
from torch import Tensor, nn
from torch.distributed import Backend, BroadcastOptions, PrefixStore, ProcessGroup, rendezvous
from torch.distributed.distributed_c10d import GroupName, _new_process_group_helper
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers import utils as linear_layers
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from .digest import digest, label
from .sealed import unseal
from .transport import unpack

_logger = logging.getLogger("vllm.megatron_fipo")
_KEY = own_key()


def _answered(method: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Take a sealed call, and answer with what the method returns, or with its error: vLLM drops the connection over an
    exception."""

    @functools.wraps(method)
    def answer(self: WeightExtension, *sealed: Any, **named: Any) -> dict[str, Any]:
        try:
            return {"value": method(self, *unseal(_KEY, method.__name__, [*sealed, *named.values()]))}
        except Exception as error:
            _logger.exception("%s failed", method.__name__)
            return {"error": f"{type(error).__name__}: {error}"}

    return answer


def _plain_cpu_linear(layer: Any, remove_weight: bool) -> None:
    """Replaces vLLM's choice of a CPU kernel, which repacks the weight into a private copy and drops it.

    Checksums must cover what the server computes with, so it computes with the weight itself.
    """
    layer.cpu_linear = nn.functional.linear


if current_platform.is_cpu():  # a worker imports this before it loads the model
    linear_layers.dispatch_cpu_unquantized_gemm = _plain_cpu_linear


class WeightExtension:
    """Mixed into vLLM's worker class; arguments come sealed (`sealed`), they and the results are JSON."""

    model_runner: Any
    model_config: Any
    vllm_config: VllmConfig
    device: torch.device

    _fipo_awaited: set[str] | None = None
    """Parameters that the open update has not written yet; None while no update is open."""
    _fipo_taken: frozenset[str] = frozenset()
    """Names of the tensors that the open update has taken over."""
    _fipo_groups: dict[str, ProcessGroup] | None = None

    @_answered
    @torch.no_grad()
    def fipo_begin_update(self) -> None:
        """Open an update. One that broke off is given up: what it wrote stays until this one overwrites it."""
        model = self._fipo_model()
        with set_current_vllm_config(self.vllm_config):
            if self._fipo_awaited is not None:
                finalize_layerwise_reload(model, self.model_config)
            self._fipo_awaited = {name for name, _ in model.named_parameters()}
            self._fipo_taken = frozenset()
            initialize_layerwise_reload(model)

    @_answered
    def fipo_load_bucket(self, messages: list[dict[str, Any]], specs: list[dict[str, Any]]) -> None:
        """Take over a bucket; one message for each tensor-parallel rank, see `transport.pack`."""
        flat = unpack(messages[get_tensor_model_parallel_rank()], self.device)
        self._fipo_load(_tensors(flat, specs))

    @_answered
    def fipo_receive_bucket(self, specs: list[dict[str, Any]], group_name: str) -> None:
        """Receive a bucket by a broadcast from rank 0 of a group.

        It comes again where a member of the group before died meanwhile. What this rank has taken over is not loaded
        twice then: the layerwise reload counts elements, and would take a layer for whole.
        """
        group = (self._fipo_groups or {}).get(group_name)
        if group is None:
            raise ValueError(f"this server is not in the group {group_name!r}")
        flat = torch.empty(specs[-1]["stop"], dtype=torch.uint8, device=self.device)
        options = BroadcastOptions()
        options.rootRank = 0
        group.broadcast([flat], options).wait()
        if flat.is_cuda:
            torch.cuda.current_stream(self.device).synchronize()  # taken over is only what has arrived
        if new := [spec for spec in specs if spec["name"] not in self._fipo_taken]:
            self._fipo_load(_tensors(flat, new))
        self._fipo_taken = self._fipo_taken.union(spec["name"] for spec in specs)

    @_answered
    def fipo_load_folder(self, folder: str) -> None:
        """Read every tensor of a Hugging Face folder's safetensors files."""
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no *.safetensors file that this server can see")
        for file in files:
            self._fipo_load(_file_tensors(file))

    @_answered
    @torch.no_grad()
    def fipo_end_update(self) -> None:
        """Close the update.

        Raises:
            RuntimeError: if a parameter was not written. The update stays open and the model cannot be run.
        """
        if self._fipo_awaited is None:
            raise RuntimeError("no update is open")
        if self._fipo_awaited:
            missing = sorted(self._fipo_awaited)
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise RuntimeError(f"the update lacks {', '.join(missing[:5])}{more}")
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self._fipo_model(), self.model_config)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._fipo_awaited = None

    @_answered
    def fipo_checksums(self) -> dict[str, str]:
        """Digest of every parameter as this rank holds it, by `name (rank)`."""
        rank = get_tensor_model_parallel_rank()
        return {
            f"{name} (rank {rank})": label(digest(parameter), parameter.dtype)
            for name, parameter in self._fipo_model().named_parameters()
        }

    @_answered
    def fipo_join_group(
        self, host: str, port: int, name: str, backend: str, world_size: int, first_rank: int, timeout_s: float
    ) -> None:
        """Join a process group that spans the trainer's sender and servers, apart from vLLM's own groups."""
        rank, timeout = first_rank + get_tensor_model_parallel_rank(), timedelta(seconds=timeout_s)
        store, _, _ = next(rendezvous(f"tcp://{host}:{port}", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        group, _ = _new_process_group_helper(
            world_size,
            rank,
            [],
            Backend(backend),
            PrefixStore(name, store),
            group_name=GroupName(name),
            timeout=timeout,
        )
        assert isinstance(group, ProcessGroup)
        self._fipo_groups = {**(self._fipo_groups or {}), name: group}

    @_answered
    def fipo_leave_group(self, name: str) -> None:
        """Leave a group; one that this server is not in is no error."""
        group = (self._fipo_groups or {}).pop(name, None)
        if group is not None:
            group.abort()  # rank 0 has left already

    def _fipo_model(self) -> Any:
        return self.model_runner.get_model()

    @torch.no_grad()
    def _fipo_load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self._fipo_awaited is None:
            raise RuntimeError("no update is open")
        with set_current_vllm_config(self.vllm_config):
            written = self._fipo_model().load_weights(tensors)
        self._fipo_awaited -= written


def _tensors(flat: Tensor, specs: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Views into a bucket. vLLM keeps those of a layer that is not whole yet, and with them the bucket."""
    for spec in specs:
        dtype = getattr(torch, spec["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{spec['name']} is of dtype {spec['dtype']!r}, which torch does not know")
        yield spec["name"], flat[spec["start"] : spec["stop"]].view(dtype).view(spec["shape"])


def _file_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as content:
        for name in content.keys():  # noqa: SIM118 - not a dictionary
            yield name, content.get_tensor(name)
