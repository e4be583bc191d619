"""Stop requests: the first signal asks, a second Ctrl-C insists, and handlers come back."""

import os
import signal

import pytest

from jaxscale.train.preemption import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.agreed(0)
        os.kill(os.getpid(), number)
        assert stop.agreed(1)
    assert signal.getsignal(number) == before


def test_a_second_interrupt_insists_and_a_second_sigterm_does_not() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
