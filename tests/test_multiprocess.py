"""N processes == 1 process: the same batches and losses, over Gloo on this machine."""

import contextlib
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from jaxscale.config import DataConfig
from jaxscale.data.prepare import prepare

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_DEVICES = 8
# Gloo adds the partial sums of the processes in another order than one process does.
LOSS_TOLERANCE = 2e-6

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a cached function from a number of processes to their results, by rank."""
    folder = tmp_path_factory.mktemp("processes")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"the {number}th of some documents " * 40)
    data = DataConfig(
        source=f"files:{folder}/*.txt", validation_fraction=0.25, cache_dir=str(folder)
    )
    return functools.cache(functools.partial(run_processes, folder, str(prepare(data).path)))


def run_processes(folder: pathlib.Path, source: str, count: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / f"of{count}"
    group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [
        sys.executable,
        str(ROOT / "tests" / "multiprocess_worker.py"),
        f"cpu:{NUM_DEVICES // count}",
        source,
        str(out),
    ]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(count):
            variables = {name: str(value) for name, value in {**group, "RANK": rank}.items()}
            process = subprocess.Popen(
                command,
                env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            output = process.communicate(timeout=180)[0]
            assert process.returncode == 0, output[-3000:]
    return [json.loads(pathlib.Path(f"{out}.{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.parametrize("count", [2, 4])
def test_batches_and_losses_equal_those_of_one_process(run: Any, count: int) -> None:
    (alone,) = run(1)
    assert len(set(alone["hashes"])) == 3
    for result in run(count):
        assert result["processes"] == count
        assert result["hashes"] == alone["hashes"]
        np.testing.assert_allclose(result["losses"], alone["losses"], rtol=LOSS_TOLERANCE)


def test_no_process_holds_the_whole_model_or_reads_the_whole_batch(run: Any) -> None:
    results = run(4)
    # With data=2 and fsdp=4, a process has two of the four shards, and norms whole.
    assert {r["held_bytes"] / r["total_bytes"] < 0.55 for r in results} == {True}
    rows = sorted(row for r in results for row in r["rows"])
    assert rows == list(range(8))
