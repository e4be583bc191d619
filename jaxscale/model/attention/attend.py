"""Attention over the mesh: which algorithm computes it, and how it crosses the sequence axis.

The algorithms are written for the part of one device. Here alone a shard_map stands around them,
and around nothing else.
"""

# B batch, L query length, S key length, N heads, K kv heads, H head dim

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.config import ConfigError, ModelConfig
from jaxscale.model.attention.all_to_all import by_heads
from jaxscale.model.attention.chunked import block_size, chunked_attention
from jaxscale.model.attention.dense import Operands, Span, dense_attention
from jaxscale.model.attention.flash import flash_attention
from jaxscale.model.attention.ring import ring_attention, zigzag_order
from jaxscale.parallel.mesh import AnyMesh
from jaxscale.parallel.pipeline import on_each_device
from jaxscale.parallel.sharding import Axis, Rules

Axes = tuple[str, ...]
# Of blocks of fewer tokens than this, no more than so many: one is worked off after the other.
SMALL_BLOCK, MOST_SMALL_BLOCKS = 64, 64


def attend(x: Operands, model: ModelConfig, rules: Rules) -> jax.Array:
    """Return the attention of a batch's tokens among themselves, (B, L, N, H), in q's dtype.

    With `sequence_attention=ring` over several devices the tokens must be `in_token_order`.
    """
    axes = rules.mesh_axes("length")
    crossing = CROSSINGS[model.sequence_attention] if axes else _within
    local = functools.partial(crossing, model=model, axes=axes)
    keys: Axis = None if crossing is _all_gather else "length"
    # Pallas kernels do not say over which mesh axes their outputs vary.
    return _on_each_device(local, x, rules, keys=keys, check=model.attention != "flash")


def in_token_order(values: Any, model: ModelConfig, rules: Rules) -> Any:
    """Return a pytree of (B, L) arrays with the tokens in the order that `attend` wants."""
    axes = rules.mesh_axes("length")
    if not axes or model.sequence_attention != "ring":
        return values

    def ordered(a_BL: jax.Array) -> jax.Array:
        order_L = zigzag_order(a_BL.shape[1], rules.num_shards("length"))
        return rules.place(rules.place(a_BL, "batch", None)[:, order_L], "batch", "length")

    return jax.tree.map(ordered, values)


def attend_to_cache(x: Operands, model: ModelConfig, rules: Rules) -> jax.Array:
    """Return the attention of new tokens to a cache's slots, (B, L, N, H), in q's dtype.

    The rules must not shard the length.
    """
    local = functools.partial(dense_attention, window=model.attention_window)
    return _on_each_device(local, x, rules, keys=None)


def check_attention(model: ModelConfig, rules: Rules, mesh: AnyMesh, length: int) -> None:
    """Check that the way across the sequence axis fits heads and length.

    Raises:
      ConfigError: naming the knobs and the remedy.
    """
    axes, parts = rules.mesh_axes("length", mesh), rules.num_shards("length", mesh)
    cut = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
    if model.sequence_attention == "all_to_all":
        heads = model.num_heads // rules.num_shards("heads", mesh)
        if heads % parts:
            raise ConfigError(
                f"model.sequence_attention=all_to_all: {cut} does not divide the {heads} heads of "
                f"model.num_heads={model.num_heads} that a device has; take ring or all_gather"
            )
    if model.sequence_attention == "ring" and axes and length % (2 * parts):
        raise ConfigError(
            f"model.sequence_attention=ring: twice {cut} does not divide data.length={length}; "
            f"take a multiple of {2 * parts}"
        )
    own, block = length // parts, block_size(length // parts)
    if model.attention != "dense" and block < SMALL_BLOCK and own > MOST_SMALL_BLOCKS * block:
        raise ConfigError(
            f"model.attention={model.attention}: data.length={length} has no divisor to make good "
            f"blocks of, only {block}; take a multiple of {SMALL_BLOCK * parts}, or dense"
        )


