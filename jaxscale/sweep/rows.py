"""What a sweep knows of a point: a row of its JSONL, CSV and JSON files."""

import csv
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxscale import records
from jaxscale.config_source import Settings
from jaxscale.parallel.mesh import AXES

# How a point can end.
OK, OUT_OF_MEMORY, NO_ROOM = "ok", "out of memory", "no room"
FAILED, NOT_APPLICABLE = "failed", "does not apply"
VERDICTS = (OK, OUT_OF_MEMORY, NO_ROOM, FAILED, NOT_APPLICABLE)
# What a point was measured for; of a result file, what its points add up to.
CURVE, BOUNDARY, SUMMARY = "curve", "boundary", "summary"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One point; what could not be known is None. Bytes and FLOPs are per device.

    Attributes:
      key: hash of all that the figures depend on.
      phase: "curve", or "boundary" for a point of the bisection.
      technique: its name.
      settings: value of each varied knob, by "section.knob".
      verdict: one of VERDICTS.
      note: why.
      peak_bytes: of device memory that the step needs.
      peak_bytes_source: "device" for the device's own count, "compiler" for the program's
        arguments + results + temporaries - aliases.
      needed_bytes: the compiler's count in any case, which limits are compared with.
      temporary_bytes: of it, temporaries.
      state_bytes: parameters and optimizer state in device memory.
      host_bytes: arguments, results and temporaries in host memory.
      flops: of the compiled program's matmuls, per step.
      tokens_per_step: over all devices.
      compile_seconds: time the compiler took.
      step_seconds: median of some repeats.
      step_seconds_least: of the repeats.
      step_seconds_most: of the repeats.
      tokens_per_second: over all devices.
      loss: training loss at step `loss_step` on one random batch, nats per token.
      loss_step: that step.
      learning_rate: of the training to equal tokens.
      trained_steps: steps of it.
      validation_loss: after it, nats per token.
      validation_windows: that were scored.
    """

    key: str
    phase: str
    technique: str
    settings: Mapping[str, Any]
    verdict: str
    note: str = ""
    peak_bytes: int | None = None
    peak_bytes_source: str | None = None
    needed_bytes: int | None = None
    temporary_bytes: int | None = None
    state_bytes: int | None = None
    host_bytes: int | None = None
    flops: float | None = None
    tokens_per_step: int | None = None
    compile_seconds: float | None = None
    step_seconds: float | None = None
    step_seconds_least: float | None = None
    step_seconds_most: float | None = None
    tokens_per_second: float | None = None
    loss: float | None = None
    loss_step: int | None = None
    learning_rate: float | None = None
    trained_steps: int | None = None
    validation_loss: float | None = None
    validation_windows: int | None = None

    @property
    def measured(self) -> bool:
        """Whether it says something of the point."""
        return self.verdict in (OK, OUT_OF_MEMORY, NO_ROOM)

    @property
    def fits(self) -> bool | None:
        """Whether the memory sufficed; None where that is not known."""
        return {OK: True, OUT_OF_MEMORY: False}.get(self.verdict)


def series_of(row: Row, axis: str) -> str:
    """Return the name of the line that a row belongs to: its technique and other settings."""
    others = shown({knob: value for knob, value in row.settings.items() if knob != axis})
    return " ".join(filter(None, [row.technique, others]))


def by_series(rows: Iterable[Row], axis: str) -> dict[str, list[Row]]:
    """Return the rows of each line in the order of the axis, without those that do not apply."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.verdict != NOT_APPLICABLE:
            found.setdefault(series_of(row, axis), []).append(row)
    if not axis:
        return found
    return {name: sorted(line, key=lambda r: r.settings[axis]) for name, line in found.items()}


def shown(settings: Settings | Mapping[str, Any]) -> str:
    """Return settings like "data.length=512"; of a whole mesh, the axes larger than 1."""
    mesh = {f"mesh.{axis}" for axis in AXES} <= dict(settings).keys()
    parts = [
        f"{knob.rpartition('.')[2]}={value}"
        for knob, value in dict(settings).items()
        if not (mesh and knob.startswith("mesh.") and value == 1)
    ]
    return " ".join(parts)


def read_rows(path: pathlib.Path) -> dict[str, Row]:
    """Return the rows of a JSONL file by their keys, the last of each; none without a file."""
    names = {field.name for field in dataclasses.fields(Row)}
    lines = records.read_lines(path) if path.is_file() else []
    # A line of another version of this program is measured again.
    whole = [line for line in lines if line.keys() - {records.NONFINITE} == names]
    rows = [Row(**{name: line[name] for name in names}) for line in whole]
    return {row.key: row for row in rows}


def write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Write the rows, each varied knob in a column of its own."""
    knobs = list(dict.fromkeys(knob for row in rows for knob in row.settings))
    names = [f.name for f in dataclasses.fields(Row) if f.name not in ("key", "settings")]
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*knobs, *names])
        for row in rows:
            values = [row.settings.get(knob) for knob in knobs]
            table.writerow([*values, *(getattr(row, name) for name in names)])
