"""Training steps through the real compiler of a chip, side by side, and never one of them twice.

What a compile gives is kept by content: the knobs that shape the step, the code that traces it, the
slice, the compiler's options, and the versions of all that takes part.
"""

import concurrent.futures
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import pathlib
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from jaxscale import config_source, records, runtime
from jaxscale.child import run_child
from jaxscale.config import Config
from jaxscale.data.workers import Stop, never
from jaxscale.hardware import TILE_MEMORY
from jaxscale.plan.describe import ENVIRONMENT, compiler, description
from jaxscale.plan.torus import Slice
from jaxscale.plan.words import refused_option

Options = tuple[tuple[str, str], ...]

COMMAND = (sys.executable, "-m", "jaxscale.plan.child")
# What a step is traced by: a change in any of it makes another program.
CODE = (
    *("model", "optimizer.py", "muon.py", "adafactor.py"),
    *(
        f"parallel/{name}.py"
        for name in ("mesh", "sharding", "host_memory", "by_layer", "pipeline")
    ),
    *(f"train/{name}.py" for name in ("state", "step", "loss_scale")),
)
SECTIONS = ("model", "mesh", "rules")
TRACED = {
    "data": ("length", "document_mask"),
    "train": (
        *("global_batch_size", "accumulation_steps", "pipeline_rounds", "loss_chunk_tokens"),
        *("offload", "gradient_reduce_dtype", "loss_scale"),
    ),
    # Numbers that are only multiplied by change no cost.
    "optimizer": ("name", "schedule", "moment_dtype", "weight_decay", "clip_norm"),
}
PACKAGES = ("jax", "jaxlib", "flax", "optax")
TIMEOUT_SECONDS = 1800.0
# Compiler options that take minutes each, and make the tiles of matmuls larger; left out where
# candidates are only compared.
SLOW_OPTIONS = (TILE_MEMORY,)


def quick(options: Options) -> Options:
    """Return compiler options without the slow ones."""
    return tuple(pair for pair in options if pair[0] not in SLOW_OPTIONS)


