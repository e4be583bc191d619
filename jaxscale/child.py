"""A process of our own that does one thing and reports it: sweep's points, the planner's compiles.

A death is an outcome like any other. A stop request ends the process first; one whose parent dies
sees its stdin closed and ends itself.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxscale import records
from jaxscale.config import Stopped
from jaxscale.data.workers import Stop

# Between looks at the process and at the stop request.
POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a child process ended.

    Attributes:
      report: what it wrote; empty if nothing.
      code: its exit code, negative for a signal; None where it took too long.
      errors: its stderr.
    """

    report: dict[str, Any]
    code: int | None
    errors: str

    @property
    def last_words(self) -> str:
        """How it ended, with the last line that it wrote to stderr."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "without a word"
        killed = self.code is not None and self.code < 0
        how = f"killed by {signal.Signals(-self.code).name}" if killed else f"exit code {self.code}"  # type: ignore[operator]
        return f"{how}: {last}"


def run_child(
    command: Sequence[str],
    request: Mapping[str, Any],
    *,
    timeout: float,
    stop: Stop,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a command with a request on its stdin; wait for its end and its report.

    Args:
      command: such as `python -m MODULE`.
      request: a line of JSON; to it come `report`, the file to write, and `folder`, for what may
        go away afterwards.
      timeout: in seconds.
      stop: asked whether to stop.
      environment: variables to set.

    Raises:
      Stopped: `stop` said so; the process is gone.
    """
    with tempfile.TemporaryDirectory(prefix="jaxscale-") as folder:
        report, errors = pathlib.Path(folder, "report.json"), pathlib.Path(folder, "errors")
        request = {**request, "report": str(report), "folder": folder}
        with open(errors, "w") as stderr:
            process = start(command, request, stderr, environment or {})
            code = _wait(process, timeout=timeout, stop=stop)
        known = records.read_json(report) if report.is_file() else {}
        known.pop(records.NONFINITE, None)
        return Outcome(known, code, errors.read_text(errors="replace"))


def start(
    command: Sequence[str],
    request: Mapping[str, Any],
    stderr: Any,
    environment: Mapping[str, str],
) -> subprocess.Popen[str]:
    """Start the process, in a session of its own, and hand it the request."""
    root = str(pathlib.Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        # Ctrl-C reaches the parent alone, which then ends the process.
        start_new_session=True,
    )
    assert process.stdin is not None
    # One that is dead already tells so by its exit code.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    return process


def _wait(process: subprocess.Popen[str], *, timeout: float, stop: Stop) -> int | None:
    """Return the exit code, None for a process that took too long; it is gone in any case."""
    deadline = time.monotonic() + timeout
    try:
        while process.poll() is None:
            if stop():
                raise Stopped("what is known is kept")
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS)
        return process.returncode
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # type: ignore[union-attr]


def read_request() -> dict[str, Any]:
    """Return what the parent asks for; from now on this process ends when the parent does."""
    request: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return request


def _end_with_parent() -> None:
    # Where memory runs out, Linux is to end this process and not its parent.
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
    # Not through the buffer, whose lock would be held when Python ends.
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
