"""Devices of a slice of TPUs that nobody has: JAX compiles for them, with libtpu, on any Linux.

Everything about libtpu stands here: how it is found, what it wants to be told, and its version.
"""

import importlib.metadata
import os
from typing import Any

from jaxscale.config import ConfigError
from jaxscale.plan.torus import Slice

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
INSTALL = "pip install 'jax[tpu]'"


def libtpu_version() -> str | None:
    """Return the version of the TPU compiler that is installed; None if none is."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(slice_: Slice) -> list[Any]:
    """Return the devices of a slice, for compiling alone.

    Raises:
      ConfigError: there is no TPU compiler, or it does not know the slice.
    """
    if libtpu_version() is None:
        raise ConfigError(f"there is no TPU compiler; install it: {INSTALL}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    settings: dict[str, Any] = dict(slice_.chip.description)
    if slice_.num_chips == slice_.num_slices:
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if slice_.num_slices > 1:
        settings["num_slices"] = slice_.num_slices
    name = f"{slice_.chip.name}:{'x'.join(map(str, slice_.shape))}"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--topology={name}: libtpu does not describe it: {first}") from error
    return list(described.devices)
