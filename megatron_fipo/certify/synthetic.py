"""A small random model and seeded rollouts: everything that a certified computation starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_fipo.config import Config
from megatron_fipo.convert.families import expected_tensors
from megatron_fipo.convert.hf_config import ModelShape, model_shape
from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory

GROUPS_PER_UPDATE = 2
SAMPLES_PER_GROUP = 4
LONGEST_PROMPT = 9

_HIDDEN_SIZE, _NUM_HEADS, _NUM_LAYERS, _VOCAB_SIZE = 64, 4, 4, 157


def shrunken_config(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json of a small model of the same family and switches: tied or not, with a bias or not, GQA or MHA.

    Args:
        raw: config.json of the model that it stands for.
    """
    heads = raw["num_attention_heads"]
    grouped = (raw.get("num_key_value_heads") or heads) != heads
    small = {
        "hidden_size": _HIDDEN_SIZE,
        "intermediate_size": 3 * _HIDDEN_SIZE,
        "num_hidden_layers": _NUM_LAYERS,
        "num_attention_heads": _NUM_HEADS,
        "num_key_value_heads": _NUM_HEADS // 2 if grouped else _NUM_HEADS,
        "head_dim": _HIDDEN_SIZE // _NUM_HEADS,
        # No multiple of 128: the last tensor-parallel rank holds padding.
        "vocab_size": _VOCAB_SIZE,
    }
    return raw | small


def write_random_model(folder: Path, raw: dict[str, Any], seed: int) -> None:
    """A random model whose norms and biases are not at their trivial initial values either."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in expected_tensors(model_shape(raw, str(folder))).items():
        values = torch.randn(size, generator=generator)
        if "norm" in name:
            tensors[name] = 1 + 0.1 * values
        elif name.endswith("bias"):
            tensors[name] = 0.1 * values
        else:
            tensors[name] = values / size[-1] ** 0.5
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def draw_groups(config: Config, shape: ModelShape, step: int, num_updates: int, longest_response: int) -> list[Group]:
    """The groups of one step, two for each update; the same everywhere.

    Response lengths run from 1 to the longest, advantages have both signs. `rollout_log_probs` holds how far the policy
    has drifted from the old one, token by token, so that even the first update has ratios, influence weights and a
    sequence filter with something to do: mostly small drifts, some beyond the clip range, and in some responses one or
    three ratios beyond dual_clip.
    """
    generator = torch.Generator().manual_seed(config.run.seed * 1000 + step)
    beyond_dual_clip = torch.tensor(1.5 * (config.objective.dual_clip or 10.0)).log().item()

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    groups = []
    for prompt_id in range(GROUPS_PER_UPDATE * num_updates):
        prompt_ids = torch.randint(shape.vocab_size, (integer(1, LONGEST_PROMPT),), generator=generator)
        samples = []
        for index in range(SAMPLES_PER_GROUP):
            # The first group has the shortest and the longest; the others lie between, short ones being more frequent.
            share = float(torch.rand((), generator=generator))
            length = {(0, 0): 1, (0, 1): longest_response}.get((prompt_id, index), round(longest_response**share))
            drift = 0.02 * torch.randn(length, generator=generator)
            drift += 0.4 * torch.randn(length, generator=generator) * (torch.rand(length, generator=generator) < 0.05)
            advantage = (1.5, -0.5, -1.25, 0.75)[index]
            if index == 2 and length > 3:
                places = torch.randperm(length, generator=generator)[: 1 if prompt_id % 2 else 3]
                drift[places] = beyond_dual_clip
            samples.append(
                Trajectory.of_response(
                    prompt_id=prompt_id,
                    sample_index=index,
                    prompt_ids=prompt_ids,
                    response_ids=torch.randint(shape.vocab_size, (length,), generator=generator),
                    rollout_log_probs=drift,
                    finish_reason="length" if length == longest_response else "stop",
                    advantage=advantage,
                )
            )
        groups.append(Group(Prompt(prompt_id, "synthetic", "", (), "exact", None), samples))
    return groups
