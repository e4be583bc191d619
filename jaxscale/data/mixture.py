"""Several sources in one run: their weights, and whose turn it is at each window.

`data.source="0.7 files:a/*.txt; 0.3 tfds:b"` names parts with weights; a bare source is a mixture
of one. The order of windows is a rule of whole numbers alone, so that any step can be reached
without those before it.
"""

import dataclasses
import fractions
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Sequence

from jaxscale import records
from jaxscale.config import ConfigError
from jaxscale.data.token_cache import TokenCache

_PART = re.compile(r"(?P<weight>[-+.\d]\S*)\s+(?P<source>\S.*)")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Token caches and the relative weight of each."""

    caches: tuple[TokenCache, ...]
    weights: tuple[int, ...] = (1,)

    @property
    def fingerprint(self) -> str:
        """That of the only cache, or SHA-256 over all of them and the weights."""
        if len(self.caches) == 1:
            return self.caches[0].fingerprint
        words = [[cache.fingerprint for cache in self.caches], self.weights]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The file of the tokenizer, which is one for all."""
        return self.caches[0].path / records.TOKENIZER_FILE


def parse_mixture(spec: str) -> tuple[list[str], tuple[int, ...]]:
    """Return the sources that `data.source` names and their weights, in lowest terms.

    Raises:
      ConfigError: a part without a weight, or with one that is not a number above 0.
    """
    if not _PART.fullmatch(spec.strip()) and ";" not in spec:
        return [spec], (1,)
    sources, weights = [], []
    for part in spec.split(";"):
        found = _PART.fullmatch(part.strip())
        if not found:
            raise ConfigError(
                f"data.source={spec!r}: {part.strip()!r} has no weight; "
                "write a mixture as '0.7 SOURCE; 0.3 SOURCE'"
            )
        try:
            weights.append(fractions.Fraction(found["weight"]))
        except (ValueError, ZeroDivisionError):
            weights.append(fractions.Fraction(0))
        if weights[-1] <= 0:
            raise ConfigError(
                f"data.source={spec!r}: {found['weight']} is no weight; give a number above 0"
            )
        sources.append(found["source"])
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    return sources, tuple(weight // math.gcd(*whole) for weight in whole)


def drawn(total: int, weights: Sequence[int]) -> list[int]:
    """Return how many of the first `total` windows each part gives.

    In order of rising weight, a part gives its share, rounded up, of what the ones before it have
    left. So each part is spread evenly, the first windows are one of each part, and where weights
    are numbers of windows, their sum takes each window once.
    """
    counts = [0] * len(weights)
    rest = sum(weights)
    for part in sorted(range(len(weights)), key=weights.__getitem__):
        if weights[part]:
            counts[part] = -(-total * weights[part] // rest)
        total -= counts[part]
        rest -= weights[part]
    return counts


def place(index: int, weights: Sequence[int]) -> tuple[int, int]:
    """Return the part that window `index` of a mixture comes from, and its number there."""
    before, after = drawn(index, weights), drawn(index + 1, weights)
    part = next(p for p in range(len(weights)) if after[p] > before[p])
    return part, before[part]
