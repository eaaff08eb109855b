"""A server that takes the command line and the routes of SGLang 0.5.23 and dies where SGLang does.

It computes nothing. What it is for is what no CPU shows of the real one: which GPUs it sees, what it finds free there
when it sizes its cache, whether it is idle when it is asked for its memory, whether its memory is there when it goes
on, and whether the memory that it is handed lies on a GPU of its own. The GPUs are `tests.colocated.fake_gpus`.

Read in SGLang's source: `managers/scheduler.py` (is_fully_idle, pause_generation, continue_generation, health
checks), `managers/scheduler_components/weight_updater.py` (release_memory_occupation, update_weights_from_tensor),
`mem_cache/kv_cache_configurator.py` (_profile_available_bytes), `utils/patch_torch.py` (_device_from_maybe_uuid).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import pickle
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.rollout.servers.cuda_handles import DEVICE_ARGUMENT
from megatron_fipo.rollout.servers.plugins.server_guard import refusal
from megatron_fipo.rollout.servers.sglang.checksums import SglangExpectedChecksums
from tests.colocated.fake_gpus import FakeGpus, OutOfGpuMemoryError

UUID = "GPU-fake-"
PARTS = {"weights": "weights", "kv_cache": "cache"}


def die(words: str) -> NoReturn:
    """As SGLang's scheduler: its words in the log, and the whole server ends, whose memory is free then."""
    print(words, file=sys.stderr, flush=True)
    FakeGpus(Path(os.environ["FAKE_GPUS"])).forget(f"server:{os.environ['FAKE_PORT']}")
    os._exit(1)


class FakeServer:
    """The scheduler's state. Every method that a route calls runs in a thread of its own."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        assert len(self.gpus) == arguments.tp, "a server sees as many GPUs as it has ranks"
        assert arguments.device == "cuda"
        assert "PYTORCH_ALLOC_CONF" not in os.environ, "the memory saver bears no expandable segments"
        self.ledger = FakeGpus(Path(os.environ["FAKE_GPUS"]))
        self.who = f"server:{arguments.port}"
        os.environ["FAKE_PORT"] = str(arguments.port)
        self.ledger.forget(self.who)
        self.model, self.tp = Path(arguments.model_path), arguments.tp
        self.shape = read_model_shape(self.model)
        self.version = arguments.weight_version
        self.saves_memory = arguments.enable_memory_saver
        self.changed = threading.Condition()
        self.running = 0
        self.has_been_asked = False
        self.is_paused = False
        self.released: set[str] = set()
        self.is_updating = False
        self.num_buckets = 0
        files = [load_file(file) for file in sorted(self.model.glob("*.safetensors"))]
        self.arrived: list[dict[str, Tensor]] = [{k: v for file in files for k, v in file.items()} for _ in self.gpus]
        """What each rank holds, under the names of Hugging Face."""
        self.sizes = self._size(arguments.mem_fraction_static)

    def _size(self, fraction: float) -> dict[str, int]:
        """Hold the weights, and for the cache what is free then less the slack."""
        before = min(self.ledger.free(gpu) for gpu in self.gpus)
        weights = sum(tensor.nbytes for tensor in self.arrived[0].values()) // self.tp
        self.take("weights", weights)
        cache = int(min(self.ledger.free(gpu) for gpu in self.gpus) - (1 - fraction) * before)
        if cache <= 0:
            die("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.")
        self.ledger.note(kind="sized", gpus=self.gpus, cache=cache, port=self.who)
        self.take("cache", cache)
        return {"weights": weights, "cache": cache}

    def take(self, part: str, num_bytes: int) -> None:
        try:
            for gpu in self.gpus:
                self.ledger.hold(gpu, f"{self.who}:{part}", num_bytes)
        except OutOfGpuMemoryError as error:
            die(f"torch.OutOfMemoryError: {error}")

    # --- computing ------------------------------------------------------------------------------------------------

    def compute(self, seconds: float) -> None:
        """One request: it waits while generation is paused, and is computed anew where a pause interrupts it."""
        with self.changed:
            while True:
                while self.is_paused:
                    self.changed.wait()
                if self.released:
                    die("RuntimeError: CUDA error: an illegal memory access was encountered")
                self.running += 1
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.is_paused, timeout=seconds)
                self.running -= 1
                self.changed.notify_all()
                if not self.is_paused:
                    return

    def health(self) -> None:
        with self.changed:
            if self.running:  # whoever is computed for tells enough
                return
            seconds = float(os.environ.get("FAKE_PROBE_S", "0")) if self.has_been_asked else 0.0
            self.has_been_asked = True  # the first one asks whether it is up
        self.compute(seconds)

    def pause(self) -> None:
        with self.changed:
            self.is_paused = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.running)

    def go_on(self) -> None:
        with self.changed:
            if self.released:
                die(f"RuntimeError: generation goes on while the memory of {sorted(self.released)} is unmapped")
            self.is_paused = False
            self.changed.notify_all()

    # --- memory ---------------------------------------------------------------------------------------------------

    def release(self, tags: list[str]) -> None:
        with self.changed:
            if self.running:
                die("AssertionError: release_memory_occupation should be called only when server is idle.")
            assert self.saves_memory, "it was started without --enable-memory-saver"
            self.released |= set(tags)
        for tag in tags:
            self.take(PARTS[tag], 0)
        self.ledger.note(kind="released", gpus=self.gpus)

    def resume(self, tags: list[str]) -> None:
        for tag in tags:
            self.take(PARTS[tag], self.sizes[PARTS[tag]])
        with self.changed:
            self.released -= set(tags)

    # --- weights --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        assert not self.is_updating
        self.is_updating, self.arrived = True, [{} for _ in self.gpus]

    def load(self, payloads: list[str]) -> None:
        assert self.is_updating, "an update is open"
        assert "weights" not in self.released
        assert len(payloads) == self.tp, "one payload for each tensor-parallel rank"
        self.num_buckets += 1
        if self.num_buckets == int(os.environ.get("FAKE_DIES_AT_BUCKET", "0")) and self.take_the_death():
            die("RuntimeError: a fault that a test asked for")
        for rank, payload in enumerate(payloads):
            reductions.rebuild_cuda_tensor = self._opened_by(rank)
            content = pickle.loads(base64.b64decode(payload))
            for entry in content["metadata"]:
                flat = content["flattened_tensor"][entry.start_idx : entry.end_idx]
                self.arrived[rank][entry.name] = flat.clone().view(entry.dtype).view(entry.shape)

    def take_the_death(self) -> bool:
        """Of the servers that a test started, one dies, once."""
        try:
            self.ledger.path.with_name("death").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _opened_by(self, rank: int) -> Any:
        def rebuild(*arguments: Any) -> Tensor:
            uuid, file, num_bytes = arguments[DEVICE_ARGUMENT : DEVICE_ARGUMENT + 3]
            self.ledger.note(kind="opened", by=self.gpus[rank], on=uuid.removeprefix(UUID))
            if uuid.removeprefix(UUID) not in self.gpus:
                die(f"Exception: Invalid device_uuid={uuid}")
            time.sleep(float(os.environ.get("FAKE_READ_S", "0")))
            return torch.from_file(file, size=num_bytes, dtype=torch.uint8)

        return rebuild

    def checksums(self) -> list[dict[str, Any]]:
        """SGLang's answer, of what each rank has been handed."""
        answers = []
        for rank, tensors in enumerate(self.arrived):
            ledger = SglangExpectedChecksums(self.shape, self.tp, hashes_on_gpu=True)
            for name, tensor in tensors.items():
                ledger.add(name, tensor)
            suffix = "" if self.tp == 1 else f" (rank {rank})"
            own = {
                name.removesuffix(suffix): checksum
                for name, checksum in ledger.expected().items()
                if name.endswith(suffix)
            }
            answers.append({"parallelism_info": [{"tp_rank": rank}], "checksums": own})
        return answers


