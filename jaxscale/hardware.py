"""The chip table: what one accelerator can compute, hold and move, as published by its vendor.

Data only, without JAX, so that planners and reports can read it anywhere. All figures are per chip
and dense (no sparsity); the comment beside each row names the pages that they come from.
"""

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator chip. `name` is also the prefix of its topology names, as in "v5e:4x4"."""

    name: str
    # The strings that `jax.Device.device_kind` gives for it.
    device_kinds: tuple[str, ...]
    # As `jax.Device.platform` has it.
    platform: str = "tpu"
    # JAX devices on a chip: 1, or its number of cores where each core is a device.
    devices_per_chip: int = 1
    chips_per_host: int
    hbm_bytes: int
    # Of a device's memory, what its programs can have; 0 = all of it.
    usable_bytes: int = 0
    hbm_bytes_per_second: float
    bf16_flops_per_second: float
    # The fast network inside a slice or node (ICI, NVLink): one link, one way.
    ici_link_bytes_per_second: float
    ici_links: int
    # Dimensions of the torus that the links form; 0 where a switch joins them.
    torus_dims: int
    # The slow network between slices or nodes, one way.
    dcn_bytes_per_second_per_host: float
    # Host memory, one way, for each chip.
    host_bytes_per_second: float = 16e9
    # Of a TPU: its cores, and their matrix units and the side of one, as the compiler counts them.
    num_cores: int = 1
    num_mxus: int | None = None
    mxu_size: int | None = None
    # What shapes its slices have, and in what sizes the torus is closed to a ring: from this many
    # chips on along a dimension of a plane; where all dimensions are such multiples, in three. Of a
    # GPU, how many of them a node may have.
    topologies: tuple[str, ...] = ()
    ring_size: int = 0
    # How the TPU compiler wants the chip described, and what is best to tell it.
    description: tuple[tuple[str, str], ...] = ()
    compiler_options: tuple[tuple[str, str], ...] = ()

    @property
    def bf16_flops_per_second_per_device(self) -> float:
        """Peak of what JAX calls a device, which may be a part of the chip."""
        return self.bf16_flops_per_second / self.devices_per_chip

    @property
    def hbm_bytes_per_device(self) -> int:
        """Memory of what JAX calls a device."""
        return self.hbm_bytes // self.devices_per_chip

    @property
    def usable_bytes_per_device(self) -> int:
        """Memory of a device that its programs can have."""
        return self.usable_bytes or self.hbm_bytes_per_device

    @property
    def has_peaks(self) -> bool:
        """Whether its speeds are known; nan stands for those that nobody published."""
        return not math.isnan(self.bf16_flops_per_second)

    @property
    def clock_hertz(self) -> float:
        """Cycles per second of a TPU: peak / (matrix units x side^2 x 2)."""
        assert self.num_mxus and self.mxu_size, f"{self.name} is no TPU"
        return self.bf16_flops_per_second / (self.num_mxus * self.mxu_size**2 * 2)

    @property
    def vector_ops_per_second(self) -> float:
        """Peak of a TPU's vector units: cores x 8 x 128 lanes x 4 units x clock."""
        return self.num_cores * 8 * 128 * 4 * self.clock_hertz


# Shapes of slices: cloud.google.com/tpu/docs, the page of the chip's name.
PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL_CUBOIDS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
CUBOIDS = (
    *SMALL_CUBOIDS,
    *("4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x4x16", "4x8x12", "8x8x8", "4x8x16", "8x8x12"),
    *("8x8x16", "8x12x12", "8x12x16", "12x12x12", "8x16x16", "12x12x16", "12x16x16", "16x16x16"),
)

