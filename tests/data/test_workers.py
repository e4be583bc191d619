"""Worker processes: they stop when told, and never outlive their parent."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Undisturbed, the first of its tasks takes 30 seconds.
SLOW_TASKS = """
import pathlib, sys, time
from jaxscale.data.workers import run_in_processes
from jaxscale.train.preemption import StopRequest

def slow(number, documents, stop):
    for index in documents:
        if stop():
            return None
        pathlib.Path(sys.argv[1], f"read-{index}").touch()
        time.sleep(0.1)
    return number

if __name__ == "__main__":
    with StopRequest(in_group=False) as request:
        tasks = [(0, range(0, 300)), (1, range(300, 301))]
        done = [n for n, _ in run_in_processes(slow, tasks, workers=2, stop=request.asked)]
        print("stopped" if request.asked() and 0 not in done else done)
"""


@pytest.fixture
def slow(tmp_path: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    """Start two workers in a group of processes of their own; wait until both are at work."""
    script = tmp_path / "slow_tasks.py"
    script.write_text(SLOW_TASKS)
    run = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while not ((tmp_path / "read-0").exists() and (tmp_path / "read-300").exists()):
        assert run.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(run.pid).children(recursive=True)
    yield run
    for process in (run, *workers):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    run.communicate()


def to_parent(run: subprocess.Popen[str], number: signal.Signals) -> None:
    run.send_signal(number)


def to_group(run: subprocess.Popen[str], number: signal.Signals) -> None:
    os.killpg(run.pid, number)


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGTERM, to_parent),
        (signal.SIGINT, to_group),
        pytest.param(signal.SIGTERM, to_group, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, to_parent, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_workers_soon_and_quietly(
    slow: subprocess.Popen[str],
    number: signal.Signals,
    send: Callable[[subprocess.Popen[str], signal.Signals], None],
) -> None:
    workers = psutil.Process(slow.pid).children(recursive=True)
    assert len(workers) >= 2
    send(slow, number)
    output, error = slow.communicate(timeout=15)
    assert (slow.returncode, output, error) == (0, "stopped\n", "")
    assert psutil.wait_procs(workers, timeout=5)[1] == []


def test_workers_end_with_a_parent_that_is_killed(slow: subprocess.Popen[str]) -> None:
    workers = psutil.Process(slow.pid).children(recursive=True)
    assert len(workers) >= 2
    slow.kill()
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_a_worker_that_is_killed_is_told_of(slow: subprocess.Popen[str]) -> None:
    children = psutil.Process(slow.pid).children()
    victim = next(child for child in children if "spawn_main" in "".join(child.cmdline()))
    victim.kill()
    error = slow.communicate(timeout=15)[1]
    assert "ConfigError: one of 2 worker processes was killed" in error
