"""Starts a vLLM server on a host without a GPU, so that its waiting processes leave time to others.

Run by path with the interpreter that has vLLM installed; it imports nothing of this package. What stands at module
level is needed in the processes that the server spawns too, which import this file anew.
"""

from __future__ import annotations

import importlib
import runpy
from typing import Any

# The engine waits for its workers by calling sched_yield in a loop. On Linux 6.18 with two cores, that kept every other
# process of the host from running for seconds: the server's own answers about its health among them, and a server that
# does not answer is killed. Without this flag it calls sleep(0): about a tenth slower, and the others run.
utilities: Any = importlib.import_module("vllm.distributed.utils")  # by name: no vLLM where this file is type-checked
if not hasattr(utilities, "USE_SCHED_YIELD"):
    raise ImportError(
        "vllm.distributed.utils has no USE_SCHED_YIELD, so that this launcher cannot keep vLLM's processes from "
        "starving others on the CPU. Install the version of tools/engines/vllm.txt, or mend the launcher for this one."
    )
utilities.USE_SCHED_YIELD = False

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