class Handler(BaseHTTPRequestHandler):
    """Routes."""

    server: Any

    def do_GET(self) -> None:
        if self._refuses():
            return
        if self.path == "/health_generate":
            self.server.fake.health()
            self._answer({})
        else:
            fake = self.server.fake
            self._answer({"model_path": str(fake.model), "weight_version": fake.version, "num_running": fake.running})

    def do_POST(self) -> None:
        try:
            self._do_post()
        except Exception as error:  # noqa: BLE001 - what ends SGLang's scheduler ends this
            die(f"{type(error).__name__}: {error}")

    def _refuses(self) -> bool:
        """What the guard does that the launcher puts before the real server's application, which this has none of."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        refused = refusal(headers, "127.0.0.1", self.server.key)
        if refused is not None:
            self._answer({"error": refused[1]}, refused[0])
        return refused is not None

    def _do_post(self) -> None:
        if self._refuses():
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake = self.server.fake
        if self.path == "/pause_generation":
            fake.pause()
        elif self.path == "/continue_generation":
            fake.go_on()
        elif self.path == "/release_memory_occupation":
            fake.release(body["tags"])
        elif self.path == "/resume_memory_occupation":
            fake.resume(body["tags"])
        elif self.path == "/begin_weight_update":
            fake.begin()
        elif self.path == "/update_weights_from_tensor":
            fake.load(body["serialized_named_tensors"])
        elif self.path == "/end_weight_update":
            fake.is_updating = False
        elif self.path == "/update_weight_version":
            fake.version = body["new_version"]
        elif self.path == "/weights_checker":
            self._answer({"success": True, "ranks": fake.checksums()})
            return
        self._answer({"success": True})

    def _answer(self, content: Any, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--tp", type=int)
    parser.add_argument("--device")
    parser.add_argument("--weight-version")
    parser.add_argument("--mem-fraction-static", type=float)
    parser.add_argument("--enable-memory-saver", action="store_true")
    parser.add_argument("--api-key", required=True)
    arguments, _ = parser.parse_known_args()
    server: Any = ThreadingHTTPServer((arguments.host, arguments.port), Handler)
    server.daemon_threads = True
    server.key = arguments.api_key
    server.fake = FakeServer(arguments)
    server.serve_forever()


if __name__ == "__main__":
    main()
