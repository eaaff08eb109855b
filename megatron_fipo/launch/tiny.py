"""`model=tiny`: a recipe's own file and script on two CPU processes, with the quick-start's model and task.

The recipe's algorithm, objective, rewards, sampling rules and optimizer stay; sizes, data, layout and engine shrink.
"""

from __future__ import annotations

from pathlib import Path

from megatron_fipo.config import load_config

TINY = "model=tiny"
TINY_RANKS = 2
_SIZES = (
    "model.dtype=float32",
    "model.fp8=none",
    "model.recompute=none",
    "rollout.engine=in_process",
    "rollout.num_prompts=16",
    "rollout.num_prompts_per_round=32",
    "rollout.num_samples_per_prompt=4",
    "rollout.max_prompt_tokens=16",
    "rollout.max_response_tokens=96",
    "reward.overlong_buffer_tokens=16",
    "parallel.tp=1",
    "parallel.pp=1",
    "parallel.virtual_pp=null",
    "parallel.cp=2",
    "parallel.sequence_parallel=false",
    "batch.max_tokens_per_microbatch=4096",
    "batch.pad_multiple=null",
    "train.num_steps=1",
    "train.num_minibatches=8",
    "train.resume=false",
    "evaluation.num_samples_per_prompt=2",
    "verifier.num_workers=1",
    "checkpoint.every_num_steps=0",
)
_SOURCE = (
    "kind=chain_arithmetic",
    "path=''",
    "schema=columns",
    "prompt_template='{prompt}'",
    "chat_template=false",
    "verifier=chain_arithmetic",
    "params={num_terms: 7}",
)
_HELD_OUT = ("num_prompts=8", "seed=1")


def tiny_overrides(config_file: Path) -> tuple[str, ...]:
    """Overrides that shrink a recipe of `examples/`; its sources keep their names."""
    config = load_config(config_file)
    base = config_file.resolve().parents[1] / "quickstart" / "base"
    overrides = [f"model.path={base}", f"run.name={config.run.name}_tiny", *_SIZES]
    for name in config.data.train:
        overrides += [f"data.train.{name}.{value}" for value in _SOURCE]
    for name in config.data.evaluation:
        overrides += [f"data.evaluation.{name}.{value}" for value in (*_SOURCE, *_HELD_OUT)]
    return tuple(overrides)
