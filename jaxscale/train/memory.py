"""Bytes that a training state takes of each device, and what a better sharding would save."""

import dataclasses
import math
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from jaxscale.config import ConfigError
from jaxscale.model.decoder import check_mesh
from jaxscale.parallel.host_memory import is_on_host
from jaxscale.parallel.sharding import Rules, finer_shardings
from jaxscale.train.state import Assembly, abstract_state

# Bytes that are worth a word: so many, or this share of the device.
MANY_BYTES, LARGE_SHARE = 2**30, 0.2


def bytes_on_device(tree: Any) -> int:
    """Return the bytes that one device holds of a pytree of abstract arrays in its own memory."""
    return _shard_bytes(leaf for leaf in jax.tree.leaves(tree) if not is_on_host(leaf))


def bytes_on_host(tree: Any) -> int:
    """Return the bytes that one device holds of a pytree of abstract arrays in host memory."""
    return _shard_bytes(leaf for leaf in jax.tree.leaves(tree) if is_on_host(leaf))


def _shard_bytes(leaves: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def memory_of_device(mesh: Mesh) -> int:
    """Return the memory of the smallest local device, in bytes."""
    local = mesh.local_devices
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in local]
    return int(min(limits) or psutil.virtual_memory().total // len(local))


def sharding_warning(assembly: Assembly, device_bytes: int) -> str | None:
    """Tell which knob would take the most parameters and optimizer state off each device.

    Args:
      assembly: the training program.
      device_bytes: memory of a device; what saves little of it is not worth a word.
    """
    now = _state_bytes(assembly, assembly.rules)
    best, remedy = now, ""
    one_slice = assembly.config.mesh.num_slices == 1
    for knobs, rules in finer_shardings(assembly.rules, assembly.mesh, one_slice=one_slice):
        try:
            check_mesh(assembly.config.model, rules, assembly.mesh)
            finer = _state_bytes(assembly, rules)
        except ConfigError:
            # It does not divide the model.
            continue
        if finer < best:
            best, remedy = finer, knobs
    saved = now - best
    if not remedy or saved < min(MANY_BYTES, LARGE_SHARE * device_bytes):
        return None
    return (
        f"parameters and optimizer state take {now:,} bytes of each device; {remedy} would shard "
        f"them further and save {saved:,} of these"
    )


def _state_bytes(assembly: Assembly, rules: Rules) -> int:
    definition = assembly.definition.with_rules(rules)
    return bytes_on_device(abstract_state(dataclasses.replace(assembly, definition=definition)))
