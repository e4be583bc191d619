"""What each verb does with its parsed arguments: it calls the library and shows the result.

The return value is the exit code. Heavy imports wait for their verb.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from jaxscale import config_source, records
from jaxscale.config import Config, ConfigError
from jaxscale.resolve import resolve

# Exit codes.
DONE, FAILED, WRONG, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130
Rows = list[dict[str, Any]]


def _given_config(args: argparse.Namespace) -> Config | None:
    """Return the config of --config, or that of the workdir with overrides; None for neither."""
    if args.config:
        return config_source.load(args.config, args.overrides)
    if not args.overrides:
        return None
    from jaxscale import workdir

    config = workdir.read_config(args.workdir) if args.workdir else Config()
    for key, value in args.overrides:
        config = config_source.override(config, key, value)
    return config


def _gives_mesh(args: argparse.Namespace) -> bool:
    """Tell whether the user chose the mesh, which then must fit."""
    return bool(args.config) or any(key.startswith("mesh.") for key, _ in args.overrides)


def _needed_config(args: argparse.Namespace) -> Config:
    """Return the given config, else that of the run in the workdir."""
    from jaxscale import workdir

    if not args.config and not args.workdir:
        raise ConfigError("--config is missing; try --config=configs/lm.py:tiny")
    if not args.config and workdir.previous_config(args.workdir) is None:
        raise ConfigError(f"--config is missing, and --workdir={args.workdir} holds no run yet")
    return _given_config(args) or workdir.read_config(args.workdir)


def _needed_workdir(args: argparse.Namespace) -> str:
    if not args.workdir:
        raise ConfigError("--workdir is missing; name the folder of the run")
    return str(args.workdir)


def print_config(args: argparse.Namespace) -> None:
    """Print the resolved config."""
    import json

    config = _needed_config(args)
    if args.workdir:
        from jaxscale.train.start import resolve_for

        config = resolve_for(config, args.workdir).config
    else:
        config = resolve(config)
    print(json.dumps(config_source.to_mapping(config), indent=2))


def _write_result(
    args: argparse.Namespace, config: Config, rows: Rows, *, kind: str = "", environment: Any = None
) -> None:
    if args.json:
        from jaxscale import runtime

        result = records.envelope(
            kind or args.verb,
            rows,
            config=config_source.to_mapping(config),
            environment=environment or runtime.describe(),
        )
        records.write_json(args.json, result)


def _show_notes(notes: Sequence[str]) -> None:
    """Print remarks beside a result, where they do not mix with it."""
    from jaxscale import runtime

    if runtime.is_primary():
        for note in notes:
            print(f"jaxscale: {note}", file=sys.stderr)


def doctor(args: argparse.Namespace) -> int:
    """Print what this machine can do."""
    from rich.console import Console

    from jaxscale.doctor import examine, render

    config = _given_config(args) or Config()
    report = examine(config.runtime, config.data, workdir=args.workdir or "", devices=args.devices)
    Console().print(render(report))
    _write_result(args, config, [dataclasses.asdict(row) for row in report.rows])
    return FAILED if report.failed else DONE


def prepare(args: argparse.Namespace) -> int:
    """Make the token cache of a config, or find it."""
    if args.profile:
        return profile(args)
    if args.step_tokens_per_second:
        raise ConfigError("--step-tokens-per-second is for --profile; leave it out, or add that")
    from jaxscale.console import counting
    from jaxscale.data.corpus import prepare_corpus
    from jaxscale.train.preemption import StopRequest

    config = resolve(_needed_config(args))
    with StopRequest(in_group=False) as stop, counting("documents", sys.stdout) as progress:
        results = prepare_corpus(
            config.data,
            workers=args.workers,
            progress=progress,
            force=args.force,
            stop=stop.asked,
        )
    for result in results:
        state = "found" if result.reused else "written"
        of = f" of {result.source}" if len(results) > 1 else ""
        print(f"token cache{of} {state} in {result.seconds:.1f} s: {result.path}")
        for name, counts in (("train", result.train), ("validation", result.validation)):
            print(f"  {name}: {counts.documents:,} documents, {counts.tokens:,} tokens")
        for reason, skipped in result.skipped.items():
            more = ", ..." if skipped.documents > len(skipped.names) else ""
            print(f"  skipped: {skipped.documents:,} {reason} ({', '.join(skipped.names)}{more})")
        for note in result.notes:
            print(f"  {note}")
    _write_result(args, config, [dataclasses.asdict(result) for result in results])
    return DONE


def profile(args: argparse.Namespace) -> int:
    """Measure the input pipeline of a config, beside its training step."""
    if args.workers or args.force:
        raise ConfigError(
            "--profile tries numbers of workers and keeps no token cache; leave out --workers and "
            "--force"
        )
    from rich.console import Console

    from jaxscale import runtime

    config = resolve(_needed_config(args))
    runtime.start(config.runtime, devices=args.devices)
    from jaxscale.data.profile import STEP, profile_pipeline, rate
    from jaxscale.data.profile_table import render, to_rows
    from jaxscale.train.state import assemble
    from jaxscale.train.step_speed import measure_step

    sharding, step, reason = None, None, ""
    try:
        sharding = assemble(config).batch_sharding
    except ConfigError as error:
        _show_notes([f"{error}; so nothing is placed on devices"])
    batch = config.train.global_batch_size
    rates = profile_pipeline(config.data, global_batch_size=batch, sharding=sharding)
    if args.step_tokens_per_second:
        step = rate(STEP, "as given", args.step_tokens_per_second, [1.0])
    else:
        try:
            step = rate(STEP, "measured here", *measure_step(config))
        except ConfigError as error:
            reason = f"the training step cannot be measured here: {error}"
    Console().print(render(rates, step))
    if reason:
        _show_notes([f"{reason}; give its speed elsewhere as --step-tokens-per-second=N"])
    _write_result(args, config, to_rows(rates, step))
    return DONE


def train(args: argparse.Namespace) -> int:
    """Train or resume, or try out what would be trained."""
    from jaxscale import runtime

    config = _needed_config(args)
    if args.dry_run:
        return _dry_run(args, config)
    if args.smoke:
        return _smoke(args, config)
    folder = _needed_workdir(args)
    runtime.start(config.runtime, devices=args.devices)
    from jaxscale.console import counting
    from jaxscale.train import loop

    with counting("documents", sys.stdout) as progress:
        result = loop.train(
            config,
            folder,
            allow_config_change=args.allow_config_change,
            stream=sys.stdout,
            progress=progress,
        )
    code = {loop.DONE: DONE, loop.PREEMPTED: PREEMPTED, loop.NON_FINITE: FAILED}[result.ending]
    if not runtime.is_primary():
        return code
    from jaxscale import workdir

    _write_result(args, workdir.read_config(folder), [dataclasses.asdict(result)])
    if result.ending == loop.PREEMPTED:
        print(f"stopped after step {result.step}, saved; the same command goes on")
    elif result.ending == loop.NON_FINITE:
        print(
            f"jaxscale: {loop.MOST_BAD_STEPS} steps in a row had a non-finite loss or gradient; "
            "go on from the last checkpoint with --allow-config-change and a lower "
            "optimizer.learning_rate",
            file=sys.stderr,
        )
    else:
        print(f"done after step {result.step}; the run is in {folder}")
    return code


def _dry_run(args: argparse.Namespace, config: Config) -> int:
    from jaxscale import runtime

    config = resolve(config)
    runtime.start(config.runtime, devices=args.devices)
    from rich.console import Console

    from jaxscale.train.dry_run import dry_run, render

    result = dry_run(config)
    if runtime.is_primary():
        Console().print(render(result))
        _write_result(args, config, [dataclasses.asdict(result)], kind="dry_run")
    if not result.fits:
        _show_notes(
            [
                "the compiled step does not fit the device's memory; raise mesh.fsdp or "
                "train.accumulation_steps, or lower train.global_batch_size or data.length"
            ]
        )
    return DONE if result.fits else FAILED


def _fake_devices() -> str:
    """Return what must stand behind a speed that was measured on fake devices."""
    import jax

    fake = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    return "; fake devices: mechanics, not speed" if fake else ""


def _smoke(args: argparse.Namespace, config: Config) -> int:
    from jaxscale import runtime

    config = resolve(config)
    runtime.start(config.runtime, devices=args.devices)
    from jaxscale.train import smoke

    result = smoke.smoke(config, seconds=smoke.SECONDS)
    if runtime.is_primary():
        print(
            f"{result.rows} sequences of {result.length} tokens: loss {result.first_loss:.4f} at "
            f"step 1, {result.last_loss:.4f} at step {result.num_steps}\n"
            f"{result.step_seconds:.3f} s per step, {result.tokens_per_second:,.0f} tokens/s, "
            f"MFU {result.mfu:.1%} of {result.peak.flops_per_second:.3g} FLOP/s "
            f"({result.peak.source}){_fake_devices()}"
        )
        _write_result(args, config, [dataclasses.asdict(result)], kind="smoke")
    if not result.passed:
        _show_notes(
            [
                "smoke test failed: the loss of one small batch did not fall; check "
                f"optimizer.learning_rate={config.optimizer.learning_rate:g}, then try one "
                "device, for a mesh must not change the loss"
            ]
        )
    return DONE if result.passed else FAILED


def evaluate(args: argparse.Namespace) -> int:
    """Score a checkpoint."""
    from jaxscale import runtime, workdir

    folder = _needed_workdir(args)
    config = _given_config(args)
    runtime.start((config or workdir.read_config(folder)).runtime, devices=args.devices)
    from jaxscale.train.trained import evaluate_trained, open_trained

    trained = open_trained(folder, config, step=args.step, other_mesh=not _gives_mesh(args))
    _show_notes(trained.notes)
    result = evaluate_trained(trained, num_batches=args.batches, baselines=args.baselines)
    if not result.same_data:
        _show_notes([f"{folder} was trained on other data than what is scored here"])
    if not runtime.is_primary():
        return DONE
    score = result.evaluation
    print(
        f"step {result.step}: loss {score.loss:.4f}, perplexity {score.perplexity:.3f} "
        f"over {score.tokens:,} tokens of held-out documents"
    )
    print(f"bits per byte: {score.bits_per_byte:.3f} model")
    row = {records.STEP: result.step, **dataclasses.asdict(score)}
    for name, field, bits in (
        ("unigram", records.UNIGRAM_BITS_PER_BYTE, result.unigram),
        ("bigram", records.BIGRAM_BITS_PER_BYTE, result.bigram),
    ):
        if bits is not None:
            print(f"               {bits:.3f} {name}")
            row[field] = bits
    _write_result(args, trained.assembly.config, [row])
    return DONE


def generate(args: argparse.Namespace) -> int:
    """Continue the prompts."""
    from jaxscale import runtime, workdir

    folder = _needed_workdir(args)
    from jaxscale.bundle.sampling import Sampling

    for prompt in args.prompt:
        if prompt.encode(errors="replace").decode() != prompt:
            raise ConfigError(f"--prompt={prompt!r} is not UTF-8 text")
    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        max_tokens=args.max_tokens,
    )
    config = _given_config(args)
    runtime.start((config or workdir.read_config(folder)).runtime, devices=args.devices)
    from jaxscale.train.trained import generate_text, open_trained

    trained = open_trained(folder, config, step=args.step, other_mesh=not _gives_mesh(args))
    _show_notes(trained.notes)
    texts = generate_text(trained, args.prompt, sampling)
    if not runtime.is_primary():
        return DONE
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(prompt + text)
    rows = [{"prompt": p, "text": t} for p, t in zip(args.prompt, texts, strict=True)]
    _write_result(args, trained.assembly.config, rows)
    return DONE


def verify(args: argparse.Namespace) -> int:
    """Compare every mesh and variant of a config with one device."""
    from jaxscale import runtime

    config = resolve(_needed_config(args))
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
    print("\n".join(["", *summary(plan, rows)]) + _fake_devices())
    _write_result(args, plan.config, to_rows(rows))
    if stopped:
        _show_notes([f"interrupted after {len(rows)} of {len(plan.cases)} rows"])
        return INTERRUPTED
    return FAILED if any(row.verdict == MISMATCH for row in rows) else DONE


def sweep(args: argparse.Namespace) -> int:
    """Measure a curve, and sum up what is known of it however it ends."""
    config = _needed_config(args)
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
            _write_result(args, config, to_rows(run), environment=run.environment)

        for row in run.rows():
            print(table.line(run.plan, row), file=out, flush=True)
    if args.table:
        print(table.markdown(run.plan, run.found))
    return DONE if any(row.measured for row in run.found) else FAILED
