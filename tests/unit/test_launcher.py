"""What the launcher does with a signal before its ranks are started, and after they have left; the rest is in
end_to_end/test_launcher."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from megatron_fipo.parallel import launcher


@pytest.fixture
def signals_restored() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in launcher._SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_signal_that_comes_while_ranks_are_started_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], signals_restored: None
) -> None:
    """torch would raise an exception at this moment, and leave the ranks that run already to themselves."""
    start = SubprocessContext._start

    def interrupted(context: SubprocessContext) -> None:
        start(context)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SubprocessContext, "_start", interrupted)
    monkeypatch.setenv(launcher._HANDLED_BY_TORCH, "")  # so that it is taken back afterwards
    monkeypatch.delenv(launcher._HANDLED_BY_TORCH)
    # The rank gets SIGTERM long before it could find that there is no such file.
    assert launcher.launch(1, ["none.yaml"], ["megatron-fipo", "train", "none.yaml"]) == 128 + signal.SIGTERM
    assert "stopping: the update in hand is finished and saved" in capfd.readouterr().err
    os.kill(os.getpid(), signal.SIGINT)  # once more, after the rank has left: this process is leaving with its code
    assert {signal.getsignal(number) for number in launcher._SIGNALS} == {signal.SIG_IGN}


def test_without_a_signal_handlers_are_put_back(monkeypatch: pytest.MonkeyPatch, signals_restored: None) -> None:
    monkeypatch.setenv(launcher._HANDLED_BY_TORCH, "")
    monkeypatch.delenv(launcher._HANDLED_BY_TORCH)
    handlers = [signal.getsignal(number) for number in launcher._SIGNALS]
    assert launcher.launch(1, ["none.yaml"], ["megatron-fipo", "train", "none.yaml"]) == 2  # there is no such file
    assert [signal.getsignal(number) for number in launcher._SIGNALS] == handlers
