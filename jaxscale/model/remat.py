"""Runs the stack of blocks, and says what the backward pass keeps of each and what it recomputes.

By a scan over the blocks that recompute and one over those that keep everything, so that compile
time does not grow with depth; or written out.
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
RECOMPUTED = ("reshard", "logistic", "tanh", "erf")


def run_blocks(
    run_block: RunBlock, x_BLD: jax.Array, stack: Any, model: ModelConfig, rules: Rules
) -> jax.Array:
    """Return the residual stream after all blocks of a stack, whose leaves lead with the layers.

    One in `model.remat_every` recomputes. They stand first and not in between: the backward pass
    has used up what the others keep when it comes to them, and each scan's body is one block.
    """
    num_layers = jax.tree.leaves(stack)[0].shape[0]
    every = 1 if model.remat == "none" else model.remat_every
    num_remat = -(-num_layers // every)
    written_out = model.scan_unroll >= num_layers
    # In a scan nothing joins what forward and backward pass have in common.
    wrap = functools.partial(jax.checkpoint, run_block, prevent_cse=written_out)
    policy = _policy(model, rules)
    first = run_block if policy is None else wrap(policy=policy)
    kept = wrap(policy=_keep_activations)
    if written_out:
        # A scan would stack what the backward pass needs.
        for number, weights in enumerate(_unstacked(stack, num_layers)):
            x_BLD = (first if number < num_remat else kept)(x_BLD, weights)
        return x_BLD

    def scan(block: RunBlock, x_BLD: jax.Array, stack: Any) -> jax.Array:
        def body(x_BLD: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            return block(x_BLD, weights), None

        return jax.lax.scan(body, x_BLD, stack, unroll=model.scan_unroll)[0]

    if every == 1:
        return scan(first, x_BLD, stack)
    recomputing, keeping = _cut(stack, num_remat)
    return scan(kept, scan(first, x_BLD, recomputing), keeping)


def _policy(model: ModelConfig, rules: Rules) -> Policy | None:
    """Return which results of a block `model.remat` keeps; None for all of them."""
    policies = jax.checkpoint_policies
    if model.remat == "none":
        return _keep_activations if rules.mesh_axes("embed") else None
    if model.remat == "full":
        return policies.nothing_saveable
    if model.remat == "dots":
        return _keep_products
    on_device = [name for name in model.remat_names if not name.startswith(OFFLOAD)]
    on_host = [name.removeprefix(OFFLOAD) for name in model.remat_names if name not in on_device]
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=on_device,
        names_which_can_be_offloaded=on_host,
        offload_src=DEVICE,
        offload_dst=HOST,
    )


def _keep_products(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Keep products with weights: scores have batch dimensions, and grow with length^2."""
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return keep(primitive, *operands, **params) and not _turns(operands)


def _keep_activations(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Keep every activation, but no copy of weights, and nothing twice.

    Gathered weights would undo FSDP's sharding. A nonlinearity is as quickly computed as read.
    """
    if primitive.name == "dot_general":
        return not _turns(operands)
    if primitive.name == "convert_element_type":
        grows = params["new_dtype"].itemsize > operands[0].dtype.itemsize
        return not (grows or _is_gathered(operands))
    return not (primitive.name in RECOMPUTED or _is_gathered(operands))


def _turns(operands: tuple[Any, ...]) -> bool:
    """Tell whether a product turns features, as rotary positions do on TPUs.

    Nothing else multiplies heads, which are 4-D, by a matrix: their weights are 3-D.
    """
    return sorted(operand.ndim for operand in operands) == [2, 4]


def _is_gathered(operands: tuple[Any, ...]) -> bool:
    return any(operand.sharding.spec.reduced for operand in operands)


def _cut(stack: Any, count: int) -> tuple[Any, Any]:
    """Return the parameters of the first blocks and of the others."""
    leaves, structure = jax.tree.flatten(stack)
    parts = [jax.lax.split(leaf, (count, leaf.shape[0] - count)) for leaf in leaves]
    first, rest = zip(*parts, strict=True)
    return jax.tree.unflatten(structure, first), jax.tree.unflatten(structure, rest)


def _unstacked(stack: Any, count: int) -> list[Any]:
    """Return the parameters of each block; their gradients are stacked again in one go."""
    leaves, structure = jax.tree.flatten(stack)
    parts = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [jax.lax.squeeze(part[i], (0,)) for part in parts])
        for i in range(count)
    ]