@dataclasses.dataclass(frozen=True)
class Job:
    """A step to compile.

    Attributes:
      config: resolved.
      slice: what it is compiled for.
      options: of the compiler, by name.
    """

    config: Config
    slice: Slice
    options: Options = ()

    def lacks_slow_options(self, wanted: Options) -> bool:
        """Tell whether a slow one of the wanted options was left out."""
        return any(name in SLOW_OPTIONS and name not in dict(self.options) for name, _ in wanted)

    @property
    def key(self) -> str:
        """The content that decides what is compiled, hashed."""
        known = config_source.to_mapping(self.config)
        knobs = {name: known[name] for name in SECTIONS}
        knobs |= {name: {k: known[name][k] for k in names} for name, names in TRACED.items()}
        described = [self.slice.name, self.slice.num_slices, description(self.slice.chip)]
        content = [knobs, described, sorted(self.options)]
        text = json.dumps([content, _code(), _versions(self.slice.chip.platform)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    folder = pathlib.Path(__file__).resolve().parents[1]
    files = [f for name in CODE for f in [folder / name, *sorted((folder / name).rglob("*.py"))]]
    contents = [file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


@functools.cache
def _versions(platform: str) -> str:
    return json.dumps([runtime.versions(PACKAGES), compiler(platform)])


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step; bytes are per device.

    Attributes:
      text: of the scheduled program; None where it has no room in the device's memory, or failed.
      needed_bytes: arguments, results and temporaries, what shares memory once; the TPU compiler
        counts holes between temporaries twice in it.
      peak_bytes: the most that is alive at a time.
      argument_bytes: of that, inputs, the state included.
      temporary_bytes: of that, the most that neither inputs nor results take at a time.
      host_bytes: in host memory.
      compile_seconds: time that the compiler took, when it did.
      error: why there is nothing, in a line; empty if there is, or had no room.
      is_known: whether it came from the cache.
    """

    text: str | None
    needed_bytes: int
    peak_bytes: int
    argument_bytes: int
    temporary_bytes: int
    host_bytes: int
    compile_seconds: float
    error: str = ""
    is_known: bool = False

    @property
    def has_room(self) -> bool:
        """Whether the compiler found room for it; only those of TPUs look."""
        return self.text is not None


def compile_all(
    jobs: Sequence[Job], *, num_processes: int = 0, stop: Stop = never
) -> Iterator[tuple[Job, Compiled]]:
    """Compile steps and yield each as soon as it is there, those that are known first.

    Args:
      jobs: what to compile.
      num_processes: that compile at a time; 0 = one for each of the host's cores.
      stop: asked whether to stop.

    Raises:
      Stopped: `stop` said so; what was compiled is kept.
    """
    jobs = list(dict.fromkeys(jobs))
    unknown = []
    for job in jobs:
        known = _read(job)
        if known:
            yield job, known
        else:
            unknown.append(job)
    ended = threading.Event()
    count = min(num_processes or os.cpu_count() or 1, max(1, len(unknown)))
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        run = functools.partial(_compile, stop=lambda: ended.is_set() or stop())
        futures = {pool.submit(run, job): job for job in unknown}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:
            ended.set()
            pool.shutdown(cancel_futures=True)


def _paths(job: Job) -> tuple[pathlib.Path, pathlib.Path]:
    folder = runtime.cache_root() / "plan"
    return folder / f"{job.key}.json", folder / f"{job.key}.hlo.gz"


def _read(job: Job) -> Compiled | None:
    """Return what is kept of a job; None where nothing is, or it cannot be read."""
    report, text = _paths(job)
    try:
        known = records.read_json(report)
        program = gzip.decompress(text.read_bytes()).decode() if "argument_bytes" in known else None
        return _from_report(known, program, is_known=True)
    except (OSError, ValueError, EOFError, zlib.error, TypeError, AttributeError):
        # What another process was stopped in the middle of.
        return None


def _compile(job: Job, *, stop: Stop) -> Compiled:
    kept, text = _paths(job)
    text.parent.mkdir(parents=True, exist_ok=True)
    partial = text.with_name(f".{text.name}.{os.getpid()}.partial")
    request = {
        "config": config_source.to_mapping(job.config),
        "topology": job.slice.name,
        "num_slices": job.slice.num_slices,
        "options": dict(job.options),
        "text": str(partial),
    }
    try:
        outcome = run_child(
            COMMAND, request, timeout=TIMEOUT_SECONDS, stop=stop, environment=ENVIRONMENT
        )
        report: dict[str, Any] = outcome.report
        if not report or outcome.code != 0:
            why = f"not done in {TIMEOUT_SECONDS:.0f} s" if outcome.code is None else ""
            report = {"error": why or outcome.last_words}
        # What the compiler refuses it will refuse again; another error may pass.
        if "error" not in report or refused_option(report["error"]):
            if "argument_bytes" in report:
                os.replace(partial, text)
            records.write_json(kept, report)
    finally:
        partial.unlink(missing_ok=True)
    program = gzip.decompress(text.read_bytes()).decode() if "argument_bytes" in report else None
    return _from_report(report, program, is_known=False)


def _from_report(report: dict[str, Any], text: str | None, *, is_known: bool) -> Compiled:
    arguments, temporary = report.get("argument_bytes", 0), report.get("temporary_bytes", 0)
    results = report.get("output_bytes", 0) - report.get("alias_bytes", 0)
    needed = report.get("needed_bytes", arguments + temporary + results)
    return Compiled(
        text=text,
        needed_bytes=needed,
        # With arrays in host memory the compiler counts these too.
        peak_bytes=min(report.get("peak_bytes", needed), needed),
        argument_bytes=arguments,
        temporary_bytes=temporary,
        host_bytes=report.get("host_bytes", 0),
        compile_seconds=report.get("compile_seconds", 0.0),
        error=report.get("error", ""),
        is_known=is_known,
    )
