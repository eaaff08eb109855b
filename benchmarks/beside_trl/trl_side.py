"""TRL's GRPO, a rank of it, with a stopwatch: `benchmarks/trl_step.py` starts it in an environment that has TRL.

What is not set is TRL's default, except for what costs time: logging, saving and gradient checkpointing are off.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.beside_trl.stopwatch import Stopwatch
from megatron_fipo.verifiers import chain_arithmetic


class TimedTrainer(GRPOTrainer):
    """TRL's trainer with a stopwatch around what it does anyway."""

    watch = Stopwatch()

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.watch.begin_step()
        return super()._generate_and_score_completions(inputs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch.rollout():
            found = super()._generate(*args, **kwargs)
        prompts, completions = found[0], found[1]
        self.watch.count(
            responses=len(completions),
            prompt_tokens=sum(map(len, prompts)),
            response_tokens=sum(map(len, completions)),
        )
        return found

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch.rollout():
            return super()._calculate_rewards(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.watch.count(trained_tokens=int(inputs["completion_mask"].sum()))
        if self.accelerator.is_main_process:
            self.watch.count(updates=1)
        return super()._compute_loss(model, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path, help="JSON, from trl_step.py")
    parser.add_argument("folder", type=Path, help="where the times go")
    arguments = parser.parse_args()
    given = json.loads(arguments.settings.read_text())
    torch.set_num_threads(given["threads"])
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32, attn_implementation="sdpa")

    def reward(completions: list[str], completion_ids: list[list[int]], reference: list[str], **_: Any) -> list[float]:
        rewards = []
        for text, ids, wanted in zip(completions, completion_ids, reference, strict=True):
            reason = "stop" if ids[-1] == tokenizer.eos_token_id else "length"
            rewards.append(1.0 if chain_arithmetic.verify(text, wanted, reason).score else -1.0)
        return rewards

    per_update = given["num_prompts"] * given["num_samples"] // given["num_updates"]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            ddp_backend="gloo" if given["processes"] > 1 else None,
            bf16=False,
            gradient_checkpointing=False,
            num_generations=given["num_samples"],
            per_device_train_batch_size=per_update // given["processes"],
            steps_per_generation=given["num_updates"],
            max_steps=given["num_steps"] * given["num_updates"],
            shuffle_dataset=False,
            max_completion_length=given["max_tokens"],
            temperature=1.0,
            top_k=0,
            learning_rate=given["learning_rate"],
            lr_scheduler_type="constant",
            adam_beta1=given["adam_beta1"],
            adam_beta2=given["adam_beta2"],
            adam_epsilon=given["adam_epsilon"],
            weight_decay=given["weight_decay"],
            max_grad_norm=given["max_grad_norm"],
            epsilon=given["clip_ratio_low"],
            epsilon_high=given["clip_ratio_high"],
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=given["seed"],
        )
        trainer = TimedTrainer(model, reward, config, Dataset.from_list(given["prompts"]), processing_class=tokenizer)
        trainer.train()
        trainer.watch.write(arguments.folder, trainer.accelerator.process_index)


if __name__ == "__main__":
    main()
