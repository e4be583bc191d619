#!/usr/bin/env python3
"""Predict published training runs and show every miss, beside what anyone could have guessed.

    pip install --editable '.[tpu]'
    python scripts/backtest.py --rows docs/published_tpu_runs.csv --json runs/backtest.json
        [--only ID,ID] [--table docs/backtest.md] [--plot docs/images/backtest.png] [--check]

Each run is rebuilt as a jaxscale config, compiled by the TPU compiler for its slice, and priced.
A run with a feature that we lack is skipped by name. The first time takes an hour on two cores;
compiled programs are kept, so that Ctrl-C loses one at most. `--fit` prints the constants that fit
the rows best; they belong into the code by hand. `--check` exits 1 where a bound is missed.
"""

import argparse
import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxscale import records, runtime
from jaxscale.config import ConfigError
from jaxscale.plan import score
from jaxscale.plan.published import Run, Skipped, to_run
from jaxscale.plan.rows import read_rows
from jaxscale.plan.score import Errors, Predict, Prediction
from jaxscale.plan.words import refused_option
from jaxscale.verbs.common import DONE, FAILED, INTERRUPTED, WRONG

GIB = 2**30
# What stands between them in a page is written by this script.
TABLE_START, TABLE_END = "<!-- table of scripts/backtest.py -->", "<!-- end of table -->"
# What a row must be for its errors to count: C lacks too much.
COUNTED = ("A", "B")
# Colours of Okabe and Ito, which every kind of colour vision tells apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")

# Tokens whose logits exist at once where those of all have no room, as by our own default.
CHUNK_TOKENS = 2048


class Planned(NamedTuple):
    """What predicts runs, its constants, and of runs that it cannot predict the reason by id."""

    predict: Predict[Any]
    shares: Any
    reasons: dict[str, str]


# Everything is compiled when it returns.
Planner = Callable[[Sequence[Run]], Planned]


@dataclasses.dataclass(frozen=True)
class Result:
    """Of all rows; lists are in the order of `runs`.

    Attributes:
      runs: those that could be rebuilt.
      skipped: the others.
      predictions: with the constants of the code.
      left_out: seconds predicted with constants that were fitted to the other chips.
      baseline: seconds at the median MFU of the run's chip.
      baseline_left_out: seconds at the median MFU of the other chips.
      shares: the constants of the code.
      best: the constants that fit these rows best; None if not asked for.
    """

    runs: list[Run]
    skipped: list[Skipped]
    predictions: list[Prediction]
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


