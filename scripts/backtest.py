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
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxscale import records
from jaxscale.config import ConfigError
from jaxscale.plan import score
from jaxscale.plan.backtest import (
    GIB,
    Result,
    bounds,
    check_page,
    closed_seconds,
    counts,
    draw,
    summary,
    to_json,
    write_table,
)
from jaxscale.plan.published import Run, Skipped, to_run
from jaxscale.plan.rows import read_rows
from jaxscale.plan.score import Predict, Prediction
from jaxscale.plan.words import refused_option
from jaxscale.verbs.common import DONE, FAILED, INTERRUPTED, WRONG

# Tokens whose logits exist at once where those of all have no room, as by our own default.
CHUNK_TOKENS = 2048
SMALL_CHUNKS = range(1, CHUNK_TOKENS + 1)


class Planned(NamedTuple):
    """What predicts runs, its constants, and of runs that it cannot predict the reason by id."""

    predict: Predict[Any]
    shares: Any
    reasons: dict[str, str]


# Everything is compiled when it returns.
Planner = Callable[[Sequence[Run]], Planned]


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
        unasked = "not asked for by --only"
        rebuilt = [to_run(r) if r.id in wanted else Skipped(r.id, unasked) for r in rows]
        compiling = {"slow_options": args.slow_options, "num_processes": args.num_processes}
        planner = planner or functools.partial(real_planner, **compiling)
        result = backtest(rebuilt, planner, args)
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
    parser.add_argument(
        "--slow-options", action="store_true", help="compile with options that take minutes each"
    )
    parser.add_argument("--num-processes", type=int, default=0, help="that compile; 0: all cores")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is missed")
    return parser.parse_args(argv)


def real_planner(runs: Sequence[Run], **compiling: Any) -> Planned:
    """Compile the runs, with progress, and return what prices them; imports the TPU compiler.

    Args:
      runs: all that are to be priced.
      compiling: as of `compile_runs`.
    """
    from jaxscale.plan.predict import predict_step
    from jaxscale.plan.shares import SHARES, Shares

    programs, reasons = compile_runs(runs, **compiling)

    def predict(run: Run, shares: Shares) -> Prediction:
        job, compiled = programs[run.id]
        if not compiled.has_room:
            return Prediction(closed_seconds(run, shares), False, compiled.peak_bytes, "memory")
        line = predict_step(
            job,
            compiled,
            shares=shares,
            is_causal=not run.full_square_attention,
            wanted=run.options,
        )
        # Copies to the host and back hide behind computation, as far as there is enough of it.
        copied = 2 * run.extra_host_bytes + sum(
            traffic.payload_bytes for traffic in line.traffic if traffic.kind == "host"
        )
        rate = run.chip.host_bytes_per_second / run.chip.devices_per_chip
        return Prediction(
            seconds=max(line.seconds, copied / rate),
            fits=True,
            bytes=compiled.peak_bytes,
            bound="host" if copied / rate > line.seconds else line.bound,
        )

    return Planned(predict, SHARES, reasons)


def compile_runs(
    runs: Sequence[Run], *, slow_options: bool = False, num_processes: int = 0
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compile the runs; return (job, compiled) of each by id, and why the others have none.

    Options that this compiler does not know are left out, and slow ones unless asked for. Where
    the logits of all tokens have no room, they are computed in parts, as few peers do.
    """
    from jaxscale.plan.compile import Job, compile_all, quick
    from jaxscale.plan.torus import parse_topology

    programs: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    waiting: dict[Any, list[Run]] = {}
    for run in runs:
        slice_ = parse_topology(run.topology, run.num_slices)
        options = run.options if slow_options else quick(run.options)
        waiting.setdefault(Job(run.config, slice_, options), []).append(run)
    while waiting:
        again: dict[Any, list[Run]] = {}
        for job, compiled in compile_all(list(waiting), num_processes=num_processes):
            ids = [run.id for run in waiting[job]]
            refused = refused_option(compiled.error)
            if refused in dict(job.options):
                options = tuple(pair for pair in job.options if pair[0] != refused)
                again[dataclasses.replace(job, options=options)] = waiting[job]
                outcome = f"the compiler knows no option {refused}; left out"
            elif compiled.error:
                outcome = compiled.error
                reasons.update(dict.fromkeys(ids, outcome))
            elif not compiled.has_room and job.config.train.loss_chunk_tokens not in SMALL_CHUNKS:
                train = dataclasses.replace(job.config.train, loss_chunk_tokens=CHUNK_TOKENS)
                config = dataclasses.replace(job.config, train=train)
                again[dataclasses.replace(job, config=config)] = waiting[job]
                outcome = "no room for so many logits; in smaller parts"
            else:
                programs.update(dict.fromkeys(ids, (job, compiled)))
                found = "" if compiled.has_room else f", no room for {compiled.needed_bytes} bytes"
                outcome = f"compiled in {compiled.compile_seconds:.0f} s{found}"
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
    guess = type(shares)()  # before any row was seen
    return Result(
        runs=runs,
        skipped=skipped,
        predictions=[predict(run, shares) for run in runs],
        closed=[closed_seconds(run) for run in runs],
        left_out=score.left_out(predict, runs, known, guess),
        baseline=score.constant_mfu(runs, known),
        baseline_left_out=score.constant_mfu(runs, known, left_out=True),
        shares=shares,
        best=score.fit(predict, known, guess) if args.fit and known else None,
    )


def show(result: Result) -> None:
    """Print the rows, the skipped ones by name, and the summary."""
    width = max([len(run.id) for run in result.runs] + [len(row.id) for row in result.skipped])
    print(f"{'id':{width}}  published  predicted   error  bound    fits  HBM/device  closed form")
    columns = zip(result.runs, result.predictions, result.closed, strict=True)
    for run, prediction, closed in columns:
        miss = score.error(prediction.seconds, run.published_seconds)
        print(
            f"{run.id:{width}}  {run.published_seconds:7.2f} s  {prediction.seconds:7.2f} s  "
            f"{miss:+6.0%}  {prediction.bound:7}  {'yes' if prediction.fits else 'NO':4}  "
            f"{prediction.bytes / GIB:6.1f} GiB  {closed:7.2f} s"
        )
    for row in result.skipped:
        print(f"{row.id:{width}}  skipped: {row.reason}")
    print()
    print("\n".join(summary(result)))
    for holds, text in bounds(result):
        print(f"{'holds ' if holds else 'MISSED'}  {text}")
    if result.best is not None:
        print(f"fits best: {result.best}")


if __name__ == "__main__":
    sys.exit(main())
