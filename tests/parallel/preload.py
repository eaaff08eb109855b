"""What every rank needs, done once in the process that ranks are forked from."""

import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import megatron_fipo.checkpoint.torch_dist
import megatron_fipo.train  # noqa: F401
from megatron_fipo.parallel import cpu
from tests.parallel import one_gloo_device

torch.set_num_threads(1)
cpu.install()
one_gloo_device.install()
get_checkpoint_conversion_mapping("qwen2")  # compiles the names' patterns of all families at the first call
