"""`jaxscale.doctor`: each check on a machine that is well, and on one with that fault."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import pytest
from packaging.requirements import Requirement
from rich.console import Console

from jaxscale import doctor
from jaxscale.config import ConfigError, DataConfig, RuntimeConfig

GROUP = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}


def examine(folder: pathlib.Path) -> doctor.DoctorReport:
    return doctor.examine(
        RuntimeConfig(compile_cache_dir=str(folder / "xla")),
        DataConfig(cache_dir=str(folder / "tokens")),
        workdir=str(folder / "run"),
    )


def row(report: doctor.DoctorReport, check: str) -> doctor.Row:
    return next(row for row in report.rows if row.check == check)


@pytest.mark.smoke
def test_every_check_reports(tmp_path: pathlib.Path, devices: list[jax.Device]) -> None:
    report = examine(tmp_path)
    assert not report.failed, [row for row in report.rows if row.status == "failure"]
    checks = [row.check for row in report.rows]
    assert checks[:2] == ["python", "packages"]
    assert checks[-5:] == ["workdir", "devices", "device memory", "compile", "all-reduce"]
    assert row(report, "devices").finding == "8 fake CPU devices (mechanics, not speed)"
    assert row(report, "all-reduce").finding.startswith(f"a sum over {len(devices)} device")
    assert not list(tmp_path.iterdir()), "examine leaves nothing behind"


def test_render_shows_every_row(tmp_path: pathlib.Path) -> None:
    report = doctor.DoctorReport(
        (doctor.Row("a", "failure", "b [c]", "d"), doctor.Row("e", "ok", "f"))
    )
    console = Console(width=80)
    with console.capture() as capture:
        console.print(doctor.render(report))
    for word in ("failure", "b [c]", "d", "e", "ok"):
        assert word in capture.get()


def test_failed_counts_failures_alone() -> None:
    warned = doctor.DoctorReport((doctor.Row("a", "warning", "b", "c"), doctor.Row("a", "ok", "b")))
    assert not warned.failed
    assert doctor.DoctorReport((*warned.rows, doctor.Row("a", "failure", "b", "c"))).failed


def test_folder_that_cannot_be_made(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").write_text("a file where a folder should be")
    found = row(examine(tmp_path), "workdir")
    assert found.status == "failure"
    assert "run cannot be written" in found.finding
    assert found.remedy


def test_compile_cache_switched_off(tmp_path: pathlib.Path) -> None:
    report = doctor.examine(RuntimeConfig(compile_cache_dir="none"), DataConfig())
    assert "compile cache" not in [row.check for row in report.rows]


def test_a_remote_folder_will_do_for_compiled_programs_alone() -> None:
    assert "not tried" in doctor._check_folder("compile cache", "gs://bucket/xla").finding
    for name in ("workdir", "token cache"):
        found = doctor._check_folder(name, "gs://bucket/run")
        assert (found.status, found.finding) == ("failure", "gs://bucket/run is remote")


def test_wrong_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="--devices=gpu"):
        doctor.examine(RuntimeConfig(), DataConfig(), devices="gpu")


@pytest.mark.parametrize(
    ("environment", "finding"),
    [
        ({"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "hides every GPU"),
        ({"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": "--xla_a=1"}, "no effect"),
        ({"LIBTPU_INIT_ARGS": "--xla_dump_to=/tmp"}, "does not take the xla_dump"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, "may pick others"),
    ],
)
def test_contradicting_variables(environment: dict[str, str], finding: str) -> None:
    shown, *warnings = doctor._check_environment(environment)
    assert shown.finding.count("=") >= len(environment)
    assert [row.status for row in warnings] == ["warning"]
    assert finding in warnings[0].finding


def test_variables_in_harmony() -> None:
    environment = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "0,1", "TPU_TOPOLOGY": "2x2"}
    (shown,) = doctor._check_environment({**environment, "HOME": "/nowhere"})
    assert shown.finding == "CUDA_VISIBLE_DEVICES=0,1 JAX_PLATFORMS=cuda TPU_TOPOLOGY=2x2"


@pytest.mark.parametrize(
    ("environment", "status", "finding"),
    [
        ({}, "ok", "none"),
        (GROUP, "ok", "process 1 of 2 at localhost:1234"),
        ({**GROUP, "MASTER_ADDR": "no-such-host.invalid"}, "failure", "has no address"),
        ({**GROUP, "MASTER_ADDR": ""}, "failure", "MASTER_ADDR not set"),
        ({**GROUP, "RANK": "2"}, "failure", "RANK=2"),
        ({"RANK": "1", "MASTER_ADDR": "localhost"}, "warning", "without WORLD_SIZE"),
        ({"SLURM_NTASKS": "4"}, "warning", "SLURM_NTASKS=4"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "warning", "2 hosts"),
    ],
)
def test_process_group(environment: dict[str, str], status: str, finding: str) -> None:
    found = doctor._check_process_group(environment)
    assert found.status == status
    assert finding in found.finding
    assert bool(found.remedy) == (status != "ok")


@pytest.mark.parametrize(
    ("requirement", "status", "finding"),
    [
        ("jax>=999", "failure", "is not the >=999 that jaxscale needs"),
        ("no-such-package>=1", "failure", "not installed"),
    ],
)
def test_packages_that_do_not_fit(requirement: str, status: str, finding: str) -> None:
    (found,) = doctor._check_requirement("jaxscale", Requirement(requirement))
    assert (found.check, found.status) == (Requirement(requirement).name, status)
    assert finding in found.finding
    assert found.remedy.startswith("pip install '")


def test_jax_names_its_jaxlib() -> None:
    names = [requirement.name for requirement in doctor._requirements("jax", doctor.JAX_EXTRAS)]
    assert "jaxlib" in names
    assert "kubernetes" not in names


def test_broken_device_is_a_finding() -> None:
    """A platform without its plugin ends the device checks, not the examination."""
    code = (
        "from jaxscale import doctor; from jaxscale.config import *\n"
        "report = doctor.examine(RuntimeConfig(), DataConfig())\n"
        "print(report.failed, [(row.check, row.status) for row in report.rows][-1])"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert run.stdout == "True ('devices', 'failure')\n"


def test_a_hang_is_left_behind() -> None:
    released = threading.Event()
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
        doctor._within(0.05, released.wait)
    assert time.perf_counter() - start < 2
    released.set()


def test_an_error_crosses_the_thread() -> None:
    with pytest.raises(KeyError, match="lost"):
        doctor._within(5, lambda: {}["lost"])
