"""Devices at hand: named as the slice that they form, or told in a line why they form none."""

import dataclasses
import math
from typing import Any

import pytest

from jaxscale.config import ConfigError
from jaxscale.hardware import CHIPS, GPUS, TPUS
from jaxscale.plan.at_hand import cpu_slice, slice_of
from jaxscale.plan.torus import DescribedDevice, described_devices, parse_topology


def tpus(kind: str, *coords: tuple[int, int, int], slice_index: int = 0) -> list[DescribedDevice]:
    return [
        DescribedDevice(i, place, 0, slice_index, 0, device_kind=kind)
        for i, place in enumerate(coords)
    ]


def gpus(kind: str, count: int) -> list[DescribedDevice]:
    return [DescribedDevice(i, (0, 0, i), 0, 0, 0, kind, platform="gpu") for i in range(count)]


SQUARE = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("num_slices", [1, 3])
def test_every_slice_of_tpus_is_known_again(chip: Any, num_slices: int) -> None:
    # Beyond 256 chips it takes seconds and is the same.
    shapes = [shape for shape in chip.topologies if math.prod(map(int, shape.split("x"))) <= 256]
    for shape in shapes:
        slice_ = parse_topology(f"{chip.name}:{shape}", num_slices)
        assert slice_of(described_devices(slice_)) == slice_


def test_a_slice_is_named_by_its_chips_whichever_way_round_they_lie() -> None:
    assert slice_of(tpus("TPU v5 lite", (3, 5, 0))).name == "v5e:1x1"
    assert slice_of(tpus("TPU v6 lite", *SQUARE)).name == "v6e:2x2"
    assert slice_of(tpus("TPU v5p", *SQUARE)).name == "v5p:2x2x1"
    wide = [(x, y, 0) for x in range(4) for y in range(2)]
    assert slice_of(tpus("TPU v5e", *wide)).name == "v5e:2x4"
    both = [*tpus("TPU v6e", *SQUARE), *tpus("TPU v6e", *SQUARE, slice_index=1)]
    assert slice_of(both).words == "2 x v6e:2x2"


@pytest.mark.parametrize("chip", GPUS, ids=lambda chip: chip.name)
def test_gpus_are_a_node(chip: Any) -> None:
    found = slice_of(gpus(chip.device_kinds[0], 4))
    assert found == parse_topology(f"{chip.name}:4")
    assert (found.num_devices, found.num_slices) == (4, 1)


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (gpus("NVIDIA A10G", 2), ["2 x NVIDIA A10G", "no such chip", "--topology=CHIP:SHAPE"]),
        (gpus("NVIDIA H100 80GB HBM3", 3), ["no node of 1, 2, 4, 8", "CUDA_VISIBLE_DEVICES"]),
        (
            [*gpus("NVIDIA H200", 1), *gpus("NVIDIA B200", 1)],
            ["NVIDIA B200 and NVIDIA H200", "b200"],
        ),
        (tpus("TPU v9", *SQUARE), ["4 x TPU v9", "v6e"]),
        (tpus("TPU v6 lite", *SQUARE[:3]), ["no whole slice", "--topology=v6e:SHAPE, of 1x1"]),
        (tpus("TPU v6 lite", (0, 0, 0), (1, 0, 0), (2, 0, 0)), ["3x1x1 of them"]),
    ],
)
def test_what_forms_no_slice_is_told_in_a_line(devices: list[Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        slice_of(devices)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_cpu_devices_share_the_host_and_have_no_speed(devices: list[Any]) -> None:
    found = cpu_slice(8, 64 * 2**30)
    assert (found.name, found.num_devices) == ("cpu:8", 8)
    assert found.chip.usable_bytes_per_device == 8 * 2**30
    assert not found.chip.has_peaks
    assert all(chip.has_peaks for chip in CHIPS.values())
    live = slice_of(devices)
    assert live.name == "cpu:8"
    # Equal but for the host's memory.
    chip = dataclasses.replace(live.chip, hbm_bytes=found.chip.hbm_bytes)
    assert dataclasses.replace(live, chip=chip) == found
