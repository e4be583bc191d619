"""What this machine, its devices and its environment can do, and what to do about the rest.

`examine` runs every check and returns rows of status, finding and remedy; it starts no run and
joins no process group. `render` shows them. Whatever may hang (a device, a name server) runs under
a timeout, so that a broken machine is reported and not waited for.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import queue
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from jaxscale import runtime
from jaxscale.config import ConfigError, DataConfig, RuntimeConfig

Status = Literal["ok", "warning", "failure"]
T = TypeVar("T")

GIB = 2**30
# Below these, a small run is likely to fail for want of room.
LOW_MEMORY_BYTES = 4 * GIB
LOW_DISK_BYTES = 5 * GIB
NAME_TIMEOUT_SECONDS = 5.0
JAX_EXTRAS = ("", "tpu", "cuda12", "cuda13")

VARIABLES = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "CUDA_VISIBLE_DEVICES",
    "WORLD_SIZE",
    "RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "JAXSCALE_CACHE",
)
VARIABLE_PREFIXES = ("TPU_", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_ID")


@dataclasses.dataclass(frozen=True)
class Row:
    """The outcome of one check; a warning or failure carries its remedy."""

    check: str
    status: Status
    finding: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class DoctorReport:
    """All rows, in the order of the checks."""

    rows: tuple[Row, ...]

    @property
    def failed(self) -> bool:
        """Whether any check failed; warnings do not count."""
        return any(row.status == "failure" for row in self.rows)


def examine(
    runtime_config: RuntimeConfig,
    data_config: DataConfig,
    *,
    workdir: str = "",
    devices: str = "",
    timeout_seconds: float = 60.0,
) -> DoctorReport:
    """Run every check, in a process where JAX has not yet started.

    Args:
      runtime_config: the runtime section, for the compile cache.
      data_config: the data section, for the token cache.
      workdir: folder of a run to come, or empty; it is not created.
      devices: empty for the devices at hand, or fake ones such as "cpu:8".
      timeout_seconds: how long the devices may take over each answer.

    Raises:
      ConfigError: `devices` is of another form.
    """
    environment = dict(os.environ)
    runtime.set_jax_flags()
    if devices:
        runtime.fake_devices(devices)
    folders = {
        "compile cache": runtime_config.compile_cache_dir or str(runtime.cache_root() / "xla"),
        "token cache": data_config.cache_dir or str(runtime.cache_root() / "tokens"),
        "workdir": workdir or os.getcwd(),
    }
    if runtime_config.compile_cache_dir == "none":
        del folders["compile cache"]
    return DoctorReport(
        (
            _check_python(),
            *_check_packages(),
            *_check_environment(environment),
            _check_process_group(environment),
            _check_host(),
            *(_check_folder(name, folder) for name, folder in folders.items()),
            *_check_devices(timeout_seconds),
        )
    )


def render(report: DoctorReport) -> Table:
    """Lay the report out as a table for a terminal."""
    styles = {"ok": "green", "warning": "yellow", "failure": "bold red"}
    table = Table("check", "status", "finding", "remedy")
    for row in report.rows:
        status = Text(row.status, style=styles[row.status])
        table.add_row(Text(row.check), status, Text(row.finding), Text(row.remedy))
    return table


def _check_python() -> Row:
    version = platform.python_version()
    try:
        metadata = importlib.metadata.metadata("jaxscale")
    except importlib.metadata.PackageNotFoundError:
        finding = f"{version}; jaxscale runs from its source folder, so no versions are checked"
        return Row("python", "warning", finding, "install it: bash scripts/setup.sh")
    tested = [line.split()[-1] for line in metadata.get_all("Classifier", []) if "3." in line]
    if version.rpartition(".")[0] not in tested:
        finding = f"{version} is not among the tested versions"
        return Row("python", "warning", finding, f"use Python {', '.join(tested)}")
    return Row("python", "ok", version)


def _check_packages() -> Iterator[Row]:
    """Compare what is installed with what jaxscale asks for, and with what JAX names as its own."""
    found = ", ".join(
        f"{name} {version}" for name, version in runtime.versions(runtime.PACKAGES).items()
    )
    yield Row("packages", "ok", found)
    for package, extras in (("jaxscale", ("",)), ("jax", JAX_EXTRAS)):
        for requirement in _requirements(package, extras):
            yield from _check_requirement(package, requirement)


def _requirements(package: str, extras: tuple[str, ...]) -> list[Requirement]:
    """Return what the package requires, and of its extras what happens to be installed."""
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    needed = {}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
        if always or (wanted and runtime.versions([requirement.name])):
            needed[requirement.name, str(requirement.specifier)] = requirement
    return list(needed.values())


def _check_requirement(package: str, requirement: Requirement) -> Iterator[Row]:
    name, specifier = requirement.name, requirement.specifier
    version = runtime.versions([name]).get(name)
    remedy = f"pip install '{name}{specifier}', or bash scripts/setup.sh"
    if version is None:
        yield Row(name, "failure", "not installed", remedy)
    elif not specifier.contains(version, prereleases=True):
        # A libtpu of another release often works; another jaxlib does not.
        status: Status = "warning" if name == "libtpu" else "failure"
        yield Row(name, status, f"{version} is not the {specifier} that {package} needs", remedy)


def _check_environment(environment: Mapping[str, str]) -> Iterator[Row]:
    """Show the variables that steer JAX, and those that contradict each other."""
    names = [n for n in environment if n in VARIABLES or n.startswith(VARIABLE_PREFIXES)]
    found = " ".join(f"{name}={environment[name]}" for name in sorted(names)) or "nothing set"
    yield Row("environment", "ok", found)
    platforms = environment.get("JAX_PLATFORMS", "")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    libtpu = environment.get("LIBTPU_INIT_ARGS", "")
    fakes = "host_platform_device_count" in environment.get("XLA_FLAGS", "")
    contradictions = (
        (
            visible in ("", "-1") and platforms.startswith(("cuda", "gpu")),
            f"JAX_PLATFORMS={platforms} but CUDA_VISIBLE_DEVICES={visible} hides every GPU",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            bool(libtpu) and platforms == "cpu",
            "JAX_PLATFORMS=cpu, so LIBTPU_INIT_ARGS has no effect",
            "unset one of them",
        ),
        (
            "xla_dump" in libtpu,
            "LIBTPU_INIT_ARGS does not take the xla_dump flags",
            "move them to XLA_FLAGS",
        ),
        (
            fakes and platforms != "cpu",
            f"XLA_FLAGS fakes CPU devices but JAX_PLATFORMS={platforms or 'unset'} may pick others",
            "use --devices=cpu:N in place of the flag",
        ),
    )
    for holds, finding, remedy in contradictions:
        if holds:
            yield Row("environment", "warning", finding, remedy)


def _check_process_group(environment: Mapping[str, str]) -> Row:
    """Tell what group a run would join, and whether its first process has an address."""
    check, remedy = "process group", "set WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT on each"
    try:
        group = runtime.process_group(environment)
    except ConfigError as error:
        return Row(check, "failure", str(error), remedy)
    if group is None:
        finding = _left_alone(environment)
        return Row(check, "warning", finding, remedy) if finding else Row(check, "ok", "none")
    host = group.address.rpartition(":")[0]
    try:
        _within(NAME_TIMEOUT_SECONDS, lambda: socket.getaddrinfo(host, None))
    except (OSError, TimeoutError):
        remedy = "give the first process's address as this host knows it"
        return Row(check, "failure", f"the name {host} has no address on this host", remedy)
    place = f"process {group.process_id} of {group.num_processes} at {group.address}"
    return Row(check, "ok", f"{place}, from {group.source}; not joined here")


def _left_alone(environment: Mapping[str, str]) -> str:
    """Say how a launcher started several processes that would not find each other, if it did."""
    tasks = environment.get("SLURM_NTASKS", "1")
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    part = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if environment.get(name)]
    if tasks.isdigit() and int(tasks) > 1:
        return f"SLURM_NTASKS={tasks} but no group: each task would train by itself"
    if workers > 1:
        return f"TPU_WORKER_HOSTNAMES has {workers} hosts but no group: each would wait"
    if part and not environment.get("WORLD_SIZE"):
        return f"{', '.join(part)} without WORLD_SIZE: each process would train by itself"
    return ""


def _check_host() -> Row:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    finding = f"{cores} cores, {_gib(memory.available)} of {_gib(memory.total)} memory free"
    if memory.available < LOW_MEMORY_BYTES:
        remedy = "end other programs, or lower train.global_batch_size and model.width"
        return Row("host", "warning", finding, remedy)
    return Row("host", "ok", finding)


def _check_folder(name: str, folder: str) -> Row:
    """Write a file where the folder is or would be made, and take it away again."""
    if "://" in folder and name == "compile cache":
        return Row(name, "ok", f"{folder} (remote: not tried)")
    if "://" in folder:
        return Row(name, "failure", f"{folder} is remote", "take a local or a mounted folder")
    path = pathlib.Path(folder).expanduser().absolute()
    parent = next(place for place in (path, *path.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"jaxscale")
        free = shutil.disk_usage(parent).free
    except OSError as error:
        remedy = f"choose another {name}, or free {parent}"
        return Row(name, "failure", f"{folder} cannot be written: {error.strerror}", remedy)
    finding = f"{folder}: writable, {_gib(free)} free"
    if free < LOW_DISK_BYTES:
        return Row(name, "warning", finding, "free some space, or choose a larger disk")
    return Row(name, "ok", finding)


def _check_devices(timeout_seconds: float) -> Iterator[Row]:
    """Find the devices, then compile and communicate on them; nothing more where one step fails."""
    remedy = (
        "install its driver and plugin, pip install 'jaxscale[cuda]' or 'jaxscale[tpu]'; "
        "or do without it, --devices=cpu:8"
    )
    steps: tuple[tuple[str, Callable[[], str]], ...] = (
        ("devices", _describe_devices),
        ("device memory", _describe_memory),
        ("compile", _try_matmul),
        ("all-reduce", _try_all_reduce),
    )
    for check, step in steps:
        try:
            finding = _within(timeout_seconds, step)
        except Exception as error:  # whatever a broken driver raises is a finding
            first = str(error).partition("\n")[0] or type(error).__name__
            platforms = os.environ.get("JAX_PLATFORMS") or "unset"
            yield Row(check, "failure", f"{first} (JAX_PLATFORMS {platforms})", remedy)
            return
        yield Row(check, "ok", finding)
        if check == "devices":
            yield from _check_unused_accelerator()


def _check_unused_accelerator() -> Iterator[Row]:
    """Name an accelerator that the operating system has and JAX does not use."""
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    files = {"cuda": "/dev/nvidiactl", "tpu": "/dev/accel0"}
    for extra, file in files.items():
        if os.path.exists(file):
            finding = f"{file} is here, but JAX runs on the CPU"
            yield Row("devices", "warning", finding, f"pip install 'jaxscale[{extra}]'")


def _describe_devices() -> str:
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    if len(devices) == 1:
        return "the CPU"
    return f"{len(devices)} fake CPU devices (mechanics, not speed)"


def _describe_memory() -> str:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [row.get("bytes_limit", 0) for row in stats]
    if not all(limits):
        return "the host's memory, shared by all devices"
    used = max(row.get("bytes_in_use", 0) for row in stats)
    return f"{_gib(min(limits))} per device, at most {_gib(used)} in use"


def _try_matmul() -> str:
    start = time.perf_counter()
    product = jax.jit(jnp.matmul)(jnp.ones((128, 128)), jnp.ones((128, 128)))
    if not bool((product == 128).all()):
        raise ArithmeticError("a 128 x 128 matmul of ones came out wrong")
    return f"one matmul in {time.perf_counter() - start:.2f} s"


def _try_all_reduce() -> str:
    start = time.perf_counter()
    devices = jax.local_devices()
    count, spec = len(devices), PartitionSpec("devices")
    mesh = jax.make_mesh((count,), ("devices",), (AxisType.Explicit,), devices=devices)

    def add_up(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "devices")

    total = jax.jit(jax.shard_map(add_up, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))
    numbers = jax.device_put(np.arange(count, dtype=np.float32), NamedSharding(mesh, spec))
    if float(total(numbers)[0]) != count * (count - 1) / 2:
        raise ArithmeticError(f"a sum over {count} device(s) came out wrong")
    return f"a sum over {count} device(s) in {time.perf_counter() - start:.2f} s"


def _within(seconds: float, function: Callable[[], T]) -> T:
    """Call `function` in a thread and wait for it so long; a thread that hangs is left behind.

    Raises:
      TimeoutError: no answer in time.
      Exception: whatever `function` raises.
    """
    answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def call() -> None:
        try:
            answers.put((function(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
