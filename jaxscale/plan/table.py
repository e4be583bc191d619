"""A plan in words: the table, why its winner wins, how it scales, and how to train it."""

import shlex
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxscale.config import Config
from jaxscale.config_source import flatten
from jaxscale.console import format_bytes
from jaxscale.hardware import Chip
from jaxscale.plan.boundary import Boundary
from jaxscale.plan.curve import LEAST_EFFICIENCY, CurvePoint
from jaxscale.plan.describe import COMPILERS, compiler
from jaxscale.plan.rank import CLOSED_FORM, Row, Shortlist
from jaxscale.plan.timeline import Timeline
from jaxscale.plan.torus import Slice

COLUMNS = (
    *("step", "tokens/s/chip", "MFU", "HBM", "fits", "bound by", "compile", "known by"),
    *("batch x length", "mesh, remat"),
)
NUMBERS = ("step", "tokens/s/chip", "MFU", "HBM", "compile")
# Knobs that a candidate may change, in the order of the command.
CHOSEN = ("mesh", "model.remat", "model.remat_names", "train.global", "train.accum", "data.length")
# Traffic that is waited for less than this share of the step is not worth a line.
LEAST_SHARE = 0.005


def header(config: Config, slice_: Slice, short: Shortlist, *, is_compiled: bool) -> list[str]:
    """Say what was looked at, and whether the compiler is going to be asked."""
    chip = slice_.chip
    how = _how(chip, is_compiled=is_compiled)
    return [
        f"{slice_.words}: {slice_.num_chips} {'chips' if chip.has_peaks else 'devices'}, "
        f"{format_bytes(chip.usable_bytes_per_device)} per device; {how}",
        f"{short.num_candidates:,} candidates for batch {config.train.global_batch_size} x "
        f"{config.data.length} tokens, {short.num_fitting:,} fit by the closed form",
    ]


def _how(chip: Chip, *, is_compiled: bool) -> str:
    """Say where bytes and seconds come from."""
    known, found = COMPILERS[chip.platform], compiler(chip.platform)
    if not is_compiled:
        how = "closed form alone" + ("" if found else f"; {known.install} compiles")
    else:
        how = f"compiled by {found}" if known.knows_time else f"bytes compiled by {found}"
    if not chip.has_peaks:
        return f"{how}; no data sheet, so no seconds: a CPU's bytes only show the shape of it"
    seconds = ", seconds by the closed form" if is_compiled and not known.knows_time else ""
    return f"{how}{seconds}; not run on a {chip.platform.upper()}"


