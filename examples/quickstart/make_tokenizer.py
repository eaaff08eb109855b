"""Writes the quick-start's character tokenizer: python examples/quickstart/make_tokenizer.py [--output FOLDER].

One token per character of the chain-arithmetic task, 19 in all; see `megatron_fipo.data.chain_arithmetic.VOCABULARY`.
Any other character becomes <unk>, which the data pipeline refuses. The files are committed; running this again writes
the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_fipo.data.chain_arithmetic import EOS_TOKEN, PAD_TOKEN, UNK_TOKEN, VOCABULARY

MAX_LENGTH = 256
"""Longest sequence, as the quick-start's model has it."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: ids are positions in VOCABULARY; decoding an encoding gives the text back."""
    vocabulary = {token: token_id for token_id, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK_TOKEN))
    # Every single character, line breaks included, is a word of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quick-start's character tokenizer.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "base", help="folder to write to")
    output: Path = parser.parse_args().output
    build_tokenizer().save_pretrained(output)
    print(f"wrote {len(VOCABULARY)} tokens to {output}")


if __name__ == "__main__":
    main()
