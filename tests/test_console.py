"""The console shows a run as lines or as a bar, and leaves a terminal as it found it."""

import io
import os
import pty
import re
import signal
import subprocess
import sys

import pytest

from jaxscale import cli, records
from jaxscale.console import Console, format_metrics

METRICS = {
    records.LOSS: 2.3125,
    records.PERPLEXITY: 10.1,
    records.LEARNING_RATE: 2.9e-4,
    records.GRADIENT_NORM: 0.83,
    records.TOKENS_PER_SECOND: 4812.3,
    records.STEP_SECONDS: 0.2104,
    records.DATA_WAIT_SHARE: 0.011,
    records.MFU: 0.312,
}
LINE = "loss 2.312  ppl 10.1  lr 2.9e-04  grad 0.83  4,812 tok/s  0.21 s/step  wait 1%  mfu 31.2%"


def test_plain_lines() -> None:
    stream = io.StringIO()
    with Console(total_steps=600, stream=stream) as console:
        console.note("evaluation: loss [bold]2.2[/bold]")
        console.advance(119)
        console.log(120, METRICS)
    assert stream.getvalue() == f"evaluation: loss [bold]2.2[/bold]\nstep 120/600  {LINE}\n"


def test_what_is_absent_is_left_out() -> None:
    assert format_metrics({records.LOSS: float("nan"), records.MFU: None}) == "loss nan"
    assert format_metrics({records.LOSS: 1.0, records.SKIPPED_STEPS: 0}) == "loss 1"
    assert format_metrics({records.LOSS: 1.0, records.SKIPPED_STEPS: 2}) == "loss 1  skipped 2"


def test_a_warning_of_ours_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    ours = sys.modules["jaxscale.console"].__file__
    assert ours
    cli.show_warning("computes as chunked", UserWarning, ours, 7)
    cli.show_warning("deprecated", DeprecationWarning, ours, 7)
    cli.show_warning("odd", UserWarning, "/elsewhere/module.py", 7)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "jaxscale: computes as chunked"
    assert "DeprecationWarning: deprecated" in lines[1]
    assert any(line.startswith("/elsewhere/module.py:7: UserWarning: odd") for line in lines)


def test_only_the_primary_process_shows_anything() -> None:
    stream = io.StringIO()
    with Console(total_steps=6, primary=False, stream=stream) as console:
        console.log(1, METRICS)
        console.note("hello")
    assert stream.getvalue() == ""


def test_lines_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(total_steps=6) as console:
        console.note("hello")
    assert capsys.readouterr().out == "hello\n"


RUN = f"""
import time
from jaxscale.console import Console
with Console(total_steps=600, first_step=100) as console:
    console.note("a [note] that stays")
    console.log(120, {METRICS!r})
    console.advance(121)
    time.sleep(0.5)
    console.note("ready")
    time.sleep(WAIT)
"""


def run_in_terminal(
    code: str, *, interrupt_at: bytes = b"", term: str = "xterm"
) -> tuple[str, int]:
    """Run Python in a terminal of 80 columns; send Ctrl-C once `interrupt_at` shows."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "80"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        shown += chunk
        if interrupt_at and interrupt_at in shown:
            process.send_signal(signal.SIGINT)
            interrupt_at = b""
        if not chunk:
            break
    os.close(ours)
    return shown.decode(), process.wait(timeout=60)


def test_a_terminal_gets_a_bar() -> None:
    shown, code = run_in_terminal(RUN.replace("WAIT", "0"))
    assert code == 0
    assert "a [note] that stays\r\n" in shown
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "121/600" in text and "loss 2.312  4,812 tok/s" in text
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"


def test_ctrl_c_leaves_the_terminal_clean() -> None:
    # Where the tests run in the background, their children are born with SIGINT ignored.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    shown, code = run_in_terminal(heard + RUN.replace("WAIT", "60"), interrupt_at=b"ready")
    assert code == -signal.SIGINT or code == 1
    assert "KeyboardInterrupt" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"
    assert shown.index("\x1b[?25h") < shown.index("Traceback")


def test_a_dumb_terminal_gets_lines() -> None:
    shown, code = run_in_terminal(RUN.replace("WAIT", "0"), term="dumb")
    assert code == 0
    assert shown == f"a [note] that stays\r\nstep 120/600  {LINE}\r\nready\r\n"


def test_a_stream_that_nobody_reads_ends_the_view_and_not_the_run() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    with Console(total_steps=2, stream=stream) as console:
        console.note("nobody hears")
        console.log(1, {})
    with pytest.raises(BrokenPipeError):
        stream.close()
