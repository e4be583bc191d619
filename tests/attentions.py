"""Operands for attention, and its output and gradients, for the tests of its kinds."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from jaxscale.model.attention.dense import Operands, Span

B, N, K, H = 2, 4, 2, 8


def draw(length: int, documents: int, num_kv_heads: int = K) -> Operands:
    """Return random operands of so many tokens and documents, the latter None for 0."""
    random = np.random.default_rng(0)
    q = (random.normal(size=(B, length, N, H)) * H**-0.5).astype(np.float32)
    k, v = random.normal(size=(2, B, length, num_kv_heads, H)).astype(np.float32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (B, length))
    segments = None
    if documents:
        segments = np.sort(random.integers(0, documents, (B, length)), axis=1).astype(np.int32)
    span = Span(positions, segments)
    return Operands(q, k, v, span, span)


def with_gradients(attend: Callable[..., jax.Array], x: Operands, window: int) -> list[jax.Array]:
    """Return the output, and gradients of queries, keys and values for a random cotangent."""
    cotangent = np.random.default_rng(1).normal(size=x.q_BLNH.shape).astype(np.float32)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
        attend_to = functools.partial(attend, window=window)
        out, transpose = jax.vjp(
            lambda q, k, v: attend_to(x._replace(q_BLNH=q, k_BSKH=k, v_BSKH=v)), q, k, v
        )
        if jax.sharding.get_abstract_mesh().empty:
            return [out, *transpose(cotangent)]
        return [out, *transpose(jax.reshard(cotangent, jax.typeof(out).sharding))]

    return run(x.q_BLNH, x.k_BSKH, x.v_BSKH)
