"""`megatron-fipo chat`: a conversation with a model, or one answer."""

from __future__ import annotations

import argparse

from megatron_fipo.system import uncollected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Talk to a model. Where its tokenizer has a chat template this is a conversation: each answer sees all turns "
        "before it. Otherwise each line is a text that the model continues, by itself."
    )
    parser.add_argument(
        "model", metavar="FOLDER", help="Hugging Face folder, such as a run's export, or a name on the hub"
    )
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling threshold (default: 1)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest answer (default: 1024)")
    parser.add_argument("--seed", type=int, help="for the same answers again")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends, or answer the one prompt. Returns the exit status."""
    with uncollected.imports():
        from megatron_fipo.evaluation.chat import ChatOptions, talk

    options = ChatOptions(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        raw=arguments.raw,
        seed=arguments.seed,
    )
    talk(arguments.model, arguments.prompt, options)
    return 0
