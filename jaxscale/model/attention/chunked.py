"""Attention by blocks: the softmax is built up over pairs of a query block and a key block.

No more than one block of scores exists at a time, and the backward pass computes it again from the
saved logarithm of the sums. Pairs that the mask hides are not on the list that is worked off, so
that they cost nothing. `ring.py` makes its rounds with the same two passes.

Source: Rabe and Staats, arXiv:2112.05682; the backward pass: Dao et al., arXiv:2205.14135.
"""

# B batch, L query length, S key length, N heads, K kv heads, G = N/K, H head dim,
# P pairs, Q a query block, C a key block

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxscale.model.attention.dense import (
    MASKED,
    Operands,
    Span,
    heads_first,
    tokens_first,
    visible,
)
from jaxscale.model.contract import product

LARGEST_BLOCK = 512
# So many pairs are written out, where the compiler sees at which constant place each block lies.
WRITTEN_OUT = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """What to compute: who sees whom, and the pairs of blocks to visit, in this order.

    Attributes:
      queries: where the queries stand.
      keys: where the keys stand.
      queries_P: int32 index of each pair's query block.
      keys_P: int32 index of its key block.
      needed_P: whether the pair counts on this device; None: all do.
      block: tokens of a block.
      window: tokens that a query sees, itself among them; 0 = all before it.
    """

    queries: Span
    keys: Span
    queries_P: Any
    keys_P: Any
    needed_P: Any = None
    block: int = dataclasses.field(default=0, metadata={"static": True})
    window: int = dataclasses.field(default=0, metadata={"static": True})


class Sums(NamedTuple):
    """What is known of each query's softmax after some keys, float32.

    Attributes:
      out_BKGLH: sum of exp(score - peak) value.
      peak_BKGL1: largest score.
      total_BKGL1: sum of exp(score - peak).
    """

    out_BKGLH: jax.Array
    peak_BKGL1: jax.Array
    total_BKGL1: jax.Array


class Gradients(NamedTuple):
    """Gradients of queries, keys and values, float32."""

    q_BKGLH: jax.Array
    k_BKSH: jax.Array
    v_BKSH: jax.Array


