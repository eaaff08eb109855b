"""What the launcher does with a signal before its ranks are started; the rest is in end_to_end/test_launcher."""

from __future__ import annotations

import os
import signal

import pytest
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from megatron_fipo.parallel import launcher


def test_a_signal_that_comes_while_ranks_are_started_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch would raise an exception at this moment, and leave the ranks that run already to themselves."""
    start = SubprocessContext._start

    def interrupted(context: SubprocessContext) -> None:
        start(context)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SubprocessContext, "_start", interrupted)
    monkeypatch.setenv(launcher._HANDLED_BY_TORCH, "")  # so that it is taken back afterwards
    monkeypatch.delenv(launcher._HANDLED_BY_TORCH)
    handlers = [signal.getsignal(number) for number in launcher._SIGNALS]
    # The rank gets SIGTERM long before it could find that there is no such file.
    assert launcher.launch(1, ["none.yaml"], ["megatron-fipo", "train", "none.yaml"]) == 128 + signal.SIGTERM
    assert "stopping: the update in hand is finished and saved" in capfd.readouterr().err
    assert [signal.getsignal(number) for number in launcher._SIGNALS] == handlers
