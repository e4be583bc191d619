"""All-to-all attention: each device exchanges its part of the length for a part of the heads.

Two exchanges before and after, with whole sequences between them, so that any algorithm serves.

Source: Jacobs et al., DeepSpeed-Ulysses, arXiv:2309.14509.
"""

# B batch, S length, N heads, K kv heads, H head dim

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxscale.model.attention.dense import Operands

Axes = tuple[str, ...]


def by_heads(attend: Callable[[Operands], jax.Array], x: Operands, axes: Axes) -> jax.Array:
    """Return the output of `attend`, which is called with all tokens of this device's heads.

    Args:
      attend: takes whole sequences and returns (B, S, N, H).
      x: this device's part of the length; the number of devices must divide N.
      axes: mesh axes that the length lies on.
    """
    num_devices = jax.lax.axis_size(axes)
    copies = num_devices // math.gcd(num_devices, x.k_BSKH.shape[2])
    k_BSKH, v_BSKH = (jnp.repeat(pair, copies, axis=2) for pair in (x.k_BSKH, x.v_BSKH))
    q_BSNH, k_BSKH, v_BSKH = (
        _exchanged(a, axes, cut=2, join=1) for a in (x.q_BLNH, k_BSKH, v_BSKH)
    )
    span = jax.lax.all_gather(x.queries, axes, axis=1, tiled=True)
    out_BSNH = attend(Operands(q_BSNH, k_BSKH, v_BSKH, span, span))
    return _exchanged(out_BSNH, axes, cut=1, join=2)


def _exchanged(a: jax.Array, axes: Axes, *, cut: int, join: int) -> jax.Array:
    result: jax.Array = jax.lax.all_to_all(a, axes, cut, join, tiled=True)
    return result
