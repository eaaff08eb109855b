"""Ranks that wait for others' work: as long as those live, not a moment after one has failed or fallen silent."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import exchange, waiting
from megatron_fipo.parallel.waiting import OtherRankError, Work
from tests.parallel.layouts import layout
from tests.parallel.ranks import RankError, run_ranks

P = ParallelSection


def _work_longer_than_a_collective_waits() -> list[str]:
    said = []
    with layout(P(timeout_s=1.0)) as ranks:
        for number in range(2):
            with Work(ranks.world, f"work {number}"):
                if ranks.rank == 1:
                    time.sleep(2.0)
            said.append(f"work {number} done")
    return said


def test_work_may_take_longer_than_a_collective_waits() -> None:
    assert run_ranks(_work_longer_than_a_collective_waits, 3, timeout_s=60) == [["work 0 done", "work 1 done"]] * 3


def _collective_that_waits() -> None:
    with layout(P(timeout_s=1.0)) as ranks:
        if ranks.rank == 1:
            threading.Event().wait()  # until all ranks are killed, because the other has given up
        exchange.barrier(ranks.world)


def test_a_collective_would_have_given_up() -> None:
    with pytest.raises(RankError, match=r"[Tt]imed out"):
        run_ranks(_collective_that_waits, 2, timeout_s=60)


def _fail_on_one() -> tuple[str, bool]:
    told = threading.Event()
    waiting.BEAT_S = 0.2
    with layout(P()) as ranks:
        try:
            with Work(ranks.world, "rollout of step 3", on_failure_elsewhere=told.set):
                if ranks.rank == 1:
                    raise ValueError("the server's own words")
                if ranks.rank == 2:  # still at work when rank 1 fails
                    assert told.wait(30), "nobody told this rank to stop"
        except (OtherRankError, ValueError) as error:
            return f"{type(error).__name__}: {error}", told.is_set()
    return "no error", told.is_set()


def test_a_failure_on_one_rank_is_raised_on_all_and_stops_their_work() -> None:
    first, second, third = run_ranks(_fail_on_one, 3, timeout_s=60)
    assert first[0] == "OtherRankError: rollout of step 3: rank 1 failed: ValueError: the server's own words"
    assert second == ("ValueError: the server's own words", False)
    assert third == (first[0], True)


def _fall_silent() -> None:
    waiting.BEAT_S = 0.2
    message = ""
    with layout(P()) as ranks:
        processes = exchange.all_gather_objects(os.getpid(), ranks.world)
        try:
            with Work(ranks.world, "rollout", silence_s=2.0):
                if ranks.rank == 1:
                    # Stopped, not ended: its connections stay open, as a machine's do that has lost its network.
                    os.kill(os.getpid(), signal.SIGSTOP)
        except OtherRankError as error:
            message = str(error)
    assert message == (
        "rollout: rank 1 has given no sign of life for 2 s; its process or its machine is dead or hangs. Start the "
        "same command again: what was saved and recorded is taken up."
    )
    os.kill(processes[1], signal.SIGKILL)  # behind what is to hold: the first failure is the one that is reported


def test_a_rank_that_falls_silent_is_noticed() -> None:
    with pytest.raises(RankError, match="rank 1 of 2:\nthe process died without a word"):  # rank 0 ended well
        run_ranks(_fall_silent, 2, timeout_s=60)
