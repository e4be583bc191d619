"""What a back-test found: published runs beside their predictions, summed up and drawn.

`scripts/backtest.py` fills a `Result`; here it becomes lines, a table in a page, JSON and a plot.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from jaxscale import records, runtime
from jaxscale.config import ConfigError
from jaxscale.plan import roofline, score
from jaxscale.plan.predict import network
from jaxscale.plan.published import Run, Skipped
from jaxscale.plan.score import Errors, Prediction
from jaxscale.plan.shares import SHARES, Shares
from jaxscale.plan.space import candidate
from jaxscale.plan.torus import parse_topology

GIB = 2**30
# What stands between them in a page is written by the script.
TABLE_START, TABLE_END = "<!-- table of scripts/backtest.py -->", "<!-- end of table -->"
# What a row must be for its errors to count: C lacks too much.
COUNTED = ("A", "B")
# Colours of Okabe and Ito, which every kind of colour vision tells apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


@dataclasses.dataclass(frozen=True)
class Result:
    """Of all rows; lists are in the order of `runs`.

    Attributes:
      runs: those that could be rebuilt.
      skipped: the others.
      predictions: with the constants of the code.
      closed: seconds by the closed form, with the constants of the code.
      left_out: seconds predicted with constants that were fitted to the other chips.
      baseline: seconds at the median MFU of the run's chip.
      baseline_left_out: seconds at the median MFU of the other chips.
      shares: the constants of the code.
      best: the constants that fit these rows best; None if not asked for.
    """

    runs: list[Run]
    skipped: list[Skipped]
    predictions: list[Prediction]
    closed: list[float]
    left_out: list[float]
    baseline: list[float]
    baseline_left_out: list[float]
    shares: Any
    best: Any

    def errors(self, seconds: Sequence[float]) -> Errors | None:
        """Sum up the errors of the rows that count; None where none has a prediction."""
        pairs = [
            (predicted, run.published_seconds)
            for run, predicted in zip(self.runs, seconds, strict=True)
            if counts(run) and not math.isnan(predicted)
        ]
        return score.errors(pairs) if pairs else None

    @property
    def seconds(self) -> list[float]:
        """Predicted, of each run."""
        return [prediction.seconds for prediction in self.predictions]

    @property
    def order(self) -> tuple[int, int]:
        """Pairs whose MFUs are in the right order, and all that are unlike."""
        kept = [(r, s) for r, s in zip(self.runs, self.seconds, strict=True) if counts(r)]
        return score.mfu_order([r for r, _ in kept], [s for _, s in kept])

    @property
    def misfits(self) -> list[str]:
        """Runs of completeness A that are predicted not to fit, though they ran."""
        pairs = zip(self.runs, self.predictions, strict=True)
        return [run.id for run, p in pairs if run.row.completeness == "A" and not p.fits]


def closed_seconds(run: Run, shares: Shares = SHARES) -> float:
    """Return the seconds of a run's step from shapes and data sheets alone, without a compiler."""
    slice_ = parse_topology(run.topology, run.num_slices)
    placed = network(run.config.mesh, slice_)
    part = candidate(run.config, slice_)
    return roofline.closed_seconds(part, slice_.chip, placed, shares).total


def counts(run: Run) -> bool:
    """Tell whether enough of a run was published for its error to mean something."""
    return run.row.completeness in COUNTED


def summary(result: Result) -> list[str]:
    """Return the errors of the planner and of the baseline as lines."""
    lines = [f"{'median':>44}  within 30%"]
    for name, seconds in (
        ("planner", result.seconds),
        ("planner, fitted to the other chips", result.left_out),
        ("closed form", result.closed),
        ("one MFU per chip, its own median", result.baseline),
        ("one MFU, the median of the other chips", result.baseline_left_out),
    ):
        if errors := result.errors(seconds):
            lines.append(f"{name:38}{errors.median:6.1%}  {errors.within_30:10.0%}")
    return lines


def bounds(result: Result) -> list[tuple[bool, str]]:
    """Return what must hold: whether it does, and the figure in words."""
    total = len(result.runs) + len(result.skipped)
    right, pairs = result.order
    share, misfits = len(result.runs) / max(total, 1), result.misfits
    held = [
        (share >= 18 / 21, f"{len(result.runs)} of {total} rows predicted (at least 18 of 21)"),
        (
            not misfits,
            f"rows of completeness A all fit{': not ' * bool(misfits)}{', '.join(misfits)}",
        ),
    ]
    if pairs:
        held.append((right / pairs >= 0.75, f"{right} of {pairs} same-chip pairs in order (75%)"))
    one_chip = len({run.chip.name for run in result.runs}) < 2
    errors = result.errors(result.seconds if one_chip else result.left_out)
    others = result.errors(result.baseline_left_out)
    if errors:
        held.append((errors.median <= 0.12, f"median absolute error {errors.median:.1%} (12%)"))
        held.append((errors.within_30 >= 0.9, f"{errors.within_30:.0%} of rows within 30% (90%)"))
    if errors and others:
        words = f"below half of the baseline's {others.median:.1%} on chips not fitted to"
        held.append((errors.median < others.median / 2, f"{errors.median:.1%} {words}"))
    return held


