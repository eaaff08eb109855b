"""The course of a run: its name and seed, its steps, what is measured and what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from megatron_fipo.config.declaration import key
from megatron_fipo.config.sections.reasons import ORDER_OF_PROMPTS, WHOLE_DISTRIBUTION
from megatron_fipo.config.text_rules import not_blank, one_folder_name, repository_or_empty

# OmegaConf resolves these annotations at run time, hence Optional, Dict and List rather than the newer spellings.


@dataclass(frozen=True)
class RunSection:
    """Name, place and seed of the run."""

    name: str = key(
        "fipo",
        check=one_folder_name,
        remedy="Set run.output_dir to write elsewhere",
        text="path",
        changes_results=False,
    )
    """Name shown in the console and in the trackers."""
    output_dir: str = key("outputs/${run.name}", check=not_blank, text="path", changes_results=False)
    """Folder of everything the run writes; ${run.name} stands for the name above."""
    seed: int = key(0, least=0, most=2**32 - 1, fixed_because=ORDER_OF_PROMPTS)
    """Seed of the order of prompts, of procedural sources without a seed of their own, and of each response's draws:
    they are the same on any number of ranks. SGLang draws by it only on GPUs and with servers.reproducible."""
    num_sample_prints: int = key(3, least=0, changes_results=False)
    """Sample responses shown before and after training."""


@dataclass(frozen=True)
class TrainSection:
    """Steps and updates."""

    num_steps: int = key(100, least=1, changes_results=False)
    """Steps to run; one step is one batch of rollouts."""
    num_minibatches: int = key(4, least=1)
    """Minibatches that a step's groups are cut into, by prompt; each is one update."""
    num_epochs: int = key(1, least=1)
    """Passes over each step's minibatches."""
    stop_when: str = key("", changes_results=False)
    """End the run before num_steps once a metric of a step or an evaluation is beyond a bound, such as
    evaluation/held_out/avg@32 >= 0.9 or policy/entropy/mean <= 0.05; empty: never."""
    resume: bool = key(True, changes_results=False)
    """Continue from the newest checkpoint in the run's folder if there is one."""


@dataclass(frozen=True)
class EvaluationSection:
    """Evaluation during the run."""

    every_num_steps: int = key(0, least=0)
    """Steps between evaluations; 0 evaluates only before and after training."""
    num_samples_per_prompt: int = key(32, least=1)
    """Responses to each evaluation prompt: k of avg@k, cons@k, pass@k."""
    temperature: float = key(1.0, least=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = key(0.7, above=0, most=1, because=WHOLE_DISTRIBUTION)
    """Nucleus sampling threshold."""
    max_response_tokens: Optional[int] = key(None, least=1)
    """Longest response; null takes rollout.max_response_tokens."""


@dataclass(frozen=True)
class MetricsSection:
    """Where metrics go."""

    console: bool = True
    """One line a step, with progress bars for rollout and updates."""
    jsonl: bool = True
    """metrics.jsonl in the run's folder."""
    tensorboard: bool = True
    """TensorBoard events in the run's folder."""
    num_samples_per_step: int = key(4, least=0)
    """Responses of each training step that are kept in samples/ of the run's folder, for `megatron-fipo samples`; 0
    keeps none."""
    trace_every_num_steps: int = key(10, least=0)
    """Steps from one whose chosen responses are traced token by token to the next, for `megatron-fipo report`; the
    first and the last are traced, too. 0 traces none."""
    num_traced_groups: int = key(2, least=1)
    """Groups that are traced of such a step; which ones, run.seed decides, mixed ones first."""
    max_traced_tokens: int = key(500_000, least=1)
    """Response tokens that are traced of such a step, at most; the first group is traced whatever it has."""
    wandb: str = key("off", choices=("off", "online", "offline"))
    """Weights & Biases: off, online or offline."""
    wandb_project: str = key("megatron_fipo", check=not_blank, text="name")
    """Project on Weights & Biases."""


@dataclass(frozen=True)
class CheckpointSection:
    """What is saved, and when."""

    every_num_steps: int = key(0, least=0)
    """Steps between saves; 0 saves only at the end and when the run is interrupted."""
    keep_last: int = key(2, least=1)
    """Checkpoints kept; older ones are deleted."""
    keep_every_num_steps: int = key(0, least=0)
    """Checkpoints at multiples of this many steps are never deleted; 0 deletes all beyond keep_last."""
    keep_best: str = ""
    """Score of the evaluations, such as evaluation/held_out/avg@32: the model of the best one so far is kept in best/,
    in Hugging Face format; empty keeps none."""
    asynchronous: bool = False
    """Write the periodic checkpoints in a process beside each rank's while training goes on."""
    export_huggingface: bool = True
    """Write the trained model as a Hugging Face folder at the end."""
    push_to_hub: str = key("", check=repository_or_empty, text="name")
    """Repository on the Hugging Face hub (me/my-model) that gets this folder and a model card; empty: none. The token
    is that of `hf auth login` or HF_TOKEN, and is checked before training."""
    hub_private: bool = True
    """Make that repository private; one that exists and is public is refused."""
    export_with_checkpoints: bool = False
    """Also write a Hugging Face folder into each periodic checkpoint, as its subfolder huggingface."""
