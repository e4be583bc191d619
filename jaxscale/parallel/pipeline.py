"""Pipeline parallelism: microbatches pass through the stages, one tick after the other.

All stages compute at once, as one function mapped over a dimension that lies on the `stage` axis;
after each tick every stage hands its result to the next. So the schedule is a plain scan, and its
backward pass the pipeline in reverse. A stage that has no microbatch computes on stale data.

With several rounds each stage holds as many runs of layers, and a microbatch that leaves the last
stage enters the first again: the bubble shrinks by that factor, and more travels between stages.

Source: Huang et al., GPipe, arXiv:1811.06965; rounds: Narayanan et al., arXiv:2104.04473.
"""

# B batch, L query length, D width, T microbatches, S stages, R rounds

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxscale.config import ConfigError
from jaxscale.parallel.mesh import STAGE_AXIS
from jaxscale.parallel.sharding import Axis, Rules

# Runs one stage: (its parameters, activations, what goes with them) -> activations.
Stage = Callable[[Any, jax.Array, Any], jax.Array]
ROWS: tuple[Axis, ...] = ("batch", "length")
ACTIVATIONS: tuple[Axis, ...] = ("batch", "residual_length", "width")


def bubble_share(num_stages: int, num_microbatches: int, num_rounds: int) -> float:
    """Return the share of the ticks in which a stage has no microbatch of its own."""
    return (num_stages - 1) / (num_microbatches * num_rounds + num_stages - 1)


def bubble_words(num_stages: int, num_microbatches: int, num_rounds: int) -> str | None:
    """Tell what a pipeline leaves idle, or None without one."""
    if num_stages == 1:
        return None
    share = bubble_share(num_stages, num_microbatches, num_rounds)
    rounds = f", {num_rounds} rounds" if num_rounds > 1 else ""
    return (
        f"{num_stages} stages, {num_microbatches} microbatches{rounds}: {share:.0%} of the ticks "
        "are bubble"
    )


def stage_order(num_layers: int, num_stages: int, num_rounds: int) -> np.ndarray:
    """Return which layer each place of the stacked parameters holds, (layers,).

    A stage's layers lie side by side: those that it runs in the first round, then the second.
    """
    runs = np.arange(num_layers).reshape(num_rounds, num_stages, -1)
    return runs.swapaxes(0, 1).ravel()


