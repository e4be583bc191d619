"""How a plan scales: the same batch on every chip, on each slice that its chip comes in.

By the closed form alone. One adds chips as long as each of them does most of what it did in the
smallest slice that holds the model.
"""

import dataclasses

from jaxscale.config import Config, ConfigError
from jaxscale.plan.rank import Options, Row, closed_row
from jaxscale.plan.space import Remat, candidates
from jaxscale.plan.torus import parse_topology

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


def scaling_curve(winner: Row, options: Options) -> list[CurvePoint]:
    """Return the curve through a plan's winner, fewest chips first.

    Args:
      winner: its remat, and its batch per chip, are those of all points.
      options: the chip.
    """
    config, slice_ = winner.candidate.config, options.slice
    per_chip = config.train.global_batch_size / slice_.num_chips
    points: list[CurvePoint] = []
    for shape in slice_.chip.topologies:
        other = parse_topology(f"{slice_.chip.name}:{shape}")
        if per_chip * other.num_chips != int(per_chip * other.num_chips):
            continue
        moved = dataclasses.replace(options, slice=other, meshes=())
        row = _best(config, moved, int(per_chip * other.num_chips))
        if row is None:
            continue
        first = points[0].row if points else row
        efficiency = row.tokens_per_second_per_chip / first.tokens_per_second_per_chip
        points.append(CurvePoint(other.name, other.num_chips, row, efficiency))
    return points


def _best(config: Config, options: Options, batch: int) -> Row | None:
    model = config.model
    remat = Remat(model.remat, model.remat_names if model.remat == "names" else ())
    try:
        found = list(candidates(config, options.slice, remat=(remat,), batch=batch))
    except ConfigError:
        return None
    rows = [closed_row(candidate, options.slice) for candidate in found]
    fitting = [row for row in rows if row.fits]
    return max(fitting, key=lambda row: row.tokens_per_second_per_chip, default=None)
