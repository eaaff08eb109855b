"""What every rank needs, done once in the process that ranks are forked from."""

import gc

gc.disable()  # nothing of what is imported is garbage

from megatron_fipo.parallel import uncompiled  # isort: skip # noqa: F401, E402 - before Megatron-Core

import torch  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402
import transformers.models.qwen2.modeling_qwen2  # noqa: E402, F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import megatron_fipo.checkpoint.torch_dist  # noqa: E402
import megatron_fipo.train  # noqa: E402, F401
from megatron_fipo.parallel import cpu  # noqa: E402
from tests.parallel import one_gloo_device  # noqa: E402

torch.set_num_threads(1)
cpu.install()
one_gloo_device.install()
get_checkpoint_conversion_mapping("qwen2")  # compiles the names' patterns of all families at the first call
gc.freeze()
gc.enable()
