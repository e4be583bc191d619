"""The verbs that look at a machine or a config: doctor, verify, plan, sweep.

Each takes the parsed arguments and returns the exit code. Heavy imports wait for their verb.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

from jaxscale.config import Config, ConfigError
from jaxscale.resolve import resolve
from jaxscale.verbs.common import (
    DONE,
    FAILED,
    INTERRUPTED,
    fake_devices,
    given_config,
    needed_config,
    show_notes,
    write_result,
)

if TYPE_CHECKING:
    from jaxscale.plan.rank import Row
    from jaxscale.plan.run import Plan


def doctor(args: argparse.Namespace) -> int:
    """Print what this machine can do."""
    from rich.console import Console

    from jaxscale.doctor import examine, render

    config = given_config(args) or Config()
    report = examine(config.runtime, config.data, workdir=args.workdir or "", devices=args.devices)
    Console().print(render(report))
    write_result(args, config, [dataclasses.asdict(row) for row in report.rows])
    return FAILED if report.failed else DONE


def verify(args: argparse.Namespace) -> int:
    """Compare every mesh and variant of a config with one device."""
    from jaxscale import runtime

    config = resolve(needed_config(args))
    runtime.start(config.runtime, devices=args.devices)
    from jaxscale.verify.cases import Options, make_plan
    from jaxscale.verify.run import MISMATCH, header, line, run_plan, summary, to_rows

    names = [field.name for field in dataclasses.fields(Options)]
    options = {name: getattr(args, name) for name in names}
    plan = make_plan(config, Options(**{**options, "meshes": tuple(args.meshes)}))
    print("\n".join(header(plan)), flush=True)
    rows, stopped = [], False
    try:
        for row in run_plan(plan):
            print(line(plan, row), flush=True)
            rows.append(row)
    except KeyboardInterrupt:
        stopped = True
    print("\n".join(["", *summary(plan, rows)]) + fake_devices())
    write_result(args, plan.config, to_rows(rows))
    if stopped:
        show_notes([f"interrupted after {len(rows)} of {len(plan.cases)} rows"])
        return INTERRUPTED
    return FAILED if any(row.verdict == MISMATCH for row in rows) else DONE


def plan(args: argparse.Namespace) -> int:
    """Rank meshes, remat and batches for devices that are named or at hand, and say why."""
    config = resolve(needed_config(args))
    _start_plan(args, config)
    from jaxscale import records, workdir
    from jaxscale.plan import table
    from jaxscale.plan.run import Plan, Request, to_rows
    from jaxscale.train.preemption import StopRequest

    names = [field.name for field in dataclasses.fields(Request)]
    given = {name: getattr(args, name) for name in names}
    lists = {name: tuple(given[name]) for name in ("remat", "meshes")}
    found = Plan(config, Request(**{**given, **lists}))
    if args.workdir:
        folder = workdir.check_writable(args.workdir) / records.PLAN_DIR

    def progress(line: str) -> None:
        print(f"jaxscale: {line}", file=sys.stderr, flush=True)

    with StopRequest(in_group=False) as stop:
        if found.is_search:
            edges = found.find_boundaries(progress, stop=stop.asked)
            print("\n".join(table.boundary_lines(edges, found.of_length)))
        else:
            slice_, short = found.options.slice, found.shortlist()
            lines = table.header(found.config, slice_, short, is_compiled=found.is_compiled)
            print("\n".join(lines))
        for note in found.notes():
            print(note)
        if found.is_compiled:
            found.compile(progress, stop=stop.asked)
    curves = found.curves()
    _show_plan(args, config, found, curves)
    rows = to_rows(found, curves)
    write_result(args, found.config, rows)
    if args.workdir:
        args.json = str(folder / "plan.json")
        write_result(args, found.config, rows)
    return DONE if found.rows[0].fits else FAILED


def _start_plan(args: argparse.Namespace, config: Config) -> None:
    """Prepare JAX: for devices that are only named it stays on the host."""
    from jaxscale import runtime

    if args.topology and args.devices:
        raise ConfigError(
            f"--topology={args.topology} and --devices={args.devices}: give one of them"
        )
    if args.topology:
        runtime.stay_on_host()
        return
    if runtime.process_group(os.environ):
        raise ConfigError("plan runs in one process; name the devices of several with --topology")
    # Only the names of GPUs are wanted, and none of their memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    runtime.start(config.runtime, devices=args.devices)


def _show_plan(
    args: argparse.Namespace, config: Config, found: "Plan", curves: dict[str, list[Any]]
) -> None:
    """Print the table, why its winner wins, how it scales, and how to train it."""
    from rich.console import Console

    from jaxscale.plan import table

    winner = found.rows[0]
    print("\n".join([*table.table(found.rows), *table.why(found.rows)]))
    for kept, points in curves.items():
        print("\n".join(table.curve_lines(kept, points)))
    if args.price and winner.is_timed:
        print(table.price_line(winner, args.price))
    for part in table.explain(winner.timeline) if args.explain and winner.timeline else []:
        Console().print(part)
    if winner.fits:
        show_notes(_without_answer(args, winner))
        overrides = args.overrides
        print(table.command(args.config, args.workdir, overrides, given=config, row=winner))


def _without_answer(args: argparse.Namespace, winner: "Row") -> list[str]:
    """Say which options have nothing to show of a winner."""
    notes = []
    if args.price and not winner.is_timed:
        notes.append("--price shows nothing: no data sheet has the speed of these devices")
    if args.explain and not winner.timeline:
        notes.append("--explain shows nothing: it takes a program that is compiled for TPUs")
    return notes


def sweep(args: argparse.Namespace) -> int:
    """Measure a curve, and sum up what is known of it however it ends."""
    config = needed_config(args)
    from jaxscale.sweep import table
    from jaxscale.sweep.points import make_options
    from jaxscale.sweep.run import Sweep, to_rows
    from jaxscale.train.preemption import StopRequest

    out = sys.stderr if args.table else sys.stdout
    with StopRequest(in_group=False) as stop, contextlib.ExitStack() as at_end:
        run = Sweep(config, make_options(vars(args)), stop=stop.asked)
        print("\n".join(table.header(run.plan)), file=out, flush=True)

        @at_end.callback
        def sum_up() -> None:
            print("\n".join(table.footer(run)), file=out)
            write_result(args, config, to_rows(run), environment=run.environment)

        for row in run.rows():
            print(table.line(run.plan, row), file=out, flush=True)
    if args.table:
        print(table.markdown(run.plan, run.found))
    return DONE if any(row.measured for row in run.found) else FAILED
