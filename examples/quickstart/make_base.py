"""Makes the quick-start's base model: torchrun --nproc-per-node 2 examples/quickstart/make_base.py [--output FOLDER].

A small Qwen2-architecture model learns chain arithmetic from worked solutions with mistakes in them, by supervised
updates of the same Megatron actor that reinforcement learning then trains. It comes to know how a solution looks and to
make the mistakes of its teachers: sampled, about one answer in two is right. The result is committed; about ten
minutes on two cores make it anew.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import BatchSection, Config, ModelSection, OptimizerSection, ParallelSection
from megatron_fipo.convert.stream import export_folder
from megatron_fipo.data.chain_arithmetic import VOCABULARY, ChainArithmetic, WorkedSolutionNoise, worked_solution
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.metrics.reductions import Mean, Metrics, scalars
from megatron_fipo.parallel import cpu, exchange, groups
from megatron_fipo.parallel.batch import shard_batch
from megatron_fipo.parallel.metric_merge import merge_metrics
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.packing import build_packed_batch
from megatron_fipo.rl.trajectory import Trajectory

BASE = Path(__file__).parent / "base"
TASK = ChainArithmetic(num_terms=7, min_terms=2)
NUM_UPDATES = 1500
SOLUTIONS_PER_UPDATE = 96
LEARNING_RATE = 1e-3
NUM_WARMUP_UPDATES = 50
SEED = 20261121


@dataclass(frozen=True)
class SupervisedLoss:
    """Negative log-likelihood of the solutions' tokens."""

    loss_sum: torch.Tensor
    normalizer: torch.Tensor
    metrics: Metrics


def supervised_loss(log_probs: torch.Tensor, entropy: torch.Tensor, batch: PackedBatch) -> SupervisedLoss:
    """Token mean over the solutions; prompts and padding carry none."""
    loss_sum = -torch.where(batch.response_mask, log_probs, 0.0).sum()
    num_tokens = batch.response_mask.sum()
    return SupervisedLoss(loss_sum, num_tokens, {"loss": Mean(loss_sum.detach(), num_tokens)})


def write_random_model(folder: Path) -> None:
    """An untrained model of the quick-start's shape, with its tokenizer."""
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY.index("<pad>"),
        bos_token_id=None,
        eos_token_id=VOCABULARY.index("<eos>"),
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for file in BASE.glob("tokenizer*"):
        shutil.copy2(file, folder / file.name)


def draw_solutions(update: int, share: int, num_shares: int, tokenizer: object) -> list[Trajectory]:
    """One data-parallel rank's part of an update's worked solutions; held-out problems are never among them."""
    samples = []
    for index in range(share, SOLUTIONS_PER_UPDATE, num_shares):
        rng = Random(f"{SEED}/{update}/{index}")
        problem = TASK.draw_training(rng)
        solution = worked_solution(problem, rng, WorkedSolutionNoise()) + tokenizer.eos_token
        prompt_ids, response_ids = (
            torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in (problem.prompt, solution)
        )
        samples.append(
            Trajectory.of_response(index, 0, prompt_ids, response_ids, torch.zeros(len(response_ids)), "stop")
        )
    return samples


def train(model_folder: Path, output: Path, num_updates: int) -> None:
    """Supervised updates over the world's ranks, data parallel; the leader writes the result in bfloat16."""
    parallel = ParallelSection()
    ranks = groups.initialize(parallel, SEED)
    tokenizer = load_tokenizer(BASE)
    config = Config(
        model=ModelSection(path=str(model_folder), log_prob_chunk_mib=0.25),
        optimizer=OptimizerSection(
            learning_rate=LEARNING_RATE, num_warmup_steps=NUM_WARMUP_UPDATES, weight_decay=0.01, adam_beta2=0.95
        ),
        parallel=parallel,
        batch=BatchSection(max_tokens_per_microbatch=8192),
    )
    actor = Actor(config, ranks)
    for update in range(num_updates):
        samples = draw_solutions(update, ranks.dp.rank(), ranks.dp.size(), tokenizer)
        batch = build_packed_batch(samples, range(len(samples)), 1, tokenizer.pad_token_id)
        result = actor.update([shard_batch(batch, ranks.cp, groups.device())], supervised_loss, update)
        if update % 50 == 0 or update == num_updates - 1:
            loss = scalars(merge_metrics(result.metrics, ranks.world))["loss"]
            if ranks.rank == 0:
                print(f"update {update}: loss {loss:.4f}, gradient norm {result.grad_norm:.3f}", flush=True)
    export_folder(actor.weights(), model_folder, output, is_writer=ranks.rank == 0, dtype=torch.bfloat16)
    exchange.barrier(ranks.world)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the quick-start's base model.")
    parser.add_argument("--output", type=Path, default=BASE, help="folder to write to")
    parser.add_argument("--num-updates", type=int, default=NUM_UPDATES)
    arguments = parser.parse_args()
    cpu.install()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        write_random_model(Path(scratch) / "random")
        train(Path(scratch) / "random", arguments.output, arguments.num_updates)
    groups.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
