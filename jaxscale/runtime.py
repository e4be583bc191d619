"""The machine under a run: platform, fake devices, process group, compile cache, JAX flags.

Everything here happens once per process and before JAX touches a device. The verbs call `start`.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxscale.config import ConfigError, RuntimeConfig

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
HEARTBEAT_TIMEOUT_SECONDS = 60


def set_jax_flags() -> None:
    """Set the JAX flags that the sharding code relies on; harmless to call twice."""
    # A sharding that names an axis of size 1 would differ from one that does not, and compile
    # twice.
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)


def start(runtime: RuntimeConfig, *, devices: str = "") -> None:
    """Prepare JAX for this process: flags, platform, compile cache, and its process group if any.

    Args:
      runtime: the runtime section.
      devices: empty for the devices at hand, or fake ones such as "cpu:8".
    """
    set_jax_flags()
    if devices:
        fake_devices(devices)
    _set_compile_cache(runtime.compile_cache_dir)
    group = process_group(os.environ)
    if group is not None:
        join(group, timeout_seconds=runtime.start_timeout_seconds)


def fake_devices(spec: str) -> None:
    """Make JAX see `N` CPU devices, for `spec` "cpu:N"; each process of a group has its own N.

    Raises:
      ConfigError: another form, or JAX has already started with other devices.
    """
    match = re.fullmatch(r"cpu(?::(\d+))?", spec)
    if match is None or match.group(1) == "0":
        raise ConfigError(f"--devices={spec} is not of the form cpu:N, like cpu:8")
    count = int(match.group(1) or 1)
    # Without this an installed libtpu or CUDA plugin is probed first.
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        if jax.local_device_count() != count or jax.default_backend() != "cpu":
            found = f"{jax.local_device_count()} {jax.default_backend()} devices"
            raise ConfigError(f"--devices={spec}: JAX already runs with {found}") from None


def stay_on_host() -> None:
    """Keep JAX from looking for accelerators, for what only plans for them."""
    set_jax_flags()
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")


def cache_root() -> pathlib.Path:
    """Return the folder for all that can be made again: $JAXSCALE_CACHE, else ~/.cache/jaxscale."""
    root = os.environ.get("JAXSCALE_CACHE")
    return pathlib.Path(root) if root else pathlib.Path.home() / ".cache" / "jaxscale"


def _set_compile_cache(folder: str) -> None:
    if folder == "none":
        return
    jax.config.update("jax_compilation_cache_dir", folder or str(cache_root() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """This process's place among the processes of one run."""

    address: str
    num_processes: int
    process_id: int
    source: str


def process_group(environment: Mapping[str, str]) -> ProcessGroup | None:
    """Read the process group from WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT; None if alone.

    Raises:
      ConfigError: some of the variables are missing or no numbers.
    """
    size = environment.get("WORLD_SIZE", "1")
    if size == "1":
        return None
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ConfigError(f"WORLD_SIZE={size} but {', '.join(missing)} not set; set all of {names}")
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        if not environment[name].isdigit():
            raise ConfigError(f"{name}={environment[name]} is not a number")
    rank = int(environment["RANK"])
    if rank >= int(size):
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={size}")
    address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    return ProcessGroup(address, int(size), rank, "environment variables")


def join(group: ProcessGroup, *, timeout_seconds: int) -> None:
    """Join the process group, waiting for the others; CPU processes talk through Gloo.

    Raises:
      ConfigError: the others did not come in time.
    """
    try:
        jax.distributed.initialize(
            coordinator_address=group.address,
            num_processes=group.num_processes,
            process_id=group.process_id,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        )
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"process {group.process_id} of {group.num_processes} found no group at "
            f"{group.address} "
            f"within runtime.start_timeout_seconds={timeout_seconds}: {first}"
        ) from error


def is_primary() -> bool:
    """Tell whether this is the process of its group that prints and writes results."""
    return jax.process_index() == 0


def agreed(number: int) -> int:
    """Return the primary process's number on all, for what clocks decide; a collective."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def describe() -> dict[str, Any]:
    """Return what a result depends on besides its config: versions, devices, host, git revision."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(PACKAGES),
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "fake_devices": jax.default_backend() == "cpu" and len(devices) > 1,
        "num_processes": jax.process_count(),
        "num_host_cpus": os.cpu_count(),
        "git_revision": _git_revision(),
        "command": sys.argv,
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the version of each package that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """Return the revision of the source tree, with `+` when it has uncommitted changes."""
    folder = pathlib.Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None
