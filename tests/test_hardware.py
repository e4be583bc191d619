"""The chip table is whole, agrees with what other places publish, and needs no JAX."""

import subprocess
import sys

import pytest

from jaxscale.hardware import CHIPS, GPUS, TPUS, Chip, chip_for

# Bidirectional GB/s per chip over all ICI or NVLink links, as the vendors' own pages state it.
PUBLISHED_ICI = {
    "v5e": 400e9,
    "v5p": 1200e9,
    "v6e": 800e9,
    "tpu7x": 1200e9,
    "a100": 600e9,
    "h100": 900e9,
    "h200": 900e9,
    "b200": 1800e9,
}


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_device_kinds_name_their_chip(device_kind: str, name: str) -> None:
    assert chip_for(device_kind) is CHIPS[name]


@pytest.mark.parametrize("device_kind", ["cpu", "", "NVIDIA H100 PCIe", "TPU v99"])
def test_unknown_kinds_have_no_chip(device_kind: str) -> None:
    assert chip_for(device_kind) is None


def test_no_name_or_kind_stands_twice() -> None:
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    assert len(CHIPS) == len(TPUS) + len(GPUS)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))
def test_links_agree_with_the_published_total(chip: Chip) -> None:
    published = PUBLISHED_ICI.get(chip.name)
    if published is not None:
        both_ways = 2 * chip.ici_links * chip.ici_link_bytes_per_second
        # The book's per-link figures are rounded down by up to a tenth.
        assert both_ways == pytest.approx(published, rel=0.11)


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_a_torus_has_two_links_per_dimension(chip: Chip) -> None:
    assert chip.ici_links == 2 * chip.torus_dims


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_tpus_agree_with_jax(chip: Chip) -> None:
    tpu_info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info")
    version = tpu_info.chip_version_from_device_kind(chip.device_kinds[0])
    info = tpu_info.get_tpu_info_for_chip(version, 1)  # per TensorCore
    cores = version.num_physical_tensor_cores_per_chip
    assert chip.bf16_flops_per_second == pytest.approx(info.bf16_ops_per_second * cores, rel=0.01)
    assert chip.hbm_bytes == pytest.approx(info.hbm_capacity_bytes * cores, rel=0.02)
    # JAX has 2.46e12 B/s for v5p where the vendor's page has 2.765e12.
    assert chip.hbm_bytes_per_second == pytest.approx(
        info.mem_bw_bytes_per_second * cores, rel=0.13
    )
    assert chip.num_cores == cores
    # The compiler finds room for twice as many products per cycle in units of 256 as JAX counts.
    halves = 2 if chip.mxu_size == 256 else 1
    assert chip.num_mxus == info.num_mxus * cores * halves
    assert chip.mxu_size == info.mxu_column_size


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_clocks_are_those_of_silicon(chip: Chip) -> None:
    assert 1e9 < chip.clock_hertz < 2.5e9


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_slices_have_the_dimensions_of_the_torus(chip: Chip) -> None:
    assert all(shape.count("x") + 1 == chip.torus_dims for shape in chip.topologies)
    assert len(set(chip.topologies)) == len(chip.topologies)


def test_a_device_is_a_part_of_a_tpu7x_chip() -> None:
    chip = CHIPS["tpu7x"]
    assert chip.bf16_flops_per_second_per_device == chip.bf16_flops_per_second / 2
    assert chip.hbm_bytes_per_device == chip.hbm_bytes // 2


def test_the_table_needs_no_jax() -> None:
    code = "import sys, jaxscale.hardware; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
