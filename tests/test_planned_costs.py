"""What steps cost on TPUs, as planned, against a file: no change slows them unseen."""

import copy
import json
import runpy

import pytest

from tests.conftest import ROOT
from tests.scripts import check_script

SCRIPT = ROOT / "scripts" / "planned_costs.py"
COSTS = runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_steps_on_tpus_cost_what_the_file_says() -> None:
    pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")
    # Of another jaxlib than the lock's there is nothing; of the lock's own there must be.
    jaxlib, _, _ = COSTS["versions"]().partition(" libtpu")
    if not any(name.startswith(jaxlib) for name in json.loads(COSTS["FILE"].read_text())):
        pytest.skip(f"tests/planned_costs.json has no figures of {jaxlib.rstrip(',')}")
    check_script("planned_costs.py")


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
