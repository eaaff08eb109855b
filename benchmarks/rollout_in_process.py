"""Tokens per second of the in-process engine beside transformers' `generate`, on the same random model and prompts.

    python benchmarks/rollout_in_process.py [--num-prompts 16] [--num-samples 8] [--max-tokens 96] ...

Two loads. "equal": nothing stops early, every response has max_tokens, the best case for a plain batch. "uneven":
response lengths are drawn from 1 … max_tokens with a heavy tail, as a policy's are; `generate` decodes each batch until
its longest response ends, and the tokens that it writes after a row's end count for neither side. Both sides run in
the same process, in turns; the fastest of the repeats counts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import tempfile
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import LogitsProcessor, LogitsProcessorList

from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams, sample_seed
from megatron_fipo.rollout.in_process.engine import InProcessEngine

EOS = 1


class EndAtLength(LogitsProcessor):
    """Force the end of row i once it has lengths[i] response tokens."""

    def __init__(self, lengths: torch.Tensor, num_prompt_tokens: int) -> None:
        self.lengths = lengths
        self.num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, EOS] = -torch.inf
        ended = input_ids.shape[1] - self.num_prompt_tokens >= self.lengths - 1
        scores[ended] = -torch.inf
        scores[ended, EOS] = 0.0
        return scores


def tokens_per_s(side: Callable[[torch.Tensor], int], lengths: torch.Tensor) -> float:
    """Speed of one run; side generates responses of these lengths and returns the number of their tokens."""
    start = time.perf_counter()
    return side(lengths) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=14)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--max-batch-size", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    config = Qwen2Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 3,
        num_hidden_layers=args.num_layers,
        num_attention_heads=max(2, args.hidden_size // 32),
        num_key_value_heads=2,
        max_position_embeddings=args.prompt_tokens + args.max_tokens,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    num_rows = args.num_prompts * args.num_samples
    prompts = torch.randint(2, args.vocab_size, (args.num_prompts, args.prompt_tokens))
    uneven = (args.max_tokens * torch.rand(num_rows) ** 3).ceil().clamp_(min=1).long()
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(config).save_pretrained(folder)
        # No token stops a response here: lengths are set from outside, alike on both sides.
        engine = InProcessEngine(folder, stop_token_ids=(), max_batch_size=args.max_batch_size, device=args.device)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        model = model.to(args.device).eval()

    def ours(lengths: torch.Tensor) -> int:
        requests = [
            GenerationRequest(
                sample_id=str(row),
                group_id=row // args.num_samples,
                sample_index=row % args.num_samples,
                prompt_ids=tuple(prompts[row // args.num_samples].tolist()),
                sampling=SamplingParams(max_tokens=int(lengths[row])),
                seed=sample_seed(0, 0, row // args.num_samples, row % args.num_samples),
            )
            for row in range(num_rows)
        ]

        async def generate() -> int:
            return sum(len(s.response_ids) for s in await asyncio.gather(*map(engine.generate, requests)))

        return asyncio.run(generate())

    def theirs(lengths: torch.Tensor) -> int:
        num_tokens = 0
        rows = prompts.repeat_interleave(args.num_samples, 0).to(args.device)
        for ids, ends in zip(rows.split(args.max_batch_size), lengths.split(args.max_batch_size), strict=True):
            processors = LogitsProcessorList([EndAtLength(ends.to(args.device), args.prompt_tokens)])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=args.max_tokens,
                logits_processor=processors,
            )
            assert out.shape[1] - args.prompt_tokens == int(ends.max())
            num_tokens += int(ends.sum())
        return num_tokens

    device = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{num_parameters:,} parameters, {num_rows} responses of up to {args.max_tokens} tokens, batch "
        f"{args.max_batch_size}, {args.threads} of {os.cpu_count()} threads, {device}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    print(f"{'load':8} {'ours, tokens/s':>16} {'generate, tokens/s':>20} {'ratio':>7}")
    for name, lengths in (("equal", torch.full((num_rows,), args.max_tokens)), ("uneven", uneven)):
        for side in (ours, theirs):
            side(lengths)
        speeds = [(tokens_per_s(ours, lengths), tokens_per_s(theirs, lengths)) for _ in range(args.repeats)]
        mine, others = (max(column) for column in zip(*speeds, strict=True))
        print(f"{name:8} {mine:16,.0f} {others:20,.0f} {mine / others:7.2f}")


if __name__ == "__main__":
    main()
