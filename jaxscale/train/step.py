"""The training step: one donated, jitted function from state and batch to state and metrics.

The same function serves the real run, the dry run, the planner and the tests.
"""

# B batch, L query length, A accumulation steps

import dataclasses
import functools
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxscale import records
from jaxscale.hardware import chip_for
from jaxscale.model.attention.attend import in_token_order
from jaxscale.model.attention.dense import Span
from jaxscale.model.decoder import Definition, Params
from jaxscale.model.loss import loss_sum
from jaxscale.parallel.host_memory import to_device, to_host
from jaxscale.parallel.mesh import STAGE_AXIS
from jaxscale.parallel.pipeline import cut_rows
from jaxscale.parallel.sharding import Rules
from jaxscale.train.loss_scale import adjusted, can_fall, loss_factor
from jaxscale.train.state import (
    Assembly,
    Batch,
    TrainState,
    abstract_batch,
    abstract_state,
    in_float32,
    optimizer_axes,
    place,
    stored,
)

Metrics = dict[str, jax.Array]


def batch_loss(
    definition: Definition,
    params: Params,
    batch: Batch,
    *,
    chunk_tokens: int,
    document_mask: bool = True,
    num_microbatches: int = 1,
) -> jax.Array:
    """Return the weighted sum of the batch's token losses, a float32 scalar in nats.

    Args:
      definition: the decoder.
      params: its parameters.
      batch: the batch.
      chunk_tokens: tokens per device whose logits exist at once; 0 = all.
      document_mask: whether tokens attend only within their document.
      num_microbatches: parts in which the batch passes through the stages, if there are any.
    """
    decoder, rules = definition.bind(params), definition.rules
    spec = rules.spec("batch", "length")
    positions_BL = jax.lax.broadcasted_iota(jnp.int32, batch["tokens"].shape, 1, out_sharding=spec)
    batch = in_token_order({**batch, "positions": positions_BL}, definition.model, rules)
    span = Span(batch["positions"], batch["segments"] if document_mask else None)
    x_BLD, _ = decoder(batch["tokens"], span, num_microbatches=num_microbatches)
    return loss_sum(decoder, x_BLD, batch["targets"], batch["weights"], chunk_tokens=chunk_tokens)


def part_loss(assembly: Assembly, params: Params, batch: Batch) -> jax.Array:
    """Return `batch_loss` as the config has it worked off."""
    train = assembly.config.train
    return batch_loss(
        assembly.definition,
        params,
        batch,
        chunk_tokens=train.loss_chunk_tokens,
        document_mask=assembly.config.data.document_mask,
        num_microbatches=train.accumulation_steps,
    )


def loss_and_gradients(
    assembly: Assembly, params: Params, batch: Batch, factor: jax.Array | None = None
) -> tuple[jax.Array, Params]:
    """Return the mean loss per weighted token, and its gradients in the parameters' shardings.

    With `train.accumulation_steps`, the batch is worked off in as many parts, one after the other,
    or passes in as many through the stages of a pipeline.

    Args:
      assembly: the training program.
      params: the parameters.
      batch: the batch.
      factor: of the loss in the backward pass; what is returned is without it.
    """
    if factor is None:
        return _scaled(assembly, params, batch, None)
    scaled = in_float32(_scaled(assembly, params, batch, factor))
    loss, gradients = jax.tree.map(lambda value: value / factor, scaled)
    return loss, gradients


def _scaled(
    assembly: Assembly, params: Params, batch: Batch, factor: jax.Array | None
) -> tuple[jax.Array, Params]:
    """Return loss and gradients multiplied by the factor."""
    count = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    count = count if factor is None else count / factor

    def mean_loss(params: Params, batch: Batch) -> jax.Array:
        return part_loss(assembly, params, batch) / count

    if num_parts(assembly) == 1:
        return jax.value_and_grad(mean_loss)(params, batch)

    def add_part(sums: tuple[jax.Array, Params], part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(mean_loss)(params, part)), None

    # Over devices that hold the same shard, gradients are added up once, after the last part.
    rules, axes = assembly.rules, assembly.definition.axes
    zeros = jax.tree.map(rules.deferred_zeros, params, axes)
    params = jax.tree.map(rules.defer_sum, params, axes)
    sums = (jnp.float32(0), zeros)
    loss, gradients = jax.lax.scan(add_part, sums, microbatches(assembly, batch))[0]
    return loss, jax.tree.map(rules.sum_deferred, gradients, axes)


def num_parts(assembly: Assembly) -> int:
    """Return in how many parts a batch is worked off one after the other; 1 with a pipeline."""
    in_stages = assembly.mesh.shape[STAGE_AXIS] > 1
    return 1 if in_stages else assembly.config.train.accumulation_steps


def microbatches(assembly: Assembly, batch: Batch) -> Batch:
    """Return the batch's arrays as (A, B/A, L): what is worked off one after the other."""
    cut = functools.partial(cut_rows, parts=num_parts(assembly), rules=assembly.rules)
    return {name: cut(a_BL, axes=("batch", "length")) for name, a_BL in batch.items()}


