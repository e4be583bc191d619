"""Processes that are killed at any moment, saves included, go on as if nothing had been."""

import collections
import contextlib
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from jaxscale import records
from jaxscale.checkpoint import Checkpointer
from jaxscale.config import CheckpointConfig
from tests.programs import final_params, last_lines
from tests.test_multiprocess import ROOT, started

NUM_KILLS = 20
STEPS = 160


@pytest.fixture
def command(tmp_path: pathlib.Path) -> Callable[[str, int], list[str]]:
    """Return a function from a workdir's name and a number of steps to the command of its run."""
    (tmp_path / "text.txt").write_text("a text to learn by heart\n" * 200)

    def make(name: str, num_steps: int) -> list[str]:
        model = {"num_layers": 1, "width": 32, "hidden": 32, "num_heads": 2}
        return [
            *("-m", "jaxscale", "train", f"--workdir={tmp_path / name}"),
            f"--config={ROOT / 'configs' / 'lm.py'}:tiny",
            *(f"--config.data.source=files:{tmp_path}/text.txt", "--config.data.length=16"),
            *(f"--config.model.{knob}={value}" for knob, value in model.items()),
            *("--config.train.global_batch_size=4", "--config.train.log_every=1"),
            "--config.checkpoint.every_steps=2",
            *("--config.optimizer.schedule_steps=1000", f"--config.train.steps={num_steps}"),
        ]

    return make


def run_to_its_end(command: list[str], devices: str = "cpu:2") -> None:
    whole = [sys.executable, *command, f"--devices={devices}"]
    subprocess.run(whole, cwd=ROOT, check=True, timeout=300, stdout=subprocess.DEVNULL)


def saves_under_way(folder: pathlib.Path) -> dict[str, int]:
    """Return the temporary folders, with the time when each last changed."""
    found = {}
    for path in folder.glob("checkpoints/*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.stat().st_ctime_ns
    return found


def wait_for_saves(folder: pathlib.Path, count: int, process: subprocess.Popen[str]) -> None:
    """Return while the `count`th save that begins from now on is under way."""
    seen = set(saves_under_way(folder))
    while process.poll() is None:
        new = saves_under_way(folder).keys() - seen
        seen |= new
        count -= len(new)
        if count <= 0:
            return
        time.sleep(0.001)


def kill_at(chance: random.Random, folder: pathlib.Path, command: list[str]) -> str:
    """Start a run and kill it at a random moment; tell what it was doing."""
    before = saves_under_way(folder)
    process = subprocess.Popen(
        [sys.executable, *command, "--devices=cpu:2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        kind = chance.choice(["anywhere", "steps", "save", "save"])
        if kind == "anywhere":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, 8))
        else:
            assert process.stdout is not None
            next(line for line in process.stdout if "starting from" in line)
            if kind == "steps":
                time.sleep(chance.uniform(0, 1.5))
            else:
                wait_for_saves(folder, chance.randint(1, 4), process)
                time.sleep(chance.uniform(0, 0.05))
        process.kill()
    assert process.returncode == -signal.SIGKILL, process.returncode
    # What an earlier kill left may still lie there.
    return "in a save" if saves_under_way(folder).items() - before.items() else "elsewhere"


def assert_equal_runs(folder: pathlib.Path, alone: pathlib.Path, num_steps: int) -> None:
    found, expected = last_lines(folder), last_lines(alone)
    assert list(expected) == list(range(1, num_steps + 1))
    for step, line in expected.items():
        for name in (records.LOSS, records.BATCH_HASH, records.GRADIENT_NORM):
            assert found[step][name] == line[name], (step, name)
    jax.tree.map(
        np.testing.assert_array_equal,
        final_params(folder, num_steps),
        final_params(alone, num_steps),
    )


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_equals_an_uninterrupted_one(
    tmp_path: pathlib.Path, command: Callable[[str, int], list[str]]
) -> None:
    folder, chance = tmp_path / "killed", random.Random(0)
    moments: collections.Counter[str] = collections.Counter()
    reached = []
    for _ in range(NUM_KILLS):
        moments[kill_at(chance, folder, command("killed", STEPS))] += 1
        newest = Checkpointer(folder, CheckpointConfig(), read_only=True).newest()
        reached.append(newest.step if newest else 0)
        assert newest is None or not newest.damaged
    print(f"{NUM_KILLS} kills: {dict(moments)}; newest checkpoint after each: {reached}")
    assert moments["in a save"] >= 5
    assert reached[-1] < STEPS
    run_to_its_end(command("killed", STEPS))
    run_to_its_end(command("alone", STEPS))
    assert_equal_runs(folder, tmp_path / "alone", STEPS)
    names = sorted(int(path.name) for path in (folder / records.CHECKPOINTS_DIR).iterdir())
    assert names == [STEPS - 4, STEPS - 2, STEPS]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_killed_and_both_go_on_bitwise(
    tmp_path: pathlib.Path, command: Callable[[str, int], list[str]], rank: int
) -> None:
    folder = tmp_path / "killed"
    with started(2, *command("killed", 100000), "--devices=cpu:1") as processes:
        assert processes[0].stdout is not None
        next(line for line in processes[0].stdout if line.startswith("step 3/"))
        wait_for_saves(folder, 1, processes[rank])
        processes[rank].kill()
        begin = time.monotonic()
        outputs = [process.communicate(timeout=150)[0] for process in processes]
        print(f"both have ended after {time.monotonic() - begin:.1f} s")
        assert processes[rank].returncode == -signal.SIGKILL
        assert processes[1 - rank].returncode not in (0, 75), outputs[1 - rank]
    newest = Checkpointer(folder, CheckpointConfig(), read_only=True).newest()
    assert newest is not None
    assert not newest.damaged
    steps = max(last_lines(folder)) + 2
    for name in ("killed", "alone"):
        with started(2, *command(name, steps), "--devices=cpu:1") as processes:
            outputs = [process.communicate(timeout=150)[0] for process in processes]
            assert [process.returncode for process in processes] == [0, 0], outputs
    assert_equal_runs(folder, tmp_path / "alone", steps)
