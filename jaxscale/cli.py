"""The command line: `jaxscale VERB ...`, a thin door to functions that Python can call as well.

Exit codes: 0 done, 1 a check or the run failed, 2 the command or config is wrong, 75 preempted
after a clean save (run the same command again), 130 interrupted. `verbs/` says what each does.
"""

import argparse
import io
import math
import os
import pathlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from jaxscale import records
from jaxscale.config import ConfigError, Stopped
from jaxscale.verbs import run, study
from jaxscale.verbs.common import DONE, FAILED, INTERRUPTED, PREEMPTED, WRONG, print_config

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
            print_config(args)
            return DONE
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            return int(args.run(args))
    except ConfigError as error:
        print(f"jaxscale: {error}", file=sys.stderr)
        return WRONG
    except Stopped as stopped:
        print(f"jaxscale: stopped: {stopped}; the same command goes on", file=sys.stderr)
        return PREEMPTED
    except BrokenPipeError:
        # Python would complain once more when it closes what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("jaxscale: interrupted", file=sys.stderr)
        return INTERRUPTED


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of ours in one line like any remark, and those of other packages as usual."""
    ours = (
        category is UserWarning and pathlib.Path(__file__).parent in pathlib.Path(filename).parents
    )
    where = warnings.formatwarning(message, category, filename, lineno, line)
    print(f"jaxscale: {message}" if ours else where, file=file or sys.stderr)


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


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 < price < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no price above 0")
    return price


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of every verb and its options, but for the knobs."""
    parser = Parser(prog="jaxscale", description="Scale a transformer in JAX, from laptop to pod.")
    choice: Any = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE[:ARG]", help="such as configs/lm.py:tiny")
    common.add_argument("--workdir", metavar="DIR", help="folder of the run")
    common.add_argument("--json", metavar="FILE", help="write the result as JSON")
    common.add_argument("--devices", default="", metavar="cpu:N", help="use N fake CPU devices")
    common.add_argument("--print-config", action="store_true", help="print the resolved config")

    def verb(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        note = "Any knob can be set with --config.SECTION.KNOB=VALUE."
        sub: argparse.ArgumentParser = choice.add_parser(
            name, parents=[common], help=text, description=text, epilog=note
        )
        sub.set_defaults(run=run)
        return sub

    verb("doctor", study.doctor, "say what this machine can do, with remedies")

    _add_prepare_options(verb("prepare", run.prepare, "tokenize a corpus once into a token cache"))

    _add_train_options(verb("train", run.train, "train, or resume the run in the workdir"))

    evaluate = verb("evaluate", run.evaluate, "loss and bits per byte of a checkpoint")
    evaluate.add_argument("--step", type=int, help="checkpoint to read; default: newest whole one")
    evaluate.add_argument(
        "--batches", type=_at_least(0), default=0, help="validation batches; 0 = all"
    )
    evaluate.add_argument("--baselines", action="store_true", help="unigram and bigram beside it")

    generate = verb("generate", run.generate, "sample text from a checkpoint")
    generate.add_argument("--step", type=int, help="checkpoint to read; default: newest whole one")
    generate.add_argument("--prompt", action="append", required=True, help="may be repeated")
    generate.add_argument("--max-tokens", type=_at_least(1), default=128, help="new tokens at most")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 = most likely token")
    generate.add_argument(
        "--top-k", type=_at_least(0), default=0, help="most likely tokens; 0 = all"
    )
    generate.add_argument("--top-p", type=float, default=1.0, help="most likely share, (0, 1]")
    generate.add_argument("--seed", type=_at_least(0), default=0, help="seed of the choice")

    _add_verify_options(
        verb("verify", study.verify, "prove that every mesh computes the same numbers")
    )
    _add_plan_options(
        verb("plan", study.plan, "rank meshes, remat and batches for TPUs or GPUs, unseen or here")
    )
    _add_sweep_options(
        verb("sweep", study.sweep, "measure a curve, each point in a process of its own")
    )
    return parser


def _add_train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("--allow-config-change", action="store_true", help="resume all the same")
    instead = train.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run", action="store_true", help="compile and show shapes, shardings, bytes, FLOPs"
    )
    instead.add_argument(
        "--smoke", action="store_true", help="learn one small batch by heart within a minute"
    )


