"""What a rank says when another one has left while it waited."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from megatron_fipo.parallel import say_once as say_once_module
from megatron_fipo.parallel.say_once import say_once
from megatron_fipo.system.error_net import EXIT_BAD_INPUT, EXIT_STOPPED, report
from tests.parallel.ranks import run_ranks


def _wait_for_a_rank_that_leaves() -> tuple[list[str], int, str]:
    """Rank 0 tells its reason and leaves; rank 1 waits for it in a collective of gloo's."""
    said: list[str] = []
    say_once_module._say = said.append
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    try:
        dist.barrier()  # a rank that leaves while the other one still connects would be met in there
        if os.environ["RANK"] == "0":
            raise ValueError("the reason")
        dist.barrier()
        raise AssertionError("nobody was there to meet")
    except Exception as error:  # noqa: BLE001 - it stands for a command's
        return said, report(error, say_once), type(error).__name__
    finally:
        dist.destroy_process_group()


def test_a_rank_that_waits_for_one_that_left_adds_nothing() -> None:
    first, second = run_ranks(_wait_for_a_rank_that_leaves, 2)
    assert first == (["error: the reason"], EXIT_BAD_INPUT, "ValueError")
    said, code, kind = second
    assert (said, code) == ([], EXIT_STOPPED)
    assert kind not in ("ValueError", "AssertionError"), "the control: it did fail, in the collective"
