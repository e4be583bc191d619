"""Arrays that lie in host memory, pinned for transfers, and come to the device for their use.

A sharding's memory kind says where an array lies, and an explicit mesh keeps its shards apart there
as well: each device has its own part of the host's memory.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxscale.config import ConfigError

DEVICE, HOST = "device", "pinned_host"


def check_host_memory(mesh: Mesh, knob: str, remedy: str) -> None:
    """Check that the devices of a mesh can keep arrays in host memory.

    Args:
      mesh: the mesh.
      knob: what asks for it, as "KNOB=VALUE".
      remedy: what the user can do.

    Raises:
      ConfigError: they cannot.
    """
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ConfigError(
            f"{knob} needs {HOST} memory, and {device.device_kind} has {', '.join(kinds)} alone; "
            f"{remedy}"
        )


def is_on_host(leaf: Any) -> bool:
    """Tell whether an array, abstract or not, lies in host memory."""
    return bool(leaf.sharding.memory_kind == HOST)


def in_host_memory(tree: Any) -> Any:
    """Return abstract arrays with shardings in host memory; scalars stay on the device."""
    return jax.tree.map(
        lambda leaf: (
            leaf.update(sharding=leaf.sharding.with_memory_kind(HOST)) if leaf.ndim else leaf
        ),
        tree,
    )


def to_device(tree: Any) -> Any:
    """Return arrays in device memory, inside jit; those that lie there stay as they are."""
    return jax.tree.map(lambda leaf: _moved(leaf, jax.memory.Space.Device), tree)


def to_host(tree: Any) -> Any:
    """Return arrays in host memory, inside jit; scalars stay on the device."""
    return jax.tree.map(
        lambda leaf: _moved(leaf, jax.memory.Space.Host) if leaf.ndim else leaf, tree
    )


def _moved(leaf: jax.Array, space: Any) -> jax.Array:
    return leaf if jax.typeof(leaf).memory_space == space else jax.device_put(leaf, space)
