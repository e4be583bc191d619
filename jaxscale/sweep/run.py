"""The sweep: every point in turn, then the boundary of memory by bisection; nothing known twice.

`jaxscale sweep` prints each row as soon as it is known. WORKDIR/sweep/NAME.jsonl has a line for
each, from which the same command goes on.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from jaxscale import records, runtime, workdir
from jaxscale.config import Config, ConfigError
from jaxscale.data.workers import Stop, never
from jaxscale.resolve import resolve
from jaxscale.sweep import child
from jaxscale.sweep.points import (
    BATCH_KNOB,
    LENGTH_KNOB,
    Options,
    Plan,
    Point,
    given_values,
    make_plan,
    make_point,
)
from jaxscale.sweep.rows import BOUNDARY, CURVE, SUMMARY, Row, by_series, read_rows, write_csv
from jaxscale.sweep.summary import (
    Boundary,
    Growth,
    Recommendation,
    boundaries,
    growths,
    next_probe,
    recommend,
    unit_of,
)

# A boundary of the length is found to a quarter of the least step between two lengths.
PARTS = {LENGTH_KNOB: 4, BATCH_KNOB: 1}


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the rows add up to.

    Attributes:
      boundaries: of each line, if memory ends on any.
      growths: of each line and quantity.
      recommendations: of a batch size, for each line, if one was asked for.
    """

    boundaries: list[Boundary]
    growths: list[Growth]
    recommendations: list[Recommendation]


class Sweep:
    """A plan, the devices it runs on, and the folder that remembers its rows."""

    def __init__(self, config: Config, options: Options, *, stop: Stop = never) -> None:
        """Check everything and look at the devices.

        Args:
          config: as given.
          options: what to vary and measure.
          stop: asked whether to stop.

        Raises:
          ConfigError: a user's mistake, before anything is measured.
          Stopped: `stop` said so.
        """
        if runtime.process_group(os.environ) is not None:
            raise ConfigError("sweep works in a single process; unset WORLD_SIZE, or set it to 1")
        given_values(config, options)
        self._stop = stop
        self.folder: pathlib.Path | None = None
        machine = child.look(resolve(config), options, stop=stop)
        self.plan = make_plan(config, options, machine)
        if options.workdir:
            self.folder = workdir.check_writable(options.workdir) / records.SWEEP_DIR
            self.folder.mkdir(exist_ok=True)
        self._known: dict[str, Row] = {}
        # The rows so far, in their order, and how many of them were not read back.
        self.found: list[Row] = []
        self.num_measured = 0

    @property
    def name(self) -> str:
        """Of the files: the preset."""
        return self.plan.options.preset or "vary"

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, devices and host of the points."""
        return self.plan.machine.environment

    def rows(self) -> Iterator[Row]:
        """Run the points one after the other, then bisect, and yield each row once it is known.

        Raises:
          Stopped: a stop was asked for; what is known is in the files.
          ConfigError: another sweep writes to the folder.
        """
        with contextlib.ExitStack() as stack:
            if self.folder:
                stack.enter_context(workdir.locked(self.folder, work="sweeps"))
                self._known = {} if self.plan.options.force else read_rows(self._lines)
            self.found.clear()
            for point in self.plan.points:
                yield self._row(point, CURVE)
            if self.plan.axis in PARTS and self.plan.limit:
                for line in by_series(list(self.found), self.plan.axis).values():
                    yield from self._bisect(line)

    def _bisect(self, line: Sequence[Row]) -> Iterator[Row]:
        """Find the largest value of a line that fits, by compiling alone."""
        axis, first = self.plan.axis, line[0]
        known = {row.settings[axis]: row.fits for row in line}
        unit = unit_of(list(known), parts=PARTS[axis])
        options = dataclasses.replace(self.plan.options, compile_only=True, tokens=0)
        plan = dataclasses.replace(self.plan, options=options)
        while (value := next_probe(known, unit)) is not None:
            settings = tuple({**first.settings, axis: value}.items())
            row = self._row(make_point(plan, first.technique, settings), BOUNDARY, plan)
            known[value] = row.fits
            yield row

    def _row(self, point: Point, phase: str, plan: Plan | None = None) -> Row:
        """Return the row of a point: the one that is known, or a new one, written down."""
        row = self._known.get(point.key)
        if row is None:
            row = child.measure(plan or self.plan, point, phase=phase, stop=self._stop)
            self._known[row.key] = row
            self.num_measured += 1
            if self.folder:
                records.append_line(self._lines, dataclasses.asdict(row))
        # A point of a bisection may be one of another command's curve.
        self.found.append(dataclasses.replace(row, phase=phase))
        return self.found[-1]

    @property
    def _lines(self) -> pathlib.Path:
        assert self.folder is not None
        return self.folder / f"{self.name}.jsonl"

    def summary(self) -> Summary:
        """Return what the rows so far add up to."""
        axis, options, rows = self.plan.axis, self.plan.options, self.found
        return Summary(
            boundaries=boundaries(rows, axis) if axis else [],
            growths=growths(rows, axis) if axis else [],
            recommendations=recommend(rows, axis, options.tolerance) if options.tokens else [],
        )

    def write(self) -> list[pathlib.Path]:
        """Write the rows so far as CSV and draw them; return the files, none without a workdir."""
        from jaxscale.sweep.plots import draw

        if not self.folder or not self.found:
            return []
        path = self.folder / f"{self.name}.csv"
        write_csv(path, self.found)
        edges = self.summary().boundaries
        return [path, *draw(self.plan, self.found, edges, self.folder / self.name)]


def to_rows(run: Sweep) -> list[dict[str, Any]]:
    """Return the rows of the result file; the last one is what the others add up to."""
    last = {"phase": SUMMARY, **dataclasses.asdict(run.summary())}
    return [*map(dataclasses.asdict, run.found), last]
