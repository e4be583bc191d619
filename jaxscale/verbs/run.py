"""The verbs of a run: prepare, train, evaluate, generate.

Each takes the parsed arguments and returns the exit code. Heavy imports wait for their verb.
"""

import argparse
import dataclasses
import sys

from jaxscale import records
from jaxscale.config import Config, ConfigError
from jaxscale.resolve import resolve
from jaxscale.verbs.common import (
    DONE,
    FAILED,
    PREEMPTED,
    fake_devices,
    given_config,
    gives_mesh,
    needed_config,
    needed_workdir,
    show_notes,
    write_result,
)


def prepare(args: argparse.Namespace) -> int:
    """Make the token cache of a config, or find it."""
    if args.profile:
        return profile(args)
    if args.step_tokens_per_second:
        raise ConfigError("--step-tokens-per-second is for --profile; leave it out, or add that")
    from jaxscale.console import counting
    from jaxscale.data.corpus import prepare_corpus
    from jaxscale.train.preemption import StopRequest

    config = resolve(needed_config(args))
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
    write_result(args, config, [dataclasses.asdict(result) for result in results])
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

    config = resolve(needed_config(args))
    runtime.start(config.runtime, devices=args.devices)
    from jaxscale.data.profile import STEP, profile_pipeline, rate
    from jaxscale.data.profile_table import render, to_rows
    from jaxscale.train.state import assemble
    from jaxscale.train.step_speed import measure_step

    sharding, step, reason = None, None, ""
    try:
        sharding = assemble(config).batch_sharding
    except ConfigError as error:
        show_notes([f"{error}; so nothing is placed on devices"])
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
        show_notes([f"{reason}; give its speed elsewhere as --step-tokens-per-second=N"])
    write_result(args, config, to_rows(rates, step))
    return DONE


def train(args: argparse.Namespace) -> int:
    """Train or resume, or try out what would be trained."""
    from jaxscale import runtime

    config = needed_config(args)
    if args.dry_run:
        return _dry_run(args, config)
    if args.smoke:
        return _smoke(args, config)
    folder = needed_workdir(args)
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

    write_result(args, workdir.read_config(folder), [dataclasses.asdict(result)])
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
        write_result(args, config, [dataclasses.asdict(result)], kind="dry_run")
    if not result.fits:
        show_notes(
            [
                "the compiled step does not fit the device's memory; raise mesh.fsdp or "
                "train.accumulation_steps, or lower train.global_batch_size or data.length"
            ]
        )
    return DONE if result.fits else FAILED


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
            f"({result.peak.source}){fake_devices()}"
        )
        write_result(args, config, [dataclasses.asdict(result)], kind="smoke")
    if not result.passed:
        show_notes(
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

    folder = needed_workdir(args)
    config = given_config(args)
    runtime.start((config or workdir.read_config(folder)).runtime, devices=args.devices)
    from jaxscale.train.trained import evaluate_trained, open_trained

    trained = open_trained(folder, config, step=args.step, other_mesh=not gives_mesh(args))
    show_notes(trained.notes)
    result = evaluate_trained(trained, num_batches=args.batches, baselines=args.baselines)
    if not result.same_data:
        show_notes([f"{folder} was trained on other data than what is scored here"])
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
    write_result(args, trained.assembly.config, [row])
    return DONE


def generate(args: argparse.Namespace) -> int:
    """Continue the prompts."""
    from jaxscale import runtime, workdir

    folder = needed_workdir(args)
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
    config = given_config(args)
    runtime.start((config or workdir.read_config(folder)).runtime, devices=args.devices)
    from jaxscale.train.trained import generate_text, open_trained

    trained = open_trained(folder, config, step=args.step, other_mesh=not gives_mesh(args))
    show_notes(trained.notes)
    texts = generate_text(trained, args.prompt, sampling)
    if not runtime.is_primary():
        return DONE
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(prompt + text)
    rows = [{"prompt": p, "text": t} for p, t in zip(args.prompt, texts, strict=True)]
    write_result(args, trained.assembly.config, rows)
    return DONE
