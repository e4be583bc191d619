"""The command line: `jaxscale VERB ...`, a thin door to functions that Python can call as well.

Exit codes: 0 done, 1 a check or the run failed, 2 the command or config is wrong, 75 preempted
after a clean save (run the same command again), 130 interrupted. Heavy imports wait for their verb.
"""

import argparse
import dataclasses
import io
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jaxscale import config_source, records
from jaxscale.config import Config, ConfigError, resolve

DONE, FAILED, WRONG, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130
OVERRIDE = "--config."


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(WRONG, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        arguments, overrides = split_overrides(arguments)
        args = parser.parse_args(arguments)
        args.overrides = overrides
        if args.json:
            # Before the work for it is done.
            if os.path.isdir(args.json):
                raise ConfigError(f"--json={args.json} is a folder; name a file in it")
            records.check_writable(pathlib.Path(args.json).parent, f"--json={args.json}")
        if args.print_config:
            _print_config(args)
            return DONE
        return int(args.run(args))
    except ConfigError as error:
        print(f"jaxscale: {error}", file=sys.stderr)
        return WRONG
    except BrokenPipeError:
        # Python would complain once more when it closes what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("jaxscale: interrupted", file=sys.stderr)
        return INTERRUPTED


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Take `--config.SECTION.KNOB=VALUE` (or with a space) out of the arguments.

    Raises:
      ConfigError: an override without a value.
    """
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith(OVERRIDE):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix(OVERRIDE).partition("=")
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise ConfigError(f"{argument} has no value; write {argument}=VALUE")
        overrides.append((key, value))
    return rest, overrides


def _at_least(minimum: int) -> Any:
    """Return an argument type: a whole number with a lower limit."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {minimum} on")
        return int(text)

    return number


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of every verb and its options, but for the knobs."""
    parser = Parser(prog="jaxscale", description="Scale a transformer in JAX, from laptop to pod.")
    verbs: Any = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE[:ARG]", help="such as configs/lm.py:tiny")
    common.add_argument("--workdir", metavar="DIR", help="folder of the run")
    common.add_argument("--json", metavar="FILE", help="write the result as JSON")
    common.add_argument("--devices", default="", metavar="cpu:N", help="use N fake CPU devices")
    common.add_argument("--print-config", action="store_true", help="print the resolved config")

    def verb(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        note = "Any knob can be set with --config.SECTION.KNOB=VALUE."
        sub: argparse.ArgumentParser = verbs.add_parser(
            name, parents=[common], help=text, description=text, epilog=note
        )
        sub.set_defaults(run=run)
        return sub

    verb("doctor", _doctor, "say what this machine can do, with remedies")

    prepare = verb("prepare", _prepare, "tokenize a corpus once into a token cache")
    prepare.add_argument(
        "--workers", type=_at_least(0), default=0, help="processes; 0 = as many as pay"
    )
    prepare.add_argument("--force", action="store_true", help="write the cache again")

    train = verb("train", _train, "train, or resume the run in the workdir")
    train.add_argument("--allow-config-change", action="store_true", help="resume all the same")

    evaluate = verb("evaluate", _evaluate, "loss, perplexity and bits per byte of a checkpoint")
    evaluate.add_argument("--step", type=int, help="checkpoint to read; default: the newest")
    evaluate.add_argument(
        "--batches", type=_at_least(0), default=0, help="validation batches; 0 = all"
    )
    evaluate.add_argument("--baselines", action="store_true", help="unigram and bigram beside it")

    generate = verb("generate", _generate, "sample text from a checkpoint")
    generate.add_argument("--step", type=int, help="checkpoint to read; default: the newest")
    generate.add_argument("--prompt", action="append", required=True, help="may be repeated")
    generate.add_argument("--max-tokens", type=_at_least(1), default=128, help="new tokens at most")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 = most likely token")
    generate.add_argument(
        "--top-k", type=_at_least(0), default=0, help="most likely tokens; 0 = all"
    )
    generate.add_argument("--top-p", type=float, default=1.0, help="most likely share, (0, 1]")
    generate.add_argument("--seed", type=_at_least(0), default=0, help="seed of the choice")
    return parser


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


def _print_config(args: argparse.Namespace) -> None:
    import json

    config = _needed_config(args)
    if args.workdir:
        from jaxscale.train.start import resolve_for

        config = resolve_for(config, args.workdir).config
    else:
        config = resolve(config)
    print(json.dumps(config_source.to_mapping(config), indent=2))


def _write_result(args: argparse.Namespace, config: Config, rows: list[dict[str, Any]]) -> None:
    if args.json:
        from jaxscale import runtime

        result = records.envelope(
            args.verb,
            rows,
            config=config_source.to_mapping(config),
            environment=runtime.describe(),
        )
        records.write_json(args.json, result)


def _show_notes(notes: Sequence[str]) -> None:
    """Print remarks beside a result, where they do not mix with it."""
    from jaxscale import runtime

    if runtime.is_primary():
        for note in notes:
            print(f"jaxscale: {note}", file=sys.stderr)


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console

    from jaxscale.doctor import examine, render

    config = _given_config(args) or Config()
    report = examine(config.runtime, config.data, workdir=args.workdir or "", devices=args.devices)
    Console().print(render(report))
    _write_result(args, config, [dataclasses.asdict(row) for row in report.rows])
    return FAILED if report.failed else DONE


def _prepare(args: argparse.Namespace) -> int:
    from jaxscale.console import counting
    from jaxscale.data.prepare import prepare

    config = resolve(_needed_config(args))
    with counting("documents", sys.stdout) as progress:
        result = prepare(config.data, workers=args.workers, progress=progress, force=args.force)
    state = "found" if result.reused else "written"
    print(f"token cache {state} in {result.seconds:.1f} s: {result.path}")
    for name, counts in (("train", result.train), ("validation", result.validation)):
        print(f"  {name}: {counts.documents:,} documents, {counts.tokens:,} tokens")
    if result.skipped_documents:
        print(f"  skipped: {result.skipped_documents:,} documents, empty or not UTF-8")
    _write_result(args, config, [dataclasses.asdict(result)])
    return DONE


def _train(args: argparse.Namespace) -> int:
    from jaxscale import runtime

    folder = _needed_workdir(args)
    config = _needed_config(args)
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
        limit = config.train.stop_after_nonfinite
        print(
            f"jaxscale: {limit} steps in a row had a non-finite loss or gradient "
            f"(train.stop_after_nonfinite={limit}); go on from the last checkpoint with "
            "--allow-config-change and a lower optimizer.learning_rate",
            file=sys.stderr,
        )
    else:
        print(f"done after step {result.step}; the run is in {folder}")
    return code


def _evaluate(args: argparse.Namespace) -> int:
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


def _generate(args: argparse.Namespace) -> int:
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
