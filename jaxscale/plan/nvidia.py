"""NVIDIA GPUs that nobody has: what XLA's CUDA plugin wants to be told of them, and what it leaves.

JAX compiles for them on any Linux, without a GPU, a driver or CUDA's libraries. That gives bytes;
no compiler estimates their time. What cuDNN is needed for cannot be compiled so.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxscale.config import Config, ConfigError
from jaxscale.hardware import GIB, Chip

KIB = 2**10
PLATFORM = "gpu"
# Timing kernels to choose among them needs a GPU: XLA takes its own first choice.
COMPILER_OPTIONS = (("xla_gpu_autotune_level", "0"),)
# Of the memory that CUDA reports, what JAX takes for arrays unless it is told otherwise; the rest
# is for CUDA's context, kernels, NCCL and cuDNN. docs.jax.dev "GPU memory allocation".
MEMORY_SHARE = 0.75
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# The attention that has a kernel of cuDNN's, and what is compiled instead.
KERNEL_ATTENTION, COMPILED_ATTENTION = "flash", "chunked"
NOTE = (
    "attention: cuDNN's kernels cannot be compiled without cuDNN, so the bytes are those of "
    f"model.attention={COMPILED_ATTENTION}; training runs model.attention={KERNEL_ATTENTION}"
)

# Of every compute capability from 8.0 on: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability".
THREADS_PER_WARP, THREADS_PER_BLOCK, THREADS_PER_SM = 32, 1024, 2048
REGISTERS = 65536
GRID_X, GRID_YZ = 2**31 - 1, 65535
# Shared memory of a block: without asking, and what of an SM's own the system keeps from it.
SHARED_BYTES_PER_BLOCK, RESERVED_SHARED_BYTES = 48 * KIB, KIB
# From here on XLA compiles for one architecture alone, such as sm_90a.
HOPPER = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What XLA asks of a GPU beside what `hardware.py` has.

    Attributes:
      capability: compute capability, major and minor.
      num_sms: streaming multiprocessors.
      lanes_per_sm: float32 units of each.
      shared_bytes_per_sm: shared memory of each.
      l2_bytes: the second level of cache.
      clock_hertz: the highest clock of the SMs.
      memory_bytes: that CUDA reports: less than the data sheet's.
    """

    capability: tuple[int, int]
    num_sms: int
    lanes_per_sm: int
    shared_bytes_per_sm: int
    l2_bytes: int
    clock_hertz: float
    memory_bytes: int


# SMs, units, L2 and clock: NVIDIA's white papers "A100 Tensor Core GPU Architecture" and "H100
# Tensor Core GPU Architecture"; of the B200, what CUDA reports. Shared memory: CUDA C++ Programming
# Guide, by compute capability. Memory: the total capacity in PyTorch's out-of-memory errors.
_A100 = Gpu(
    capability=(8, 0),
    num_sms=108,
    lanes_per_sm=64,
    shared_bytes_per_sm=164 * KIB,
    l2_bytes=40 * KIB**2,
    clock_hertz=1.41e9,
    memory_bytes=int(79.1 * GIB),
)
_H100 = Gpu(
    capability=(9, 0),
    num_sms=132,
    lanes_per_sm=128,
    shared_bytes_per_sm=228 * KIB,
    l2_bytes=50 * KIB**2,
    clock_hertz=1.98e9,
    memory_bytes=int(79.1 * GIB),
)
GPUS = {
    "a100": _A100,
    "a100-40gb": dataclasses.replace(_A100, memory_bytes=int(39.4 * GIB)),
    "h100": _H100,
    "h200": dataclasses.replace(_H100, memory_bytes=int(139.7 * GIB)),
    "b200": dataclasses.replace(
        _H100,
        capability=(10, 0),
        num_sms=148,
        l2_bytes=129536 * KIB,
        clock_hertz=1.965e9,
        memory_bytes=int(178.3 * GIB),
    ),
}


def target_config(chip: Chip) -> str:
    """Return the GPU as XLA wants it: a GpuTargetConfigProto in text form.

    Source: xla/stream_executor/device_description.proto.
    """
    gpu = GPUS[chip.name]
    major, minor = gpu.capability
    capability = {"major": major, "minor": minor}
    if major >= HOPPER:
        capability["feature_extension"] = "ACCELERATED_FEATURES"  # type: ignore[assignment]
    info: dict[str, Any] = {
        "threads_per_block_limit": THREADS_PER_BLOCK,
        "threads_per_warp": THREADS_PER_WARP,
        "threads_per_core_limit": THREADS_PER_SM,
        "registers_per_core_limit": REGISTERS,
        "registers_per_block_limit": REGISTERS,
        "block_dim_limit_x": GRID_X,
        "block_dim_limit_y": GRID_YZ,
        "block_dim_limit_z": GRID_YZ,
        "shared_memory_per_block": SHARED_BYTES_PER_BLOCK,
        "shared_memory_per_block_optin": gpu.shared_bytes_per_sm - RESERVED_SHARED_BYTES,
        "shared_memory_per_core": gpu.shared_bytes_per_sm,
        "core_count": gpu.num_sms,
        "fpus_per_core": gpu.lanes_per_sm,
        "clock_rate_ghz": gpu.clock_hertz / 1e9,
        "l2_cache_size": gpu.l2_bytes,
        "memory_bandwidth": int(chip.hbm_bytes_per_second),
        "device_memory_size": gpu.memory_bytes,
        "cuda_compute_capability": capability,
    }
    lines = [*_proto({"gpu_device_info": info}), 'platform_name: "CUDA"']
    return "\n".join([*lines, f'device_description_str: "{chip.device_kinds[0]}"', ""])


def _proto(fields: Mapping[str, Any]) -> list[str]:
    """Return the lines of a message in text form."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            lines += [f"{name} {{", *(f"  {line}" for line in _proto(value)), "}"]
        else:
            lines.append(f"{name}: {value}")
    return lines


def with_memory(chip: Chip, environment: Mapping[str, str]) -> Chip:
    """Return the chip with the memory that JAX takes for arrays on it.

    Raises:
      ConfigError: the share in the environment is none.
    """
    name = next((name for name in SHARE_VARIABLES if environment.get(name)), "")
    text = environment.get(name, str(MEMORY_SHARE))
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"{name}={text} is no share of the memory above 0 and up to 1")
    return dataclasses.replace(chip, usable_bytes=int(GPUS[chip.name].memory_bytes * share))


def compilable(config: Config) -> Config:
    """Return the config with an attention that can be compiled without cuDNN."""
    if config.model.attention != KERNEL_ATTENTION:
        return config
    model = dataclasses.replace(config.model, attention=COMPILED_ATTENTION)
    return dataclasses.replace(config, model=model)
