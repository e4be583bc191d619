"""A sweep in words: a line per point, what the points add up to, and the table of techniques.

The table in docs/sweep.md is what `markdown` gives.
"""

from collections.abc import Iterator, Sequence

from jaxscale.config_source import Settings
from jaxscale.console import format_bytes
from jaxscale.sweep.points import Plan
from jaxscale.sweep.rows import CURVE, NOT_APPLICABLE, VERDICTS, Row, shown
from jaxscale.sweep.run import Sweep
from jaxscale.sweep.summary import FITS, Boundary, Recommendation
from jaxscale.sweep.techniques import BY_NAME, FIRST

COLUMNS = ("technique", "settings", "temporaries", "saved", "state", "FLOPs", "more")
GIGA = 1e9


def header(plan: Plan) -> list[str]:
    """Say what is going to be run."""
    machine, options = plan.machine, plan.options
    runs = sum(point.config is not None for point in plan.points)
    kind = machine.environment["device_kind"]
    how = "compiled only" if options.compile_only else "compiled and run"
    limit = format_bytes(plan.limit) if plan.limit else "none"
    lines = [
        f"{runs} points, each {how} in a process of its own; {machine.num_devices} x {kind}, "
        f"limit of a device's memory: {limit}"
    ]
    if plan.options.tokens:
        lines.append(
            f"each trains on {options.tokens:,} tokens; learning rate scaled with the batch size: "
            f"{options.scale_learning_rate}"
        )
    return lines


def line(plan: Plan, row: Row) -> str:
    """Return a row as it is printed when it is known."""
    width = max(len(f"{p.technique} {shown(p.settings)}") for p in plan.points)
    name = f"{row.technique} {shown(row.settings)}"
    parts = [f"{name:<{width}}", f"{row.verdict:<{len(NOT_APPLICABLE)}}", *_figures(row)]
    return "  ".join([*parts, *filter(None, [row.note])]).rstrip()


def _figures(row: Row) -> Iterator[str]:
    if row.peak_bytes is not None:
        yield f"{format_bytes(row.peak_bytes):>9}"
    if row.temporary_bytes is not None:
        yield f"temporaries {format_bytes(row.temporary_bytes):>9}"
    if row.tokens_per_second is not None:
        yield f"{row.tokens_per_second:>9,.0f} tok/s"
        spread = f"{row.step_seconds_least:.3g}-{row.step_seconds_most:.3g}"
        yield f"{row.step_seconds:.3g} s/step ({spread})"
    if row.loss is not None:
        yield f"loss {row.loss:.4f}"
    if row.validation_loss is not None:
        yield f"validation {row.validation_loss:.4f}"


def footer(run: Sweep) -> list[str]:
    """Write the files, and say what the rows add up to and where the files are."""
    plan, rows, summary = run.plan, run.found, run.summary()
    lines = ["", *skipped_words(rows)]
    if summary.boundaries and plan.limit:
        lines.append(f"largest {plan.axis} within {format_bytes(plan.limit)} on each device:")
        lines += [f"  {boundary_words(boundary)}" for boundary in summary.boundaries]
    if summary.growths:
        lines.append(f"growth with {plan.axis}, as a power (of the last two points):")
        lines += [
            f"  {g.series}: {g.quantity} {g.exponent:.2f} ({g.last_exponent:.2f})"
            for g in summary.growths
        ]
    for found in summary.recommendations:
        lines += recommendation_words(found)
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    ends = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    fake = "; fake devices: mechanics, not speed" if plan.fake else ""
    known = len(rows) - run.num_measured
    lines.append(f"{ends or 'nothing measured'}; {known} of them known before{fake}")
    return [*lines, *(f"written: {path}" for path in run.write())]


def boundary_words(found: Boundary) -> str:
    """Return where memory ends on a line."""
    least = "at least " if found.exceeds is None else ""
    if found.fits is None:
        size = f"less than {found.exceeds}" if found.exceeds else "not known"
    else:
        more = f"{found.exceeds} is too large" if found.exceeds else "the largest tried"
        size = f"{found.fits} ({more})"
    moved = f", {least}{found.moved:.2g} x" if found.moved is not None else ""
    return f"{found.series}: {size}{moved}"


def recommendation_words(found: Recommendation) -> Iterator[str]:
    """Yield a verdict for each batch size, then the recommendation."""
    yield f"batch sizes, {found.series}: " + ", ".join(
        f"{b} {verdict}" for b, verdict in found.verdicts.items()
    )
    if found.batch is None or found.lowest_loss is None:
        yield "no batch size is recommended: no validation loss is known"
        return
    judged = [b for b, verdict in found.verdicts.items() if verdict == FITS]
    more = "; larger ones were not tried" if found.batch == max(found.verdicts) else ""
    yield (
        f"recommended: {found.batch}, the largest of {len(judged)} within {found.tolerance:.1%} of "
        f"the lowest validation loss {found.lowest_loss:.4f}{more}"
    )


def markdown(plan: Plan, rows: Sequence[Row]) -> str:
    """Return the table of techniques at the largest value of the axis where the baseline is known.

    Bytes and FLOPs are per device; "saved" and "more" are against the baseline.
    """
    curve = [row for row in rows if row.phase == CURVE]
    known = [r for r in curve if r.technique == FIRST and r.temporary_bytes is not None]
    if not known:
        return "no table: the baseline is not known; add --techniques=all, or some by name"
    base = known[-1]
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in curve:
        if row.settings == base.settings and row.temporary_bytes is not None:
            lines.append(_cells(row, base))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cells(row: Row, base: Row) -> tuple[str, ...]:
    assert row.temporary_bytes is not None and base.temporary_bytes and row.state_bytes is not None
    saved = 1 - row.temporary_bytes / base.temporary_bytes
    more = (row.flops or 0) / base.flops - 1 if base.flops else 0.0
    settings = _short(BY_NAME[row.technique].settings) if row.technique in BY_NAME else ""
    return (
        f"`{row.technique}`",
        settings,
        format_bytes(row.temporary_bytes),
        f"{round(saved, 3) + 0.0:.1%}",
        format_bytes(row.state_bytes),
        f"{(row.flops or 0) / GIGA:,.1f} G",
        f"{round(more, 3) + 0.0:+.1%}",
    )


def _short(settings: Settings) -> str:
    """Return settings as code, mesh axes of size 1 left out."""
    parts = [
        f"`{knob}={','.join(value) if isinstance(value, tuple) else value}`"
        for knob, value in settings
        if not (knob.startswith("mesh.") and value == 1)
    ]
    return " ".join(parts)


def skipped_words(rows: Sequence[Row]) -> Iterator[str]:
    """Yield each technique that did not apply anywhere, with the reason."""
    for technique in dict.fromkeys(row.technique for row in rows):
        own = [row for row in rows if row.technique == technique]
        if all(row.verdict == NOT_APPLICABLE for row in own):
            yield f"{technique}: {own[0].note}"
