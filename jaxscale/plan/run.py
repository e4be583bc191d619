"""A plan from beginning to end, as `jaxscale plan` runs it and Python can: `make_options`, `Plan`.

The closed form, the compiler on what it likes best, the winner and the runner-up as training
compiles them; or the boundary of memory, when a batch or length is to be found.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxscale.config import Config, ConfigError, MeshConfig
from jaxscale.config_source import to_mapping
from jaxscale.data.workers import Stop, never
from jaxscale.parallel.mesh import AXES, parse_mesh
from jaxscale.plan import nvidia
from jaxscale.plan.at_hand import slice_of
from jaxscale.plan.boundary import Boundary, Search, closed_boundaries, compiled_boundaries
from jaxscale.plan.compile import quick
from jaxscale.plan.curve import CurvePoint, scaling_curve
from jaxscale.plan.describe import compilable, compiler
from jaxscale.plan.rank import Options, Progress, Row, Shortlist, compile_rows, ranked
from jaxscale.plan.rank import shortlist as closed_shortlist
from jaxscale.plan.space import REMATS, Remat
from jaxscale.plan.torus import Slice, parse_topology

AUTO = "auto"
# Of the rows, compiled once more as training does.
NUM_FINALISTS = 2
# Which batch a scaling curve keeps.
PER_CHIP, IN_ALL = "the same batch on every chip", "the same batch in all"


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of the verb, each as the user wrote it; `--help` says what they mean."""

    topology: str = ""
    num_slices: int = 1
    batch: str = ""
    length: str = ""
    remat: tuple[str, ...] = ()
    meshes: tuple[str, ...] = ()
    top: int = 6
    processes: int = 0
    closed_form: bool = False


def make_options(request: Request) -> Options:
    """Read the arguments.

    Raises:
      ConfigError: an unknown chip, shape, remat or mesh, or a number that is none.
    """
    slice_ = _slice(request)
    if request.batch == AUTO and request.length == AUTO:
        raise ConfigError("--batch=auto and --length=auto: one of them must be a number")
    return Options(
        slice=slice_,
        meshes=tuple(_mesh(text, slice_) for text in request.meshes if text != AUTO),
        remats=tuple(_remat(text) for text in request.remat if text != AUTO),
        top=request.top,
        num_processes=request.processes,
    )


def _slice(request: Request) -> Slice:
    """Return the slice by its name, or the devices at hand; GPUs with the memory that JAX takes."""
    if request.topology:
        slice_ = parse_topology(request.topology, request.num_slices)
    elif request.num_slices > 1:
        raise ConfigError(f"--num-slices={request.num_slices} needs --topology")
    else:
        slice_ = slice_of(jax.devices())
    if slice_.chip.platform == nvidia.PLATFORM:
        chip = nvidia.with_memory(slice_.chip, os.environ)
        slice_ = dataclasses.replace(slice_, chip=chip)
    return slice_


def _mesh(text: str, slice_: Slice) -> MeshConfig:
    sizes = parse_mesh(text, slice_.num_devices)
    if math.prod(sizes) != slice_.num_devices:
        raise ConfigError(
            f"--meshes={text} has {math.prod(sizes)} devices, and {slice_.name} "
            f"{slice_.num_devices}; their product must be that"
        )
    return MeshConfig(**dict(zip(AXES, sizes, strict=True)), num_slices=slice_.num_slices)


def _remat(text: str) -> Remat:
    kind, _, names = text.partition(":")
    kinds = list(dict.fromkeys(remat.kind for remat in REMATS))
    if kind not in kinds or (names and kind != "names"):
        raise ConfigError(
            f"--remat={text} is not one of auto, {', '.join(kinds)}, or names:NAME,NAME"
        )
    return Remat(kind, tuple(name.strip() for name in names.split(",")) if names else ())


def _size(option: str, text: str) -> int:
    """Return the number that was asked for; 0 where none was."""
    if text in ("", AUTO):
        return 0
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"{option}={text} is neither auto nor a number from 1 on")
    return int(text)


