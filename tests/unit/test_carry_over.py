"""What a rank takes over from step to step: in memory, in the ledger, by other ranks, and no longer than it may."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.config import RolloutSection
from megatron_fipo.parallel.cpu import single_process_groups
from megatron_fipo.rl.prompt_order import FreshSamples
from megatron_fipo.rl.trajectory import Prompt, SampleKey, Segment, Trajectory
from megatron_fipo.rollout.carried import Carried
from megatron_fipo.rollout.carry_over import CARRIED_TOKENS, DROPPED_TOKENS, CarryOver
from megatron_fipo.rollout.held import Held
from megatron_fipo.rollout.ledger import Plan, RolloutLedger
