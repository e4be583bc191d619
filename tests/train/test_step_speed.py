"""The speed of the step, and the verb that compares the input pipeline with it."""

import json
import pathlib
from typing import Any

import pytest

from jaxscale import cli
from jaxscale.config import ConfigError
from jaxscale.train import step_speed
from jaxscale.train.step_speed import measure_step
from tests.conftest import ROOT


def test_the_step_is_measured(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_speed, "SECONDS_PER_REPEAT", 0.0)
    config = make_config()
    tokens, seconds = measure_step(config)
    assert tokens == config.train.global_batch_size * config.data.length
    assert len(seconds) == step_speed.REPEATS
    assert all(0 < s < 60 for s in seconds)


def test_what_does_not_fit_is_not_compiled(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(step_speed, "compile_step")
    large = make_config(model__width=2**20, model__hidden=2**20)
    with pytest.raises(ConfigError, match=r"it needs [\d,.]+ GiB on each device, of [\d,.]+ GiB"):
        measure_step(large)


@pytest.fixture
def arguments(corpus: pathlib.Path, tmp_path: pathlib.Path) -> list[str]:
    return [
        *("prepare", "--profile", "--devices=cpu:8", f"--json={tmp_path / 'rows.json'}"),
        f"--config={ROOT / 'configs' / 'lm.py'}:tiny",
        f"--config.data.source=files:{corpus}/*.txt",
        f"--config.data.cache_dir={tmp_path / 'tokens'}",
        *("--config.data.length=16", "--config.train.global_batch_size=8"),
        *("--config.model.num_layers=1", "--config.model.width=32", "--config.model.num_heads=4"),
    ]


def rows_in(folder: pathlib.Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())["rows"]
    return rows


@pytest.mark.slow
def test_the_verb_compares_with_the_step(
    arguments: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 0
    output, error = capsys.readouterr()
    assert "x what a training step takes" in " ".join(output.split())
    assert error == ""
    rows = rows_in(tmp_path)
    assert rows[-1]["part"] == "training step"
    for row in rows:
        assert row["step_ratio"] == row["tokens_per_second"] / rows[-1]["tokens_per_second"]


@pytest.mark.slow
def test_the_verb_says_that_it_cannot_measure_and_takes_a_figure(
    arguments: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*arguments, "--config.mesh.data=3"]
    assert cli.main(arguments) == 0
    error = capsys.readouterr().err
    assert "the training step cannot be measured here: mesh (data=3)" in error
    assert "so nothing is placed on devices" in error
    assert "--step-tokens-per-second=N" in error
    assert rows_in(tmp_path)[-1]["step_ratio"] is None
    assert cli.main([*arguments, "--step-tokens-per-second=1000"]) == 0
    assert "cannot be measured" not in capsys.readouterr().err
    last = rows_in(tmp_path)[-1]
    assert (last["what"], last["tokens_per_second"]) == ("as given", 1000)
