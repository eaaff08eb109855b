"""Starts an SGLang server, or its router, on a host without CUDA and without AMX, from its published wheels.

Run by path with the interpreter that has SGLang installed; everything but the stand-ins is in `sglang_launcher`. The
code at module level is needed before SGLang is imported, and again in the processes that it spawns, which import this
file anew.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
import types
from typing import Any

# Otherwise rotary embeddings import vllm's operators.
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

import torch


def _define_torchvision_operators() -> torch.library.Library:
    """The published torchvision is a CUDA build, whose operators are missing here; importing it needs their names."""
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _stand_in_for_kernels() -> types.ModuleType:
    """sgl_kernel is a CUDA build. Without AMX no layer calls it; one that does raises, naming what it wanted."""
    module = types.ModuleType("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    module.__path__ = []

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"sgl_kernel.{name} does not exist on this host")

        return refuse

    module.__getattr__ = missing  # type: ignore[method-assign]
    return module


_operators = _define_torchvision_operators()
sys.modules["sgl_kernel"] = _stand_in_for_kernels()
# By name: it lies beside this file, whose folder is on the path of what runs by path alone.
_launcher: Any = importlib.import_module("sglang_launcher")

if __name__ == "__main__":
    _launcher.main(sys.argv[1:])
