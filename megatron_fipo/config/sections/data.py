"""Prompts and who judges the responses to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from megatron_fipo.config.declaration import key, seconds
from megatron_fipo.config.sections.reasons import ORDER_OF_PROMPTS
from megatron_fipo.config.text_rules import holds_prompt, not_blank
from megatron_fipo.verifiers.names import BUILTIN_VERIFIERS, OTHER_FORMS

# OmegaConf resolves these annotations at run time, hence Optional, Dict and List rather than the newer spellings.

FILE_KINDS = ("jsonl", "parquet", "hub")
"""Kinds of source that read files: local ones, or those of a data set on the Hugging Face hub."""
PROCEDURAL_KINDS = ("chain_arithmetic", "reasoning_gym")
"""Kinds of source that generate prompts without end."""


def _names_verifiers(value: Any) -> str:
    """The rule for one verifier's name, or a list of several; empty where it is kept."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and names and all(isinstance(name, str) and (name or name is value) for name in names):
        return ""
    return (
        "a verifier's name, or a list of several, was expected, such as [math, my_rewards:format] with "
        "verifier_weights=[1.0, 0.2]"
    )


@dataclass(frozen=True)
class DataSourceConfig:
    """One source of prompts."""

    kind: str = key("", choices=(*FILE_KINDS, *PROCEDURAL_KINDS), fixed_because=ORDER_OF_PROMPTS)
    """jsonl, parquet, hub, chain_arithmetic or reasoning_gym."""
    path: str = key("", text="path")
    """File of a jsonl or parquet source; a relative path is looked for as model.path is. With kind=hub a data set's
    name on the Hugging Face hub, such as openai/gsm8k."""
    subset: str = key("", text="name")
    """Subset (configuration) of a data set on the hub, such as main; empty takes its only or its default one."""
    split: str = key("", text="name")
    """Split of a data set on the hub, such as train or test."""
    revision: Optional[str] = key(None, check=not_blank, text="name")
    """Branch, tag or commit of a data set on the hub; null takes main. The commit it points to is recorded and kept."""
    task: str = key("", fixed_because=ORDER_OF_PROMPTS)
    """Name of the reasoning-gym data set."""
    params: Dict[str, Any] = key({}, fixed_because=ORDER_OF_PROMPTS)
    """Parameters of a procedural source, passed on by name."""
    num_prompts: Optional[int] = key(None, least=1, fixed_because=ORDER_OF_PROMPTS)
    """Use only this many prompts, from the first on; required for a procedural source used for evaluation."""
    seed: Optional[int] = key(None, least=0, most=2**32 - 1, fixed_because=ORDER_OF_PROMPTS)
    """Seed of a procedural source; null takes run.seed. Give held-out data a fixed seed of its own."""
    schema: str = key("columns", choices=("columns", "dapo_math", "aime", "gsm8k", "humaneval", "mbpp"))
    """How a file's rows are read: columns (prompt_field and answer_field), or as published: dapo_math (DAPO-Math-17k
    and its AIME 2024), aime (problem, answer), gsm8k (question, answer after ####), humaneval, mbpp."""
    deduplicate: bool = True
    """Keep the first of a file's rows with the same prompt; DAPO-Math-17k as published has each a hundred times."""
    prompt_field: str = key("prompt", check=not_blank)
    """Column that holds the prompt: a string, or a list of chat messages. Read with schema=columns only."""
    answer_field: str = key("answer", check=not_blank)
    """Column that holds the reference answer; a dot descends into a struct (reward_model.ground_truth). Read with
    schema=columns only."""
    prompt_template: str = key("{prompt}", check=holds_prompt, text="prompt")
    """Text around the prompt; {prompt} is replaced."""
    system_prompt: str = key("", text="prompt")
    """System message in front of the chat; needs chat_template=true."""
    chat_template: bool = False
    """Format the prompt with the tokenizer's chat template; false feeds the text as it is."""
    verifier: Any = key(
        "",
        choices=tuple(BUILTIN_VERIFIERS),
        forms=OTHER_FORMS,
        check=_names_verifiers,
    )
    """Judge of its responses: math (last \\boxed{} or "Answer:"), math_answer (DAPO's "Answer:" line), math_boxed,
    exact, code (Python against tests), code_unprotected (the same without a sandbox), reasoning_gym, chain_arithmetic,
    a reward model as http://host:port/path, or your own as package.module:function. A list names several; a response is
    right if each with a weight above 0 gives 1."""
    verifier_weights: List[float] = key([], least=0, because="0 shows a verifier's score without counting it")
    """Weights of several verifiers in the mean that is the score; empty weighs them alike. With 0 a verifier's score is
    shown in the metrics and does not count."""
    weight: int = key(1, least=1, fixed_because=ORDER_OF_PROMPTS)
    """Prompts taken from this source in each round over the sources."""


@dataclass(frozen=True)
class DataSection:
    """Prompts to train on and to evaluate on."""

    train: Dict[str, DataSourceConfig] = key({})
    """Training sources by name."""
    evaluation: Dict[str, DataSourceConfig] = key({}, changes_results=False)
    """Evaluation sources by name; each must be finite."""
    overlong_prompts: str = key("error", choices=("error", "skip"))
    """What happens to a prompt longer than rollout.max_prompt_tokens: error stops the run before it begins, or when a
    procedural source makes such a prompt; skip leaves it out: a file's are counted in the log, a procedural source
    makes another question instead."""


@dataclass(frozen=True)
class VerifierSection:
    """The pool of processes that judges responses."""

    num_workers: int = key(1, least=1, most=1024, because="these are processes on each rank")
    """Worker processes on each rank."""
    timeout_s: float = seconds(10.0)
    """Longest time for one response; one that takes longer is killed, reported, and its group dropped."""
    trusted: List[str] = key([])
    """Names of verifiers in use that judge with the environment, files, network and rights of the run instead of
    confined (docs/security.md): for a function that needs a GPU, a server or threads."""
