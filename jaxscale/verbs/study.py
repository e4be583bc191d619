"""The verbs that look at a machine or a config: doctor, verify, plan, sweep.

Each takes the parsed arguments and returns the exit code. Heavy imports wait for their verb.
"""

import argparse
import contextlib
import dataclasses
import sys

from jaxscale.config import Config
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
    """Rank meshes, remat and batches for a slice of TPUs, and say why."""
    config = resolve(needed_config(args))
    from rich.console import Console

    from jaxscale import runtime

    runtime.stay_on_host()
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
    console = Console()

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
        if found.is_compiled:
            found.compile(progress, stop=stop.asked)
    print("\n".join(table.table(found.rows)))
    print("\n".join(table.why(found.rows)))
    winner = found.rows[0]
    curves = found.curves()
    for kept, points in curves.items():
        print("\n".join(table.curve_lines(kept, points)))
    if args.price and winner.fits:
        print(table.price_line(winner, args.price))
    for part in table.explain(winner.timeline) if args.explain and winner.timeline else []:
        console.print(part)
    if winner.fits:
        overrides = args.overrides
        print(table.command(args.config, args.workdir, overrides, given=config, row=winner))
    rows = to_rows(found, curves)
    write_result(args, found.config, rows)
    if args.workdir:
        args.json = str(folder / "plan.json")
        write_result(args, found.config, rows)
    return DONE if winner.fits else FAILED


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
