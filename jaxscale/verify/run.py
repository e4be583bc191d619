"""One device against every mesh and variant of a plan, and the result in words.

`jaxscale verify` prints each row as soon as it is known.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxscale import records
from jaxscale.config import ConfigError
from jaxscale.verify.cases import Case, Plan
from jaxscale.verify.compare import (
    GRADIENT_TOLERANCE_F32,
    LOSS,
    TENSORS,
    Deviation,
    compare,
    loss_tolerance,
    make_batches,
    on_host,
    run_steps,
)

VERDICTS = EQUAL, MISMATCH, NO_ROOM = "equal", "MISMATCH", "no room"


@dataclasses.dataclass(frozen=True)
class Row:
    """How a case compares with one device.

    Attributes:
      case: what was run.
      deviations: the largest of each quantity, or none where it could not run.
      note: why not.
      seconds: that it took, compilation included.
    """

    case: Case
    deviations: list[Deviation]
    note: str
    seconds: float

    @property
    def verdict(self) -> str:
        """EQUAL, MISMATCH or NO_ROOM."""
        if not self.deviations:
            return NO_ROOM
        return EQUAL if all(d.passed for d in self.deviations) else MISMATCH


def run_plan(plan: Plan) -> Iterator[Row]:
    """Run the cases of a plan one after the other, and yield how each compares.

    Raises:
      ConfigError: one device has no room for the model, or its loss is not finite.
    """
    train, data = plan.config.train, plan.config.data
    batches = make_batches(plan.config, plan.num_steps)
    try:
        expected = on_host(run_steps(plan.reference, batches))
    except ConfigError as error:
        raise ConfigError(
            f"one device cannot run it: {error}; lower --layers, --length or --batch"
        ) from error
    bad = [step for step, loss in enumerate(expected.losses, 1) if not math.isfinite(loss)]
    if bad:
        raise ConfigError(
            f"on one device the loss of step {bad[0]} is no finite number, which nothing can be "
            "compared with; lower --steps or --layers"
        )
    for case in plan.cases:
        started = time.perf_counter()
        deviations, note = [], ""
        try:
            # The same seed gives the same parameters on every mesh; variants share a mesh.
            params = expected.initial if case.settings else None
            found = run_steps(case.assembly, batches, params)
            deviations = compare(found, expected, train.global_batch_size * data.length)
        except ConfigError as error:
            note = str(error)
        yield Row(case, deviations, note, time.perf_counter() - started)


def header(plan: Plan) -> list[str]:
    """Say what is going to be run, and what is not; then the head of the table."""
    model, train, data = plan.config.model, plan.config.train, plan.config.data
    checked = sum(not case.settings for case in plan.cases)
    lines = [
        f"{model.num_layers} layers of width {model.width}, {plan.num_steps} batches of "
        f"{train.global_batch_size} x {data.length} tokens, SGD in float32",
        f"{plan.num_meshes} meshes fit, {plan.num_refused} do not; here are {checked} and "
        f"{len(plan.cases) - checked} variants, each against the plainest program on one device",
        *(f"not checked: {text}" for text in plan.left_out),
    ]
    columns = ("mesh", "verdict", "loss", "largest error of a tensor")
    return [*lines, "", _aligned(plan, *columns)]


def line(plan: Plan, row: Row) -> str:
    """Return a row of the table; above it the mesh of the variants that follow.

    Under a mismatch stands all that is wrong.
    """
    case, lines = row.case, []
    if case.settings and case is next(c for c in plan.cases if c.settings and c.mesh == case.mesh):
        lines.append(f"\nvariants on {case.mesh}")
    if not row.deviations:
        return "\n".join([*lines, _aligned(plan, _name(case), row.verdict, "", row.note)])
    loss = next(d for d in row.deviations if d.quantity == LOSS)
    worst = max((d for d in row.deviations if d.quantity in TENSORS), key=lambda d: d.severity)
    error = f"{loss.relative_error:.1e}"
    lines.append(_aligned(plan, _name(case), row.verdict, error, _shown(worst)))
    wrong = [d for d in row.deviations if not d.passed and d is not worst]
    return "\n".join([*lines, *(_aligned(plan, "", "", "", _shown(d)) for d in wrong)])


def summary(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """Name what is not equal, then say in a line what the rows add up to."""
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    tokens = plan.config.train.global_batch_size * plan.config.data.length
    return [
        *(f"{MISMATCH}: {row.case.name}" for row in rows if row.verdict == MISMATCH),
        f"{shown or 'nothing to check'}; tolerance of the loss {loss_tolerance(tokens):.1e}, "
        f"of tensors {GRADIENT_TOLERANCE_F32:.0e}",
    ]


def to_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows of the result file."""
    return [
        {
            records.CASE: row.case.name,
            records.MESH: dict(row.case.assembly.mesh.shape),
            records.SETTINGS: dict(row.case.settings),
            records.VERDICT: row.verdict,
            records.NOTE: row.note,
            records.DEVIATIONS: [dataclasses.asdict(d) for d in row.deviations],
            records.CASE_SECONDS: row.seconds,
        }
        for row in rows
    ]


def _name(case: Case) -> str:
    return case.variant or case.mesh


def _aligned(plan: Plan, name: str, verdict: str, loss: str, tensor: str) -> str:
    width = max(len(_name(case)) for case in plan.cases) if plan.cases else 0
    verdict = verdict.ljust(max(map(len, VERDICTS)))
    return f"{name:<{width}}  {verdict}  {loss:<7}  {tensor}".rstrip()


def _shown(deviation: Deviation) -> str:
    of = f"{deviation.quantity} {deviation.where}".rstrip()
    return f"{deviation.relative_error:.1e}  {of}"
