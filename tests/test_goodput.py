"""The ledger adds up to the life of the process, whatever is measured inside what."""

import pathlib
import subprocess
import sys
import time

import psutil
import pytest

from jaxscale import records
from jaxscale.goodput import Goodput, read_goodput

NAP = 0.03


def age() -> float:
    return float(time.time() - psutil.Process().create_time())


def total(ledger: Goodput) -> float:
    return sum(ledger.seconds().values())


def test_categories_add_up_to_the_age_of_the_process(tmp_path: pathlib.Path) -> None:
    before = age()
    ledger = Goodput(tmp_path, primary=True)
    with ledger.measure(records.STEP_SECONDS):
        time.sleep(NAP)
    # The kernel notes the birth of a process to a hundredth of a second.
    assert before - 0.02 < total(ledger) < age() + 0.02
    assert tuple(ledger.seconds()) == records.GOODPUT_CATEGORIES


def test_imports_count_as_init(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys, time; time.sleep(0.2)\n"
        "from jaxscale.goodput import Goodput\n"
        "Goodput(sys.argv[1], primary=True).write(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    summary = read_goodput(tmp_path / records.GOODPUT_FILE)
    assert summary.seconds[records.INIT_SECONDS] > 0.2


def test_nested_measures_count_no_second_twice(tmp_path: pathlib.Path) -> None:
    ledger = Goodput(tmp_path, primary=True)
    with ledger.measure(records.STEP_SECONDS):
        time.sleep(NAP)
        with ledger.measure(records.COMPILE_SECONDS):
            time.sleep(2 * NAP)
            with ledger.measure(records.STEP_SECONDS):
                time.sleep(NAP)
        with ledger.measure(records.DATA_WAIT_SECONDS):
            time.sleep(NAP)
    seconds = ledger.seconds()
    assert seconds[records.STEP_SECONDS] >= 2 * NAP
    assert seconds[records.COMPILE_SECONDS] >= 2 * NAP
    assert seconds[records.DATA_WAIT_SECONDS] >= NAP
    assert sum(seconds.values()) < age() + 0.02


def test_unclaimed_time_is_lost(tmp_path: pathlib.Path) -> None:
    ledger = Goodput(tmp_path, primary=True)
    time.sleep(NAP)
    assert ledger.seconds()[records.LOST_SECONDS] >= NAP


def test_a_measure_ends_with_an_exception(tmp_path: pathlib.Path) -> None:
    ledger = Goodput(tmp_path, primary=True)
    with pytest.raises(KeyboardInterrupt), ledger.measure(records.STEP_SECONDS):
        raise KeyboardInterrupt
    at_the_end = ledger.seconds()[records.STEP_SECONDS]
    time.sleep(NAP)
    assert ledger.seconds()[records.STEP_SECONDS] == at_the_end


def test_a_misspelt_category_is_refused(tmp_path: pathlib.Path) -> None:
    ledger = Goodput(tmp_path, primary=True)
    with pytest.raises(AssertionError, match="stepseconds"), ledger.measure("stepseconds"):
        pass


def test_restarts_are_added_up(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys; from jaxscale.goodput import Goodput\n"
        "ledger = Goodput(sys.argv[1], primary=True)\n"
        "with ledger.measure('step_seconds'):\n"
        "    import time; time.sleep(0.1)\n"
        "ledger.write(1); ledger.write(2)"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    lines = records.read_lines(tmp_path / records.GOODPUT_FILE)
    assert [line["step"] for line in lines] == [1, 2, 1, 2]
    last = lines[1], lines[3]
    summary = read_goodput(tmp_path / records.GOODPUT_FILE)
    assert summary.num_runs == 2
    assert summary.wall_seconds == sum(line["wall_seconds"] for line in last)
    assert summary.seconds["step_seconds"] == sum(line["step_seconds"] for line in last)
    assert sum(summary.seconds.values()) == pytest.approx(summary.wall_seconds, abs=0.02)
    assert summary.step_share == summary.seconds["step_seconds"] / summary.wall_seconds


def test_only_the_primary_process_writes(tmp_path: pathlib.Path) -> None:
    Goodput(tmp_path, primary=False).write(1)
    assert not list(tmp_path.iterdir())
