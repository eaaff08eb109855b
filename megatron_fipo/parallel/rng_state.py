"""The random states of every rank, for checkpoints."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups


def gather(ranks: ParallelGroups) -> list[dict[str, Any]]:
    """Every rank's states, by rank. Collective over all ranks."""
    own = {
        "python": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "torch": torch.get_rng_state(),
        "megatron": dict(get_cuda_rng_tracker().get_states()),
    }
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    return exchange.all_gather_objects(own, ranks.world)


def restore(states: Sequence[dict[str, Any]], ranks: ParallelGroups) -> bool:
    """Take this rank's states back. No communication.

    Returns:
        Whether they were taken: not where the number of ranks differs, in which the old states have no owners. What is
        drawn from them (dropout, which is 0 in all supported models) then comes from the run's seed anew; prompts and
        responses do not, their randomness being keyed by step, prompt and sample.
    """
    if len(states) != ranks.world.size():
        return False
    own = states[ranks.rank]
    random.setstate(own["python"])
    np.random.set_state(tuple(own["numpy"]))
    torch.set_rng_state(own["torch"])
    get_cuda_rng_tracker().set_states(dict(own["megatron"]))
    if torch.cuda.is_available() and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"])
    return True
