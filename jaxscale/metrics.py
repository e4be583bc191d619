"""What a run reports about itself: metrics.jsonl, TensorBoard, the machine's load, MFU's peak.

Names of metrics and files stand in records.py. The train loop gathers one mapping per logged step
from its own figures and `SystemMonitor.read`, and hands it to `MetricsWriter` and the console.
"""

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from jaxscale import records
from jaxscale.hardware import chip_for


class MetricsWriter:
    """Appends lines to metrics.jsonl and mirrors their numbers to TensorBoard.

    Only the primary process writes; for the others every call does nothing.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, primary: bool) -> None:
        self._path = pathlib.Path(workdir) / records.METRICS_FILE
        self._events = None
        if primary:
            # Imported here because it is slow, and of no use to the other processes.
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir), flush_secs=10)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
          step: the step that the values belong to; in a resumed run the last line of a step counts.
          kind: one of the KIND_ names of records.py.
          values: metric name to number, text, list or None; `records.to_json` says what becomes of
            NaN and infinity.
        """
        if self._events is None:
            return
        line = records.to_json(
            {records.STEP: step, records.KIND: kind, records.TIME: records.now(), **values}
        )
        records.append_line(self._path, line)
        for name, value in line.items():
            if name != records.STEP and isinstance(value, int | float):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Write out what TensorBoard's writer still holds."""
        if self._events is not None:
            self._events.close()
            self._events = None


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats per token; a loss beyond all floats counts as 700."""
    return math.exp(min(loss, 700.0))


class SystemMonitor:
    """Reads how busy this host and its accelerators are, and how much memory they took at most."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        """Watch those of `devices` that belong to this process."""
        self._devices = [d for d in devices if d.process_index == jax.process_index()]
        self._utilization = _utilization_reader(self._devices)
        # The first call has no interval to speak of, and always says 0.
        psutil.cpu_percent()

    def read(self, *, compiled_peak_bytes: int | None = None) -> dict[str, Any]:
        """Return utilizations (0 to 1, None if unknown) and peak bytes of the fullest local device.

        Args:
          compiled_peak_bytes: what the compiler says that the step needs on a device. It stands in
            where the device does not count its bytes, as on a CPU.
        """
        stats = [device.memory_stats() or {} for device in self._devices]
        counted = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
        peak = max(counted, default=compiled_peak_bytes)
        source = "device" if counted else "compiler"
        return {
            records.HOST_CPU_UTILIZATION: psutil.cpu_percent() / 100,
            records.DEVICE_UTILIZATION: self._utilization(),
            records.PEAK_BYTES: peak,
            records.PEAK_BYTES_SOURCE: None if peak is None else source,
        }


def _utilization_reader(devices: Sequence[jax.Device]) -> Callable[[], float | None]:
    """Choose the counters of the platform: NVML for NVIDIA, libtpu's for TPUs, or none."""
    if devices and devices[0].device_kind.startswith("NVIDIA"):
        return lambda: _nvml_utilization(devices)
    if devices and devices[0].platform == "tpu":
        return _tpu_utilization
    return lambda: None


def _nvml_utilization(devices: Sequence[jax.Device]) -> float | None:
    """Return the share of the last second or so in which the GPUs ran a kernel, averaged."""
    try:
        import pynvml
    except ImportError:
        return None
    # JAX numbers the GPUs that CUDA shows to it; NVML knows all of the host's.
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    busy: list[float] = []
    try:
        pynvml.nvmlInit()
        for device in devices:
            index = device.local_hardware_id
            name = visible[index] if visible else str(index)
            find = pynvml.nvmlDeviceGetHandleByIndex
            handle = find(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
            busy.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
    except (pynvml.NVMLError, IndexError):
        return None
    return sum(busy) / len(busy)


def _tpu_utilization() -> float | None:
    """Return the share of the last interval in which the chips worked, averaged."""
    try:
        from libtpu.sdk import tpumonitoring

        busy = [float(x) for x in tpumonitoring.get_metric("duty_cycle_pct").data()]
    # Its errors are not documented, and a missing counter must not end a run.
    except Exception:
        return None
    return sum(busy) / len(busy) / 100 if busy else None


@dataclasses.dataclass(frozen=True)
class PeakFlops:
    """The denominator of MFU, and where it comes from."""

    flops_per_second: float
    source: str


def peak_flops(devices: Sequence[jax.Device], dtype: str) -> PeakFlops:
    """Return the peak of all `devices` together.

    A chip of the hardware table counts with its published bf16 peak, whatever `dtype` is. On others
    a square matmul of `dtype`, accumulated in float32, is timed here for a fraction of a second:
    per device, but on CPUs per process, for all fake devices of a process share the host's cores.
    """
    kind = devices[0].device_kind
    chip = chip_for(kind)
    if chip is not None:
        total = chip.bf16_flops_per_second_per_device * len(devices)
        return PeakFlops(total, f"published bf16 peak of {kind}")
    measured = _time_matmul(dtype)
    if devices[0].platform == "cpu":
        num_processes = len({device.process_index for device in devices})
        return PeakFlops(measured * num_processes, "measured matmul on this host's CPU")
    return PeakFlops(measured * len(devices), f"measured matmul on {kind}")


def _time_matmul(dtype: str, *, size: int = 1536, budget_seconds: float = 0.3) -> float:
    """Return the best FLOP/s of a square matmul on one local device."""
    # The caller may stand in the mesh of the whole run, where one device alone may not compute.
    mesh = jax.sharding.Mesh([jax.local_devices()[0]], ("one",))
    multiply = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        matrix = jnp.ones((size, size), dtype)
        multiply(matrix).block_until_ready()
        start, best = time.perf_counter(), math.inf
        while time.perf_counter() - start < budget_seconds:
            begin = time.perf_counter()
            multiply(matrix).block_until_ready()
            best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
