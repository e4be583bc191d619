"""The devices that a step is compiled for: of a TPU slice or GPUs that nobody has, or the host's.

JAX compiles for the former on any Linux, with libtpu or the CUDA plugin: how those are found, what
they want to be told, and their versions stand here. The CPU's compiler is a part of jaxlib.
"""

import dataclasses
import importlib.metadata
import os
from typing import Any

from jaxscale import runtime
from jaxscale.config import Config, ConfigError
from jaxscale.hardware import Chip
from jaxscale.plan import nvidia
from jaxscale.plan.at_hand import CPU
from jaxscale.plan.torus import Slice, parse_topology

# No question to a metadata server, no lock against other processes, no look for real devices.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # What is compiled hangs on nothing that nobody sees.
    "LIBTPU_INIT_ARGS": "",
    "XLA_FLAGS": "",
}


@dataclasses.dataclass(frozen=True)
class Compiler:
    """What compiles for a platform.

    Attributes:
      packages: any of these has it.
      install: the command that brings it.
      knows_time: whether its programs tell how long they take; all of them tell their bytes.
    """

    packages: tuple[str, ...]
    install: str
    knows_time: bool


# By `Chip.platform`.
COMPILERS = {
    "tpu": Compiler(("libtpu",), "pip install 'jax[tpu]'", knows_time=True),
    nvidia.PLATFORM: Compiler(
        ("jax-cuda12-plugin", "jax-cuda13-plugin"),
        "pip install 'jax[cuda12-local]'",
        knows_time=False,
    ),
    CPU: Compiler(("jaxlib",), "pip install jax", knows_time=False),
}


def compiler(platform: str) -> str | None:
    """Return name and version of the compiler that is installed; None if none is."""
    for package in COMPILERS[platform].packages:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def libtpu_version() -> str | None:
    """Return the version of the TPU compiler that is installed; None if none is."""
    found = compiler("tpu")
    return found.split()[1] if found else None


def description(chip: Chip) -> Any:
    """Return what the chip's compiler is told of it."""
    return nvidia.target_config(chip) if chip.platform == nvidia.PLATFORM else chip.description


def compiler_options(chip: Chip) -> tuple[tuple[str, str], ...]:
    """Return the options that a plan compiles with: training's, but for what needs the device."""
    options = nvidia.COMPILER_OPTIONS if chip.platform == nvidia.PLATFORM else ()
    return (*chip.compiler_options, *options)


def compilable(config: Config, chip: Chip) -> Config:
    """Return the config as it can be compiled without the chip."""
    return nvidia.compilable(config) if chip.platform == nvidia.PLATFORM else config


def devices_of(name: str, num_slices: int) -> list[Any]:
    """Return the devices of a slice by its name; of "cpu:8", fake ones of this process.

    Raises:
      ConfigError: there is no compiler for them, or it does not know the slice.
    """
    if name.partition(":")[0] != CPU:
        return describe(parse_topology(name, num_slices))
    import jax

    runtime.fake_devices(name)
    return jax.devices()


def describe(slice_: Slice) -> list[Any]:
    """Return the devices of a slice, for compiling alone.

    Raises:
      ConfigError: there is no compiler for it, or it does not know the slice.
    """
    platform = slice_.chip.platform
    if compiler(platform) is None:
        install = COMPILERS[platform].install
        raise ConfigError(f"there is no {platform.upper()} compiler; install it: {install}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    backend, settings = _gpus(slice_) if platform == nvidia.PLATFORM else _tpus(slice_)
    try:
        described = topologies.get_topology_desc(
            platform=backend, topology_name=slice_.name, **settings
        )
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        name = COMPILERS[platform].packages[0]
        raise ConfigError(f"--topology={slice_.name}: {name} does not describe it: {first}") from (
            error
        )
    return list(described.devices)


def _tpus(slice_: Slice) -> tuple[str, dict[str, Any]]:
    settings: dict[str, Any] = dict(slice_.chip.description)
    if slice_.num_chips == slice_.num_slices:
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if slice_.num_slices > 1:
        settings["num_slices"] = slice_.num_slices
    return "tpu", settings


def _gpus(slice_: Slice) -> tuple[str, dict[str, Any]]:
    (size,) = slice_.shape
    shape = f"{slice_.num_slices}x1x{size}"
    return "cuda", {"target_config": nvidia.target_config(slice_.chip), "topology": shape}
