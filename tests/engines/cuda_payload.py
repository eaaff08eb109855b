"""What SGLang's own code makes of a handle to GPU memory: LAUNCHER UUID …, the payload on standard input.

Runs in SGLang's environment, which LAUNCHER (the project's, for CPUs) makes importable. The process is made to believe
that it sees GPUs of these UUIDs; opening the memory itself is left out. Prints the number of the device on which SGLang
would open it, or its error.
"""

import base64
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def main(launcher: str, uuids: list[str]) -> None:
    sys.path.insert(0, str(Path(launcher).parent))  # as for what runs by path
    spec = importlib.util.spec_from_file_location("launcher", launcher)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    from sglang.srt.utils.common import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from torch.multiprocessing import reductions

    torch.cuda.device_count = lambda: len(uuids)
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=uuids[index])
    monkey_patch_torch_reductions()

    def opened(*arguments: Any) -> str:
        assert len(arguments) == 15, "torch's rebuild_cuda_tensor takes so many"
        return f"device {arguments[6]}"

    reductions._rebuild_cuda_tensor_original = opened
    try:
        content = MultiprocessingSerializer.deserialize(base64.b64decode(sys.stdin.read()))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        print(error)
        return
    (entry,) = content["metadata"]
    print(content["flattened_tensor"], entry.name, entry.dtype, list(entry.shape), entry.start_idx, entry.end_idx)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