def block_size(length: int) -> int:
    """Return the tokens of a block: the largest divisor of the length up to its fourth and 512."""
    limit = min(LARGEST_BLOCK, max(length // 4, 1))
    return next(size for size in range(limit, 0, -1) if length % size == 0)


def chunked_attention(x: Operands, window: int, rank: Any = None) -> jax.Array:
    """Return softmax(q k) v, (B, L, N, H), in q's dtype.

    A query that sees no key gets a mean of values, which no loss reads.

    Args:
      x: queries, keys, values.
      window: tokens that a query sees, itself among them; 0 = all before it.
      rank: which of the equal parts of the length the queries are; None: all of it.
    """
    block = block_size(x.q_BLNH.shape[1])
    queries_P, keys_P = np.indices((x.q_BLNH.shape[1] // block, x.k_BSKH.shape[1] // block))
    queries_P, keys_P = queries_P.ravel().astype(np.int32), keys_P.ravel().astype(np.int32)
    first = 0 if rank is None else rank * (x.q_BLNH.shape[1] // block)
    needed_P = may_see((first + queries_P) * block, keys_P * block, block, window)
    if rank is None:
        queries_P, keys_P, needed_P = queries_P[needed_P], keys_P[needed_P], None
    work = Work(x.queries, x.keys, queries_P, keys_P, needed_P, block, window)
    return tokens_first(_attention(*heads_first(x), work))


def may_see(query_P: Any, key_P: Any, block: int, window: int) -> Any:
    """Tell of blocks, by their first positions, whether a query of one may see a key of another."""
    is_causal_P = query_P >= key_P
    if not window:
        return is_causal_P
    return is_causal_P & (query_P - key_P - (block - 1) < window)


@jax.custom_vjp
def _attention(q_BKGLH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, work: Work) -> jax.Array:
    out_BKGLH, _ = _forward(q_BKGLH, k_BKSH, v_BKSH, work)
    return out_BKGLH


def _forward(
    q_BKGLH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, work: Work
) -> tuple[jax.Array, Any]:
    sums = add_keys(no_sums(q_BKGLH), q_BKGLH, k_BKSH, v_BKSH, work)
    out_BKGLH, log_total_BKGL1 = finished(sums, q_BKGLH.dtype)
    return out_BKGLH, (q_BKGLH, k_BKSH, v_BKSH, work, out_BKGLH, log_total_BKGL1)


def _backward(residuals, d_out_BKGLH):  # type: ignore[no-untyped-def]
    q_BKGLH, k_BKSH, v_BKSH, work, out_BKGLH, log_total_BKGL1 = residuals
    queries = known(q_BKGLH, out_BKGLH, log_total_BKGL1, d_out_BKGLH)
    zeros = no_gradients(q_BKGLH, k_BKSH, v_BKSH)
    gradients = add_gradients(zeros, queries, k_BKSH, v_BKSH, work)
    return (*(x.astype(q_BKGLH.dtype) for x in gradients), None)


_attention.defvjp(_forward, _backward)


def no_sums(q_BKGLH: jax.Array) -> Sums:
    """Return the sums before any key."""
    # Made from q, to vary over the same mesh axes inside of shard_map.
    zeros_BKGLH = q_BKGLH.astype(jnp.float32) * 0
    zeros_BKGL1 = zeros_BKGLH[..., :1]
    return Sums(zeros_BKGLH, zeros_BKGL1 + MASKED, zeros_BKGL1)


def finished(sums: Sums, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return the attention output in `dtype` and the logarithm of each query's whole sum."""
    out_BKGLH = (sums.out_BKGLH / sums.total_BKGL1).astype(dtype)
    log_total_BKGL1 = sums.peak_BKGL1 + jnp.log(sums.total_BKGL1)
    # One name for both: a backward pass that keeps them computes no score of the forward pass anew.
    return checkpoint_name(out_BKGLH, "context"), checkpoint_name(log_total_BKGL1, "context")


def add_keys(
    sums: Sums, q_BKGLH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, work: Work
) -> Sums:
    """Return the sums with these keys and values added."""
    work = _inside(work, q_BKGLH)

    def add_pair(sums: Sums, i: Any, j: Any) -> Sums:
        scores_BKGQC = _scores(_cut(q_BKGLH, i, work), _cut(k_BKSH, j, work))
        scores_BKGQC = jnp.where(_mask(work, i, j), scores_BKGQC, MASKED)
        old = Sums(*(_cut(x, i, work) for x in sums))
        peak_BKGQ1 = jnp.maximum(old.peak_BKGL1, jnp.max(scores_BKGQC, axis=-1, keepdims=True))
        weights_BKGQC = jnp.exp(scores_BKGQC - peak_BKGQ1)
        kept_BKGQ1 = jnp.exp(old.peak_BKGL1 - peak_BKGQ1)
        values_BKGQH = product(
            "bkgqc,bkch->bkgqh", weights_BKGQC.astype(v_BKSH.dtype), _cut(v_BKSH, j, work)
        )
        new = Sums(
            old.out_BKGLH * kept_BKGQ1 + values_BKGQH,
            peak_BKGQ1,
            old.total_BKGL1 * kept_BKGQ1 + jnp.sum(weights_BKGQC, axis=-1, keepdims=True),
        )
        return Sums(*(_put(x, i, y, work) for x, y in zip(sums, new, strict=True)))

    return _visit(add_pair, sums, work)


class Known(NamedTuple):
    """What the backward pass knows of each query.

    Attributes:
      q_BKGLH: queries.
      d_out_BKGLH: gradient of the output.
      log_total_BKGL1: logarithm of the sum of exp(score) over all keys, float32.
      d_sum_BKGL1: sum over H of output times its gradient, float32.
    """

    q_BKGLH: jax.Array
    d_out_BKGLH: jax.Array
    log_total_BKGL1: jax.Array
    d_sum_BKGL1: jax.Array


def known(
    q_BKGLH: jax.Array, out_BKGLH: jax.Array, log_total_BKGL1: jax.Array, d_out_BKGLH: jax.Array
) -> Known:
    """Return what the backward pass knows of each query."""
    product_BKGLH = out_BKGLH.astype(jnp.float32) * d_out_BKGLH.astype(jnp.float32)
    d_sum_BKGL1 = jnp.sum(product_BKGLH, axis=-1, keepdims=True)
    return Known(q_BKGLH, d_out_BKGLH, log_total_BKGL1, d_sum_BKGL1)


def no_gradients(q_BKGLH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> Gradients:
    """Return the gradients before any key."""
    return Gradients(*(x.astype(jnp.float32) * 0 for x in (q_BKGLH, k_BKSH, v_BKSH)))


def add_gradients(
    gradients: Gradients, queries: Known, k_BKSH: jax.Array, v_BKSH: jax.Array, work: Work
) -> Gradients:
    """Return the gradients with the part of these keys and values added."""
    work = _inside(work, queries.q_BKGLH)

    def add_pair(gradients: Gradients, i: Any, j: Any) -> Gradients:
        q_BKGQH, d_out_BKGQH, log_total_BKGQ1, d_sum_BKGQ1 = (_cut(x, i, work) for x in queries)
        k_BKCH, v_BKCH = _cut(k_BKSH, j, work), _cut(v_BKSH, j, work)
        weights_BKGQC = jnp.exp(_scores(q_BKGQH, k_BKCH) - log_total_BKGQ1)
        weights_BKGQC = jnp.where(_mask(work, i, j), weights_BKGQC, 0.0)
        d_weights_BKGQC = product("bkgqh,bkch->bkgqc", d_out_BKGQH, v_BKCH)
        d_scores_BKGQC = weights_BKGQC * (d_weights_BKGQC - d_sum_BKGQ1)
        d_scores_BKGQC = d_scores_BKGQC.astype(q_BKGQH.dtype)
        weights_BKGQC = weights_BKGQC.astype(q_BKGQH.dtype)
        q, k, v = gradients
        added_q = product("bkgqc,bkch->bkgqh", d_scores_BKGQC, k_BKCH)
        added_k = product("bkgqc,bkgqh->bkch", d_scores_BKGQC, q_BKGQH)
        added_v = product("bkgqc,bkgqh->bkch", weights_BKGQC, d_out_BKGQH)
        return Gradients(
            _put(q, i, _cut(q, i, work) + added_q, work),
            _put(k, j, _cut(k, j, work) + added_k, work),
            _put(v, j, _cut(v, j, work) + added_v, work),
        )

    return _visit(add_pair, gradients, work)


def _inside(work: Work, q_BKGLH: jax.Array) -> Work:
    """Return the work, made to look as if it depended on the queries.

    What does not depend on the layer is hoisted out of the scan over layers by JAX: here the masks
    of all pairs, length^2 of them.
    """
    spans = (work.queries, work.keys)
    (queries, keys), _ = jax.lax.optimization_barrier((spans, q_BKGLH))
    return dataclasses.replace(work, queries=queries, keys=keys)


def _visit(add_pair: Callable[..., Any], sums: Any, work: Work) -> Any:
    """Call `add_pair(sums, i, j)` for the pairs of blocks that are needed, one after the other."""

    def step(sums: Any, pair: Any) -> tuple[Any, None]:
        i, j, needed = pair
        if needed is None:
            return add_pair(sums, i, j), None
        return jax.lax.cond(needed, lambda: add_pair(sums, i, j), lambda: sums), None

    pairs = (work.queries_P, work.keys_P, work.needed_P)
    return jax.lax.scan(step, sums, pairs, unroll=len(work.queries_P) <= WRITTEN_OUT)[0]


def _scores(q_BKGQH: jax.Array, k_BKCH: jax.Array) -> jax.Array:
    return product("bkgqh,bkch->bkgqc", q_BKGQH, k_BKCH)


def _mask(work: Work, i: Any, j: Any) -> jax.Array:
    """Return which keys of block j each query of block i sees, (B, 1, 1, Q, C)."""

    def of_block(span: Span, index: Any) -> Span:
        start = index * work.block
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, work.block, axis=1)  # noqa: E731
        return jax.tree.map(cut, span)

    mask_BQC = visible(of_block(work.queries, i), of_block(work.keys, j), work.window)
    return mask_BQC[:, None, None]


def _cut(x: jax.Array, index: Any, work: Work) -> jax.Array:
    """Return a block of the tokens, which are the last dimension but one."""
    return jax.lax.dynamic_slice_in_dim(x, index * work.block, work.block, axis=-2)


def _put(x: jax.Array, index: Any, block: jax.Array, work: Work) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block, index * work.block, axis=-2)
