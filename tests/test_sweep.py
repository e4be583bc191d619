"""`jaxscale sweep`: deaths are data points, nothing is measured twice, mistakes cost nothing.

Most points here are those of `tests/fake_point.py`, in real processes; some are real ones.
"""

import csv
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from jaxscale import records
from jaxscale.cli import main
from jaxscale.config import Config
from jaxscale.sweep import child
from jaxscale.sweep.points import Options
from jaxscale.sweep.rows import read_rows
from jaxscale.sweep.run import Sweep
from tests.conftest import ROOT

CONFIG = f"--config={ROOT / 'configs' / 'lm.py'}:tiny,batch=2"
SHAPE = {"num_layers": 2, "width": 32, "num_heads": 4, "hidden": 64}
REAL = [
    *("sweep", CONFIG, "--devices=cpu:1", "--steps=1"),
    *(f"--config.model.{name}={value}" for name, value in SHAPE.items()),
]
Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def points(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Let points be made-up ones; return the file that notes them."""
    path = tmp_path / "points"
    path.touch()
    monkeypatch.setenv("POINTS", str(path))
    script = pathlib.Path(__file__).with_name("fake_point.py")
    monkeypatch.setattr(child, "COMMAND", (sys.executable, str(script)))
    return path


@pytest.fixture
def run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the verb and gives exit code, rows of its result and text."""

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
        file = tmp_path / "result.json"
        file.unlink(missing_ok=True)
        code = main([*arguments, f"--json={file}"])
        rows: list[dict[str, Any]] = records.read_json(file)["rows"] if file.is_file() else []
        return code, rows, capsys.readouterr().out

    return run


def noted(path: pathlib.Path) -> list[int]:
    """Return the lengths that were measured."""
    return [int(line.split()[0]) for line in path.read_text().splitlines()]


def test_a_death_is_a_data_point_and_not_the_end(run: Run, points: pathlib.Path) -> None:
    lengths = "16,13,17,19,29,31,32"
    code, rows, text = run("sweep", CONFIG, f"--vary=data.length={lengths}", "--compile-only")
    assert code == 0
    assert [(row["settings"]["data.length"], row["verdict"]) for row in rows[:-1]] == [
        (16, "ok"),
        (13, "out of memory"),
        (17, "failed"),
        (19, "failed"),
        (29, "does not apply"),
        (31, "out of memory"),
        (32, "ok"),
    ]
    notes = {row["settings"]["data.length"]: row["note"] for row in rows[:-1]}
    assert notes[13].startswith("killed by SIGKILL")
    assert notes[17] == "exit code 1: ValueError: a loss of nerve"
    assert notes[19].startswith("killed by SIGSEGV")
    # What was known when a point died stays.
    assert rows[1]["needed_bytes"] == 26_000
    assert all(str(note) in text for note in notes.values())
    assert "2 ok, 2 out of memory, 2 failed, 1 does not apply; 0 of them known before" in text
    assert run("sweep", CONFIG, "--vary=data.length=17")[0] == 1, "nothing was measured"


def test_a_point_that_hangs_is_ended(run: Run, points: pathlib.Path) -> None:
    code, rows, _ = run("sweep", CONFIG, "--vary=data.length=23,16", "--timeout=1")
    assert code == 0
    assert (rows[0]["verdict"], rows[1]["verdict"]) == ("failed", "ok")
    assert "not done within 1 s" in rows[0]["note"]
    check_all_gone(points)


def check_all_gone(points: pathlib.Path) -> None:
    for line in points.read_text().splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[2]), 0)


