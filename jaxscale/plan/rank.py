"""The plan: every candidate by the closed form, the best of them through the real compiler, ranked.

Compiling is slow, so the closed form prunes and orders first. What it calls best is compiled side
by side without the slow options; the winner and the runner-up then once more, as training does.
`jaxscale plan` prints the result.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxscale.config import Config, ConfigError, MeshConfig
from jaxscale.console import format_bytes
from jaxscale.data.workers import Stop, never
from jaxscale.model.cost import train_flops_per_token
from jaxscale.plan.compile import Compiled, Job, compile_all, quick
from jaxscale.plan.describe import COMPILERS, compilable, compiler_options
from jaxscale.plan.memory import closed_bytes
from jaxscale.plan.predict import network, predict_step
from jaxscale.plan.roofline import closed_seconds, recomputed_flops
from jaxscale.plan.space import Candidate, Remat, candidate, candidates
from jaxscale.plan.timeline import Timeline
from jaxscale.plan.torus import Slice, family

# Of a device's memory, what a program may take by the closed form to be compiled at all: it may be
# so much too high.
ROOM = 1.2
CLOSED_FORM, COMPILED, AS_TRAINED = "closed form", "compiled", "as trained"
# By a compiler that tells no time; that is the closed form's, as far as there is one.
BYTES_COMPILED = "bytes compiled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks for.

    Attributes:
      slice: the chips.
      meshes: to choose from; empty: all.
      remats: to choose from; empty: those that the planner knows.
      top: candidates that are compiled.
      num_processes: that compile at a time; 0 = one for each core of the host.
    """

    slice: Slice
    meshes: tuple[MeshConfig, ...] = ()
    remats: tuple[Remat, ...] = ()
    top: int = 6
    num_processes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A candidate and what is known of it; bytes are per device.

    Attributes:
      candidate: the config.
      known_by: how it is known: by the closed form, with bytes compiled, compiled, or compiled as
        training does.
      needed_bytes: of device memory, the most that is alive at a time.
      available_bytes: that a device has.
      seconds: predicted, of a step; nan where it does not fit, or nobody knows the chip's speed.
      tokens_per_second_per_chip: predicted.
      mfu: predicted: model FLOPs per second over peak.
      bound: what most of the step is spent on.
      compile_seconds: that the compiler took, when it did.
      timeline: of a compiled step.
      error: why it could not be compiled; empty if it could.
    """

    candidate: Candidate
    known_by: str
    needed_bytes: int
    available_bytes: int
    seconds: float
    tokens_per_second_per_chip: float
    mfu: float
    bound: str
    compile_seconds: float = 0.0
    timeline: Timeline | None = None
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether it has room on a device: the compiler decides, or else the closed form."""
        if self.known_by in (CLOSED_FORM, BYTES_COMPILED):
            return not self.error and self.needed_bytes <= self.available_bytes
        return self.timeline is not None

    @property
    def is_timed(self) -> bool:
        """Whether its seconds are known."""
        return self.fits and not math.isnan(self.seconds)


@dataclasses.dataclass(frozen=True)
class Shortlist:
    """What the closed form says.

    Attributes:
      num_candidates: that the config can take on the slice.
      num_fitting: of these, those with room by the closed form.
      rows: those to compile, best first.
    """

    num_candidates: int
    num_fitting: int
    rows: list[Row]


Progress = Callable[[str], None]


def shortlist(config: Config, options: Options) -> Shortlist:
    """Judge every candidate by the closed form.

    Args:
      config: resolved.
      options: what to choose from.

    Raises:
      ConfigError: nothing fits; the message names the smallest slice on which something would.
    """
    rows = [closed_row(candidate, options.slice) for candidate in _choices(config, options)]
    if not rows:
        for mesh in options.meshes[:1]:
            # Says why.
            candidate(dataclasses.replace(config, mesh=mesh), options.slice)
        raise ConfigError(_no_candidate(config, options))
    least = min(row.needed_bytes for row in rows)
    fitting = [row for row in rows if row.needed_bytes <= ROOM * row.available_bytes]
    if not fitting:
        raise ConfigError(_no_room(config, options, least))
    sure = sum(row.fits for row in fitting)
    # What is over the limit by the closed form stands behind all that is not.
    return Shortlist(len(rows), sure, _various(ranked(fitting), options.top))


def _choices(config: Config, options: Options) -> Iterator[Candidate]:
    return candidates(
        config, options.slice, meshes=options.meshes or "auto", remat=options.remats or "auto"
    )