# What is best to tell the compiler, as far as it can tell itself: `scripts/yardstick.py`. Sums of
# gradients that run beside matmuls need sums that are not merged; where there are sparse cores,
# these work off collectives; larger tiles of matmuls need more of the vector memory, and cost
# minutes of compile time.
BESIDE_MATMULS = (
    ("xla_tpu_enable_async_collective_fusion", "true"),
    ("xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true"),
    ("xla_tpu_enable_async_collective_fusion_multiple_steps", "true"),
    ("xla_enable_async_all_reduce", "true"),
    ("xla_tpu_overlap_compute_collective_tc", "true"),
    ("xla_jf_crs_combiner_threshold_count", "1"),
)
ON_SPARSE_CORES = (
    ("xla_enable_async_all_gather", "true"),
    ("xla_tpu_prefer_async_allgather_to_allreduce", "true"),
    ("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "false"),
    ("xla_tpu_use_tc_device_shape_on_sc", "true"),
    ("xla_sc_disable_megacore_partitioning", "true"),
    ("xla_tpu_enable_sparse_core_collective_offload_all_gather", "true"),
    ("xla_tpu_enable_sparse_core_collective_offload_2d_all_gather", "true"),
    ("xla_tpu_enable_sparse_core_collective_offload_all_reduce", "true"),
    ("xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", "true"),
    ("xla_tpu_enable_all_gather_offload_tracing", "true"),
    ("xla_tpu_enable_all_reduce_offload_tracing", "true"),
    ("xla_tpu_enable_reduce_scatter_offload_tracing", "true"),
)
TILE_MEMORY = "xla_tpu_scoped_vmem_limit_kib"

# HBM, FLOP/s, network per host: cloud.google.com/tpu/docs, the page of the chip's name.
# ICI per link, PCIe: jax-ml.github.io/scaling-book "How to Think About TPUs". MXUs: FLOPs per cycle
# of a large matmul, as the TPU compiler estimates it; a matmul is at 83% to 97% of these.
TPUS = (
    Chip(
        name="v4",
        device_kinds=("TPU v4",),
        chips_per_host=4,
        hbm_bytes=32 * GIB,
        hbm_bytes_per_second=1.2e12,
        bf16_flops_per_second=275e12,
        ici_link_bytes_per_second=45e9,
        ici_links=6,
        torus_dims=3,
        dcn_bytes_per_second_per_host=25e9,  # scaling-book; the chip's own page is silent
        num_cores=2,
        num_mxus=8,
        mxu_size=128,
        topologies=CUBOIDS,
        ring_size=4,
        description=(("chip_config_name", "megacore"),),
    ),
    Chip(
        name="v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        chips_per_host=8,
        hbm_bytes=16 * GIB,
        hbm_bytes_per_second=819e9,
        bf16_flops_per_second=197e12,
        ici_link_bytes_per_second=45e9,
        ici_links=4,
        torus_dims=2,
        dcn_bytes_per_second_per_host=25e9,  # page "TPU v6e", which compares: 2 x 100 Gb/s
        num_mxus=4,
        mxu_size=128,
        topologies=PLANES,
        ring_size=16,
        compiler_options=(*BESIDE_MATMULS, (TILE_MEMORY, "32768")),
    ),
    Chip(
        name="v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        chips_per_host=4,
        hbm_bytes=95 * GIB,
        hbm_bytes_per_second=2.765e12,
        bf16_flops_per_second=459e12,
        ici_link_bytes_per_second=90e9,
        ici_links=6,
        torus_dims=3,
        dcn_bytes_per_second_per_host=25e9,  # 50 Gb/s per chip
        num_cores=2,
        num_mxus=8,
        mxu_size=128,
        topologies=(*CUBOIDS, "16x16x24"),
        ring_size=4,
        compiler_options=(*ON_SPARSE_CORES, (TILE_MEMORY, "32768")),
    ),
    Chip(
        name="v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        chips_per_host=8,
        hbm_bytes=32 * GIB,
        hbm_bytes_per_second=1.638e12,  # page "TPU7x", which compares
        bf16_flops_per_second=918e12,
        ici_link_bytes_per_second=90e9,
        ici_links=4,
        torus_dims=2,
        dcn_bytes_per_second_per_host=100e9,  # 4 x 200 Gb/s
        num_mxus=4,
        mxu_size=256,
        host_bytes_per_second=32e9,
        topologies=PLANES,
        ring_size=16,
        compiler_options=(*ON_SPARSE_CORES, (TILE_MEMORY, "98304")),
    ),
    Chip(
        name="tpu7x",
        device_kinds=("TPU7x", "TPU7"),
        devices_per_chip=2,
        chips_per_host=4,
        hbm_bytes=192 * GIB,
        hbm_bytes_per_second=7.38e12,
        bf16_flops_per_second=2307e12,
        ici_link_bytes_per_second=90e9,  # MaxText "custom_model": intensity 12800 over one axis
        ici_links=6,
        torus_dims=3,
        dcn_bytes_per_second_per_host=50e9,  # 100 Gb/s per chip
        num_cores=2,
        num_mxus=8,
        mxu_size=256,
        host_bytes_per_second=32e9,
        topologies=CUBOIDS,
        ring_size=4,
    ),
)

# GPUs of a node that a switch joins.
NODES = ("1", "2", "4", "8")

# Memory, FLOP/s and NVLink: the NVIDIA data sheet of the chip's name, SXM variant. Network: the
# data sheet of the DGX system that carries eight of them.
GPUS = (
    Chip(
        name="a100",
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        platform="gpu",
        chips_per_host=8,
        topologies=NODES,
        hbm_bytes=80 * GIB,
        hbm_bytes_per_second=2.039e12,
        bf16_flops_per_second=312e12,
        ici_link_bytes_per_second=25e9,
        ici_links=12,
        torus_dims=0,
        dcn_bytes_per_second_per_host=200e9,  # 8 x 200 Gb/s
    ),
    Chip(
        name="a100-40gb",
        device_kinds=("NVIDIA A100-SXM4-40GB",),
        platform="gpu",
        chips_per_host=8,
        topologies=NODES,
        hbm_bytes=40 * GIB,
        hbm_bytes_per_second=1.555e12,
        bf16_flops_per_second=312e12,
        ici_link_bytes_per_second=25e9,
        ici_links=12,
        torus_dims=0,
        dcn_bytes_per_second_per_host=200e9,
    ),
    Chip(
        name="h100",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        platform="gpu",
        chips_per_host=8,
        topologies=NODES,
        hbm_bytes=80 * GIB,
        hbm_bytes_per_second=3.35e12,
        bf16_flops_per_second=989e12,
        ici_link_bytes_per_second=25e9,
        ici_links=18,
        torus_dims=0,
        dcn_bytes_per_second_per_host=400e9,  # 8 x 400 Gb/s
    ),
    Chip(
        name="h200",
        device_kinds=("NVIDIA H200",),
        platform="gpu",
        chips_per_host=8,
        topologies=NODES,
        hbm_bytes=141 * GIB,
        hbm_bytes_per_second=4.8e12,
        bf16_flops_per_second=989e12,
        ici_link_bytes_per_second=25e9,
        ici_links=18,
        torus_dims=0,
        dcn_bytes_per_second_per_host=400e9,
    ),
    Chip(
        name="b200",
        device_kinds=("NVIDIA B200",),
        platform="gpu",
        chips_per_host=8,
        topologies=NODES,
        hbm_bytes=180 * GIB,
        hbm_bytes_per_second=8e12,
        bf16_flops_per_second=2250e12,
        ici_link_bytes_per_second=50e9,
        ici_links=18,
        torus_dims=0,
        dcn_bytes_per_second_per_host=400e9,
    ),
)

CHIPS = {chip.name: chip for chip in TPUS + GPUS}


def chip_for(device_kind: str) -> Chip | None:
    """Return the chip behind a `jax.Device.device_kind`; None for a CPU and other strangers."""
    for chip in CHIPS.values():
        if device_kind in chip.device_kinds:
            return chip
    return None