class Plan:
    """A config, what to choose from, and what is known so far."""

    def __init__(self, config: Config, request: Request) -> None:
        """Read the arguments; nothing is computed yet.

        Args:
          config: resolved.
          request: the arguments of the verb.

        Raises:
          ConfigError: a user's mistake.
        """
        self.options = make_options(request)
        platform = self.options.slice.chip.platform
        self.is_compiled = compiler(platform) is not None and not request.closed_form
        self.of_length = request.length == AUTO
        self.is_search = AUTO in (request.batch, request.length)
        data, train = config.data, config.train
        # What one number was asked for is the config's from here on.
        length = _size("--length", request.length) or data.length
        batch = _size("--batch", request.batch) or train.global_batch_size
        self.config = dataclasses.replace(
            config,
            data=dataclasses.replace(data, length=length),
            train=dataclasses.replace(train, global_batch_size=batch),
        )
        self.short: Shortlist | None = None
        self.rows: list[Row] = []
        self.boundaries: list[Boundary] = []

    def shortlist(self) -> Shortlist:
        """Judge every candidate by the closed form.

        Raises:
          ConfigError: nothing fits.
        """
        self.short = closed_shortlist(self.config, self.options)
        self.rows = self.short.rows
        return self.short

    def find_boundaries(self, progress: Progress, *, stop: Stop = never) -> list[Boundary]:
        """Find the largest batch, or the longest context, for each kind of remat.

        Raises:
          ConfigError: not even the smallest fits.
          Stopped: `stop` said so.
        """
        search = Search(self.config, self.options, of_length=self.of_length)
        if self.is_compiled:
            self.boundaries = compiled_boundaries(search, progress=progress, stop=stop)
        else:
            self.boundaries = closed_boundaries(search)
        rows = [found.row for found in self.boundaries if found.row]
        if not rows:
            option = "--length" if self.of_length else "--batch"
            raise ConfigError(
                f"{option}=auto: nothing fits on {self.options.slice.name}; take a larger "
                "--topology"
            )
        self.rows = ranked(rows)
        return self.boundaries

    def compile(self, progress: Progress, *, stop: Stop = never) -> list[Row]:
        """Take the rows through the compiler, the best two as training would; return them ranked.

        Raises:
          Stopped: `stop` said so.
        """
        options = self.options
        if not self.is_search:
            self.rows = compile_rows(self.rows, options, progress=progress, stop=stop)
        as_trained = options.slice.chip.compiler_options
        if quick(as_trained) != as_trained:
            best = [row for row in self.rows if row.fits][:NUM_FINALISTS]
            final = compile_rows(best, options, as_trained=True, progress=progress, stop=stop)
            done = {row.candidate: row for row in final if row.fits}
            # Where the slow options find no room, the quick ones still did.
            self.rows = ranked([done.get(row.candidate, row) for row in self.rows])
        return self.rows

    def notes(self) -> list[str]:
        """Return what is compiled otherwise than it is trained."""
        chip = self.options.slice.chip
        is_other = self.is_compiled and compilable(self.config, chip) is not self.config
        return [nvidia.NOTE] if is_other else []

    def curves(self) -> dict[str, list[CurvePoint]]:
        """Return how the winner scales, by the closed form, and by which batch is kept."""
        best = self.rows[0]
        if not best.is_timed:
            return {}
        return {
            PER_CHIP: scaling_curve(best, self.options, per_chip=True),
            IN_ALL: scaling_curve(best, self.options, per_chip=False),
        }


def to_rows(plan: Plan, curves: Mapping[str, Sequence[CurvePoint]]) -> list[dict[str, Any]]:
    """Return the rows of the result file: candidates, boundaries, points of the curve."""
    found = [{"phase": "candidate", **_fields(row), **_detail(row)} for row in plan.rows]
    for edge in plan.boundaries:
        size = {"size": edge.size, "next_size": edge.next_size, "remat": edge.remat.kind}
        found.append({"phase": "boundary", **size, "remat_names": list(edge.remat.names)})
    for kept, points in curves.items():
        for point in points:
            place = {"topology": point.topology, "num_chips": point.num_chips, "keeps": kept}
            efficiency = {"efficiency": point.efficiency}
            found.append({"phase": "curve", **place, **efficiency, **_fields(point.row)})
    return found


def _fields(row: Row) -> dict[str, Any]:
    config = row.candidate.config
    return {
        "mesh": dict(row.candidate.mesh.shape),
        "remat": config.model.remat,
        "remat_names": list(config.model.remat_names) if config.model.remat == "names" else [],
        "accumulation_steps": config.train.accumulation_steps,
        "global_batch_size": config.train.global_batch_size,
        "length": config.data.length,
        "known_by": row.known_by,
        "fits": row.fits,
        "needed_bytes": row.needed_bytes,
        "available_bytes": row.available_bytes,
        "step_seconds": row.seconds,
        "tokens_per_second_per_chip": row.tokens_per_second_per_chip,
        "mfu": row.mfu,
        "bound": row.bound,
        "error": row.error,
    }


def _detail(row: Row) -> dict[str, Any]:
    detail: dict[str, Any] = {
        "compile_seconds": row.compile_seconds,
        "config": to_mapping(row.candidate.config),
    }
    if row.timeline:
        line = row.timeline
        detail["seconds_by_resource"] = line.by_resource
        detail["seconds_by_part"] = {" ".join(key): value for key, value in line.by_part.items()}
        detail["traffic"] = [dataclasses.asdict(traffic) for traffic in line.traffic]
    return detail
