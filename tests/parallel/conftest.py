"""Ranks and this process share the machine's cores: one thread each."""

import torch

torch.set_num_threads(1)