def check_pipeline(num_layers: int, num_stages: int, num_microbatches: int, rounds: int) -> None:
    """Check that a schedule of several rounds fits.

    Raises:
      ConfigError: naming the knob and the remedy.
    """
    if num_stages == 1 or rounds == 1:
        return
    if num_layers % (num_stages * rounds):
        raise ConfigError(
            f"train.pipeline_rounds={rounds} x mesh.{STAGE_AXIS}={num_stages} does not divide "
            f"model.num_layers={num_layers}; lower one of them"
        )
    if num_microbatches < num_stages:
        raise ConfigError(
            f"train.pipeline_rounds={rounds} needs as many microbatches as stages: raise "
            f"train.accumulation_steps={num_microbatches} to {num_stages}"
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
      run_stage: called with the parameters of one stage in one round and a microbatch.
      parameters: pytree of arrays whose first dimension is the layers, in `stage_order`.
      x_BLD: activations at the first stage.
      riders: pytree of (B, L) arrays that go with them through the stages.
      num_microbatches: it must divide B; at least the number of stages if there are rounds.
      rules: the sharding rules.
    """
    S, T, R = rules.num_shards("layers"), num_microbatches, rules.pipeline_rounds
    staged = jax.tree.map(lambda a: _cut_layers(a, S, R), parameters)
    flow_axes = (ACTIVATIONS, jax.tree.map(lambda _: ROWS, riders))
    ids_S = jax.lax.broadcasted_iota(jnp.int32, (S,), 0, out_sharding=rules.spec("layers"))

    def over(function: Callable[..., Any], *flows: Any) -> Any:
        """Apply a function to each array of a flow and its logical axes."""
        return jax.tree.map(function, *flows, flow_axes)

    def is_stage(stage: int, like: jax.Array) -> jax.Array:
        return ids_S.reshape(S, *[1] * (like.ndim - 1)) == stage

    def tick(carry: tuple[Any, Any], number: jax.Array) -> tuple[tuple[Any, Any], None]:
        flying, waiting = carry

        def enter(a: jax.Array, queue: jax.Array) -> jax.Array:
            return jnp.where(is_stage(0, a), _at(queue, number % T), a)

        # Stage s has microbatch (number - s) mod T, in round (number - s) div T.
        rounds_S = jnp.clip((number - ids_S) // T, 0, R - 1)
        x, riders = jax.tree.map(enter, flying, waiting)
        x = jax.vmap(functools.partial(_in_round, run_stage))(staged, rounds_S, x, riders)
        flying = over(lambda a, axes: _shift(a, rules, axes), (x, riders))
        last = number - (S - 1)

        def leave(a: jax.Array, queue: jax.Array) -> jax.Array:
            a = jnp.where(last >= 0, a, _at(queue, last % T))
            return jax.lax.dynamic_update_index_in_dim(queue, a, last % T, axis=1)

        return (flying, jax.tree.map(leave, flying, waiting)), None

    # Each stage has a queue of all microbatches. Only that of the first counts: what comes round
    # to it waits there for the next round, and is the result in the end.
    queued = over(
        lambda a, axes: _queues(cut_rows(a, T, rules, axes), S, rules, axes), (x_BLD, riders)
    )
    flying = jax.tree.map(lambda queue: _at(queue, 0), queued)
    (_, queued), _ = jax.lax.scan(tick, (flying, queued), jnp.arange(T * R + S - 1))
    queue_STBLD, _ = queued
    out_TBLD = jnp.sum(jnp.where(is_stage(0, queue_STBLD), queue_STBLD, 0), axis=0)
    return join_rows(out_TBLD, rules, ACTIVATIONS)


def on_each_device(
    local: Callable[[Any], jax.Array],
    x: Any,
    in_specs: Any,
    out_specs: PartitionSpec,
    rules: Rules,
    *,
    check_vma: bool,
) -> jax.Array:
    """Call a function with each device's part of its input, in a shard_map.

    Inside a stage too: there `jax.vmap` of a shard_map would gather what all stages have on each
    device (seen in jax 0.10.2).

    Args:
      local: takes one device's part of `x`.
      x: pytree of arrays.
      in_specs: their PartitionSpecs within a stage, a tree of the same shape.
      out_specs: that of the result.
      rules: the sharding rules.
      check_vma: whether JAX follows which mesh axes each value varies over.
    """
    shard_map = functools.partial(jax.shard_map, check_vma=check_vma)
    within = shard_map(local, in_specs=(in_specs,), out_specs=out_specs)
    stages = rules.mesh_axes("layers")
    if not stages:
        return within(x)
    inside = jax.custom_batching.custom_vmap(within)

    @inside.def_vmap
    def over_stages(_: int, mapped: list[Any], x: Any) -> tuple[jax.Array, bool]:
        def staged(spec: PartitionSpec, is_mapped: bool) -> PartitionSpec:
            return PartitionSpec(stages, *spec) if is_mapped else spec

        def of_one_stage(x: Any) -> jax.Array:
            own = jax.tree.map(lambda a, is_mapped: a[0] if is_mapped else a, x, mapped[0])
            return local(own)[None]

        specs = jax.tree.map(staged, in_specs, mapped[0])
        out = shard_map(of_one_stage, in_specs=(specs,), out_specs=staged(out_specs, True))(x)
        return out, True

    result: jax.Array = inside(x)
    return result


def _in_round(run_stage: Stage, parameters: Any, number: jax.Array, x: Any, riders: Any) -> Any:
    """Run a stage with its parameters (R, layers, ...) of one round."""
    choose = functools.partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False)
    if jax.tree.leaves(parameters)[0].shape[0] == 1:
        choose = functools.partial(jnp.squeeze, axis=0)
    return run_stage(jax.tree.map(choose, parameters), x, riders)


def _at(queue: jax.Array, index: Any) -> jax.Array:
    """Return each stage's microbatch of that index."""
    found: jax.Array = jax.lax.dynamic_index_in_dim(queue, index, axis=1, keepdims=False)
    return found


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


def _cut_layers(a: jax.Array, num_stages: int, num_rounds: int) -> jax.Array:
    """Cut (layers, ...) into (S, R, layers / S / R, ...), each stage its own."""
    first, *rest = jax.typeof(a).sharding.spec
    shape = (num_stages, num_rounds, a.shape[0] // num_stages // num_rounds, *a.shape[1:])
    return jax.lax.reshape(a, shape, out_sharding=PartitionSpec(first, None, None, *rest))


def _queues(a: jax.Array, num_stages: int, rules: Rules, axes: tuple[Axis, ...]) -> jax.Array:
    """Return all microbatches (T, ...) once for each stage, (S, T, ...)."""
    dims = tuple(range(1, a.ndim + 1))
    spec = rules.spec("layers", None, *axes)
    return jax.lax.broadcast_in_dim(a, (num_stages, *a.shape), dims, out_sharding=spec)


def _shift(a: jax.Array, rules: Rules, axes: tuple[Axis, ...]) -> jax.Array:
    """Hand what each stage has to the next, and what the last one has to the first."""
    spec, stages = rules.spec("layers", *axes), rules.mesh_axes("layers")

    def shift(a: jax.Array) -> jax.Array:
        size = jax.lax.axis_size(stages)
        following = [(stage, (stage + 1) % size) for stage in range(size)]
        return jax.lax.ppermute(a, stages, following)

    return jax.shard_map(shift, in_specs=spec, out_specs=spec)(a)
