"""Number formats by the names that a configuration, a config.json and a weight file have for them."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_fipo.config.text_files import read_json_object

MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Values of `model.dtype`, and the torch dtypes that they mean."""

SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names in the headers of safetensors files."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that weights may be stored in."""


def dtype_name(dtype: torch.dtype | None) -> str:
    """A dtype without torch's prefix: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def stated_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that config.json states; None where it does not.

    Raises:
        ValueError: if config.json cannot be read, or names a dtype that weights may not have.
    """
    file = folder / "config.json"
    raw = read_json_object(file)
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is None:
        return None
    for dtype in FLOATS:
        if dtype_name(dtype) == name:
            return dtype
    raise ValueError(f"{file}: dtype={name!r}; supported are float32, float16 and bfloat16.")
