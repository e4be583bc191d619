"""The time of Pallas kernels, of which the TPU compiler knows nothing, by a stated model.

Splash attention works off blocks of queries x keys and skips those that are masked whole. A block
takes the longer of its matmuls on the matrix units and its softmax on the vector units; or as long
as memory takes to bring operands and take results.

Source: jax.experimental.pallas.ops.tpu.splash_attention.
"""

import dataclasses
import math

from jaxscale.config import ConfigError
from jaxscale.hardware import Chip
from jaxscale.plan.schedule import Kernel
from jaxscale.plan.shares import VECTOR_OPS_PER_SCORE, Shares

# Of each kernel, how its sizes of blocks end, and its matmuls of queries x keys x features.
KERNELS = {
    "splash_mha_fwd": ("", 2),
    "splash_mha_dq": ("_dq", 3),
    "splash_mha_dkv": ("_dkv", 4),
}


@dataclasses.dataclass(frozen=True)
class Attention:
    """Which pairs of query and key there are.

    Attributes:
      length: keys of a sequence, over all devices.
      window: tokens that a query sees; 0 = all before it.
      is_causal: whether a query sees nothing after it.
    """

    length: int
    window: int = 0
    is_causal: bool = True


def kernel_seconds(kernel: Kernel, attention: Attention, chip: Chip, shares: Shares) -> float:
    """Return the seconds of one call on one device.

    Args:
      kernel: the call.
      attention: which pairs it computes.
      chip: the chip, whose units its devices share evenly.
      shares: what of the units' peaks is achieved.

    Raises:
      ConfigError: a kernel that no model is stated for.
    """
    ending, matmuls = _of_kernel(kernel)
    (*heads, L, H), (*_, S, _) = kernel.shapes[:2]
    sizes = dict(kernel.blocks)
    blocks = min(sizes[f"block_q{ending}"], L), min(sizes[f"block_kv{ending}"], S)
    pairs = math.prod(heads) * _num_pairs(L, S, blocks, attention)
    # Features fill a part of a matrix unit where they are fewer than its side.
    assert chip.mxu_size
    filled = min(1.0, H / chip.mxu_size)
    peak = chip.bf16_flops_per_second_per_device * shares.matmul
    vector = chip.vector_ops_per_second / chip.devices_per_chip * shares.vector
    bandwidth = chip.hbm_bytes_per_second / chip.devices_per_chip * shares.hbm
    return max(
        2 * matmuls * pairs * H / (peak * filled),
        VECTOR_OPS_PER_SCORE * pairs / vector,
        kernel.hbm_bytes / bandwidth,
    )


def _of_kernel(kernel: Kernel) -> tuple[str, int]:
    for name, known in KERNELS.items():
        if kernel.name.startswith(name):
            return known
    raise ConfigError(
        f"the planner has no model of the kernel {kernel.name}; take model.attention=flash, "
        "chunked or dense"
    )


def _num_pairs(L: int, S: int, blocks: tuple[int, int], attention: Attention) -> int:
    """Return the pairs in all blocks that are not masked whole, on the device that has the most.

    Of a length cut in parts that is the last part, whose queries see all keys.
    """
    rows, columns = blocks
    total = 0
    for row in range(-(-L // rows)):
        first = S - L + row * rows
        last = first + rows - 1
        begin = max(0, first - attention.window + 1) // columns if attention.window else 0
        end = last // columns if attention.is_causal else (S - 1) // columns
        total += (min(end, (S - 1) // columns) - begin + 1) * rows * columns
    return total
