"""The environment that training sets before CUDA starts."""

from __future__ import annotations

import megatron_fipo.cuda_start  # noqa: F401
