"""The table of techniques: what it is made of, and that docs/sweep.md has the one that is so."""

import os
import re
import shlex
import subprocess
import sys

import jax
import pytest

from jaxscale.config import Config
from jaxscale.sweep.points import Machine, Options, Plan
from jaxscale.sweep.rows import BOUNDARY, CURVE, OK, OUT_OF_MEMORY, Row
from jaxscale.sweep.table import markdown
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "sweep.md").read_text()
UNITS = {"MiB": 2**20, "GiB": 2**30}
# A compiler gives the same bytes again; cells have one decimal, which is 5% of a "1.0".
BYTES_TOLERANCE = 0.05


def plan() -> Plan:
    machine = Machine({"fake_devices": False}, "cpu", 1, None)
    return Plan(Config(), Options(), machine, "data.length", ())


def row(technique: str, length: int, temporary: int, flops: float, **fields: str) -> Row:
    values = {"phase": CURVE, "verdict": OK, **fields}
    return Row(
        key=f"{technique}{length}",
        technique=technique,
        settings={"data.length": length},
        temporary_bytes=temporary,
        state_bytes=2**20,
        flops=flops,
        **values,
    )


def test_saved_and_more_are_against_the_baseline_at_the_largest_length() -> None:
    rows = [
        row("baseline", 512, 2**20, 1e9),
        row("baseline", 1024, 2**22, 2e9, verdict=OUT_OF_MEMORY),
        row("remat-every-2", 512, 1, 1),
        row("remat-every-2", 1024, 2**20, 2.5e9),
        row("remat-every-2", 1024, 1, 1, phase=BOUNDARY),
    ]
    assert markdown(plan(), rows).splitlines()[2:] == [
        "| `baseline` |  | 4.0 MiB | 0.0% | 1.0 MiB | 2.0 G | +0.0% |",
        "| `remat-every-2` | `model.remat=full` `model.remat_every=2` | 1.0 MiB | 75.0% | 1.0 MiB "
        "| 2.5 G | +25.0% |",
    ]
    assert "the baseline is not known" in markdown(plan(), rows[2:])


def cells(table: str) -> dict[str, list[str]]:
    """Return the cells of each technique's row."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {row[0]: [cell.strip() for cell in row[1:]] for row in rows}


def in_bytes(cell: str) -> float:
    number, unit = cell.split()
    return float(number) * UNITS[unit]


@pytest.mark.slow
def test_the_page_has_the_table_that_its_command_gives() -> None:
    version = re.search(r"jax (\d+\.\d+\.\d+)", PAGE)
    assert version is not None
    if version[1] != jax.__version__:
        pytest.skip(f"the table is of jax {version[1]}, and here is {jax.__version__}")
    found = re.search(
        r"    (jaxscale sweep [^\n]*--table=markdown)\n(.*?)<!-- end -->", PAGE, re.DOTALL
    )
    assert found is not None
    run = subprocess.run(
        [sys.executable, "-m", *shlex.split(found[1])],
        cwd=ROOT,
        # Those of the tests compile quickly rather than well.
        env={**{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    expected, now = cells(found[2]), cells(run.stdout)
    assert now.keys() == expected.keys()
    for technique, (settings, temporaries, _, state, flops, more) in expected.items():
        new = now[technique]
        assert (new[0], new[3]) == (settings, state)
        assert in_bytes(new[1]) == pytest.approx(in_bytes(temporaries), rel=BYTES_TOLERANCE)
        assert (new[4], new[5]) == (flops, more), technique
