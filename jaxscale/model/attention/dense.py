"""Dense attention: all scores at once, in float32. The reference for every other kind.

Who sees whom follows from positions and segments alone, so that the same function serves training,
prefill, cached decode and any placement of tokens on devices.
"""

# B batch, L query length, S key length, N heads, K kv heads, G = N/K, H head dim

import dataclasses

import jax
import jax.numpy as jnp

from jaxscale.model.contract import contract
from jaxscale.parallel.sharding import Rules

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


def visible(queries: Span, keys: Span) -> jax.Array:
    """Return the causal and document mask, bool (B, L, S): which keys each query sees."""
    mask_BLS = queries.positions_BL[:, :, None] >= keys.positions_BL[:, None, :]
    if queries.segments_BL is not None and keys.segments_BL is not None:
        mask_BLS &= queries.segments_BL[:, :, None] == keys.segments_BL[:, None, :]
    return mask_BLS


def dense_attention(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BLS: jax.Array,
    *,
    rules: Rules,
) -> jax.Array:
    """Return softmax(q k / sqrt(H)) v for grouped queries, shape (B, L, N, H), in q's dtype.

    Keys and values are whole along S; queries may be sharded along L. A query that sees no key gets
    the mean of the values, which no loss reads.
    """
    B, L, N, H = q_BLNH.shape
    if rules.mesh_axes("heads") != rules.mesh_axes("kv_heads"):
        k_BSKH, v_BSKH = (_repeat(x, N, rules) for x in (k_BSKH, v_BSKH))
    K = k_BSKH.shape[2]
    grouped = rules.spec("batch", "length", "heads" if K == N else "kv_heads", None, "head_dim")
    q_BLKGH = jax.lax.reshape(q_BLNH, (B, L, K, N // K, H), out_sharding=grouped)
    # Heads before tokens: as the products have them, so that the large arrays are never transposed.
    q_BKGLH = jnp.transpose(q_BLKGH, (0, 2, 3, 1, 4))
    k_BKSH, v_BKSH = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k_BSKH, v_BSKH))
    scores_BKGLS = contract("bkglh,bksh->bkgls", q_BKGLH, k_BKSH, dtype=jnp.float32)
    scores_BKGLS = jnp.where(mask_BLS[:, None, None], scores_BKGLS * H**-0.5, MASKED)
    weights_BKGLS = jax.nn.softmax(scores_BKGLS, axis=-1).astype(v_BSKH.dtype)
    out_BKGLH = contract("bkgls,bksh->bkglh", weights_BKGLS, v_BKSH)
    out_BLKGH = jnp.transpose(out_BKGLH, (0, 3, 1, 2, 4))
    whole = rules.spec("batch", "length", "heads", "head_dim")
    return jax.lax.reshape(out_BLKGH, (B, L, N, H), out_sharding=whole)


def _repeat(x_BSKH: jax.Array, num_heads: int, rules: Rules) -> jax.Array:
    """Give every query head its own copy of its key/value head, sharded like the query heads."""
    B, S, K, H = x_BSKH.shape
    x_BSKGH = jnp.broadcast_to(x_BSKH[:, :, :, None], (B, S, K, num_heads // K, H))
    whole = rules.spec("batch", None, None, "head_dim")
    x_BSNH = jax.lax.reshape(x_BSKGH, (B, S, num_heads, H), out_sharding=whole)
    return rules.place(x_BSNH, "batch", None, "heads", "head_dim")
