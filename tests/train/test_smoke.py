"""The smoke test passes where training works, and fails loudly where it does not."""

import dataclasses
import math
import pathlib

import pytest

from jaxscale import records
from jaxscale.cli import main
from jaxscale.config import Config
from jaxscale.train.smoke import FALLEN, LEARNT, SmokeResult, _with_small_batch, smoke
from tests.programs import tiny_config

MESH = {"data": 2, "sequence": 2, "tensor": 2}


def run(config: Config, seconds: float = 60.0) -> SmokeResult:
    return smoke(config, seconds=seconds)


def test_a_small_batch_is_learnt_by_heart() -> None:
    result = run(tiny_config(mesh=MESH, train={"accumulation_steps": 2}))
    assert result.passed
    # One row for each shard of the batch and accumulation step.
    assert (result.rows, result.length) == (4, 16)
    assert result.last_loss < LEARNT * result.first_loss
    assert 1 < result.num_steps < 100
    assert result.tokens_per_second == pytest.approx(4 * 16 / result.step_seconds)


def test_the_length_is_cut_to_what_every_rule_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts of 3 tokens would not divide where the residual stream lies in four."""
    monkeypatch.setattr("jaxscale.train.smoke.SHARD_TOKENS", 3)
    config = tiny_config(mesh=MESH, rules={"residual_length": "sequence,tensor"})
    assert _with_small_batch(config).config.data.length == 12


@pytest.mark.parametrize("learning_rate", [0.0, 1e30])
def test_a_loss_that_does_not_fall_fails(learning_rate: float) -> None:
    config = tiny_config(mesh=MESH)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate)
    result = run(dataclasses.replace(config, optimizer=optimizer), seconds=0)
    assert not result.passed
    assert not result.last_loss < FALLEN * result.first_loss


def test_a_model_that_has_diverged_to_a_guess_fails() -> None:
    """Its loss, ln 8, is less than that of the first weights by more than a tenth."""
    model, optimizer = {"vocab_size": 8}, {"learning_rate": 1e30}
    result = run(tiny_config(mesh={"data": 8}, model=model, optimizer=optimizer), seconds=0)
    assert result.last_loss == pytest.approx(math.log(8))
    assert result.last_loss < FALLEN * result.first_loss
    assert not result.passed


@pytest.mark.parametrize(("rate", "code"), [("3e-3", 0), ("0", 1)])
def test_the_verb_exits_with_what_it_found(
    rate: str,
    code: int,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jaxscale.train.smoke.SECONDS", 0.0)
    config = pathlib.Path(__file__).resolve().parents[2] / "configs" / "lm.py"
    shape = ["--config.model.num_layers=1", "--config.data.length=16"]
    file = tmp_path / "result.json"
    verb = ["train", "--smoke", f"--config={config}:tiny", "--devices=cpu:8", *shape]
    assert main([*verb, f"--config.optimizer.learning_rate={rate}", f"--json={file}"]) == code
    out, err = capsys.readouterr()
    assert "8 sequences of 16 tokens: loss" in out
    assert "mechanics, not speed" in out
    assert ("smoke test failed" in err) == bool(code)
    assert records.read_json(file)["kind"] == "smoke"
