"""What steps cost on TPUs, as planned, against a file: no change slows them unseen."""

import copy
import json
import os
import runpy
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "scripts" / "planned_costs.py"
COSTS = runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_steps_on_tpus_cost_what_the_file_says() -> None:
    pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")
    if COSTS["versions"]() not in json.loads(COSTS["FILE"].read_text()):
        pytest.skip(f"tests/planned_costs.json has no figures of {COSTS['versions']()}")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_change_beyond_its_margin_is_named() -> None:
    figures = json.loads(COSTS["FILE"].read_text())
    old = next(iter(figures.values()))
    assert set(old) == set(COSTS["PAIRS"]) and len(old) == 8
    name = next(iter(old))
    for key, margin in COSTS["MARGINS"].items():
        new = copy.deepcopy(old)
        for factor, num_changes in ((1 + margin / 2, 0), (1 + 2 * margin, 1), (1 - 2 * margin, 1)):
            new[name][key] = old[name][key] * factor
            changes = list(COSTS["compare"](name, new[name], old))
            assert len(changes) == num_changes
            assert not changes or key in changes[0]
