"""What the rows of a sweep add up to: the boundary of memory, exponents of growth, a batch size.

Everything here is a function of rows alone, so that an interrupted sweep, and one that was read
back, are summed up alike.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxscale.sweep.rows import CURVE, OK, OUT_OF_MEMORY, Row, by_series
from jaxscale.sweep.techniques import AS_CONFIGURED, FIRST

# A line through fewer points says nothing of a power.
LEAST_POINTS = 3
# What is fitted: fields of a row.
GROWING = ("temporary_bytes", "step_seconds")
FITS, DEGRADES, TOO_LARGE, UNKNOWN = "fits", "degrades", "out of memory", "not known"


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Where memory ends on one line of a sweep.

    Attributes:
      series: the line.
      fits: the largest value that fits; None if none does.
      exceeds: the smallest that does not; None if all fit.
      moved: `fits` over that of the reference's line; None where one of them is not known.
    """

    series: str
    fits: int | None
    exceeds: int | None
    moved: float | None


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a quantity grows along a line.

    Attributes:
      series: the line.
      quantity: one of GROWING.
      exponent: p of the least-squares line of log(quantity) = p log(x) + c.
      last_exponent: the same of the last two points alone: what it tends to.
      num_points: of the fit.
    """

    series: str
    quantity: str
    exponent: float
    last_exponent: float
    num_points: int


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The batch size to take.

    Attributes:
      series: the line.
      batch: the largest that fits and does not degrade the validation loss; None if none is known.
      lowest_loss: of all that fit, nats per token.
      tolerance: share by which the loss may lie above that.
      verdicts: of each batch size: FITS, DEGRADES, TOO_LARGE or UNKNOWN.
    """

    series: str
    batch: int | None
    lowest_loss: float | None
    tolerance: float
    verdicts: Mapping[int, str]


def next_probe(known: Mapping[int, bool | None], unit: int) -> int | None:
    """Return the value to try next on the way to the largest that fits; None when that is found.

    It halves the gap between the largest that fits and the smallest that does not, or the smallest
    value of all. Bytes are taken to grow with the value.

    Args:
      known: whether each value that was tried fits; None for one that could not be run.
      unit: of which all values are multiples; the answer is exact to one.
    """
    too_large = [value for value, fits in known.items() if fits is False]
    fitting = [value for value, fits in known.items() if fits and value < min(too_large, default=0)]
    if not too_large:
        return None
    low, high = max(fitting, default=0) // unit, min(too_large) // unit
    probe = (low + high) // 2 * unit
    return None if high - low <= 1 or probe in known or probe == 0 else probe


def unit_of(values: Sequence[int], *, parts: int = 1) -> int:
    """Return the unit of a bisection: the greatest common divisor of the values over some parts."""
    return max(1, math.gcd(*values) // parts)


def boundaries(rows: Sequence[Row], axis: str) -> list[Boundary]:
    """Return where memory ends on each line; none where nothing exceeds it."""
    found = {}
    for series, line in by_series(rows, axis).items():
        exceeds = min((r.settings[axis] for r in line if r.fits is False), default=None)
        fitting = [r.settings[axis] for r in line if r.fits]
        fits = max((x for x in fitting if exceeds is None or x < exceeds), default=None)
        found[series] = (line[0], fits, exceeds)
    if all(exceeds is None for _, _, exceeds in found.values()):
        return []
    result = []
    for series, (row, fits, exceeds) in found.items():
        own = series if row.technique == AS_CONFIGURED else series.replace(row.technique, FIRST, 1)
        base = found[own][1] if own in found else None
        result.append(Boundary(series, fits, exceeds, fits / base if fits and base else None))
    return result


def growth(series: str, quantity: str, points: Sequence[tuple[float, float]]) -> Growth | None:
    """Fit a power to points (x, quantity) in the order of x; None for too few."""
    if len({x for x, _ in points}) < LEAST_POINTS:
        return None
    x, y = np.log(np.asarray(points, dtype=float)).T
    slope = np.polyfit(x, y, 1)[0]
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return Growth(series, quantity, float(slope), float(last), len(points))


def growths(rows: Sequence[Row], axis: str) -> list[Growth]:
    """Return how each quantity grows along each line; bytes count whether they fit or not."""
    found = []
    for series, line in by_series(rows, axis).items():
        for quantity in GROWING:
            curve = (r for r in line if r.phase == CURVE)
            values = {r.settings[axis]: getattr(r, quantity) for r in curve}
            points = [(x, y) for x, y in values.items() if x > 0 and y]
            fitted = growth(series, quantity, points)
            found += [fitted] if fitted else []
    return found


def recommend(rows: Sequence[Row], axis: str, tolerance: float) -> list[Recommendation]:
    """Return for each line the largest batch size that fits and whose loss is near the lowest."""
    lines = by_series((row for row in rows if row.phase == CURVE), axis)
    return [_recommend(name, line, axis, tolerance) for name, line in lines.items()]


def _recommend(series: str, line: Sequence[Row], axis: str, tolerance: float) -> Recommendation:
    known = [r.validation_loss for r in line if r.verdict == OK and r.validation_loss is not None]
    lowest = min(known, default=math.inf)
    verdicts = {}
    for row in line:
        verdict = TOO_LARGE if row.verdict == OUT_OF_MEMORY else UNKNOWN
        if row.verdict == OK and row.validation_loss is not None:
            near = row.validation_loss <= lowest * (1 + tolerance)
            verdict = FITS if near else DEGRADES
        verdicts[row.settings[axis]] = verdict
    best = max((batch for batch, verdict in verdicts.items() if verdict == FITS), default=None)
    return Recommendation(series, best, lowest if known else None, tolerance, verdicts)


def overhead(rows: Sequence[Row], axis: str) -> dict[str, tuple[float, float | None]]:
    """Return FLOPs and seconds of a step over the baseline's, where both are known.

    They are taken at the largest value at which the line and the baseline are known.
    """
    lines = by_series((row for row in rows if row.phase == CURVE and row.flops), axis)
    found: dict[str, tuple[float, float | None]] = {}
    for series, line_rows in lines.items():
        base = lines.get(series.replace(line_rows[0].technique, FIRST, 1), [])
        pairs = [(r, b) for r in line_rows for b in base if r.settings == b.settings]
        timed = [(r, b) for r, b in pairs if r.step_seconds and b.step_seconds]
        if pairs:
            row, other = (timed or pairs)[-1]
            assert row.flops and other.flops
            seconds = (row.step_seconds or 0) / other.step_seconds if timed else None  # type: ignore[operator]
            found[series] = (row.flops / other.flops, seconds)
    return found
