"""What rows add up to, on rows that are made up: boundary, growth, batch size, overhead."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxscale.sweep.rows import BOUNDARY, CURVE, FAILED, NOT_APPLICABLE, OK, OUT_OF_MEMORY, Row
from jaxscale.sweep.summary import (
    boundaries,
    growth,
    growths,
    next_probe,
    overhead,
    recommend,
    unit_of,
)

AXIS = "data.length"
BATCH = "train.global_batch_size"


def row(value: int, technique: str = "baseline", axis: str = AXIS, **fields: Any) -> Row:
    values = {"phase": CURVE, "verdict": OK, "settings": {axis: value}, **fields}
    return Row(key=f"{technique}{value}", technique=technique, **values)


def bisect(fits: Callable[[int], bool], tried: list[int], unit: int) -> tuple[int, int]:
    """Return the largest value that fits, and how many probes that took."""
    known: dict[int, bool | None] = {value: fits(value) for value in tried}
    probes = 0
    while (value := next_probe(known, unit)) is not None:
        known[value] = fits(value)
        probes += 1
    return max((value for value, good in known.items() if good), default=0), probes


@pytest.mark.parametrize("limit", [1, 127, 128, 700, 1024, 1500, 2047, 2048, 4095])
def test_bisection_finds_the_boundary_of_a_known_byte_function(limit: int) -> None:
    found, probes = bisect(
        lambda length: 3 * length**2 <= 3 * limit**2, [512, 1024, 2048, 4096], 128
    )
    assert found == limit // 128 * 128
    assert probes <= math.log2(2048 / 128)


def test_bisection_stops_where_there_is_nothing_to_find() -> None:
    assert next_probe({512: True, 1024: True}, 128) is None
    assert next_probe({}, 128) is None
    # One that could not be run is not run again.
    assert next_probe({512: True, 768: None, 1024: False}, 128) is None
    assert unit_of([512, 1024, 4096], parts=4) == 128
    assert unit_of([4, 8, 16]) == 4


def test_boundary_moves_against_the_baseline() -> None:
    rows = [
        row(512),
        row(1024, verdict=OUT_OF_MEMORY),
        row(768, verdict=OUT_OF_MEMORY, phase=BOUNDARY),
        row(640, phase=BOUNDARY),
        row(512, "chunked"),
        row(1024, "chunked"),
        row(512, "hopeless", verdict=OUT_OF_MEMORY),
        row(512, "broken", verdict=FAILED),
        row(512, "elsewhere", verdict=NOT_APPLICABLE),
    ]
    found = {b.series: (b.fits, b.exceeds, b.moved) for b in boundaries(rows, AXIS)}
    assert found == {
        "baseline": (640, 768, 1.0),
        "chunked": (1024, None, 1.6),
        "hopeless": (None, 512, None),
        "broken": (None, None, None),
    }
    assert boundaries(rows[:1], AXIS) == []


def test_exponent_is_that_of_known_data() -> None:
    x = [2.0**n for n in range(4, 10)]
    square = growth("line", "bytes", [(v, 7 * v**2) for v in x])
    assert square is not None
    assert (square.exponent, square.last_exponent) == pytest.approx((2.0, 2.0))
    # A constant beside the square: the fit lies between, the last points nearer to 2.
    mixed = growth("line", "bytes", [(v, 4e3 + v**2) for v in x])
    assert mixed is not None
    log = np.log(np.array([(v, 4e3 + v**2) for v in x]))
    slope = np.cov(log.T)[0, 1] / np.var(log[:, 0], ddof=1)
    assert mixed.exponent == pytest.approx(slope)
    assert mixed.exponent < mixed.last_exponent < 2
    assert growth("line", "bytes", [(1, 1), (2, 2)]) is None


def test_growth_is_fitted_for_each_line_from_its_curve_alone() -> None:
    rows = [
        row(n, name, temporary_bytes=n**p) for n in (2, 4, 8) for name, p in (("a", 1), ("b", 2))
    ]
    rows += [row(6, "a", temporary_bytes=10**6, phase=BOUNDARY), row(16, "a")]
    found = {g.series: round(g.exponent, 6) for g in growths(rows, AXIS)}
    assert found == {"a": 1.0, "b": 2.0}


def test_the_largest_batch_within_the_tolerance_is_recommended() -> None:
    losses = {8: 2.010, 16: 2.000, 32: 2.015, 64: 2.030, 128: None, 256: None}
    verdicts = {128: FAILED, 256: OUT_OF_MEMORY}
    rows = [
        row(b, axis=BATCH, validation_loss=loss, verdict=verdicts.get(b, OK))
        for b, loss in losses.items()
    ]
    [found] = recommend(rows, BATCH, 0.01)
    assert (found.batch, found.lowest_loss) == (32, 2.0)
    assert found.verdicts == {
        8: "fits",
        16: "fits",
        32: "fits",
        64: "degrades",
        128: "not known",
        256: "out of memory",
    }
    assert recommend(rows, BATCH, 0.001)[0].batch == 16
    assert recommend(rows, BATCH, 0.1)[0].batch == 64
    [nothing] = recommend(rows[4:], BATCH, 0.01)
    assert (nothing.batch, nothing.lowest_loss) == (None, None)


def test_overhead_is_taken_where_both_are_known() -> None:
    rows = [
        row(1, flops=10.0, step_seconds=1.0),
        row(2, flops=20.0),
        row(1, "remat-full", flops=13.0, step_seconds=1.2),
        row(2, "remat-full", flops=25.0),
        row(2, "chunked", flops=19.0),
    ]
    assert overhead(rows, AXIS) == {
        "baseline": (1.0, 1.0),
        "remat-full": (1.3, 1.2),
        "chunked": (0.95, None),
    }
