"""From the mesh section to a mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxscale.config import ConfigError, MeshConfig
from jaxscale.parallel.mesh import AXES, axis_sizes, make_mesh, mesh_sizes


def test_the_rest_of_the_devices_goes_to_the_axis_of_minus_one(devices: list[jax.Device]) -> None:
    assert axis_sizes(MeshConfig(), 8)["data"] == 8
    assert axis_sizes(MeshConfig(data=1, fsdp=-1, tensor=2), 8)["fsdp"] == 4
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2), devices)
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Explicit,) * len(AXES)
    assert dict(mesh.shape) == {"stage": 1, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}


def test_a_mesh_that_does_not_multiply_out_is_told_ones_that_would() -> None:
    with pytest.raises(ConfigError) as caught:
        axis_sizes(MeshConfig(data=3, tensor=2), 8)
    text = str(caught.value)
    assert text.startswith("mesh (data=3, tensor=2) does not multiply out to 8 devices")
    assert "data=4, tensor=2" in text
    for sizes in text.split("these would: ")[1].split("; "):
        product = np.prod([int(part.split("=")[1]) for part in sizes.split(", ")])
        assert product == 8
    with pytest.raises(ConfigError, match="these would: "):
        axis_sizes(MeshConfig(data=-1, tensor=3), 8)


def test_slices_are_spanned_by_the_slow_axis_alone(devices: list[jax.Device]) -> None:
    mesh = make_mesh(MeshConfig(data=4, tensor=2, num_slices=2), devices)
    grid = mesh.devices.reshape(4, 2)
    slices = [[device.id // 4 for device in row] for row in grid]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    stages = make_mesh(MeshConfig(stage=2, data=1, fsdp=4, num_slices=2), devices)
    assert [device.id // 4 for device in stages.devices.reshape(2, 4)[1]] == [1] * 4
    # Stages inside of slices, which replicas span: each replica is in one slice.
    both = make_mesh(MeshConfig(stage=2, data=2, fsdp=2, num_slices=2), devices)
    ids = [[device.id for device in row] for row in both.devices.reshape(4, 2)]
    assert ids == [[0, 1], [4, 5], [2, 3], [6, 7]]
    with pytest.raises(ConfigError, match="mesh.num_slices=2 divides neither mesh.data=1"):
        make_mesh(MeshConfig(data=1, fsdp=8, num_slices=2), devices)


def test_meshes_come_with_few_axes_first_and_even_ones_before_the_others() -> None:
    found = list(mesh_sizes(8))
    assert len(found) == len(set(found)) == 35
    num_axes = [sum(size > 1 for size in sizes) for sizes in found]
    assert num_axes == [1] * 5 + [2] * 10 + [3] * 10 + [2] * 10
    assert found[0] == (8, 1, 1, 1, 1)
    many = list(mesh_sizes(64))
    assert len(many) == 210
    assert len({tuple(size > 1 for size in sizes) for sizes in many[:31]}) == 31
    assert many[5] == (8, 8, 1, 1, 1)
    fewer = list(mesh_sizes(4, fewer=True))
    assert [int(np.prod(sizes)) for sizes in fewer] == [4] * 15 + [2] * 5
