"""What every rank needs, imported once in the process that ranks are forked from (hosts without GPUs)."""

import torch

import megatron_fipo.certify.computation  # noqa: F401
from megatron_fipo.parallel import cpu

torch.set_num_threads(1)
cpu.install()
