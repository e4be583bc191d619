"""What compiled steps cost, against figures in a file: a regression in communication shows here."""

import copy
import runpy
from typing import Any

import jax
import pytest

from tests.conftest import ROOT
from tests.scripts import check_script

SCRIPT = ROOT / "scripts" / "compiled_costs.py"
COSTS = runpy.run_path(str(SCRIPT))


def known() -> dict[str, Any]:
    if not COSTS["has_figures"]():
        pytest.skip(f"tests/compiled_costs.json has no figures of jax {jax.__version__}")
    return dict(COSTS["read"]())


@pytest.mark.slow
def test_compiled_steps_cost_what_the_file_says() -> None:
    """The same program as for a user: without the flags and the cache of the tests."""
    known()
    check_script("compiled_costs.py")


def test_a_change_beyond_its_margin_is_named() -> None:
    old = known()["small, fsdp"]
    gathers = "all-gather fsdp"

    def changes(key: str, value: float) -> list[str]:
        new = copy.deepcopy(old)
        (new["collectives"][gathers] if key in ("number", "bytes") else new)[key] = value
        return list(COSTS["compare"]("small", new, old))

    assert list(COSTS["compare"]("small", old, old)) == []
    number = old["collectives"][gathers]["number"]
    place = f"small: collectives: {gathers}: number"
    assert changes("number", number + 1) == [f"{place} was {number} and is {number + 1}"]
    assert changes("bytes", 1.009 * old["collectives"][gathers]["bytes"]) == []
    assert len(changes("bytes", 1.02 * old["collectives"][gathers]["bytes"])) == 1
    assert changes("temporary_bytes", 0.96 * old["temporary_bytes"]) == []
    assert len(changes("temporary_bytes", 1.06 * old["temporary_bytes"])) == 1
    assert len(changes("flops", 1.01 * old["flops"])) == 1


def test_a_collective_that_came_or_went_is_named() -> None:
    old = known()["small, data, accumulation"]
    new = copy.deepcopy(old)
    new["collectives"]["all-gather stage"] = new["collectives"].pop("all-reduce data")
    lines = list(COSTS["compare"]("small", new, old))
    assert [line.split(" was ")[0].split(": ")[-2:] for line in lines] == [
        ["all-gather stage", "bytes"],
        ["all-gather stage", "number"],
        ["all-reduce data", "bytes"],
        ["all-reduce data", "number"],
    ]


def test_no_stage_gathers_what_the_others_have() -> None:
    for name, pair in known().items():
        assert not [key for key in pair["collectives"] if key.startswith("all-gather stage")], name
