"""Stop requests: the first signal asks, a second Ctrl-C insists, and handlers come back."""

import io
import os
import pathlib
import signal
from typing import Any

import pytest

from jaxscale import records
from jaxscale.checkpoint import Checkpointer
from jaxscale.config import CheckpointConfig, Stopped
from jaxscale.train import start
from jaxscale.train.loop import DONE, PREEMPTED, train
from jaxscale.train.preemption import StopRequest
from tests.programs import RUN_STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest(in_group=False) as stop:
        assert not stop.agreed(0)
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.agreed(1)
        with pytest.raises(Stopped):
            stop.check()
    assert signal.getsignal(number) == before


def test_a_second_interrupt_insists_and_a_second_sigterm_does_not() -> None:
    with StopRequest(in_group=False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


class Terminating(io.StringIO):
    """A stream that sends SIGTERM to this process when a text is written to it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def write(self, text: str) -> int:
        if text.startswith(self.text):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def evaluated(folder: pathlib.Path) -> list[int]:
    lines = records.read_lines(folder / records.METRICS_FILE)
    return [x[records.STEP] for x in lines if x[records.KIND] == records.KIND_EVALUATION]


# The line of a step is written after the next one began: that of step 3 before the evaluation
# after step 4. The line of the last step is written before the last evaluation.
@pytest.mark.parametrize(("line", "step"), [("step 3/", 4), (f"step {RUN_STEPS}/", RUN_STEPS)])
def test_a_stop_during_an_evaluation_drops_it_and_saves(
    make_config: Any, tmp_path: pathlib.Path, line: str, step: int
) -> None:
    config = make_config(train__eval_every=4)
    result = train(config, tmp_path, stream=Terminating(line))
    assert (result.ending, result.step, result.evaluation) == (PREEMPTED, step, None)
    assert evaluated(tmp_path) == [x for x in (4,) if x < step]
    newest = Checkpointer(tmp_path, CheckpointConfig(), read_only=True).newest()
    assert newest is not None
    assert newest.step == step
    assert train(config, tmp_path).ending == DONE
    assert evaluated(tmp_path)[-1] == RUN_STEPS


def test_a_stop_while_the_state_is_made_is_kept(
    make_config: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = start.first_state

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return made(*arguments)

    monkeypatch.setattr(start, "first_state", interrupted)
    result = train(make_config(), tmp_path)
    assert (result.ending, result.step) == (PREEMPTED, 0)
