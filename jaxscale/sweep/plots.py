"""A sweep drawn: memory and speed along its axis, how far the boundary moved, and what it costs.

Colours are Okabe and Ito's, which every kind of colour vision tells apart; lines differ in marker
and style too. Nothing here computes a figure.
"""

import contextlib
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxscale.console import format_bytes
from jaxscale.sweep.points import Plan
from jaxscale.sweep.rows import CURVE, Row, by_series
from jaxscale.sweep.summary import Boundary, overhead

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS, STYLES = "osD^vP", ("-", "--", ":", "-.")
GREY, BLUE, VERMILION = "#5A5A5A", "#0072B2", "#D55E00"
DOTS_PER_INCH = 120
UNITS = {"data.length": "tokens", "train.global_batch_size": "sequences"}


def draw(
    plan: Plan, rows: Sequence[Row], boundaries: Sequence[Boundary], stem: pathlib.Path
) -> list[pathlib.Path]:
    """Write STEM-memory.png and others, as far as there is something to draw; return the files."""
    from matplotlib.figure import Figure

    files: list[pathlib.Path] = []

    @contextlib.contextmanager
    def figure(name: str, height: float) -> Iterator[Any]:
        fig = Figure(figsize=(9.6, height), dpi=DOTS_PER_INCH, layout="constrained")
        axes = fig.subplots()
        yield axes
        axes.spines[["top", "right"]].set_visible(False)
        path = stem.with_name(f"{stem.name}-{name}.png")
        fig.savefig(path)
        files.append(path)

    curve = [row for row in rows if row.phase == CURVE]
    if plan.axis and any(row.needed_bytes for row in curve):
        with figure("memory", 5.2) as axes:
            _memory(axes, plan, curve)
    if plan.axis and any(row.tokens_per_second for row in curve):
        with figure("speed", 5.2) as axes:
            _speed(axes, plan, curve)
    reached = [boundary for boundary in boundaries if boundary.fits]
    if reached:
        with figure("boundary", 1.6 + 0.32 * len(reached)) as axes:
            _boundary(axes, plan, reached)
    costs = overhead(rows, plan.axis)
    if len(costs) > 1:
        with figure("overhead", 1.6 + 0.36 * len(costs)) as axes:
            _overhead(axes, costs, fake=plan.fake)
    return files


def _lines(axes: Any, plan: Plan, rows: Sequence[Row], field: str, scale: float) -> None:
    """Draw a field of the rows, one line per technique, over the axis in powers of two."""
    from matplotlib.ticker import NullLocator

    looks = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    lines = by_series(rows, plan.axis)
    for number, ((series, line), (colour, marker)) in enumerate(zip(lines.items(), looks)):  # noqa: B905
        points = [(r.settings[plan.axis], getattr(r, field)) for r in line]
        points = [(x, y / scale) for x, y in points if y is not None]
        if points:
            style = STYLES[number // len(COLOURS) % len(STYLES)]
            x, y = zip(*points, strict=True)
            axes.plot(x, y, style, color=colour, marker=marker, markersize=4.5, label=series)
    values = sorted({row.settings[plan.axis] for row in rows})
    if values[0] > 0:
        axes.set_xscale("log", base=2)
        axes.set_xlim(values[0] / 1.2, values[-1] * 1.2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    unit = UNITS.get(plan.axis, "")
    axes.set_xlabel(f"{plan.axis} [{unit}]" if unit else plan.axis)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _memory(axes: Any, plan: Plan, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator

    most = max(row.peak_bytes or 0 for row in rows)
    unit, scale = ("GiB", 2.0**30) if most >= 2**30 else ("MiB", 2.0**20)
    _lines(axes, plan, rows, "peak_bytes", scale)
    if plan.limit:
        axes.axhline(plan.limit / scale, color=GREY, linestyle=(0, (6, 3)), linewidth=1.2)
        axes.annotate(
            f"limit {format_bytes(plan.limit)}",
            (0.01, plan.limit / scale),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=GREY,
            fontsize=9,
        )
    sources = sorted({row.peak_bytes_source for row in rows if row.peak_bytes_source})
    axes.set_ylabel(f"peak memory of a device [{unit}]")
    axes.set_title(f"Memory of a step, counted by the {' and the '.join(sources)}", loc="left")
    # 1, 2, 5, 10 instead of powers of ten.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()


def _speed(axes: Any, plan: Plan, rows: Sequence[Row]) -> None:
    _lines(axes, plan, rows, "tokens_per_second", 1.0)
    axes.set_ylabel("tokens per second, all devices")
    words = "fake devices: mechanics, not speed" if plan.fake else _kind(plan)
    axes.set_title(f"Speed of training ({words})", loc="left")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,g}")


def _kind(plan: Plan) -> str:
    return f"{plan.machine.num_devices} x {plan.machine.environment['device_kind']}"


def _boundary(axes: Any, plan: Plan, boundaries: Sequence[Boundary]) -> None:
    limit = format_bytes(plan.limit or 0)
    fits = [boundary.fits or 0 for boundary in boundaries]
    axes.barh([b.series for b in boundaries], fits, color=BLUE, height=0.62)
    for place, boundary in enumerate(boundaries):
        more = "at least " if boundary.exceeds is None else ""
        moved = f"  ({more}{boundary.moved:.2g} x)" if boundary.moved is not None else ""
        text = f" {more}{boundary.fits:,}{moved}"
        axes.annotate(text, (boundary.fits, place), va="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(fits) / 2, max(fits) * 4)
    axes.margins(y=0.03)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.invert_yaxis()
    axes.set_xlabel(f"largest {plan.axis} that fits [{UNITS.get(plan.axis, '')}]")
    axes.set_title(f"Where {limit} of a device end, and how far that moved", loc="left")


def _overhead(axes: Any, costs: Mapping[str, tuple[float, float | None]], *, fake: bool) -> None:
    names, places = list(costs), range(len(costs))
    flops = [ratio for ratio, _ in costs.values()]
    axes.barh(names, flops, color=BLUE, height=0.62, label="FLOPs of the compiled program")
    timed = [(seconds, place) for place, (_, seconds) in zip(places, costs.values(), strict=True)]
    timed = [(seconds, place) for seconds, place in timed if seconds is not None]
    if timed:
        x, y = zip(*timed, strict=True)
        words = "seconds of a step" + (" (mechanics, not speed)" if fake else "")
        axes.plot(x, y, "D", color=VERMILION, markersize=6, label=words)
    for place, ratio in zip(places, flops, strict=True):
        axes.annotate(
            f"{ratio:.2f}",
            (ratio, place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(1, color=GREY, linewidth=1)
    axes.margins(x=0.08, y=0.03)
    axes.figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=2)
    axes.invert_yaxis()
    axes.set_xlabel("as a multiple of the baseline's, per device")
    axes.set_title("What each technique costs in compute, at the largest size of both", loc="left")
