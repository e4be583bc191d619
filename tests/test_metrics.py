"""What a run writes about itself can be read back, and says where each figure comes from."""

import contextlib
import json
import math
import pathlib
import struct
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from tensorboardX.proto import event_pb2

from jaxscale import metrics, records
from jaxscale.metrics import MetricsWriter, SystemMonitor, peak_flops


def read_events(folder: pathlib.Path) -> dict[tuple[str, int], float]:
    """Read TensorBoard's files: records of a length, its checksum, the event, and its checksum."""
    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_lines_and_events(tmp_path: pathlib.Path) -> None:
    with contextlib.closing(MetricsWriter(tmp_path, primary=True)) as writer:
        writer.write(3, records.KIND_TRAIN, {records.LOSS: 2.5, records.MFU: None})
        # Each line is there at once, for whoever follows the file.
        (line,) = records.read_lines(tmp_path / records.METRICS_FILE)
        assert {"step": 3, "kind": "train", "loss": 2.5, "mfu": None}.items() <= line.items()
        assert line["time"].endswith("+00:00")
        writer.write(4, records.KIND_SAMPLE, {"text": "def f():\n"})
    assert read_events(tmp_path) == {("train/loss", 3): 2.5}
    assert records.read_lines(tmp_path / records.METRICS_FILE)[1]["text"] == "def f():\n"


def test_arrays_of_one_element_are_numbers(tmp_path: pathlib.Path) -> None:
    values = {"a": jnp.float32(0.5), "b": np.int64(7), "c": np.float32("nan"), "d": jnp.bfloat16(2)}
    with contextlib.closing(MetricsWriter(tmp_path, primary=True)) as writer:
        writer.write(1, records.KIND_TRAIN, values)
    (line,) = records.read_lines(tmp_path / records.METRICS_FILE)
    assert (line["a"], line["b"], line["c"], line["d"]) == (0.5, 7, None, 2.0)


def test_nonfinite_numbers_are_valid_json_and_visible(tmp_path: pathlib.Path) -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0}

    def refuse(text: str) -> Any:
        raise AssertionError(f"{text} is not JSON")

    with contextlib.closing(MetricsWriter(tmp_path, primary=True)) as writer:
        writer.write(1, records.KIND_TRAIN, values)
    records.write_json(tmp_path / "result.json", {"rows": [{"loss": math.nan, "list": [math.inf]}]})
    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert result == {"rows": [{"loss": None, "list": [None], "nonfinite": {"loss": "nan"}}]}
    text = (tmp_path / records.METRICS_FILE).read_text()
    line = json.loads(text, parse_constant=refuse)
    assert line["nonfinite"] == {"a": "nan", "b": "inf", "c": "-inf"}
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, None, 1.0)
    assert read_events(tmp_path) == {("train/d", 1): 1.0}


def test_a_line_cut_short_costs_only_itself(tmp_path: pathlib.Path) -> None:
    path = tmp_path / records.METRICS_FILE
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    with contextlib.closing(MetricsWriter(tmp_path, primary=True)) as writer:
        writer.write(2, records.KIND_TRAIN, {})
        writer.write(3, records.KIND_TRAIN, {})
    assert [line["step"] for line in records.read_lines(path)] == [1, 2, 3]


def test_only_the_primary_process_writes(tmp_path: pathlib.Path) -> None:
    with contextlib.closing(MetricsWriter(tmp_path, primary=False)) as writer:
        writer.write(1, records.KIND_TRAIN, {records.LOSS: 1.0})
    assert not list(tmp_path.iterdir())


def test_a_busy_host_shows(devices: list[jax.Device]) -> None:
    monitor = SystemMonitor(devices)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass
    reading = monitor.read()
    assert 0.1 < reading[records.HOST_CPU_UTILIZATION] <= 1
    assert reading[records.DEVICE_UTILIZATION] is None


def test_peak_bytes_of_a_cpu_come_from_the_compiler(devices: list[jax.Device]) -> None:
    monitor = SystemMonitor(devices)
    reading = monitor.read(compiled_peak_bytes=123)
    assert reading[records.PEAK_BYTES] == 123
    assert reading[records.PEAK_BYTES_SOURCE] == "compiler"
    reading = monitor.read()
    assert reading[records.PEAK_BYTES] is None and reading[records.PEAK_BYTES_SOURCE] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_a_cpu_is_measured(devices: list[jax.Device], dtype: str) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    for _ in range(5):
        with jax.set_mesh(mesh):
            in_mesh = peak_flops(devices, dtype)
        alone = peak_flops(devices[:1], dtype)
        assert in_mesh.source == "measured matmul on this host's CPU"
        # Eight fake devices share the cores of one. Other work on the host disturbs both figures.
        if 1 / 2 < in_mesh.flops_per_second / alone.flops_per_second < 2:
            break
    else:
        pytest.fail(f"{in_mesh} for 8 devices in a mesh, {alone} for one")
    assert 1e9 < alone.flops_per_second < 1e14


@pytest.mark.parametrize(
    ("device_kind", "per_device"),
    [("TPU v5 lite", 197e12), ("TPU7x", 2307e12 / 2), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_the_peak_of_a_known_chip_is_published(device_kind: str, per_device: float) -> None:
    peak = peak_flops([SimpleNamespace(device_kind=device_kind)] * 4, "bfloat16")
    assert peak.flops_per_second == 4 * per_device
    assert peak.source == f"published bf16 peak of {device_kind}"


def test_the_peak_of_a_described_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    assert peak_flops(topology.devices, "bfloat16").flops_per_second == 4 * 197e12


def test_nvml_counts_or_says_nothing() -> None:
    pynvml = pytest.importorskip("pynvml")
    busy = metrics._nvml_utilization([SimpleNamespace(local_hardware_id=0)])
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert busy is None
    else:
        assert busy is not None and 0 <= busy <= 1