def main(argv: Sequence[str] | None = None, planner: Planner | None = None) -> int:
    """Predict the rows of a file; return the exit code."""
    args = parse(argv)
    try:
        rows = read_rows(args.rows)
        wanted = args.only.split(",") if args.only else [row.id for row in rows]
        unknown = set(wanted) - {row.id for row in rows}
        if unknown:
            raise ConfigError(f"--only={args.only}: {args.rows} has no row {min(unknown)}")
        if args.json:
            records.check_writable(args.json.absolute().parent, f"--json={args.json}")
        if args.table:
            check_page(args.table)
        rebuilt = [to_run(row) for row in rows if row.id in wanted]
        result = backtest(rebuilt, planner or real_planner, args)
    except (ConfigError, OSError) as error:
        print(f"backtest: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("interrupted; what is compiled is kept, and the same command goes on")
        return INTERRUPTED
    show(result)
    if args.json:
        records.write_json(args.json, to_json(result, args.rows))
    if args.table:
        write_table(result, args.table)
    if args.plot:
        draw(result, args.plot)
    missed = [text for holds, text in bounds(result) if not holds]
    return FAILED if args.check and missed else DONE


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Predict published training runs.")
    file = pathlib.Path
    parser.add_argument("--rows", type=file, required=True, help="table of published runs (CSV)")
    parser.add_argument("--json", type=file, help="write the result here")
    parser.add_argument("--only", default="", help="ids of rows, joined by commas")
    parser.add_argument("--plot", type=file, help="draw the errors here (PNG or SVG)")
    parser.add_argument("--table", type=file, help="write the table between this page's markers")
    parser.add_argument("--fit", action="store_true", help="print the constants that fit best")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is missed")
    return parser.parse_args(argv)


def real_planner(runs: Sequence[Run]) -> Planned:
    """Compile the runs, with progress, and return what prices them; imports the TPU compiler."""
    from jaxscale.plan.predict import predict_step
    from jaxscale.plan.shares import SHARES, Shares

    programs, reasons = compile_runs(runs)

    def predict(run: Run, shares: Shares) -> Prediction:
        job, compiled = programs[run.id]
        line = predict_step(job, compiled, shares=shares, is_causal=not run.full_square_attention)
        # Copies to the host and back hide behind computation, as far as there is enough of it.
        copied = 2 * run.extra_host_bytes + sum(
            traffic.payload_bytes for traffic in line.traffic if traffic.kind == "host"
        )
        rate = run.chip.host_bytes_per_second / run.chip.devices_per_chip
        needed = compiled.needed_bytes - run.offloaded_carry_bytes
        return Prediction(
            seconds=max(line.seconds, copied / rate),
            fits=needed <= run.chip.hbm_bytes_per_device,
            bytes=needed,
            bound="host" if copied / rate > line.seconds else line.bound,
        )

    return Planned(predict, SHARES, reasons)


def compile_runs(runs: Sequence[Run]) -> tuple[dict[str, Any], dict[str, str]]:
    """Compile the runs; return (job, compiled) of each by id, and why the others have none.

    Options that this compiler does not know are left out. Where the logits of all tokens have no
    room, they are computed in parts, as few peers do.
    """
    from jaxscale.plan.compile import Job, compile_all
    from jaxscale.plan.torus import parse_topology

    programs: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    waiting: dict[Any, list[Run]] = {}
    for run in runs:
        slice_ = parse_topology(run.topology, run.num_slices)
        waiting.setdefault(Job(run.config, slice_, run.options), []).append(run)
    while waiting:
        again: dict[Any, list[Run]] = {}
        for job, compiled in compile_all(list(waiting)):
            ids = [run.id for run in waiting[job]]
            refused = refused_option(compiled.error)
            if refused in dict(job.options):
                options = tuple(pair for pair in job.options if pair[0] != refused)
                again[dataclasses.replace(job, options=options)] = waiting[job]
                outcome = f"the compiler knows no option {refused}; left out"
            elif compiled.has_room:
                programs.update(dict.fromkeys(ids, (job, compiled)))
                outcome = f"compiled in {compiled.compile_seconds:.0f} s"
            elif not compiled.error and not job.config.train.loss_chunk_tokens:
                train = dataclasses.replace(job.config.train, loss_chunk_tokens=CHUNK_TOKENS)
                config = dataclasses.replace(job.config, train=train)
                again[dataclasses.replace(job, config=config)] = waiting[job]
                outcome = "no room for all logits; in parts"
            else:
                outcome = compiled.error or f"no room for {compiled.needed_bytes / GIB:.1f} GiB"
                reasons.update(dict.fromkeys(ids, outcome))
            done = len(programs) + len(reasons)
            print(f"{done}/{len(runs)}  {', '.join(ids)}: {outcome}", file=sys.stderr, flush=True)
        waiting = again
    return programs, reasons


def backtest(
    rebuilt: Sequence[Run | Skipped], planner: Planner, args: argparse.Namespace
) -> Result:
    """Predict what could be rebuilt, with the code's constants and with others' fitted ones."""
    runs = [run for run in rebuilt if isinstance(run, Run)]
    skipped = [row for row in rebuilt if isinstance(row, Skipped)]
    predict, shares, reasons = planner(runs)
    skipped += [Skipped(id, reason) for id, reason in reasons.items()]
    runs = [run for run in runs if run.id not in reasons]
    known = [run for run in runs if counts(run)]
    return Result(
        runs=runs,
        skipped=skipped,
        predictions=[predict(run, shares) for run in runs],
        left_out=score.left_out(predict, runs, known, shares),
        baseline=score.constant_mfu(runs, known),
        baseline_left_out=score.constant_mfu(runs, known, left_out=True),
        shares=shares,
        best=score.fit(predict, known, shares) if args.fit and known else None,
    )


def counts(run: Run) -> bool:
    """Tell whether enough of a run was published for its error to mean something."""
    return run.row.completeness in COUNTED


def show(result: Result) -> None:
    """Print the rows, the skipped ones by name, and the summary."""
    width = max([len(run.id) for run in result.runs] + [len(row.id) for row in result.skipped])
    print(f"{'id':{width}}  published  predicted   error  bound    fits  HBM/device")
    for run, prediction in zip(result.runs, result.predictions, strict=True):
        miss = score.error(prediction.seconds, run.published_seconds)
        print(
            f"{run.id:{width}}  {run.published_seconds:7.2f} s  {prediction.seconds:7.2f} s  "
            f"{miss:+6.0%}  {prediction.bound:7}  {'yes' if prediction.fits else 'NO':4}  "
            f"{prediction.bytes / GIB:6.1f} GiB"
        )
    for row in result.skipped:
        print(f"{row.id:{width}}  skipped: {row.reason}")
    print()
    print("\n".join(summary(result)))
    for holds, text in bounds(result):
        print(f"{'holds ' if holds else 'MISSED'}  {text}")
    if result.best is not None:
        print(f"fits best: {result.best}")


def summary(result: Result) -> list[str]:
    """Return the errors of the planner and of the baseline as lines."""
    lines = [f"{'median':>44}  within 30%"]
    for name, seconds in (
        ("planner", result.seconds),
        ("planner, fitted to the other chips", result.left_out),
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
        *(result.runs, result.predictions, result.left_out),
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
            "left_out_seconds": left_out,
            "baseline_seconds": own,
            "baseline_left_out_seconds": others,
            "approximations": list(run.approximations),
        }
        for run, prediction, left_out, own, others in columns
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
    lines = ["| run | published | predicted | error | bound | fits | GiB per device |"]
    lines.append("| --- | ---: | ---: | ---: | --- | --- | ---: |")
    for run, prediction in zip(result.runs, result.predictions, strict=True):
        miss = score.error(prediction.seconds, run.published_seconds)
        lines.append(
            f"| {run.id} | {run.published_seconds:.2f} s | {prediction.seconds:.2f} s | "
            f"{miss:+.0%} | {prediction.bound} | {'yes' if prediction.fits else 'no'} | "
            f"{prediction.bytes / GIB:.1f} |"
        )
    lines += [f"| {row.id} | skipped: {row.reason} | | | | | |" for row in result.skipped]
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
            mark = {"marker": marker, "markerfacecolor": face, "markeredgecolor": colour}
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


if __name__ == "__main__":
    sys.exit(main())
