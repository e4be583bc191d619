"""The benchmark beside PyTorch: its contenders train one model, or it refuses to compare them."""

import pathlib
import runpy
import subprocess
import sys
import types

import pytest

from jaxscale import records

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "bench_train.py"


@pytest.mark.slow
def test_all_contenders_train_one_model(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch", reason="the extra `bench` is not installed")
    file = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--rounds=2", "--steps=1", f"--json={file}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert shown.returncode == 0, shown.stderr
    rows = records.read_json(file)["rows"]
    assert [row["dtype"] for row in rows] == ["float32"] * 3 + ["bfloat16"] * 3
    for row in rows:
        low, high = row["jaxscale_ratio_range"]
        assert 0 < low <= row["jaxscale_ratio"] <= high
        # They learn: the script itself compares the contenders' losses with each other.
        assert row["losses"] == sorted(row["losses"], reverse=True)
    assert [row["jaxscale_ratio"] for row in rows[::3]] == [1.0, 1.0]
    assert shown.stdout.count("tokens/s") == 6


def test_other_losses_are_refused() -> None:
    check = runpy.run_path(str(SCRIPT), run_name="bench")["check_losses"]

    def contender(*losses: float) -> types.SimpleNamespace:
        return types.SimpleNamespace(name="one", dtype="float32", losses=losses)

    check([contender(4.0, 3.0), contender(4.0, 3.00001)])
    with pytest.raises(ArithmeticError, match="do not train the same model"):
        check([contender(4.0, 3.0), contender(4.0, 3.001)])