def _on_each_device(
    local: Callable[..., jax.Array],
    x: Operands,
    rules: Rules,
    *,
    keys: Axis,
    check: bool = True,
) -> jax.Array:
    """Call `local` with each device's part of the operands; without a mesh, with all of them.

    Args:
      local: takes Operands and returns (B, L, N, H).
      x: the operands, all on the logical axis `length`.
      rules: the sharding rules.
      keys: logical axis of the keys and values that `local` wants; None: whole.
      check: whether JAX follows which mesh axes each value varies over.
    """
    if rules.spec() is None:
        return local(x)
    N = x.q_BLNH.shape[2]
    if rules.mesh_axes("heads") != rules.mesh_axes("kv_heads"):
        k_BSNH, v_BSNH = (_per_query_head(pair, N, rules) for pair in (x.k_BSKH, x.v_BSKH))
        x = x._replace(k_BSKH=k_BSNH, v_BSKH=v_BSNH)
    pairs, places = ("batch", keys, "heads", "head_dim"), ("batch", keys)
    x = x._replace(
        k_BSKH=rules.place(x.k_BSKH, *pairs),
        v_BSKH=rules.place(x.v_BSKH, *pairs),
        keys=jax.tree.map(lambda a: rules.place(a, *places), x.keys),
    )
    heads: Any = rules.spec("batch", "length", "heads", "head_dim")
    pair: Any = rules.spec(*pairs)
    tokens: Any = rules.spec("batch", "length")
    others: Any = rules.spec(*places)
    specs = Operands(heads, pair, pair, Span(tokens, tokens), Span(others, others))
    return on_each_device(local, x, specs, heads, rules, check_vma=check)


def _per_query_head(pair_BSKH: jax.Array, num_heads: int, rules: Rules) -> jax.Array:
    """Give every query head its own copy of its key or value head, sharded like the query heads."""
    B, S, K, H = pair_BSKH.shape
    pair_BSKGH = jnp.broadcast_to(pair_BSKH[:, :, :, None], (B, S, K, num_heads // K, H))
    whole = rules.spec("batch", "length", None, "head_dim")
    pair_BSNH = jax.lax.reshape(pair_BSKGH, (B, S, num_heads, H), out_sharding=whole)
    return rules.place(pair_BSNH, "batch", "length", "heads", "head_dim")


def _within(x: Operands, *, model: ModelConfig, axes: Axes) -> jax.Array:
    """Attend where this device has the whole length."""
    del axes
    return ALGORITHMS[model.attention](x, model.attention_window)


def _all_gather(x: Operands, *, model: ModelConfig, axes: Axes) -> jax.Array:
    """Attend from this device's part of the length to all keys."""
    # Their gradients are sums over the devices.
    vary = functools.partial(jax.lax.pcast, axis_name=axes, to="varying")
    x = x._replace(k_BSKH=vary(x.k_BSKH), v_BSKH=vary(x.v_BSKH))
    if model.attention == "dense":
        return dense_attention(x, model.attention_window)
    return ALGORITHMS[model.attention](x, model.attention_window, jax.lax.axis_index(axes))


def _all_to_all(x: Operands, *, model: ModelConfig, axes: Axes) -> jax.Array:
    """Attend with the whole length of this device's part of the heads."""
    return by_heads(functools.partial(_within, model=model, axes=()), x, axes)


def _ring(x: Operands, *, model: ModelConfig, axes: Axes) -> jax.Array:
    """Attend by blocks, whatever the algorithm, while keys and values go round."""
    return ring_attention(x, axes, model.attention_window)


CROSSINGS: dict[str, Callable[..., jax.Array]] = {
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "ring": _ring,
}
ALGORITHMS: dict[str, Callable[..., jax.Array]] = {
    "dense": dense_attention,
    "chunked": chunked_attention,
    "flash": flash_attention,
}
