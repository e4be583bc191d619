"""Dense attention: all scores at once, in float32. The reference for every other kind.

Who sees whom follows from positions and segments alone, so that the same function serves training,
prefill, cached decode and any placement of tokens on devices. As every kind, it works on the part
of one device; `attend.py` says which part that is.
"""

# B batch, L query length, S key length, N heads, K kv heads, G = N/K, H head dim

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxscale.model.contract import contract

MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Span:
    """Where tokens stand: position in the sequence, and document (None: all in one).

    Attributes:
      positions_BL: int32 position of each token.
      segments_BL: int32 document of each token; tokens attend within their own.
    """

    positions_BL: jax.Array
    segments_BL: jax.Array | None = None


class Operands(NamedTuple):
    """What attention is computed from.

    Attributes:
      q_BLNH: queries, scaled by 1/sqrt(H).
      k_BSKH: keys; query heads of a group share one.
      v_BSKH: values.
      queries: where the queries stand.
      keys: where keys and values stand.
    """

    q_BLNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    queries: Span
    keys: Span


def visible(queries: Span, keys: Span, window: int) -> jax.Array:
    """Return which keys each query sees, bool (B, L, S): causal, same document, within the window.

    Args:
      queries: where the queries stand.
      keys: where the keys stand.
      window: tokens that a query sees, itself among them; 0 = all before it.
    """
    distance_BLS = queries.positions_BL[:, :, None] - keys.positions_BL[:, None, :]
    mask_BLS = distance_BLS >= 0
    if window:
        mask_BLS &= distance_BLS < window
    if queries.segments_BL is not None and keys.segments_BL is not None:
        mask_BLS &= queries.segments_BL[:, :, None] == keys.segments_BL[:, None, :]
    return mask_BLS


def dense_attention(x: Operands, window: int) -> jax.Array:
    """Return softmax(q k) v for grouped queries, shape (B, L, N, H), in q's dtype.

    A query that sees no key gets the mean of the values, which no loss reads.

    Args:
      x: queries, keys, values.
      window: tokens that a query sees, itself among them; 0 = all before it.
    """
    q_BKGLH, k_BKSH, v_BKSH = heads_first(x)
    mask_BLS = visible(x.queries, x.keys, window)
    scores_BKGLS = contract("bkglh,bksh->bkgls", q_BKGLH, k_BKSH, dtype=jnp.float32)
    scores_BKGLS = jnp.where(mask_BLS[:, None, None], scores_BKGLS, MASKED)
    weights_BKGLS = jax.nn.softmax(scores_BKGLS, axis=-1).astype(v_BKSH.dtype)
    out_BKGLH = contract("bkgls,bksh->bkglh", weights_BKGLS, v_BKSH)
    return tokens_first(checkpoint_name(out_BKGLH, "context"))


def heads_first(x: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return q as (B, K, G, L, H), k and v as (B, K, S, H).

    The products have their dimensions in this order; the large arrays are never transposed.
    """
    B, L, N, H = x.q_BLNH.shape
    K = x.k_BSKH.shape[2]
    q_BKGLH = jnp.transpose(x.q_BLNH.reshape(B, L, K, N // K, H), (0, 2, 3, 1, 4))
    k_BKSH, v_BKSH = (jnp.transpose(pair, (0, 2, 1, 3)) for pair in (x.k_BSKH, x.v_BSKH))
    return q_BKGLH, k_BKSH, v_BKSH


def tokens_first(out_BKGLH: jax.Array) -> jax.Array:
    """Return an output of heads_first's order as (B, L, N, H)."""
    B, K, G, L, H = out_BKGLH.shape
    return jnp.transpose(out_BKGLH, (0, 3, 1, 2, 4)).reshape(B, L, K * G, H)
