"""Work that needs a layer's whole matrix, shared out among the devices layer by layer.

Some update rules cannot work on shards of a matrix. Stacked layers give another axis to cut: each
device takes some layers whole, and no device ever holds the stack.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def map_layers(function: Callable[[jax.Array], jax.Array], stack: jax.Array) -> jax.Array:
    """Return `function` of each layer of a stack (layers, ...), in the stack's own sharding.

    The function sees one layer whole and keeps its shape. Each device computes for
    ceil(layers / devices) layers; where they do not divide, some compute for layers of zeros.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.vmap(function)(stack)
    num_layers, own = stack.shape[0], jax.typeof(stack).sharding.spec
    path = _path_to_layers(own, [name for name in mesh.axis_names if mesh.shape[name] > 1])
    missing = -num_layers % mesh.size
    if missing:
        stack = jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1))
    for spec in path:
        stack = jax.reshard(stack, spec)
    stack = jax.vmap(function)(stack)
    for spec in [*path[-2::-1], own]:
        stack = jax.reshard(stack, spec)
    return stack[:num_layers] if missing else stack


def _path_to_layers(spec: PartitionSpec, axes: Sequence[str]) -> list[PartitionSpec]:
    """Return the specs that lead from one to all of the mesh axes on the layers.

    Axes move one at a time: each move is one all-to-all, or a slice of what is replicated. A single
    step from first to last can make the compiler gather the stack on every device.
    """
    parts = [part if isinstance(part, tuple) else (part,) if part else () for part in spec]
    path = []
    for axis in axes:
        if axis not in parts[0]:
            rest = [tuple(name for name in part if name != axis) for part in parts[1:]]
            parts = [(*parts[0], axis), *rest]
            path.append(PartitionSpec(*parts))
    return path