def batch_hash(batch: Batch, rules: Rules) -> jax.Array:
    """Return a uint32 hash of a batch that depends on its contents and order, never on the mesh.

    A sum of products modulo 2^32 is exact in any order, so every sharding gives the same number.
    """
    tokens_BL = batch["tokens"]
    B, L = tokens_BL.shape
    iota = functools.partial(
        jax.lax.broadcasted_iota, jnp.uint32, (B, L), out_sharding=rules.spec("batch", "length")
    )
    index_BL = iota(0) * jnp.uint32(L) + iota(1)
    mixed_BL = (index_BL ^ (index_BL >> 15)) * jnp.uint32(0x9E3779B1) | jnp.uint32(1)
    total = jnp.uint32(0)
    for factor, name in enumerate(("tokens", "targets", "segments", "weights"), start=1):
        values_BL = batch[name].astype(jnp.uint32) + jnp.uint32(factor)
        total = total * jnp.uint32(31) + jnp.sum(values_BL * mixed_BL, dtype=jnp.uint32)
    return total


def train_step(assembly: Assembly, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Return the next state and the step's metrics; a non-finite step leaves the weights alone."""
    state = dataclasses.replace(state, params=to_device(state.params))
    factor = loss_factor(assembly.config, state.loss_scale)
    loss, gradients = loss_and_gradients(assembly, state.params, batch, factor)
    gradient_norm = optax.tree.norm(gradients)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    learning_rate = assembly.schedule(state.step)
    if assembly.config.train.offload != "none":
        # Fetched when the activations are gone, and not before.
        gradients, optimizer = jax.lax.optimization_barrier((gradients, state.optimizer))
        state = dataclasses.replace(state, optimizer=to_device(optimizer))
    params, optimizer = updated(assembly, state, gradients, learning_rate)
    keep = jax.named_scope("optimizer")(functools.partial(jnp.where, is_finite))
    bad = 1 - is_finite.astype(jnp.int32)
    # An overflow that a lower scale may cure is skipped and brings no run nearer to its end.
    hopeless = bad if state.loss_scale is None else bad * ~can_fall(state.loss_scale)
    state = TrainState(
        step=state.step + 1,
        params=jax.tree.map(keep, params, state.params),
        optimizer=jax.tree.map(keep, optimizer, state.optimizer),
        skipped_steps=state.skipped_steps + bad,
        skipped_in_a_row=(state.skipped_in_a_row + hopeless) * bad,
        loss_scale=state.loss_scale and adjusted(state.loss_scale, is_finite),
    )
    metrics = {
        records.LOSS: loss,
        records.GRADIENT_NORM: gradient_norm,
        records.LEARNING_RATE: learning_rate,
        records.SKIPPED_STEPS: state.skipped_steps,
        records.SKIPPED_IN_A_ROW: state.skipped_in_a_row,
        records.BATCH_HASH: batch_hash(batch, assembly.rules),
    }
    if factor is not None:
        metrics[records.LOSS_SCALE] = factor
    return stored(assembly.config, state, to_host), metrics


@jax.named_scope("optimizer")
def updated(
    assembly: Assembly, state: TrainState, gradients: Params, learning_rate: jax.Array
) -> tuple[Params, Any]:
    """Apply the optimizer where its state lies, then bring the update to the parameters."""
    rules, axes = assembly.rules, optimizer_axes(assembly.definition)
    updates, optimizer = assembly.optimizer.update(
        in_float32(place(rules, gradients, axes)),
        state.optimizer,
        in_float32(place(rules, state.params, axes)),
    )
    updates = place(rules, updates, assembly.definition.axes)
    params = jax.tree.map(
        lambda p, u: (p - learning_rate * u).astype(p.dtype), state.params, updates
    )
    return params, optimizer


def compile_step(assembly: Assembly, options: Mapping[str, str] | None = None) -> Any:
    """Compile the step `(state, batch) -> (state, metrics)`; the old state is donated.

    The result takes arrays of exactly the abstract state's and batch's shardings, so that nothing
    can compile a second time. Its `memory_analysis()` and `as_text()` tell what it needs.

    Args:
      assembly: the training program.
      options: of the compiler, by name; None: those of hardware.py for the chip.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return train_step(assembly, state, batch)

    state, batch = abstract_state(assembly), abstract_batch(assembly)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    with jax.set_mesh(assembly.mesh):
        lowered = jitted.lower(state, batch)
    if options is None:
        chip = chip_for(assembly.mesh.devices.flat[0].device_kind)
        options = dict(chip.compiler_options) if chip else {}
    return _compiled(lowered, dict(options))


def _compiled(lowered: Any, options: dict[str, str]) -> Any:
    """Compile with those options that the installed compiler knows; say which it does not."""
    while True:
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '([^']*)'", str(error))
            if not unknown or unknown[1] not in options:
                raise
            warnings.warn(f"the compiler knows no option {unknown[1]}; left out", stacklevel=3)
            del options[unknown[1]]
