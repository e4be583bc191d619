"""The torus: shapes, the order of devices, and collectives against times by hand."""

import os
from typing import Any

import numpy as np
import pytest
from jax.experimental import topologies

from jaxscale.config import ConfigError, MeshConfig
from jaxscale.parallel.mesh import AXES, device_grid
from jaxscale.plan.torus import (
    Network,
    Seconds,
    Slice,
    described_devices,
    family,
    parse_topology,
)

V5E_LINK, V6E_LINK, V5P_LINK = 45e9, 90e9, 90e9
FSDP = AXES[2:3]
TENSOR = AXES[4:5]
DATA = AXES[1:2]
PAYLOAD = 1e9


def network(topology: str, num_slices: int = 1, **mesh: int) -> Network:
    found = parse_topology(topology, num_slices)
    config = MeshConfig(**{"data": 1, **mesh}, num_slices=num_slices)
    return Network(found, device_grid(config, described_devices(found)))


def test_a_slice_knows_its_size_and_its_rings() -> None:
    assert parse_topology("v6e:16x16").num_devices == 256
    assert parse_topology("v6e:16x16").wraps == (True, True)
    assert parse_topology("v5e:8x16").wraps == (False, True)
    assert parse_topology("v5p:4x4x8").wraps == (True,) * 3
    assert parse_topology("v5p:2x4x4").wraps == (False,) * 3
    seven = parse_topology("tpu7x:4x4x4", num_slices=2)
    assert (seven.name, seven.num_chips, seven.num_devices) == ("tpu7x:4x4x4", 128, 256)


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v6f:4x4", ["no chip 'v6f'", "did you mean v6e?", "v4, v5e, v5p, v6e, tpu7x"]),
        ("rtx4090:1", ["no chip 'rtx4090'", "There are v4", "a100-40gb, h100, h200, b200"]),
        ("h100:3", ["h100 has no node of size '3'; it has 1, 2, 4, 8"]),
        ("v6e:4x5", ["v6e has no slice of shape '4x5'", "4x4, 4x8, 8x8"]),
        ("v5p", ["v5p has no slice of shape ''", "2x2x1"]),
        ("v5e:8x4", ["no slice of shape '8x4'"]),
    ],
)
def test_what_does_not_exist_is_told_what_does(topology: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_topology(topology)
    assert str(caught.value).startswith(f"--topology={topology}: ")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_family_is_what_a_chip_comes_in() -> None:
    two = parse_topology("v5e:2x4", num_slices=2)
    assert [other.words for other in family(two)][:3] == [
        "2 x v5e:1x1",
        "2 x v5e:2x2",
        "2 x v5e:2x4",
    ]
    # GPUs of a node, and then nodes.
    nodes = [other.words for other in family(parse_topology("h100:2"))]
    assert nodes[:5] == ["h100:1", "h100:2", "h100:4", "h100:8", "2 x h100:8"]
    assert nodes[-1] == "16 x h100:8"


def test_a_switch_gives_every_chip_all_of_its_links() -> None:
    """18 links of 25 GB/s: the seven others' eighths of the payload, or of four GPUs of it."""
    node = network("h100:8", fsdp=8)
    once = PAYLOAD * 7 / 8 / 450e9
    assert node.seconds("all-gather", FSDP, PAYLOAD).ici == pytest.approx(once)
    assert node.seconds("reduce-scatter", FSDP, PAYLOAD).ici == pytest.approx(once)
    assert node.seconds("all-to-all", FSDP, PAYLOAD).ici == pytest.approx(once)
    assert node.seconds("all-reduce", FSDP, PAYLOAD).ici == pytest.approx(2 * once)
    assert node.seconds("collective-permute", FSDP, PAYLOAD).ici == pytest.approx(PAYLOAD / 450e9)
    # Apart or side by side is the same.
    strided = network("h100:8", fsdp=4, tensor=2)
    assert strided.seconds("all-gather", FSDP, PAYLOAD) == Seconds(PAYLOAD * 3 / 4 / 450e9)
    assert not strided.spans_several_dims((*FSDP, *TENSOR))


def test_nodes_are_joined_by_the_slow_network() -> None:
    """400 GB/s of a node are 50 of each GPU; between two, half of the payload goes and comes."""
    two = network("h100:8", num_slices=2, data=2, fsdp=8)
    assert two.seconds("all-reduce", DATA, PAYLOAD) == Seconds(dcn=pytest.approx(PAYLOAD / 50e9))
    # Of all devices, each exchanges its own eighth.
    both = two.seconds("all-reduce", (*DATA, *FSDP), PAYLOAD)
    assert both.dcn == pytest.approx(PAYLOAD / 8 / 50e9)
    assert both.ici == pytest.approx(2 * PAYLOAD * 7 / 8 / 450e9)


TOPOLOGIES = [
    *(("v5e:4x8", 1), ("v6e:2x4", 1), ("v6e:4x4", 2), ("v5p:2x2x4", 1), ("v4:2x2x4", 1)),
    ("tpu7x:2x2x2", 1),
]


@pytest.mark.parametrize(("topology", "num_slices"), TOPOLOGIES)
def test_devices_come_as_libtpu_lists_them(topology: str, num_slices: int) -> None:
    pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    described = parse_topology(topology, num_slices)
    options: dict[str, Any] = dict(described.chip.description)
    if num_slices > 1:
        options["num_slices"] = num_slices
    live = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    ours = described_devices(described)
    assert [d.id for d in ours] == [d.id for d in live]
    for name in ("core_on_chip", "process_index", "device_kind", "platform"):
        assert [getattr(d, name) for d in ours] == [getattr(d, name) for d in live]
    assert [list(d.coords) for d in ours] == [list(d.coords) for d in live]
    if num_slices > 1:
        assert [d.slice_index for d in ours] == [d.slice_index for d in live]
    # So training and planning place them alike.
    mesh = MeshConfig(data=2, fsdp=-1, tensor=2, num_slices=num_slices)
    ids = [[d.id for d in device_grid(mesh, devices).flat] for devices in (ours, live)]
    assert ids[0] == ids[1]


def test_a_plane_without_rings_has_one_link_a_dimension() -> None:
    """All 16 chips of a 4x4: 15/16 of the payload over one link along x and one along y."""
    found = network("v5e:4x4", fsdp=16)
    gather = found.seconds("all-gather", FSDP, PAYLOAD)
    assert gather == Seconds(pytest.approx(PAYLOAD * 15 / 16 / (2 * V5E_LINK)), 0.0)
    assert found.seconds("reduce-scatter", FSDP, PAYLOAD) == gather
    assert found.seconds("all-reduce", FSDP, PAYLOAD).ici == pytest.approx(2 * gather.ici)
    assert found.spans_several_dims(FSDP)


def test_a_pod_of_v6e_has_both_ways_round_both_rings() -> None:
    found = network("v6e:16x16", fsdp=256)
    expected = PAYLOAD * 255 / 256 / (4 * V6E_LINK)
    assert found.seconds("all-gather", FSDP, PAYLOAD).ici == pytest.approx(expected)


def test_groups_that_interleave_share_their_links() -> None:
    """fsdp=64 is every fourth chip of x and all of y; tensor=4 a piece of x without a way round."""
    found = network("v6e:16x16", fsdp=64, tensor=4)
    expected = PAYLOAD * 63 / 64 / ((2 / 4 + 2) * V6E_LINK)
    assert found.seconds("all-gather", FSDP, PAYLOAD).ici == pytest.approx(expected)
    expected = PAYLOAD * 3 / 4 / V6E_LINK
    assert found.seconds("all-gather", TENSOR, PAYLOAD).ici == pytest.approx(expected)
    assert not found.spans_several_dims(TENSOR)
    assert found.seconds("all-gather", DATA, PAYLOAD) == Seconds(0.0, 0.0)


def test_a_permutation_takes_one_link() -> None:
    found = network("v6e:16x16", fsdp=64, tensor=4)
    permute = "collective-permute"
    assert found.seconds(permute, TENSOR, PAYLOAD).ici == pytest.approx(PAYLOAD / V6E_LINK)


def test_an_all_to_all_is_bound_by_the_middle() -> None:
    """Of 4 in a line, 2 send half of their payload each across one link: 1 payload."""
    found = network("v6e:16x16", fsdp=64, tensor=4)
    line = found.seconds("all-to-all", TENSOR, PAYLOAD).ici
    assert line == pytest.approx(PAYLOAD * 2 * 0.5 / V6E_LINK)
    # Of 16 in a ring, 8 send half of theirs across two places of one link: 4 payloads over 2.
    ring = network("v6e:16x16", data=16, fsdp=16).seconds("all-to-all", FSDP, PAYLOAD).ici
    assert ring == pytest.approx(PAYLOAD * 8 * 0.5 / (2 * V6E_LINK))


def test_the_cores_of_a_chip_share_its_links() -> None:
    """Both cores in one group: the chip needs the data once. In two groups: half a link each."""
    together = network("tpu7x:4x4x4", fsdp=128)
    expected = PAYLOAD * 63 / 64 / (3 * 2 * 90e9)
    assert together.seconds("all-gather", FSDP, PAYLOAD).ici == pytest.approx(expected)
    apart = network("tpu7x:4x4x4", fsdp=64, tensor=2)
    assert apart.seconds("all-gather", TENSOR, PAYLOAD).ici == 0.0
    assert apart.seconds("all-gather", FSDP, PAYLOAD).ici == pytest.approx(2 * expected)


def test_slices_exchange_only_their_devices_own_parts() -> None:
    """Two slices of 256 v6e, 12.5 GB/s of the slow network for each chip."""
    found = network("v6e:16x16", num_slices=2, data=2, fsdp=256)
    reduced = found.seconds("all-reduce", DATA, PAYLOAD)
    assert reduced == Seconds(0.0, pytest.approx(2 * PAYLOAD / 2 / 12.5e9))
    both = found.seconds("all-reduce", DATA + FSDP, PAYLOAD)
    assert both.dcn == pytest.approx(reduced.dcn / 256)
    assert both.ici == pytest.approx(2 * PAYLOAD * 255 / 256 / (4 * V6E_LINK))
    assert found.seconds("all-reduce", FSDP, PAYLOAD).dcn == 0.0


def test_seconds_add_up() -> None:
    assert Seconds(1.0, 2.0) + Seconds(3.0, 4.0) * 2 == Seconds(7.0, 10.0)


def test_the_grid_is_the_one_training_uses() -> None:
    found = Slice(chip=parse_topology("v5p:2x2x2").chip, shape=(2, 2, 2))
    grid = device_grid(MeshConfig(data=1, fsdp=8), described_devices(found))
    assert grid.shape == (1, 1, 8, 1, 1)
    assert sorted(d.id for d in grid.flat) == list(range(8))
    assert np.array([d.coords for d in grid.flat]).max() == 1