def _various(rows: Sequence[Row], count: int) -> list[Row]:
    """Return the first so many rows, few of each mesh as far as there are several.

    The closed form may err, and then it errs for all of a mesh.
    """
    most = max(2, count // 3)
    places: Counter[Any] = Counter()
    chosen = []
    for row in rows:
        places[row.candidate.mesh] += 1
        chosen.append((places[row.candidate.mesh] > most, row))
    return [row for _, row in sorted(chosen, key=lambda item: item[0])][:count]


def closed_row(candidate: Candidate, slice_: Slice) -> Row:
    """Return what the closed form says of a candidate."""
    needed = int(closed_bytes(candidate).live)
    if not slice_.chip.has_peaks:
        return _row(candidate, slice_, CLOSED_FORM, needed, math.nan, bound="-")
    roofline = closed_seconds(candidate, slice_.chip, network(candidate.config.mesh, slice_))
    return _row(candidate, slice_, CLOSED_FORM, needed, roofline.total, bound=roofline.bound)


def _row(
    candidate: Candidate, slice_: Slice, known_by: str, needed: int, seconds: float, **fields: Any
) -> Row:
    config = candidate.config
    tokens = config.train.global_batch_size * config.data.length
    rate = tokens / seconds / slice_.num_chips
    flops = train_flops_per_token(config.model, config.data.length)
    return Row(
        candidate=candidate,
        known_by=known_by,
        needed_bytes=needed,
        available_bytes=slice_.chip.usable_bytes_per_device,
        seconds=seconds,
        tokens_per_second_per_chip=rate,
        mfu=rate * flops / slice_.chip.bf16_flops_per_second,
        **fields,
    )


def compile_rows(
    rows: Sequence[Row],
    options: Options,
    *,
    as_trained: bool = False,
    progress: Progress,
    stop: Stop = never,
) -> list[Row]:
    """Take rows through the real compiler and return them with what it says, the best first.

    Args:
      rows: candidates.
      options: the slice and the number of processes.
      as_trained: with all options that training uses, also the slow ones.
      progress: told of each that is done.
      stop: asked whether to stop.

    Raises:
      Stopped: `stop` said so; what was compiled is kept.
    """
    jobs = {_job(row.candidate, options.slice, as_trained): row.candidate for row in rows}
    found: list[Row] = []
    for job, compiled in compile_all(list(jobs), num_processes=options.num_processes, stop=stop):
        row = _compiled_row(jobs[job], job, compiled, AS_TRAINED if as_trained else COMPILED)
        found.append(row)
        progress(
            f"{len(found)}/{len(jobs)} {row.known_by}: {words(row, is_known=compiled.is_known)}"
        )
    return ranked(found)


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Return rows that fit, the best first, and then the others."""
    return [
        *sorted((row for row in rows if row.fits), key=_cost),
        *(row for row in rows if not row.fits),
    ]


def _cost(row: Row) -> tuple[float, int]:
    """Return what is to be small: seconds of a token, or what takes time and then bytes."""
    if row.is_timed:
        return -row.tokens_per_second_per_chip, 0
    return recomputed_flops(row.candidate), row.needed_bytes


def words(row: Row, *, is_known: bool) -> str:
    """Say in a line what is known of a candidate."""
    name = f"{row.candidate.mesh_words}, {row.candidate.remat_words}"
    if row.error:
        return f"{name}: {row.error}"
    needed = format_bytes(row.needed_bytes)
    time = f", {row.seconds:.4g} s" if row.is_timed else "" if row.fits else ", no room"
    how = "known" if is_known else f"compiled in {row.compile_seconds:.0f} s"
    return f"{name}: {needed}{time} ({how})"


def _job(candidate: Candidate, slice_: Slice, as_trained: bool) -> Job:
    options = compiler_options(slice_.chip)
    config = compilable(candidate.config, slice_.chip)
    return Job(config, slice_, options if as_trained else quick(options))


def _compiled_row(candidate: Candidate, job: Job, compiled: Compiled, known_by: str) -> Row:
    if not COMPILERS[job.slice.chip.platform].knows_time:
        return _bytes_row(candidate, job.slice, compiled)
    if compiled.has_room:
        timeline = predict_step(job, compiled)
        seconds, bound = timeline.seconds, timeline.bound
    else:
        timeline, seconds, bound = None, math.nan, "memory"
    return _row(
        candidate,
        job.slice,
        known_by,
        compiled.peak_bytes,
        seconds,
        bound=bound,
        compile_seconds=compiled.compile_seconds,
        timeline=timeline,
        error=compiled.error,
    )


def _bytes_row(candidate: Candidate, slice_: Slice, compiled: Compiled) -> Row:
    """Return the closed form's row with the compiler's bytes, which are those it will allocate."""
    row = dataclasses.replace(
        closed_row(candidate, slice_),
        known_by=BYTES_COMPILED,
        needed_bytes=compiled.needed_bytes,
        compile_seconds=compiled.compile_seconds,
        error=compiled.error,
    )
    return row if row.fits else dataclasses.replace(row, bound="memory")


def _no_candidate(config: Config, options: Options) -> str:
    batch = config.train.global_batch_size
    return (
        f"no mesh of {options.slice.num_devices} devices cuts the model and "
        f"train.global_batch_size={batch} evenly; take a batch that is a multiple of "
        f"{options.slice.num_devices}, or another --topology"
    )


def _no_room(config: Config, options: Options, least: int) -> str:
    slice_, available = options.slice, options.slice.chip.usable_bytes_per_device
    needed = f"{least / 2**30:.1f} GiB of a device's {available / 2**30:.1f}"
    if not slice_.chip.topologies:
        remedy = "lower --batch or --length, or name a --topology"
        return f"{slice_.name} is too small: the leanest candidate needs {needed}; {remedy}"
    larger = smallest_slice(config, options)
    remedy = f"the smallest that would be is {larger.name}" if larger else "none of that chip is"
    if larger and larger.num_slices != slice_.num_slices:
        remedy += f" with --num-slices={larger.num_slices}"
    return f"--topology={slice_.name} is too small: the leanest candidate needs {needed}; {remedy}"


def smallest_slice(config: Config, options: Options) -> Slice | None:
    """Return the smallest slice of the same chip on which something fits; None if nothing does."""
    chip = options.slice.chip
    for slice_ in family(options.slice):
        if slice_.num_chips <= options.slice.num_chips:
            continue
        other = dataclasses.replace(options, slice=slice_, meshes=())
        bytes_ = (closed_bytes(candidate).live for candidate in _choices(config, other))
        if any(needed <= chip.usable_bytes_per_device for needed in bytes_):
            return slice_
    return None
