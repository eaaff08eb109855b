"""What must be in the environment before CUDA starts. Imported before all else: Transformer Engine's import starts it.

With one hardware queue, kernels begin in the order in which they were launched. Tensor, context and data parallelism
launch their communication first and the products that it hides behind next, and count on it: with several queues the
products may take the whole GPU before. Megatron-LM asks for it before Blackwell, which keeps the order by itself
(CUDA_DEVICE_MAX_CONNECTIONS in its tensor_parallel/layers.py and training/arguments.py).

One process must have one cuDNN. torch brings its own as a package. Transformer Engine takes the system's, such as that
of NVIDIA's container images, unless CUDNN_HOME or CUDNN_PATH names another, and the dynamic loader takes the system's
for the parts that its library is linked with, unless they are loaded already (transformer_engine/common/__init__.py).
If it is of another version, torch's next use of cuDNN fails with "cuDNN version incompatibility".
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
from collections.abc import MutableMapping
from pathlib import Path

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


def use_torchs_cudnn(environment: MutableMapping[str, str]) -> None:
    """Load the cuDNN that torch was installed with, and name it to Transformer Engine, if both are installed.

    What CUDNN_HOME or CUDNN_PATH names already stays, and then nothing is loaded here.
    """
    if "CUDNN_HOME" in environment or "CUDNN_PATH" in environment:
        return
    if importlib.util.find_spec("transformer_engine") is None:
        return
    spec = importlib.util.find_spec("nvidia")
    for root in [] if spec is None else spec.submodule_search_locations or []:
        folder = Path(root) / "cudnn"
        if libraries := sorted((folder / "lib").glob("libcudnn*.so.*")):
            for library in libraries:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            environment["CUDNN_HOME"] = str(folder)
            return


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
use_torchs_cudnn(os.environ)
