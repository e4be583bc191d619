"""NVIDIA GPUs that are only described: their facts agree, and XLA compiles for them."""

import dataclasses
import json
import pathlib
import re

import pytest

from jaxscale.cli import main
from jaxscale.config import ConfigError
from jaxscale.config_source import load
from jaxscale.hardware import CHIPS, GIB
from jaxscale.hardware import GPUS as CHIPS_OF_NVIDIA
from jaxscale.plan.compile import Job
from jaxscale.plan.describe import compiler
from jaxscale.plan.nvidia import GPUS, NOTE, compilable, target_config, with_memory
from jaxscale.plan.torus import parse_topology
from jaxscale.resolve import resolve

# TFLOP/s in float32 without matrix units, as the data sheets have them.
FLOAT32_PEAKS = {"a100": 19.5, "a100-40gb": 19.5, "h100": 67, "h200": 67, "b200": 75}


def test_every_gpu_is_described() -> None:
    assert list(GPUS) == [chip.name for chip in CHIPS_OF_NVIDIA]


@pytest.mark.parametrize("name", GPUS)
def test_the_facts_agree_with_the_data_sheet(name: str) -> None:
    gpu, chip = GPUS[name], CHIPS[name]
    # A multiplication and an addition per unit and cycle.
    peak = 2 * gpu.num_sms * gpu.lanes_per_sm * gpu.clock_hertz
    assert peak == pytest.approx(FLOAT32_PEAKS[name] * 1e12, rel=0.01)
    # Some memory is for error correction and the driver.
    assert 0.98 * chip.hbm_bytes < gpu.memory_bytes < chip.hbm_bytes


def test_the_target_is_told_in_xlas_words() -> None:
    text = target_config(CHIPS["h100"])
    fields = dict(re.findall(r"^ *(\w+): (.*)$", text, re.MULTILINE))
    assert fields["core_count"] == "132"
    assert (fields["major"], fields["minor"]) == ("9", "0")
    assert fields["feature_extension"] == "ACCELERATED_FEATURES"
    # 228 KiB of an SM, one of which is the system's.
    assert fields["shared_memory_per_core"] == "233472"
    assert fields["shared_memory_per_block_optin"] == "232448"
    assert fields["clock_rate_ghz"] == "1.98"
    assert fields["memory_bandwidth"] == "3350000000000"
    assert fields["device_description_str"] == '"NVIDIA H100 80GB HBM3"'
    assert text.count("{") == text.count("}") == 2
    assert "feature_extension" not in target_config(CHIPS["a100"])


def test_programs_have_what_jax_takes_of_the_memory() -> None:
    chip = CHIPS["h100"]
    assert chip.usable_bytes_per_device == 80 * GIB
    # Three quarters of the 79.1 GiB that CUDA reports.
    assert with_memory(chip, {}).usable_bytes_per_device == pytest.approx(59.325 * GIB, abs=2)
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        more = with_memory(chip, {name: "0.9"})
        assert more.usable_bytes_per_device == pytest.approx(71.19 * GIB, abs=2)
        for wrong in ("1.5", "0", "most"):
            with pytest.raises(ConfigError, match=f"{name}={wrong} is no share"):
                with_memory(chip, {name: wrong})


def test_only_what_needs_cudnn_is_compiled_otherwise() -> None:
    config = resolve(load("configs/lm.py:tiny", [("model.attention", "flash")]))
    assert compilable(config).model.attention == "chunked"
    for attention in ("dense", "chunked"):
        other = resolve(load("configs/lm.py:tiny", [("model.attention", attention)]))
        assert compilable(other) is other


def test_what_is_told_of_a_gpu_decides_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(load("configs/lm.py:tiny", []))
    before = Job(config, parse_topology("h100:8"))
    assert Job(config, parse_topology("h100:8")).key == before.key
    assert Job(config, parse_topology("h100:8", num_slices=2)).key != before.key
    fewer = dataclasses.replace(GPUS["h100"], num_sms=114)
    key = before.key
    monkeypatch.setitem(GPUS, "h100", fewer)
    assert before.key != key


def test_gpus_are_planned_by_the_closed_form_where_there_is_no_plugin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    for module in ("run", "table"):
        monkeypatch.setattr(f"jaxscale.plan.{module}.compiler", lambda platform: None)
    file = tmp_path / "plan.json"
    arguments = ["plan", "--config=configs/lm.py:8b,batch=64", "--topology=h100:8"]
    assert main([*arguments, "--num-slices=2", f"--json={file}"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("2 x h100:8: 16 chips, 59.3 GiB per device; closed form alone; ")
    assert "pip install 'jax[cuda12-local]' compiles" in text and NOTE not in text
    rows = json.loads(file.read_text())["rows"]
    best = rows[0]
    assert best["known_by"] == "closed form" and best["step_seconds"] > 0
    # GPUs of a node, then nodes.
    curve = [row["topology"] for row in rows if row["phase"] == "curve"]
    assert "h100:8" in curve and curve.index("h100:8") < curve.index("2 x h100:8")


@pytest.mark.parametrize("knob", ["batch", "length"])
def test_the_boundary_of_memory_is_that_of_the_gpus(knob: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "plan.json"
    arguments = ["plan", "--config=configs/lm.py:1b,batch=8", "--config.model.attention=flash"]
    arguments += [f"--{knob}=auto", "--remat=full", "--meshes=fsdp=8", "--closed-form"]
    assert main([*arguments, "--topology=h100:8", f"--json={file}"]) == 0
    (small,) = (r for r in json.loads(file.read_text())["rows"] if r["phase"] == "boundary")
    assert main([*arguments, "--topology=b200:8", f"--json={file}"]) == 0
    (large,) = (r for r in json.loads(file.read_text())["rows"] if r["phase"] == "boundary")
    assert 0 < small["size"] < large["size"]


def test_a_step_is_compiled_for_gpus_that_nobody_has(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler("gpu") is None:
        pytest.skip("the extra `nvidia-plan` is not installed")
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path))
    file = tmp_path / "plan.json"
    arguments = ["plan", "--config=configs/lm.py:tiny", "--config.model.attention=flash"]
    arguments += ["--topology=h100:4", "--num-slices=2", "--top=1", f"--json={file}"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert NOTE in shown.out and "seconds by the closed form" in shown.out
    (row,) = (r for r in json.loads(file.read_text())["rows"] if r["phase"] == "candidate")
    assert row["known_by"] == "bytes compiled" and row["fits"] and not row["error"]
    # The state is cut in no more than 8: 1.8 million parameters with two moments in float32.
    assert row["needed_bytes"] > 3 * 4 * 1.8e6 / 8
    # What is trained is what was asked for.
    assert row["config"]["model"]["attention"] == "flash"
    assert "--config.model.attention=flash" in shown.out
    # With no room, the compiler's bytes say so.
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", str(row["needed_bytes"] / 79.1 / GIB * 0.99))
    assert main(arguments) == 1
    assert "jaxscale train" not in capsys.readouterr().out
