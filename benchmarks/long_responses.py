"""A step on responses as long as the paper's: generated, packed and trained on, with seconds and peak memory by part.

    python benchmarks/long_responses.py --engine sglang --server-python PATH [--tokens 20480] [--cp 4]

A small random model whose responses never end early answers one prompt four times. Everything else is the real thing:
torchrun, a Megatron-Core actor under context parallelism, the server, weight sync, Future-KL over the whole length.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_fipo.verifiers.verdict import Verdict

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "examples/quickstart/base"
EOS = 1
JUDGED = "LONG_RESPONSES_JUDGED"
"""Environment variable that names the judges' folder."""
_SAMPLE_S = 0.5
PARTS = ("rollout", "old_log_probs", "update", "weight_sync", "step")


def judge(response: str, reference: object, finish_reason: str) -> Verdict:
    """Every second response that is judged is right, so that there is something to learn. Judges share a folder."""
    for number in itertools.count():
        try:
            (Path(os.environ[JUDGED]) / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        return Verdict(float(number % 2))
    raise AssertionError


def make_model(folder: Path, num_tokens: int) -> None:
    """A model that never ends a response: its logits are large, and that of the end token is 0."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=19, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2 * num_tokens, tie_word_embeddings=False, eos_token_id=EOS,
        pad_token_id=0, bos_token_id=None, attention_dropout=0.0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        # The end token's logit is the mean of all rows' less a margin that no hidden state makes up.
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.normal_(0.0, 0.02)
        bias = torch.ones(config.hidden_size) / config.hidden_size**0.5
        model.model.embed_tokens.weight.add_(bias)
        model.lm_head.weight[EOS] = -20.0 * bias
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


def make_config(folder: Path, arguments: argparse.Namespace) -> Path:
    """The run's configuration."""
    tokens = arguments.tokens
    servers = {"python": str(arguments.server_python)} if arguments.server_python else {}
    config = {
        "algorithm": "fipo",
        "run": {"name": "long", "output_dir": str(folder / "run"), "num_sample_prints": 0},
        "model": {"path": str(folder / "model"), "recompute": arguments.recompute},
        "data": {"train": {"chains": {"kind": "chain_arithmetic", "verifier": "long_responses:judge"}}},
        "rollout": {
            "engine": arguments.engine, "num_prompts": 1, "num_samples_per_prompt": 4, "max_prompt_tokens": 32,
            "max_response_tokens": tokens,
        },
        "servers": servers,
        "sampling": {"dynamic": False},
        "train": {"num_steps": 1, "num_minibatches": 1, "num_epochs": 2, "resume": False},
        "parallel": {"cp": arguments.cp},
        "batch": {"max_tokens_per_microbatch": tokens + 64},
        "optimizer": {"num_warmup_steps": 0},
        "metrics": {"tensorboard": False},
        "checkpoint": {"export_huggingface": False},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


class Memory:
    """Largest resident memory of the trainer's ranks and of the servers under a process, looked at twice a second."""

    def __init__(self, pid: int) -> None:
        self.peaks = {"one rank": 0, "all ranks": 0, "server": 0}
        self._root = psutil.Process(pid)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_SAMPLE_S):
            ranks, server = [], 0
            for process in self._root.children(recursive=True):
                try:
                    command, resident = process.cmdline(), process.memory_info().rss
                except psutil.Error:  # it has just ended
                    continue
                if "megatron_fipo.train" in command and "torch.distributed.run" not in command:
                    ranks.append(resident)
                elif any("sglang" in part or "vllm" in part.lower() for part in command):
                    server += resident
            found = {"one rank": max(ranks, default=0), "all ranks": sum(ranks), "server": server}
            self.peaks = {name: max(peak, found[name]) for name, peak in self.peaks.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("in_process", "sglang", "vllm"), default="in_process")
    parser.add_argument("--server-python", type=Path, help="interpreter of the server's environment")
    parser.add_argument("--tokens", type=int, default=20480, help="length of each of the four responses")
    parser.add_argument("--cp", type=int, default=4)
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="selective")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", arguments.tokens)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.cp), "-m",
            "megatron_fipo.train", str(make_config(folder, arguments)),
        ]  # fmt: skip
        (folder / "judged").mkdir()
        started = time.perf_counter()
        environment = {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1", JUDGED: str(folder / "judged"),
        }  # fmt: skip
        process = subprocess.Popen(command, env={**os.environ, **environment}, cwd=ROOT)
        memory = Memory(process.pid)
        status = process.wait()
        memory.stop()
        if status:
            return status
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if "optim/grad_norm" in line)
    print(f"\n{arguments.engine}, cp {arguments.cp}, responses of {step['rollout/response_tokens/min']:.0f} to "
          f"{step['rollout/response_tokens/max']:.0f} tokens, {step['perf/tokens']:.0f} in all, "
          f"{time.perf_counter() - started:.0f} s with all starts")  # fmt: skip
    print("| part | seconds |\n|---|---|")
    for part in PARTS:
        print(f"| {part} | {step[f'time_s/{part}']:.1f} |")
    print("| memory | peak GiB |\n|---|---|")
    for name, peak in memory.peaks.items():
        print(f"| {name} | {peak / 2**30:.2f} |")
    print(f"gradient norm {step['optim/grad_norm']:.3g}, future_kl absmax {step['fipo/future_kl/absmax']:.3g}, "
          f"mismatch absmax {step['mismatch/log_prob_difference/absmax']:.2e}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
