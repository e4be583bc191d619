"""From the mesh section to a `jax.sharding.Mesh`.

With `sharding.py`, the only place that names mesh axes. Axes stand outermost first: what talks
least (stages, replicas) is farthest apart, what talks most (tensor) sits on neighbouring devices.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxscale.config import ConfigError, MeshConfig

AXES = ("stage", "data", "fsdp", "sequence", "tensor")
STAGE_AXIS = AXES[0]
# The axes that cut a batch by its rows: replicas, and shards of the parameters.
BATCH_AXES = AXES[1:3]
# Where a model is read that was trained elsewhere: over all devices, or on a single one.
SPREAD, ONE_DEVICE = MeshConfig(data=1, fsdp=-1), MeshConfig(data=1)
# The axes that may span slices, where only the slow network joins devices.
SLOW_AXES = ("data", "stage")

# Of every axis, in their order.
Sizes = tuple[int, ...]
# What knows the sizes of the axes, with devices or without.
AnyMesh = Mesh | AbstractMesh


def axis_sizes(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """Return the size of every mesh axis on `num_devices` devices, with -1 filled in.

    Raises:
      ConfigError: the sizes do not multiply out to `num_devices` (with some that would).
    """
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest = [axis for axis, size in sizes.items() if size == -1]
    if rest and num_devices % fixed == 0:
        sizes[rest[0]] = num_devices // fixed
    if math.prod(sizes.values()) != num_devices:
        shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        fitting = "; ".join(_fitting(sizes, num_devices))
        raise ConfigError(
            f"mesh ({shown or 'all axes 1'}) does not multiply out to {num_devices} devices; "
            f"these would: {fitting}"
        )
    _check_slices(mesh, sizes)
    return sizes


def _fitting(sizes: dict[str, int], num_devices: int) -> list[str]:
    """Return up to three meshes that use all devices, each one axis away from `sizes`."""
    found = []
    for axis in AXES:
        others = math.prod(s for a, s in sizes.items() if a != axis and s != -1)
        if num_devices % others == 0 and sizes[axis] != num_devices // others:
            changed = {**sizes, axis: num_devices // others}
            text = ", ".join(f"{a}={s}" for a, s in changed.items() if s not in (1, -1))
            if text and text not in found:
                found.append(text)
    return found[:3] or [f"data={num_devices}", f"fsdp={num_devices}"]


def _check_slices(mesh: MeshConfig, sizes: dict[str, int]) -> None:
    if mesh.num_slices > 1 and all(sizes[axis] % mesh.num_slices for axis in SLOW_AXES):
        raise ConfigError(
            f"mesh.num_slices={mesh.num_slices} divides neither mesh.data={sizes['data']} nor "
            f"mesh.stage={sizes['stage']}; one of them must span the slices"
        )


def make_mesh(mesh: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh over `devices` (default: all), Explicit on every axis.

    Args:
      mesh: the mesh section.
      devices: live devices, or those of a described topology.

    Raises:
      ConfigError: the sizes do not multiply out to the number of devices.
    """
    grid = device_grid(mesh, jax.devices() if devices is None else devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def abstract_mesh(mesh: MeshConfig, num_devices: int) -> AbstractMesh:
    """Return the mesh over so many devices that nobody has yet: the sizes of its axes alone.

    Raises:
      ConfigError: the sizes do not multiply out to the number of devices.
    """
    sizes = axis_sizes(mesh, num_devices)
    return AbstractMesh(tuple(sizes.values()), AXES, (AxisType.Explicit,) * len(AXES))


def device_grid(mesh: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Return the devices in their places in the mesh, one dimension per axis.

    Args:
      mesh: the mesh section.
      devices: live devices, those of a described topology, or records with the same attributes.

    Raises:
      ConfigError: the sizes do not multiply out to the number of devices.
    """
    sizes = axis_sizes(mesh, len(devices))
    shape = tuple(sizes.values())
    if mesh.num_slices == 1:
        return _grid(shape, devices)
    slow = next(axis for axis in SLOW_AXES if sizes[axis] % mesh.num_slices == 0)
    outer = tuple(mesh.num_slices if axis == slow else 1 for axis in AXES)
    inner = tuple(size // out for size, out in zip(shape, outer, strict=True))
    return _hybrid_grid(inner, outer, devices)


def _grid(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    if devices[0].platform == "cpu":
        return np.asarray(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _hybrid_grid(
    inner: tuple[int, ...], outer: tuple[int, ...], devices: Sequence[Any]
) -> np.ndarray:
    """Place `outer` across slices, `inner` inside; fake devices are slices in order."""
    if hasattr(devices[0], "slice_index"):
        # Described GPUs are all in slice 0, and nodes only differ in their processes.
        by_process = devices[0].platform == "gpu" and len({d.slice_index for d in devices}) == 1
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
        )
    slices = np.asarray(devices).reshape(math.prod(outer), *inner)
    slow = next(i for i, size in enumerate(outer) if size > 1)
    grid = np.moveaxis(slices, 0, slow)
    return grid.reshape(tuple(i * o for i, o in zip(inner, outer, strict=True)))


def parse_mesh(text: str, num_devices: int) -> Sizes:
    """Read `--meshes`: a mesh such as "fsdp=2,tensor=4".

    Raises:
      ConfigError: it is no such thing, or has more devices than there are.
    """
    sizes, named = dict.fromkeys(AXES, 1), set()
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not size.isdecimal() or int(size) == 0:
            raise ConfigError(
                f"--meshes={text}: {part} is not AXIS=SIZE with an axis of {', '.join(AXES)}"
            )
        if axis in named:
            raise ConfigError(f"--meshes={text} names {axis} twice; give --meshes once per mesh")
        named.add(axis)
        sizes[axis] = int(size)
    if math.prod(sizes.values()) > num_devices:
        raise ConfigError(f"--meshes={text} has more devices than the {num_devices} there are")
    return tuple(sizes.values())


def mesh_sizes(num_devices: int, *, fewer: bool = False) -> Iterator[Sizes]:
    """Yield the sizes of the mesh axes, few axes first, the most even ones of each set of axes.

    Args:
      num_devices: their product.
      fewer: yield afterwards the meshes of its divisors.
    """
    counts = [num_devices]
    if fewer:
        counts += [n for n in range(num_devices - 1, 1, -1) if num_devices % n == 0]
    for count in counts:
        yield from _in_order(s for s in _factorisations(count, len(AXES)) if math.prod(s) > 1)


def _factorisations(count: int, parts: int) -> Iterator[Sizes]:
    if parts == 1:
        yield (count,)
        return
    for first in (n for n in range(1, count + 1) if count % n == 0):
        yield from ((first, *rest) for rest in _factorisations(count // first, parts - 1))


def _in_order(meshes: Iterator[Sizes]) -> Iterator[Sizes]:
    """Sort so that every set of axes has had its most even mesh before any has its second."""

    def axes(sizes: Sizes) -> tuple[int, ...]:
        return tuple(i for i, size in enumerate(sizes) if size > 1)

    ranked: list[tuple[int, Sizes]] = []
    for _, group in itertools.groupby(sorted(meshes, key=axes), key=axes):
        ranked += enumerate(sorted(group, key=lambda sizes: (max(sizes), sizes)))
    for _, sizes in sorted(ranked, key=lambda item: (item[0], len(axes(item[1])), axes(item[1]))):
        yield sizes