def test_the_boundary_is_found_and_nothing_is_measured_twice(
    run: Run, points: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    # 2000 bytes per token, half of it chunked: the boundaries are 2500 and 5000 tokens.
    command = [
        *("sweep", "length", CONFIG, "--from=512", "--to=8192", "--techniques=chunked"),
        *("--memory-limit=5MB", "--compile-only", f"--workdir={tmp_path / 'run'}"),
    ]
    code, rows, text = run(*command)
    assert code == 0
    assert "  baseline: 2432 (2560 is too large), 1 x\n" in text
    assert "  chunked: 4992 (5120 is too large), 2.1 x\n" in text
    assert "baseline: temporary_bytes 1.00 (1.00)" in text
    first = noted(points)
    assert len(first) == len(set(first)) + 5, "both techniques have the same 5 lengths"
    again = run(*command)
    assert noted(points) == first
    assert again[1] == rows
    assert f"{len(rows) - 1} of them known before" in again[2]
    assert run(*command, "--force")[0] == 0
    assert noted(points) == first * 2
    check_files(tmp_path / "run" / "sweep", rows[:-1])


def check_files(folder: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """JSONL, CSV and result file say the same; the pictures are pictures."""
    kept = {key: row.verdict for key, row in read_rows(folder / "length.jsonl").items()}
    assert kept == {row["key"]: row["verdict"] for row in rows}
    with open(folder / "length.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        settings = row.pop("settings")
        values = {**{k: v for k, v in row.items() if k != "key"}, **settings}
        assert line == {name: "" if v is None else str(v) for name, v in values.items()}
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["length-boundary.png", "length-memory.png", "length-overhead.png"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_an_interrupted_sweep_keeps_what_is_known_and_goes_on(
    run: Run,
    points: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    command = ["sweep", CONFIG, "--vary=data.length=16,23,32", f"--workdir={tmp_path / 'run'}"]

    def interrupt() -> None:
        while 23 not in noted(points):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    code, rows, text = run(*command)
    assert code == 75
    assert [row["settings"]["data.length"] for row in rows[:-1]] == [16]
    assert "1 ok; 0 of them known before" in text
    check_all_gone(points)
    assert len(read_rows(tmp_path / "run" / "sweep" / "vary.jsonl")) == 1
    code, rows, text = run(*command, "--timeout=1")
    assert [row["verdict"] for row in rows[:-1]] == ["ok", "failed", "ok"]
    assert noted(points) == [16, 23, 23, 32]


def test_a_point_does_not_outlive_its_parent(tmp_path: pathlib.Path) -> None:
    """The parent is killed while the point is at work on more steps than there is time for."""
    report = tmp_path / "report"
    code = f"""if True:
        import sys, time
        from jaxscale.config_source import load, to_mapping
        from jaxscale.resolve import resolve
        from jaxscale.child import start
        from jaxscale.sweep.child import COMMAND
        overrides = [("model.num_layers", "1"), ("data.length", "16")]
        config = resolve(load({CONFIG.removeprefix("--config=")!r}, overrides))
        request = {{"task": "point", "config": to_mapping(config), "devices": "cpu:1"}}
        request |= {{"report": {str(report)!r}, "compile_only": False, "limit": 0}}
        request |= {{"steps": 10**9, "training": None}}
        print(start(COMMAND, request, sys.stderr, {{}}).pid, flush=True)
        time.sleep(600)"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    while not report.exists():
        assert alive(pid), "the point ended by itself"
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline, "the point goes on without its parent"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that waits for its parent to look does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


MISTAKES = {
    "an unknown knob": (["--vary=data.lenght=1"], "did you mean data.length?"),
    "a value of a wrong type": (["--vary=train.steps=many"], "train.steps='many' has a wrong"),
    "a limit without a unit": (["length", "--memory-limit=2"], "--memory-limit=2 is no size"),
    "an unknown technique": (["length", "--techniques=chunkd"], "did you mean chunked?"),
    "an unknown preset": (["lenght"], "invalid choice: 'lenght'"),
    "a wrong number": (["length", "--from=0"], "0 is no whole number from 1 on"),
    "nothing to vary": ([], "nothing varies; name one of length, batch, mesh, precision"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_line_before_anything_runs(
    mistake: str, points: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    arguments, complaint = MISTAKES[mistake]
    monkeypatch.setattr(child, "COMMAND", ("false",))
    try:
        code = main(["sweep", CONFIG, *arguments])
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2
    errors = capsys.readouterr().err
    assert complaint in errors
    assert len(errors.splitlines()) == 1


def test_a_config_that_does_not_fit_the_devices_is_told_at_once(run: Run, capsys: Any) -> None:
    assert main([*REAL, "--vary=data.length=16", "--config.mesh.data=3"]) == 2
    assert "mesh (data=3) does not multiply out to 1 devices" in capsys.readouterr().err


def test_real_points_are_measured(run: Run, tmp_path: pathlib.Path) -> None:
    code, rows, text = run(
        *(*REAL, "--config.data.length=64", "--vary=model.remat=none,full"),
        *("--memory-limit=2MiB", f"--workdir={tmp_path}"),
    )
    assert code == 0
    large, small, _ = rows
    assert (large["verdict"], small["verdict"]) == ("out of memory", "ok")
    assert (small["loss_step"], small["tokens_per_step"]) == (1, 128)
    assert small["step_seconds_least"] <= small["step_seconds"] <= small["step_seconds_most"]
    assert small["tokens_per_second"] == 128 / small["step_seconds"]
    assert small["compile_seconds"] > 0
    assert small["peak_bytes_source"] == "compiler"
    assert large["step_seconds"] is None
    assert large["needed_bytes"] > 2 * 2**20 > small["needed_bytes"] > small["temporary_bytes"]
    assert small["flops"] > large["flops"] > 0
    assert "bytes of 2,097,152, says the compiler" in text


@pytest.mark.slow
def test_an_allocation_that_fails_is_out_of_memory(run: Run) -> None:
    """The process may not have more than 6 GiB, and its step wants 14."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, before[1]))
    try:
        lengths = "--vary=data.length=32,4096"
        code, rows, _ = run(*REAL, lengths, "--config.train.global_batch_size=8", "--timeout=90")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert code == 0
    assert [row["verdict"] for row in rows[:2]] == ["ok", "out of memory"]
    assert "RESOURCE_EXHAUSTED" in rows[1]["note"]


@pytest.mark.slow
def test_batch_sizes_are_trained_and_one_is_recommended(run: Run, tmp_path: pathlib.Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"document {number} " * 50)
    code, rows, text = run(
        *(*REAL[:1], "batch", *REAL[1:], "--to=4", "--tokens=2048", "--tolerance=0.5"),
        *(f"--config.data.source=files:{corpus}/*.txt", "--config.data.length=32"),
        *(f"--config.data.cache_dir={tmp_path / 'tokens'}", "--scale-learning-rate=linear"),
    )
    assert code == 0, text
    assert [row["trained_steps"] for row in rows[:3]] == [64, 32, 16]
    assert [row["learning_rate"] for row in rows[:3]] == pytest.approx([1.5e-3, 3e-3, 6e-3])
    assert len({row["validation_windows"] for row in rows[:3]}) == 1
    assert all(1 < row["validation_loss"] < 6 for row in rows[:3])
    assert "learning rate scaled with the batch size: linear" in text
    assert "recommended: 4" in text
    assert rows[-1]["recommendations"][0]["batch"] == 4


def test_it_can_be_called_from_python(points: pathlib.Path) -> None:
    options = Options(vary=("data.length=16",), compile_only=True)
    run = Sweep(Config(), options)
    assert [row.verdict for row in run.rows()] == ["ok"]