def table(rows: Sequence[Row]) -> list[str]:
    """Return rows as aligned lines, the best first; what is longest stands last."""
    lines = [list(COLUMNS), *(list(_cells(row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if name in NUMBERS else cell.ljust(width)
            for cell, width, name in zip(cells, widths, COLUMNS, strict=True)
        ).rstrip()
        for cells in lines
    ]


def _cells(row: Row) -> Iterator[str]:
    config = row.candidate.config
    yield f"{row.seconds:.4g} s" if row.is_timed else "-"
    yield f"{row.tokens_per_second_per_chip:,.0f}" if row.is_timed else "-"
    yield f"{row.mfu:.1%}" if row.is_timed else "-"
    share = row.needed_bytes / row.available_bytes
    yield f"{format_bytes(row.needed_bytes)} {share:.0%}"
    yield "?" if row.error else "yes" if row.fits else "NO"
    yield row.error or row.bound
    yield f"{row.compile_seconds:.0f} s" if row.known_by != CLOSED_FORM else "-"
    yield row.known_by
    parts = config.train.accumulation_steps
    sequences = f"{config.train.global_batch_size}" + (f" in {parts}" if parts > 1 else "")
    yield f"{sequences} x {config.data.length}"
    yield f"{row.candidate.mesh_words}, {row.candidate.remat_words}"


def why(rows: Sequence[Row]) -> Iterator[str]:
    """Say why the first row is before the second."""
    first, *others = rows
    if first.timeline is None:
        return
    spent = _spent(first.timeline)
    yield f"winner: {first.candidate.mesh_words}, {first.candidate.remat_words}: {spent}"
    second = next((row for row in others if row.timeline and row.fits), None)
    if second is None or second.timeline is None:
        return
    # Of what a token costs, for batches may differ.
    ratio = second.tokens_per_second_per_chip / first.tokens_per_second_per_chip
    differences = {
        name: second.timeline.by_resource[name] * ratio * first.seconds / second.seconds - seconds
        for name, seconds in first.timeline.by_resource.items()
    }
    name = max(differences, key=lambda name: differences[name])
    yield (
        f"runner-up: {second.candidate.mesh_words}, {second.candidate.remat_words}: "
        f"{_spent(second.timeline)}; a token takes {1 / ratio:.3g} times as long, most of it "
        f"for {name}"
    )


def _spent(timeline: Timeline) -> str:
    parts = sorted(timeline.by_resource.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{seconds / timeline.seconds:.0%} {name}"
        for name, seconds in parts
        if seconds > LEAST_SHARE * timeline.seconds
    )


def explain(timeline: Timeline) -> list[Table]:
    """Break a step down: by part of the model and pass, and by what is sent."""
    passes = list(dict.fromkeys(name for _, name in timeline.by_part))
    parts = Table("seconds of computation", *passes, "all", box=SIMPLE_HEAD)
    for part in dict.fromkeys(name for name, _ in timeline.by_part):
        cells = [timeline.by_part.get((part, name), 0.0) for name in passes]
        parts.add_row(part, *(f"{seconds:.4f}" for seconds in [*cells, sum(cells)]))
    sent = Table("sent", "over", "times", "bytes", "links busy", "waited for", box=SIMPLE_HEAD)
    for row in timeline.traffic:
        sent.add_row(
            row.kind,
            ",".join(row.axes) or "-",
            f"{row.number:,}",
            format_bytes(row.payload_bytes),
            f"{row.busy_seconds:.4f} s",
            f"{row.waited_seconds:.4f} s",
        )
    return [parts, sent]


def curve_lines(kept: str, points: Sequence[CurvePoint]) -> Iterator[str]:
    """Say how the winner scales, by the closed form, and where to stop."""
    yield f"scaling, {kept}, by the closed form:"
    for point in points:
        row = point.row
        yield (
            f"  {point.topology:>14}  {point.num_chips:>5} chips  {row.seconds:8.4g} s  "
            f"{row.tokens_per_second_per_chip * point.num_chips:>13,.0f} tokens/s  "
            f"{point.efficiency:4.0%}  {row.candidate.mesh_words}"
        )
    worth = [point for point in points if point.is_worth_it]
    if len(worth) == len(points):
        yield f"  each chip does at least {LEAST_EFFICIENCY:.0%} of what it does in the smallest"
    else:
        last = worth[-1].topology
        yield f"  stop at {last}: beyond, a chip does less than {LEAST_EFFICIENCY:.0%}"


def boundary_lines(boundaries: Sequence[Boundary], of_length: bool) -> Iterator[str]:
    """Say where memory ends for each kind of remat."""
    unit = "tokens per sequence" if of_length else "sequences per step"
    yield f"the most that fits, {unit}:"
    for found in boundaries:
        name = found.remat.kind + (":" + ",".join(found.remat.names) if found.remat.names else "")
        above = f", {found.next_size:,} does not" if found.next_size else ""
        mesh = f" with {found.row.candidate.mesh_words} ({found.row.known_by})" if found.row else ""
        yield f"  {found.size:>9,}{above}{mesh}: {name}"


def price_line(row: Row, dollars_per_chip_hour: float) -> str:
    """Say what tokens cost."""
    per_million = dollars_per_chip_hour / 3600 / row.tokens_per_second_per_chip * 1e6
    return (
        f"at {dollars_per_chip_hour:g} dollars a chip and hour: {per_million:.4g} dollars for a "
        f"million tokens, {1e6 / per_million:,.0f} tokens for a dollar"
    )


def command(
    source: str | None,
    workdir: str | None,
    overrides: Sequence[tuple[str, str]],
    *,
    given: Config,
    row: Row,
) -> str:
    """Return the command that trains a row.

    Args:
      source: the config file and its argument; None where the workdir has the config.
      workdir: the folder of the run; None where none was named.
      overrides: knobs that the user set, and their values.
      given: the resolved config, before the planner changed it.
      row: the choice.
    """
    before, after = flatten(given), flatten(row.candidate.config)
    knobs = dict(overrides)
    for key, value in after.items():
        if value != before[key] and key.startswith(CHOSEN):
            knobs[key] = ",".join(map(str, value)) if isinstance(value, list) else value
    words = [f"--config={source}"] if source else []
    words += [f"--config.{key}={value}" for key, value in knobs.items()]
    words.append(f"--workdir={workdir or 'DIR'}")
    return " ".join(["jaxscale train", *map(shlex.quote, words)])
