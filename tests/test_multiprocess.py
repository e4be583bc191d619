"""N processes == 1 process: the same batches and losses, over Gloo on this machine."""

import contextlib
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jaxscale import records
from jaxscale.config import DataConfig
from jaxscale.data.prepare import prepare

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_DEVICES = 8
# Gloo adds the partial sums of the processes in another order than one process does.
LOSS_TOLERANCE = 2e-6
# Over many steps Adam makes such differences grow, as on other meshes of one process.
RUN_TOLERANCE = 1e-3

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


@contextlib.contextmanager
def started(count: int, *command: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Start a command as a group of processes, which end with the context at the latest."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(count):
            variables = {name: str(value) for name, value in {**group, "RANK": rank}.items()}
            process = subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def run_processes(folder: pathlib.Path, source: str, count: int) -> list[dict[str, Any]]:
    out = folder / f"of{count}"
    worker = str(ROOT / "tests" / "multiprocess_worker.py")
    with started(count, worker, f"cpu:{NUM_DEVICES // count}", source, str(out)) as processes:
        for process in processes:
            output = process.communicate(timeout=180)[0]
            assert process.returncode == 0, output[-3000:]
    return [json.loads(pathlib.Path(f"{out}.{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
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


SMOKE = """
import jax
from jaxscale import runtime
from jaxscale.config import RuntimeConfig
runtime.start(RuntimeConfig(), devices="cpu:1")
from jaxscale.train.smoke import smoke
from tests.programs import tiny_config
config = tiny_config(mesh={"data": 2}, optimizer={"learning_rate": 0.0})
print("steps", smoke(config, seconds=30.0 * jax.process_index()).num_steps)
"""


def test_processes_end_a_smoke_test_together_though_their_clocks_differ() -> None:
    with started(2, "-c", SMOKE) as processes:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert ["steps 5" in output for output in outputs] == [True, True], outputs


@pytest.mark.parametrize(
    ("number", "rank"),
    [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow)],
)
def test_a_signal_to_one_stops_all_and_one_process_goes_on(
    tmp_path: pathlib.Path, number: signal.Signals, rank: int
) -> None:
    (tmp_path / "text.txt").write_text("a text to learn by heart\n" * 200)
    folder = tmp_path / "run"
    train = [
        *("-m", "jaxscale", "train", f"--workdir={folder}"),
        f"--config={ROOT / 'configs' / 'lm.py'}:tiny",
        *(f"--config.data.source=files:{tmp_path}/text.txt", "--config.data.length=32"),
        *("--config.model.num_layers=1", "--config.train.global_batch_size=8"),
        *("--config.train.log_every=1", "--config.optimizer.schedule_steps=1000"),
    ]
    with started(2, *train, "--devices=cpu:4", "--config.train.steps=100000") as processes:
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if line.startswith("step 3/"):
                break
        processes[rank].send_signal(number)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [75, 75], outputs
    (saved,) = (int(path.name) for path in (folder / records.CHECKPOINTS_DIR).iterdir())
    assert saved >= 3
    last = [
        *train,
        "--devices=cpu:8",
        "--config.mesh.tensor=2",
        f"--config.train.steps={saved + 2}",
    ]
    subprocess.run([sys.executable, *last], check=True, cwd=ROOT, timeout=120)
    alone = [*train, f"--workdir={tmp_path / 'alone'}", "--devices=cpu:8"]
    subprocess.run(
        [sys.executable, *alone, f"--config.train.steps={saved + 2}"], check=True, timeout=240
    )
    lines = [
        {x[records.STEP]: x for x in records.read_lines(path) if x[records.KIND] == "train"}
        for path in (folder / records.METRICS_FILE, tmp_path / "alone" / records.METRICS_FILE)
    ]
    assert len({line[records.BATCH_HASH] for line in lines[1].values()}) > 1
    for step, line in lines[1].items():
        assert lines[0][step][records.BATCH_HASH] == line[records.BATCH_HASH]
        assert lines[0][step][records.LOSS] == pytest.approx(line[records.LOSS], rel=RUN_TOLERANCE)


def test_hosts_with_other_files_are_told_so(tmp_path: pathlib.Path) -> None:
    """Each process has a home of its own, as on hosts that share no disk."""
    for rank in range(2):
        (tmp_path / f"home{rank}").mkdir()
        (tmp_path / f"home{rank}" / "text.txt").write_text(f"text of host {rank}\n" * 200)
    home = "import os; os.environ['HOME'] = os.environ['HOME_OF'] + os.environ['RANK']\n"
    script = tmp_path / "train.py"
    script.write_text(f"{home}import sys\nfrom jaxscale import cli\nsys.exit(cli.main())\n")
    train = [
        *(str(script), "train", f"--workdir={tmp_path / 'run'}", "--devices=cpu:4"),
        *(f"--config={ROOT / 'configs' / 'lm.py'}:tiny", "--config.data.source=files:~/text.txt"),
        *("--config.data.length=32", "--config.data.cache_dir=~/caches", "--config.train.steps=2"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME_OF", str(tmp_path / "home"))
        with started(2, *train) as processes:
            outputs = [process.communicate(timeout=120)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 2, output
        assert "holds other tokens for processes [1] than for process 0; give all" in output
    assert not (tmp_path / "run" / records.CHECKPOINTS_DIR).exists()
