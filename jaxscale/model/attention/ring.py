"""Ring attention: keys and values go round the devices, each of which keeps its own queries.

No device ever holds the whole length. The tokens lie in zigzag order: of 2P equal chunks of the
sequence, device r holds r and 2P-1-r. In every round each device then has equally many visible
pairs of blocks to work off, where whole parts in a row would leave the first devices idle. While a
device computes with one part, the next is on its way.

Source: Liu et al., Ring Attention, arXiv:2310.01889; the two chunks are those of Llama 3's context
parallelism, arXiv:2407.21783.
"""

# B batch, L query length, K kv heads, G query heads of each, H head dim, P pairs

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.model.attention.chunked import (
    Gradients,
    Work,
    add_gradients,
    add_keys,
    block_size,
    finished,
    known,
    may_see,
    no_gradients,
    no_sums,
)
from jaxscale.model.attention.dense import Operands, Span, heads_first, tokens_first

Axes = tuple[str, ...]


class Part(NamedTuple):
    """What goes round: the keys and values of some tokens, and where these stand."""

    k_BKLH: jax.Array
    v_BKLH: jax.Array
    span: Span


def zigzag_order(length: int, num_parts: int) -> np.ndarray:
    """Return the position of each token in zigzag order, part after part, int32 (length,)."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * num_parts, -1)
    parts = [np.concatenate([chunks[r], chunks[-1 - r]]) for r in range(num_parts)]
    return np.concatenate(parts)


def ring_attention(x: Operands, axes: Axes, window: int) -> jax.Array:
    """Return softmax(q k) v over all tokens, (B, L, N, H), for the queries here.

    Args:
      x: this device's part of the tokens, which are in zigzag order.
      axes: mesh axes that the length lies on.
      window: tokens that a query sees, itself among them; 0 = all before it.
    """
    return tokens_first(_attention(*heads_first(x), x.queries, axes, window))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    q_BKGLH: jax.Array, k_BKLH: jax.Array, v_BKLH: jax.Array, span: Span, axes: Axes, window: int
) -> jax.Array:
    out_BKGLH, _ = _forward(q_BKGLH, k_BKLH, v_BKLH, span, axes, window)
    return out_BKGLH


def _forward(
    q_BKGLH: jax.Array, k_BKLH: jax.Array, v_BKLH: jax.Array, span: Span, axes: Axes, window: int
) -> tuple[jax.Array, Any]:
    def visit(sums: Any, _: None, part: Part, work: Work) -> tuple[Any, None]:
        return add_keys(sums, q_BKGLH, part.k_BKLH, part.v_BKLH, work), None

    part = Part(k_BKLH, v_BKLH, span)
    sums, _ = _go_round(visit, no_sums(q_BKGLH), None, part, axes, window)
    out_BKGLH, log_total_BKGL1 = finished(sums, q_BKGLH.dtype)
    return out_BKGLH, (q_BKGLH, part, out_BKGLH, log_total_BKGL1)


def _backward(axes, window, residuals, d_out_BKGLH):  # type: ignore[no-untyped-def]
    q_BKGLH, part, out_BKGLH, log_total_BKGL1 = residuals
    queries = known(q_BKGLH, out_BKGLH, log_total_BKGL1, d_out_BKGLH)

    def visit(d_q: Any, d_part: Any, part: Part, work: Work) -> tuple[Any, Any]:
        gradients = Gradients(d_q, *d_part)
        d_q, *d_part = add_gradients(gradients, queries, part.k_BKLH, part.v_BKLH, work)
        return d_q, d_part

    d_q, *d_part = no_gradients(q_BKGLH, part.k_BKLH, part.v_BKLH)
    d_q, d_part = _go_round(visit, d_q, d_part, part, axes, window)
    return (*(x.astype(q_BKGLH.dtype) for x in (d_q, *d_part)), None)


_attention.defvjp(_forward, _backward)


def _go_round(
    visit: Callable[..., Any], own: Any, riding: Any, part: Part, axes: Axes, window: int
) -> tuple[Any, Any]:
    """Visit every device's part once, own first, and return what was made of it.

    Args:
      visit: `(own, riding, part, work) -> (own, riding)`.
      own: what stays on this device.
      riding: what goes round with the part, and is home again at the end.
      part: keys, values and where they stand.
      axes: mesh axes that the length lies on.
      window: of the attention.
    """
    num_parts = jax.lax.axis_size(axes)
    neighbours = [(rank, (rank + 1) % num_parts) for rank in range(num_parts)]
    shift = functools.partial(jax.lax.ppermute, axis_name=axes, perm=neighbours)
    queries = part.span
    work_of = functools.partial(_work, queries, axes=axes, window=window)

    def go_on(carry: Any, number: Any) -> tuple[Any, None]:
        own, riding, part = carry
        # Sent before it is worked with, so that the transfer hides behind the work.
        following = jax.tree.map(shift, part)
        own, riding = visit(own, riding, part, work_of(part.span, number))
        return (own, jax.tree.map(shift, riding), following), None

    # The first round is the only one with pairs on the diagonal; the last sends no part on.
    carry, _ = go_on((own, riding, part), 0)
    carry, _ = jax.lax.scan(go_on, carry, jnp.arange(1, num_parts - 1))
    own, riding, part = carry
    own, riding = visit(own, riding, part, work_of(part.span, num_parts - 1))
    return own, jax.tree.map(shift, riding)


def _work(queries: Span, keys: Span, number: Any, *, axes: Axes, window: int) -> Work:
    """Return the pairs of blocks of a round: 0, one device's own part, or `number` devices back."""
    half = queries.positions_BL.shape[1] // 2
    block = block_size(half)
    n = half // block
    rank, num_parts = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    origin = (rank - number) % num_parts
    every, first, second = np.arange(2 * n), np.arange(n), np.arange(n, 2 * n)
    if isinstance(number, int) and number == 0:
        pairs = _all_pairs(every, every)
        queries_P, keys_P = pairs[:, pairs[0] >= pairs[1]]
    else:
        # Of a device before, all queries see the first chunk; of one after, the queries of the
        # second chunk see all.
        before, after = _all_pairs(every, first), _all_pairs(second, every)
        queries_P, keys_P = jnp.where(origin < rank, before, after)
    needed_P = None
    if window:
        start = functools.partial(_block_start, half=half, block=block, num_parts=num_parts)
        needed_P = may_see(start(rank, queries_P), start(origin, keys_P), block, window)
    return Work(queries, keys, queries_P, keys_P, needed_P, block, window)


def _all_pairs(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the indices of all pairs, queries in the first row, int32 (2, P)."""
    pairs: np.ndarray = np.stack([x.ravel() for x in np.meshgrid(queries, keys, indexing="ij")])
    return pairs.astype(np.int32)


def _block_start(rank: Any, index_P: Any, *, half: int, block: int, num_parts: int) -> Any:
    """Return the position of the first token of a device's blocks."""
    blocks = half // block
    first = rank * half + index_P * block
    second = (2 * num_parts - 1 - rank) * half + (index_P - blocks) * block
    return jnp.where(index_P < blocks, first, second)
