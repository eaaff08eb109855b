"""Signals as requests: noted once, acted on at once, and the previous handlers put back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from megatron_fipo.system.interrupt import Interrupt


def send(number: signal.Signals) -> None:
    """To this process; Python runs the handler before the next line."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_survived(number: signal.Signals) -> None:
    calls: list[str] = []
    with Interrupt(lambda: calls.append("cut short")) as interrupt:
        assert interrupt.received is None
        send(number)
        assert interrupt.received is number
        assert calls == ["cut short"]


def test_only_the_first_counts() -> None:
    calls: list[str] = []
    with Interrupt(lambda: calls.append("cut short")) as interrupt:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert interrupt.received is signal.SIGTERM
    assert calls == ["cut short"]


@pytest.fixture
def _sigint_raises() -> Iterator[None]:
    """A test run that was started in the background ignores SIGINT; here it shall raise KeyboardInterrupt."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("_sigint_raises")
def test_afterwards_signals_do_what_they_did_before() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Interrupt(lambda: None) as interrupt:
        assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in before} == before
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert interrupt.received is None


def test_handlers_are_put_back_after_an_error_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Interrupt(lambda: None):
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before
