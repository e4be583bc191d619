"""A trace covers the steps asked for, once, and survives runs that end early or resume midway."""

import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxscale.profiling import StepProfiler


@jax.jit
def compute(x: jax.Array) -> jax.Array:
    return (x @ x).sum()


def run(profiler: StepProfiler, steps: range) -> None:
    for step in steps:
        profiler.before(step)
        profiler.after(step, compute(jnp.ones((8, 8))))


def traces(workdir: pathlib.Path) -> list[pathlib.Path]:
    return sorted(workdir.rglob("*.xplane.pb"))


def test_traces_the_range_of_steps(tmp_path: pathlib.Path) -> None:
    profiler = StepProfiler(tmp_path, (2, 3))
    run(profiler, range(2))
    assert not (tmp_path / "profile").exists()
    run(profiler, range(2, 6))
    (trace,) = traces(tmp_path)
    assert trace.parent == tmp_path / "profile" / "plugins" / "profile" / "steps_2_3"
    assert trace.name.endswith(".process_0.xplane.pb")
    assert [path.name for path in trace.parent.parent.iterdir()] == ["steps_2_3"]
    steps = {
        value
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        for name, value in event.stats
        if event.name == "train" and name == "step_num"
    }
    assert steps == {2, 3}
    profiler.close()
    assert traces(tmp_path) == [trace]


def test_a_run_that_ends_early_keeps_its_trace(tmp_path: pathlib.Path) -> None:
    profiler = StepProfiler(tmp_path, (1, 100))
    run(profiler, range(3))
    profiler.close()
    assert len(traces(tmp_path)) == 1


def test_an_exception_inside_a_step_keeps_its_trace(tmp_path: pathlib.Path) -> None:
    profiler = StepProfiler(tmp_path, (1, 2))
    profiler.before(1)
    profiler.close()
    profiler.close()
    assert len(traces(tmp_path)) == 1


def test_a_run_that_resumes_inside_the_range(tmp_path: pathlib.Path) -> None:
    profiler = StepProfiler(tmp_path, (1, 5))
    run(profiler, range(4, 7))
    (trace,) = traces(tmp_path)
    assert trace.parent.name == "steps_4_5"


@pytest.mark.parametrize("steps", [(), (50, 60)])
def test_no_trace_without_need(tmp_path: pathlib.Path, steps: tuple[int, ...]) -> None:
    profiler = StepProfiler(tmp_path, steps)
    run(profiler, range(5))
    profiler.close()
    assert not (tmp_path / "profile").exists()


WORKER = """
import sys
import jax
workdir, address, rank = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(rank), initialization_timeout=60)
from jaxscale.profiling import StepProfiler

profiler = StepProfiler(workdir, (1, 1))
profiler.before(1)
profiler.after(1, jax.numpy.ones(8).sum())
"""


@pytest.mark.multiprocess
def test_processes_of_one_host_keep_their_own_files(tmp_path: pathlib.Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, "-W", "error", "-c", WORKER, str(tmp_path), address]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    first, second = traces(tmp_path)
    assert first.parent == second.parent
    assert first.name.endswith("process_0.xplane.pb") and second.name.endswith(
        "process_1.xplane.pb"
    )
