"""What every rank needs, imported once in the process that ranks are forked from."""

import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import megatron_fipo.checkpoint.torch_dist  # noqa: F401
from megatron_fipo.parallel import cpu

torch.set_num_threads(1)
cpu.install()
