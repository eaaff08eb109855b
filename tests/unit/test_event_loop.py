"""A coroutine runs to its end from plain code, inside a running event loop too."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from megatron_fipo.system.event_loop import run_to_end


async def doubled(number: int) -> int:
    await asyncio.sleep(0)
    if number < 0:
        raise ValueError(f"negative: {number}")
    return 2 * number


async def in_a_notebook(number: int) -> int:
    """A cell: plain code under a loop that runs already."""
    return run_to_end(doubled(number))


def test_with_and_without_a_running_loop() -> None:
    assert run_to_end(doubled(4)) == 8
    assert asyncio.run(in_a_notebook(4)) == 8
    with pytest.raises(RuntimeError, match="cannot be called from a running event loop"):
        asyncio.run(directly())


async def directly() -> int:
    """What notebooks met before; the control."""
    coroutine = doubled(4)
    try:
        return asyncio.run(coroutine)
    finally:
        coroutine.close()


def test_errors_arrive() -> None:
    with pytest.raises(ValueError, match="negative: -1"):
        run_to_end(doubled(-1))
    with pytest.raises(ValueError, match="negative: -1"):
        asyncio.run(in_a_notebook(-1))


def test_ctrl_c_in_a_notebook_ends_the_coroutine() -> None:
    started, ended = threading.Event(), threading.Event()

    async def endless() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def cell() -> None:
        def press() -> None:
            started.wait()
            signal.pthread_kill(main, signal.SIGINT)  # as a terminal's finds the thread that waits

        main = threading.main_thread().ident
        assert main is not None
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        thread = threading.Thread(target=press)
        thread.start()
        try:
            run_to_end(endless())
        finally:
            thread.join()
            signal.signal(signal.SIGINT, previous)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(cell())
    assert ended.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "coroutine-of-a-notebook"]


def test_tasks_left_behind_are_ended() -> None:
    ended = []

    async def leaves_a_task() -> None:
        async def endless() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        leaves_a_task.task = asyncio.create_task(endless())  # type: ignore[attr-defined]
        await asyncio.sleep(0)

    async def cell() -> None:
        run_to_end(leaves_a_task())

    asyncio.run(cell())
    assert ended == [True]
