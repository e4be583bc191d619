"""The share of each peak that a program reaches: the only constants that predictions are fitted by.

Five, the same for every chip; everything else in a prediction follows from shapes and data sheets.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """Achieved over peak, each between 0 and 1; the defaults are provisional.

    Attributes:
      matmul: FLOP/s of large matmuls.
      vector: operations of the vector units inside the attention kernel.
      hbm: bytes/s of device memory.
      ici: bytes/s of a torus link.
      dcn: bytes/s of a host's network.
    """

    matmul: float = 0.85
    vector: float = 0.85
    hbm: float = 0.85
    ici: float = 0.85
    dcn: float = 0.7
