"""The key/value cache of decoding: one slot per row and position, in every layer.

Slot s of a row holds the token at position s, so causality alone hides what is not yet written.
"""

# B batch, L new tokens, S slots, K kv heads, H head dim

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.config import ModelConfig
from jaxscale.parallel.sharding import Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values, each (layers, B, S, K, H); inside the layer scan without the first axis."""

    keys: jax.Array
    values: jax.Array


def empty_cache(model: ModelConfig, rules: Rules, *, batch: int, slots: int) -> Cache:
    """Return a cache of zeros for `batch` rows of `slots` tokens, in the compute dtype."""
    shape = (model.num_layers, batch, slots, model.num_kv_heads, model.head_dim)
    spec = rules.spec(None, "batch", None, "kv_heads", "head_dim")
    dtype = jnp.dtype(model.compute_dtype)
    return Cache(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2)))


def write(cache: Cache, keys_BLKH: Any, values_BLKH: Any, start_B: jax.Array) -> Cache:
    """Return the layer's cache with L new tokens written from slot `start_B[b]` of each row on."""
    slots = cache.keys.shape[1]
    length = keys_BLKH.shape[1]
    offset_BS = jnp.arange(slots)[None, :] - start_B[:, None]
    is_new_BS11 = ((offset_BS >= 0) & (offset_BS < length))[:, :, None, None]
    if length == 1:
        return Cache(
            jnp.where(is_new_BS11, keys_BLKH, cache.keys),
            jnp.where(is_new_BS11, values_BLKH, cache.values),
        )
    # Bring token l of each row to slot start + l: a gather along the length.
    source_BS = jnp.clip(offset_BS, 0, length - 1)
    return Cache(
        jnp.where(is_new_BS11, _take_rows(keys_BLKH, source_BS), cache.keys),
        jnp.where(is_new_BS11, _take_rows(values_BLKH, source_BS), cache.values),
    )


def _take_rows(x_BLKH: jax.Array, index_BS: jax.Array) -> jax.Array:
    """Return x[b, index[b, s]] for every row b and slot s."""
    taken: jax.Array = jax.vmap(lambda x, index: jnp.take(x, index, axis=0))(x_BLKH, index_BS)
    return taken
