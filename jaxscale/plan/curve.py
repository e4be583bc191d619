"""How a plan scales over the slices or nodes of its chip: the same batch on every chip, or in all.

By the closed form alone. One adds chips as long as each of them does most of what it did in the
smallest slice that holds the model.
"""

import dataclasses
import math

from jaxscale.config import Config, ConfigError, MeshConfig
from jaxscale.parallel.mesh import AXES, BATCH_AXES
from jaxscale.plan.rank import Options, Row, closed_row
from jaxscale.plan.space import Remat, candidates
from jaxscale.plan.torus import Slice, family

# Below it another chip is not worth its price.
LEAST_EFFICIENCY = 0.7


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """The best candidate on a slice, by the closed form.

    Attributes:
      topology: the slice.
      num_chips: its chips.
      row: the candidate.
      efficiency: tokens per second and chip, over those of the smallest slice.
    """

    topology: str
    num_chips: int
    row: Row
    efficiency: float

    @property
    def is_worth_it(self) -> bool:
        """Whether the stop rule lets it be."""
        return self.efficiency >= LEAST_EFFICIENCY


def scaling_curve(winner: Row, options: Options, *, per_chip: bool) -> list[CurvePoint]:
    """Return the curve through a plan's winner, fewest chips first.

    Args:
      winner: its remat, and what of its mesh is neither replicas nor shards of parameters, are
        those of all points.
      options: the chip.
      per_chip: whether every chip keeps its batch; else the chips share the winner's.
    """
    config, slice_ = winner.candidate.config, options.slice
    whole = config.train.global_batch_size
    points: list[CurvePoint] = []
    for other in _slices(slice_):
        batch = whole * other.num_chips / slice_.num_chips if per_chip else whole
        if batch != int(batch):
            continue
        moved = dataclasses.replace(options, slice=other, meshes=_meshes(config.mesh, other))
        row = _best(config, moved, int(batch)) if moved.meshes else None
        if row is None:
            continue
        first = points[0].row if points else row
        efficiency = row.tokens_per_second_per_chip / first.tokens_per_second_per_chip
        points.append(CurvePoint(other.words, other.num_chips, row, efficiency))
    return points


def _slices(slice_: Slice) -> list[Slice]:
    """Return a slice of the same chip for each power of two, and that of the plan."""
    found = {}
    for other in family(slice_):
        chips = math.prod(other.shape)
        if chips & (chips - 1) == 0:
            found[other.num_chips] = other
    found[slice_.num_chips] = slice_
    return [found[count] for count in sorted(found)]


def _meshes(mesh: MeshConfig, slice_: Slice) -> tuple[MeshConfig, ...]:
    """Return the meshes of a slice that differ from a plan's in the axes of the batch alone."""
    own = dict(zip(AXES, (getattr(mesh, axis) for axis in AXES), strict=True))
    kept = {axis: size for axis, size in own.items() if axis not in BATCH_AXES}
    rest = slice_.num_devices // math.prod(kept.values())
    if slice_.num_devices % math.prod(kept.values()):
        return ()
    shards = [size for size in range(1, rest + 1) if rest % size == 0]
    first, second = BATCH_AXES
    slices = slice_.num_slices
    return tuple(
        MeshConfig(**kept, **{first: rest // size, second: size}, num_slices=slices)
        for size in shards
    )


def _best(config: Config, options: Options, batch: int) -> Row | None:
    model = config.model
    remat = Remat(model.remat, model.remat_names if model.remat == "names" else ())
    try:
        found = list(
            candidates(config, options.slice, meshes=options.meshes, remat=(remat,), batch=batch)
        )
    except ConfigError:
        return None
    rows = [closed_row(candidate, options.slice) for candidate in found]
    fitting = [row for row in rows if row.fits]
    return max(fitting, key=lambda row: row.tokens_per_second_per_chip, default=None)
