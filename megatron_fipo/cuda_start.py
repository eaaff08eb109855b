"""What must be in the environment before CUDA starts. Imported before all else: Transformer Engine's import starts it.

With one hardware queue, kernels begin in the order in which they were launched. Tensor, context and data parallelism
launch their communication first and the products that it hides behind next, and count on it: with several queues the
products may take the whole GPU before. Megatron-LM asks for it before Blackwell, which keeps the order by itself
(CUDA_DEVICE_MAX_CONNECTIONS in its tensor_parallel/layers.py and training/arguments.py).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import MutableMapping

_VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = 10
"""Its compute capability's first number."""
_TIMEOUT_S = 60
"""A driver that does not answer is told of when CUDA starts."""


def set_max_connections(environment: MutableMapping[str, str]) -> None:
    """Set the variable to 1 where there is a GPU older than Blackwell; a value that is there already stays."""
    if _VARIABLE in environment or environment.get("CUDA_VISIBLE_DEVICES") == "":
        return
    capabilities = _compute_capabilities()
    if capabilities and min(capabilities) < _BLACKWELL:
        environment[_VARIABLE] = "1"


def _compute_capabilities() -> list[int]:
    """First number of each GPU's; asked of nvidia-smi, because torch could only say once CUDA has started."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    numbers = (line.strip().partition(".")[0] for line in listed.stdout.splitlines())
    return [int(number) for number in numbers if number.isdecimal()]


set_max_connections(os.environ)
