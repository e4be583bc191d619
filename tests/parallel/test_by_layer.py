"""Work by layer equals a vmap on one device, on every mesh, and no device holds the stack."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxscale.parallel.by_layer import map_layers
from jaxscale.parallel.mesh import AXES

MESHES = [
    ({"fsdp": 8}, PartitionSpec(None, "fsdp", None)),
    ({"fsdp": 2, "tensor": 4}, PartitionSpec(None, "tensor", "fsdp")),
    ({"data": 2, "fsdp": 2, "tensor": 2}, PartitionSpec(None, ("fsdp", "tensor"), None)),
    ({"data": 4, "sequence": 2}, PartitionSpec(None, None, None)),
    ({"stage": 2, "tensor": 4}, PartitionSpec("stage", None, "tensor")),
]
# Sums of 16 and 8 terms, rounded at 2^-24 each.
TOLERANCE = 24 * 2.0**-24


def whole_layer(x: jax.Array) -> jax.Array:
    """Mix all elements of a layer."""
    assert x.ndim == 2
    return x @ x.T @ x


def make_mesh(sizes: dict[str, int]) -> jax.sharding.Mesh:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    kinds = (AxisType.Explicit,) * len(AXES)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)


@pytest.mark.parametrize(
    ("sizes", "spec", "num_layers"), [*((*case, 8) for case in MESHES), (*MESHES[2], 3)]
)
def test_it_equals_each_layer_alone(
    sizes: dict[str, int], spec: PartitionSpec, num_layers: int
) -> None:
    stack = np.random.default_rng(0).standard_normal((num_layers, 8, 16)).astype(np.float32)
    expected = np.stack([x @ x.T @ x for x in stack])
    mesh = make_mesh(sizes)
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda x: map_layers(whole_layer, x))(jax.device_put(stack, sharding))
    assert found.sharding == sharding
    for result in (found, map_layers(whole_layer, stack)):
        np.testing.assert_allclose(result, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(("sizes", "spec"), MESHES)
def test_no_device_holds_the_stack(sizes: dict[str, int], spec: PartitionSpec) -> None:
    mesh, shape = make_mesh(sizes), (64, 32, 128)
    stack = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x: map_layers(whole_layer, x)).lower(stack).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * math.prod(shape)
