"""The most that fits: the largest batch or the longest context for each kind of remat.

Where memory ends by the closed form, the compiler is asked; from there it goes up or down a ladder
of sizes until one fits and the next does not. Without a compiler the closed form has the last word.
"""

import dataclasses

from jaxscale.config import Config, ConfigError
from jaxscale.data.workers import Stop, never
from jaxscale.plan.rank import Options, Progress, Row, closed_row, compile_rows
from jaxscale.plan.space import REMATS, Candidate, Remat, candidates

# Sizes of the ladder, as multiples of a power of two: no step is larger than a half.
STEPS = (2, 3)
LEAST_LENGTH, MOST_LENGTH = 1024, 2**22
MOST_ROWS_PER_DEVICE = 256


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Where memory ends for a kind of remat.

    Attributes:
      remat: the kind.
      size: the largest that fits: sequences per step, or tokens per sequence; 0 = none.
      next_size: the next one of the ladder, which does not; 0 where the ladder ends.
      row: of the largest; None where none fits.
    """

    remat: Remat
    size: int
    next_size: int
    row: Row | None


class Search:
    """The ladder of one knob, and what is known of each of its sizes."""

    def __init__(self, config: Config, options: Options, *, of_length: bool) -> None:
        """Set out to find the longest context, or else the largest batch.

        Args:
          config: resolved.
          options: what to choose from.
          of_length: which of the two.
        """
        self.config, self.options, self.of_length = config, options, of_length
        self.remats = list(dict.fromkeys(options.remats or REMATS))
        self._leanest: dict[tuple[Remat, int], Row | None] = {}
        sizes = lengths() if of_length else batches(options.slice.num_devices)
        # What no mesh can cut is no step of the ladder.
        self.ladder = [size for size in sizes if self._candidates(self.remats[0], size)]

    def leanest(self, remat: Remat, size: int) -> Row | None:
        """Return the candidate that needs the least, by the closed form; None if none is valid."""
        key = (remat, size)
        if key not in self._leanest:
            rows = [closed_row(found, self.options.slice) for found in self._candidates(*key)]
            self._leanest[key] = min(rows, key=lambda row: row.needed_bytes, default=None)
        return self._leanest[key]

    def _candidates(self, remat: Remat, size: int) -> list[Candidate]:
        chosen = {"length" if self.of_length else "batch": size}
        try:
            found = list(
                candidates(
                    self.config,
                    self.options.slice,
                    meshes=self.options.meshes or "auto",
                    remat=(remat,),
                    **chosen,
                )
            )
        except ConfigError:
            return []
        # More microbatches would make room for any batch.
        least = {c.mesh: c for c in reversed(found)}
        return list(least.values())

    def closed(self, remat: Remat) -> int:
        """Return the place of the largest that fits by the closed form; -1 if none."""
        low, high = -1, len(self.ladder)
        while high - low > 1:
            middle = (low + high) // 2
            row = self.leanest(remat, self.ladder[middle])
            low, high = (middle, high) if row and row.fits else (low, middle)
        return low

    def boundary(self, remat: Remat, place: int, row: Row | None) -> Boundary:
        """Return what is found, of a place on the ladder."""
        size = self.ladder[place] if place >= 0 else 0
        above = self.ladder[place + 1] if place + 1 < len(self.ladder) else 0
        return Boundary(remat, size, above, row)


def lengths() -> list[int]:
    """Return the ladder of tokens per sequence."""
    return _ladder(LEAST_LENGTH, MOST_LENGTH)


def batches(num_devices: int) -> list[int]:
    """Return the ladder of sequences per step."""
    most = num_devices * MOST_ROWS_PER_DEVICE
    # Slices may have other prime factors than two.
    odd = num_devices // (num_devices & -num_devices)
    return sorted({*_ladder(1, most), *(odd * size for size in _ladder(1, most // odd))})


def _ladder(least: int, most: int) -> list[int]:
    sizes = {least}
    power = least
    while power <= most:
        sizes |= {power * step // STEPS[0] for step in STEPS}
        power *= 2
    return sorted(size for size in sizes if least <= size <= most)


def closed_boundaries(search: Search) -> list[Boundary]:
    """Return where memory ends by the closed form."""
    found = []
    for remat in search.remats:
        place = search.closed(remat)
        row = search.leanest(remat, search.ladder[place]) if place >= 0 else None
        found.append(search.boundary(remat, place, row))
    return found


def compiled_boundaries(
    search: Search, *, progress: Progress, stop: Stop = never
) -> list[Boundary]:
    """Return where memory ends by the compiler, begun from where it ends by the closed form.

    Args:
      search: the ladder.
      progress: told of each program that is compiled.
      stop: asked whether to stop.

    Raises:
      Stopped: `stop` said so; what was compiled is kept.
    """
    remats = search.remats
    places = {remat: max(search.closed(remat), 0) for remat in remats}
    known: dict[Remat, dict[int, Row | None]] = {remat: {} for remat in remats}
    while places:
        rows = {r: search.leanest(r, search.ladder[place]) for r, place in places.items()}
        asked = [row for row in rows.values() if row is not None]
        compiled = compile_rows(asked, search.options, progress=progress, stop=stop)
        answers = {row.candidate: row for row in compiled}
        for answer in compiled:
            if answer.error:
                # No boundary of memory.
                mesh = answer.candidate.mesh_words
                raise ConfigError(f"{mesh} could not be compiled: {answer.error}")
        for remat, row in rows.items():
            known[remat][places[remat]] = answers[row.candidate] if row else None
        steps = {remat: _next(known[remat], len(search.ladder)) for remat in places}
        places = {remat: place for remat, place in steps.items() if place is not None}
    found = []
    for remat in remats:
        fitting = [place for place, row in known[remat].items() if row and row.fits]
        place = max(fitting, default=-1)
        found.append(search.boundary(remat, place, known[remat].get(place)))
    return found


def _next(known: dict[int, Row | None], count: int) -> int | None:
    """Return the place to look at next; None where one fits and the next does not."""
    fitting = [place for place, row in known.items() if row and row.fits]
    others = [place for place in known if place not in fitting]
    place = max(fitting) + 1 if fitting else min(others) - 1
    return place if 0 <= place < count and place not in known else None
