"""What is achieved of the published peaks: the planner's only fitted constants, for all chips.

`scripts/backtest.py` fits them to published runs; docs/backtest.md tells how well that does.
"""

import dataclasses

# Stated and not fitted: what the vector units do for each score in one pass of an attention kernel.
# Scale, masks of causality and of documents, running maximum, difference, exponential (of a slower
# unit, as several), sum, conversion.
VECTOR_OPS_PER_SCORE = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """Achieved shares of a chip's peaks, each between 0 and 1.

    Attributes:
      matmul: of the matrix units.
      vector: of the vector units, in attention kernels.
      hbm: of the bandwidth of the device's memory.
      ici: of the links inside a slice.
      dcn: of the network between slices.

    The defaults are a guess, from which the fit departs as far as rows tell of it.
    """

    matmul: float = 0.85
    vector: float = 0.6
    hbm: float = 0.8
    ici: float = 0.8
    dcn: float = 0.6


# Fitted by scripts/backtest.py --rows docs/published_tpu_runs.csv --fit
SHARES = Shares(matmul=0.83, vector=0.83, hbm=0.82, ici=0.84, dcn=0.60)