def _add_prepare_options(prepare: argparse.ArgumentParser) -> None:
    prepare.add_argument(
        "--workers", type=_at_least(0), default=0, help="processes; 0 = as many as pay"
    )
    prepare.add_argument("--force", action="store_true", help="write the cache anew")
    prepare.add_argument(
        "--profile", action="store_true", help="instead, measure the input pipeline on a sample"
    )
    prepare.add_argument(
        "--step-tokens-per-second",
        type=_at_least(1),
        default=0,
        metavar="N",
        help="what --profile compares with; 0 = measure the training step here",
    )


def _add_verify_options(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("--steps", type=_at_least(1), default=3, help="SGD steps on each mesh")
    verify.add_argument("--length", type=_at_least(0), default=0, help="tokens; 0 = a few")
    verify.add_argument("--batch", type=_at_least(0), default=0, help="sequences; 0 = a few")
    verify.add_argument("--layers", type=_at_least(0), default=0, help="blocks; 0 = the config's")
    verify.add_argument(
        "--meshes",
        action="append",
        default=[],
        metavar="AXIS=N,...",
        help="check this mesh, may be repeated; default: all that fit",
    )
    verify.add_argument("--fewer-devices", action="store_true", help="also meshes of fewer devices")
    verify.add_argument("--limit", type=_at_least(1), default=40, help="the most meshes")
    verify.add_argument("--only", choices=("meshes", "variants"), default="", help="one of the two")


def _add_plan_options(plan: argparse.ArgumentParser) -> None:
    option = plan.add_argument
    option(
        "--topology",
        default="",
        metavar="CHIP:SHAPE",
        help="such as v6e:16x16, or h100:8 for a node of GPUs; default: the devices at hand",
    )
    option("--num-slices", type=_at_least(1), default=1, help="or nodes, on the slow network")
    option("--batch", default="", metavar="auto|N", help="sequences per step; auto = what fits")
    option("--length", default="", metavar="auto|N", help="tokens; auto = the most that fit")
    option(
        "--remat",
        action="append",
        default=[],
        metavar="auto|KIND",
        help="none, full, dots, names or names:A,B; may be repeated; auto = all of them",
    )
    option(
        "--meshes",
        action="append",
        default=[],
        metavar="auto|AXIS=N,...",
        help="choose among these, may be repeated; auto = all that fit",
    )
    option("--top", type=_at_least(1), default=6, help="candidates that are compiled")
    option("--processes", type=_at_least(0), default=0, help="that compile; 0 = one per core")
    option("--closed-form", action="store_true", help="compile nothing")
    option("--explain", action="store_true", help="break the winner's step down")
    option("--price", type=_price, default=0.0, metavar="DOLLARS", help="of a chip for an hour")


def _add_sweep_options(sweep: argparse.ArgumentParser) -> None:
    presets = ("length", "batch", "mesh", "precision")
    sweep.add_argument("preset", nargs="?", default="", choices=("", *presets), help="what varies")
    option = sweep.add_argument
    option(
        "--vary",
        action="append",
        default=[],
        metavar="KNOB=A,B,...",
        help="values of a knob; several of these give their product",
    )
    option("--from", type=_at_least(1), default=0, dest="first", help="least length or batch")
    option("--to", type=_at_least(1), default=0, dest="last", help="largest, by doubling")
    option(
        "--techniques",
        action="append",
        default=[],
        metavar="all|none|A,B",
        help="ways to save memory, each beside a baseline without any; none = the config as it is",
    )
    option("--compile-only", action="store_true", help="bytes and FLOPs; no time is measured")
    option("--steps", type=_at_least(1), default=3, help="after which the loss is read")
    option("--memory-limit", default="", metavar="SIZE", help="of a device, such as 2GiB")
    option("--tokens", type=_at_least(0), help="batch: train on so many; 0 = do not train")
    option(
        "--scale-learning-rate",
        choices=("none", "sqrt", "linear"),
        default="none",
        help="batch: with the batch size over the config's",
    )
    option("--tolerance", type=float, default=0.01, help="batch: share of the validation loss")
    option("--timeout", type=_at_least(1), default=600, help="seconds of a point")
    option("--force", action="store_true", help="measure again what the workdir knows")
    option("--table", choices=("markdown",), default="", help="print a table of the techniques")
