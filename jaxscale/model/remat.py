"""Runs the stack of blocks, and says what the backward pass keeps of each and what it recomputes.

By one scan over the layers, or over groups of `model.remat_every` of them, so that compile time
does not grow with depth; or written out.
"""

# B batch, L query length, D width

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxscale.config import OFFLOAD, ModelConfig
from jaxscale.parallel.host_memory import DEVICE, HOST
from jaxscale.parallel.sharding import Rules

# From the residual stream (B, L, D) and one block's parameters to the stream after it.
RunBlock = Callable[[jax.Array, Any], jax.Array]
Policy = Callable[..., Any]
# Primitives whose results are not kept even where all activations are.
RECOMPUTED = ("reshard", "slice", "squeeze", "logistic", "tanh", "erf")


def run_blocks(
    run_block: RunBlock, x_BLD: jax.Array, stack: Any, model: ModelConfig, rules: Rules
) -> jax.Array:
    """Return the residual stream after all blocks of a stack, whose leaves lead with the layers."""
    num_layers = jax.tree.leaves(stack)[0].shape[0]
    every = 1 if model.remat == "none" else model.remat_every
    written_out = model.scan_unroll >= num_layers

    def run_one(x_BLD: jax.Array, weights: Any, number: int | None) -> jax.Array:
        # A slice of a group is taken in here, where the backward pass can take it again.
        return run_block(x_BLD, weights if number is None else _layer(weights, number))

    # In a scan nothing joins what forward and backward pass have in common.
    wrap = functools.partial(jax.checkpoint, run_one, static_argnums=2, prevent_cse=written_out)
    remat = _policy(model, rules)
    last = run_one if remat is None else wrap(policy=remat)
    kept = wrap(policy=_keep_activations)
    if written_out:
        # A scan would stack what the backward pass needs.
        for number, weights in enumerate(_unstacked(stack, num_layers), start=1):
            x_BLD = (kept if number % every else last)(x_BLD, weights, None)
        return x_BLD

    def run_group(x_BLD: jax.Array, group: Any) -> tuple[jax.Array, None]:
        if every == 1:
            return last(x_BLD, group, None), None
        for number in range(every - 1):
            x_BLD = kept(x_BLD, group, number)
        return last(x_BLD, group, every - 1), None

    return jax.lax.scan(run_group, x_BLD, _grouped(stack, every), unroll=model.scan_unroll)[0]


def _policy(model: ModelConfig, rules: Rules) -> Policy | None:
    """Return which results of a block `model.remat` keeps; None for all of them."""
    policies = jax.checkpoint_policies
    if model.remat == "none":
        return _keep_activations if rules.mesh_axes("embed") else None
    if model.remat == "full":
        return policies.nothing_saveable
    if model.remat == "dots":
        # Those of weights alone: attention's scores have batch dimensions and grow with length^2.
        return policies.dots_with_no_batch_dims_saveable
    on_device = [name for name in model.remat_names if not name.startswith(OFFLOAD)]
    on_host = [name.removeprefix(OFFLOAD) for name in model.remat_names if name not in on_device]
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=on_device,
        names_which_can_be_offloaded=on_host,
        offload_src=DEVICE,
        offload_dst=HOST,
    )


def _keep_activations(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Keep every activation, but no copy of weights, and nothing twice.

    Gathered weights would undo FSDP's sharding; cut out of the stack, they would be held twice.
    What an activation's nonlinearity would have kept is as quickly computed as read.
    """
    if primitive.name == "dot_general":
        return True
    if primitive.name == "convert_element_type":
        grows = params["new_dtype"].itemsize > operands[0].dtype.itemsize
        return not (grows or _is_gathered(operands))
    return not (primitive.name in RECOMPUTED or _is_gathered(operands))


def _is_gathered(operands: tuple[Any, ...]) -> bool:
    return any(operand.sharding.spec.reduced for operand in operands)


def _layer(group: Any, number: int) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, number, keepdims=False), group)


def _grouped(stack: Any, size: int) -> Any:
    """Return the stack with its layers in groups: (layers, ...) as (layers / size, size, ...)."""
    if size == 1:
        return stack
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), stack)


def _unstacked(stack: Any, count: int) -> list[Any]:
    """Return the parameters of each block; their gradients are stacked again in one go."""
    leaves, structure = jax.tree.flatten(stack)
    parts = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [jax.lax.squeeze(part[i], (0,)) for part in parts])
        for i in range(count)
    ]
