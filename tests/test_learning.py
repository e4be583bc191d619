"""`tiny` learns: in minutes on two cores it predicts held-out code better than n-gram models do."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from jaxscale import records

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 150
LIMIT_SECONDS = 600


def jaxscale(*arguments: str) -> None:
    # The test suite's XLA flags compile quickly and compute slowly; a user has none.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "jaxscale", *arguments]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_tiny_beats_unigram_and_bigram_in_ten_minutes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    jaxscale(
        "train",
        "--config=configs/lm.py:tiny",
        f"--workdir={tmp_path}",
        "--devices=cpu:8",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        f"--config.train.steps={STEPS}",
        "--config.train.eval_every=0",
    )
    seconds = time.monotonic() - started
    result = tmp_path / "evaluate.json"
    jaxscale("evaluate", f"--workdir={tmp_path}", "--baselines", "--batches=64", f"--json={result}")
    row = records.read_json(result)["rows"][0]
    model, unigram, bigram = (
        row[name]
        for name in (
            records.BITS_PER_BYTE,
            records.UNIGRAM_BITS_PER_BYTE,
            records.BIGRAM_BITS_PER_BYTE,
        )
    )
    with capsys.disabled():
        print(
            f"\nbits per byte after {STEPS} steps: {model:.3f} model, {bigram:.3f} bigram, "
            f"{unigram:.3f} unigram"
        )
    assert model < bigram < unigram
    assert seconds < LIMIT_SECONDS
