"""Pipeline parallelism: microbatches pass through the stages, one tick after the other.

All stages compute at once, as one function mapped over a dimension that lies on the `stage` axis;
after each tick every stage hands its result to the next. So the schedule is a plain scan, and its
backward pass the pipeline in reverse. A stage that has no microbatch computes on stale data.

Source: Huang et al., GPipe, arXiv:1811.06965.
"""

# B batch, L query length, D width, T microbatches, S stages

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxscale.parallel.sharding import Axis, Rules

# Runs one stage: (its parameters, activations, what goes with them) -> activations.
Stage = Callable[[Any, jax.Array, Any], jax.Array]
ROWS: tuple[Axis, ...] = ("batch", "length")
ACTIVATIONS: tuple[Axis, ...] = ("batch", "residual_length", "width")


def bubble_share(num_stages: int, num_microbatches: int) -> float:
    """Return the share of the ticks in which a stage has no microbatch of its own."""
    return (num_stages - 1) / (num_microbatches + num_stages - 1)


def bubble_words(num_stages: int, num_microbatches: int) -> str | None:
    """Tell what a pipeline leaves idle, or None without one."""
    if num_stages == 1:
        return None
    share = bubble_share(num_stages, num_microbatches)
    return (
        f"{num_stages} stages, {num_microbatches} microbatches: {share:.0%} of the ticks are bubble"
    )


def pipelined(
    run_stage: Stage,
    parameters: Any,
    x_BLD: jax.Array,
    riders: Any,
    *,
    num_microbatches: int,
    rules: Rules,
) -> jax.Array:
    """Return what all stages in turn make of a batch, (B, L, D).

    Args:
      run_stage: called with the parameters of one stage and a microbatch.
      parameters: pytree of arrays whose first dimension, the layers, is cut into stages.
      x_BLD: activations at the first stage.
      riders: pytree of (B, L) arrays that go with them through the stages.
      num_microbatches: it must divide B.
      rules: the sharding rules.
    """
    S, T = rules.num_shards("layers"), num_microbatches
    staged = jax.tree.map(lambda a: _cut_layers(a, S), parameters)
    flow = (x_BLD, riders)
    flow_axes = (ACTIVATIONS, jax.tree.map(lambda _: ROWS, riders))

    def over(function: Callable[..., Any], *flows: Any) -> Any:
        """Apply a function to each array of a flow and its logical axes."""
        return jax.tree.map(function, *flows, flow_axes)

    # Stage s has microbatch t - s at tick t. What enters after the last one is never read.
    order = np.arange(T + S - 1) % T
    entering = over(lambda a, axes: cut_rows(a, T, rules, axes)[order], flow)
    ids_S = jax.lax.broadcasted_iota(jnp.int32, (S,), 0, out_sharding=rules.spec("layers"))

    def enter(waiting: jax.Array, new: jax.Array, axes: tuple[Axis, ...]) -> jax.Array:
        ids = ids_S.reshape(S, *[1] * new.ndim)
        return jnp.where(ids == 0, _on_all_stages(new, S, rules, axes), waiting)

    def tick(flying: Any, new: Any) -> tuple[Any, jax.Array]:
        x, riders = over(enter, flying, new)
        x = jax.vmap(run_stage)(staged, x, riders)
        return over(lambda a, axes: _shift(a, rules, axes), (x, riders)), x

    first = jax.tree.map(lambda a: a[0], entering)
    flying = over(lambda a, axes: _on_all_stages(a, S, rules, axes), first)
    _, out_TSBLD = jax.lax.scan(tick, flying, entering)
    is_last = ids_S.reshape(1, S, 1, 1, 1) == S - 1
    out_TBLD = jnp.sum(jnp.where(is_last, out_TSBLD[S - 1 :], 0), axis=1)
    return join_rows(out_TBLD, rules, ACTIVATIONS)


def cut_rows(a: jax.Array, parts: int, rules: Rules, axes: tuple[Axis, ...]) -> jax.Array:
    """Cut (B, ...) into (parts, B/parts, ...): strided rows, so that no row changes its device.

    Args:
      a: an array.
      parts: they must divide B.
      rules: the sharding rules.
      axes: its logical axes, `batch` first.
    """
    spec = rules.spec("batch", None, *axes[1:])
    cut = jax.lax.reshape(a, (a.shape[0] // parts, parts, *a.shape[1:]), out_sharding=spec)
    return jnp.moveaxis(cut, 1, 0)


def join_rows(a: jax.Array, rules: Rules, axes: tuple[Axis, ...]) -> jax.Array:
    """Undo `cut_rows`."""
    parts, rows, *rest = a.shape
    joined = jnp.moveaxis(a, 0, 1)
    return jax.lax.reshape(joined, (rows * parts, *rest), out_sharding=rules.spec(*axes))


def _cut_layers(a: jax.Array, num_stages: int) -> jax.Array:
    """Cut (layers, ...) into (S, layers / S, ...), each stage its own."""
    first, *rest = jax.typeof(a).sharding.spec
    spec = PartitionSpec(first, None, *rest)
    shape = (num_stages, a.shape[0] // num_stages, *a.shape[1:])
    return jax.lax.reshape(a, shape, out_sharding=spec)


def _on_all_stages(
    a: jax.Array, num_stages: int, rules: Rules, axes: tuple[Axis, ...]
) -> jax.Array:
    """Return the array once for each stage, (S, ...)."""
    dims = tuple(range(1, a.ndim + 1))
    spec = rules.spec("layers", *axes)
    return jax.lax.broadcast_in_dim(a, (num_stages, *a.shape), dims, out_sharding=spec)


def _shift(a: jax.Array, rules: Rules, axes: tuple[Axis, ...]) -> jax.Array:
    """Hand what each stage has to the next, and what the last one has to the first."""
    spec, stages = rules.spec("layers", *axes), rules.mesh_axes("layers")

    def shift(a: jax.Array) -> jax.Array:
        size = jax.lax.axis_size(stages)
        following = [(stage, (stage + 1) % size) for stage in range(size)]
        return jax.lax.ppermute(a, stages, following)

    return jax.shard_map(shift, in_specs=spec, out_specs=spec)(a)