def to_json(result: Result, rows: pathlib.Path) -> dict[str, Any]:
    """Return the result in the envelope of all results; what is skipped stands apart."""
    columns = zip(
        *(result.runs, result.predictions, result.closed, result.left_out),
        *(result.baseline, result.baseline_left_out),
        strict=True,
    )
    body = [
        {
            "id": run.id,
            "predicted_seconds": prediction.seconds,
            "published_seconds": run.published_seconds,
            "fits": prediction.fits,
            "bytes": prediction.bytes,
            "bound": prediction.bound,
            "chip": run.chip.name,
            "closed_form_seconds": closed,
            "left_out_seconds": left_out,
            "baseline_seconds": own,
            "baseline_left_out_seconds": others,
            "approximations": list(run.approximations),
        }
        for run, prediction, closed, left_out, own, others in columns
    ]
    config = {"rows": str(rows), "shares": dataclasses.asdict(result.shares)}
    return {
        **records.envelope("backtest", body, config=config, environment=runtime.describe()),
        "skipped": [dataclasses.asdict(row) for row in result.skipped],
        "summary": summary(result),
        "bounds": [{"holds": holds, "text": text} for holds, text in bounds(result)],
    }


def check_page(page: pathlib.Path) -> None:
    """Check that a page has the markers, before hours of work.

    Raises:
      ConfigError: it has not.
    """
    if not re.search(f"{TABLE_START}.*{TABLE_END}", page.read_text(), re.DOTALL):
        raise ConfigError(f"--table={page} has no line {TABLE_START} with {TABLE_END} after it")


def write_table(result: Result, page: pathlib.Path) -> None:
    """Replace what stands between a page's markers by the table and the summary."""
    text = page.read_text()
    names = "published | predicted | error | closed form | bound | fits | GiB per device"
    lines = [f"| run | {names} |", "| --- | ---: | ---: | ---: | ---: | --- | --- | ---: |"]
    columns = zip(result.runs, result.predictions, result.closed, strict=True)
    for run, prediction, closed in columns:
        miss = score.error(prediction.seconds, run.published_seconds)
        lines.append(
            f"| {run.id} | {run.published_seconds:.2f} s | {prediction.seconds:.2f} s | "
            f"{miss:+.0%} | {closed:.2f} s | {prediction.bound} | "
            f"{'yes' if prediction.fits else 'no'} | {prediction.bytes / GIB:.1f} |"
        )
    lines += [f"| {row.id} | skipped: {row.reason} | | | | | | |" for row in result.skipped]
    before, rest = text.split(TABLE_START, 1)
    after = rest.split(TABLE_END, 1)[1]
    figures = "\n".join(["```text", *summary(result), "```"])
    body = "\n".join(lines)
    page.write_text(f"{before}{TABLE_START}\n{body}\n\n{figures}\n{TABLE_END}{after}")


def draw(result: Result, path: pathlib.Path) -> None:
    """Draw every run's error: the planner's, and those of what was fitted to the other chips."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9.6, 1.4 + 0.3 * len(result.runs)), dpi=120, layout="constrained")
    axes = fig.subplots()
    chips = sorted({run.chip.name for run in result.runs})
    axes.axvspan(-30, 30, color="#F0F0F0", zorder=0)
    axes.axvline(0, color="#5A5A5A", linewidth=1, zorder=1)
    for y, run in enumerate(result.runs):
        colour = COLOURS[chips.index(run.chip.name) % len(COLOURS)]
        for seconds, marker, face in (
            (result.seconds[y], "o", colour),
            (result.left_out[y], "o", "none"),
            (result.baseline_left_out[y], "x", colour),
        ):
            miss = 100 * score.error(seconds, run.published_seconds)
            mark: dict[str, Any] = {
                "marker": marker,
                "markerfacecolor": face,
                "markeredgecolor": colour,
            }
            axes.plot([miss], [y], linestyle="none", **mark)
    axes.set_yticks(range(len(result.runs)), [run.id for run in result.runs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "error of the step time, %   (● planner   ○ fitted to the other chips   "
        "x one MFU, of the other chips)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
