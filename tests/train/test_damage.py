"""A damaged checkpoint is never read: the run goes on from the one before it, and says so."""

import hashlib
import io
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from jaxscale import records
from jaxscale.checkpoint import Checkpointer
from jaxscale.cli import main
from jaxscale.config import CheckpointConfig, ConfigError
from jaxscale.train.loop import train
from jaxscale.train.trained import open_trained
from tests.damage import CONTINUED, DAMAGES, cut_short, flip_byte, largest
from tests.programs import RUN_STEPS, final_params, last_lines

# The steps that `whole` has saved.
STEPS = (3, 6, 8)


@pytest.fixture
def run(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """Return a copy of the uninterrupted run, to be damaged."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "run"))


def folder_of(run: pathlib.Path, step: int) -> pathlib.Path:
    return run / records.CHECKPOINTS_DIR / str(step)


def contents(folder: pathlib.Path) -> dict[str, str]:
    """Return the checksum of each file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_its_file_named(run: pathlib.Path, name: str) -> None:
    damage = DAMAGES[name]
    damage.do(folder_of(run, 8), folder_of(run, 6))
    before = contents(run)
    reader = Checkpointer(run, CheckpointConfig(), read_only=True)
    with pytest.raises(ConfigError, match=f"checkpoints/8 is damaged .{damage.said}"):
        reader.read_meta(8)
    with pytest.raises(ConfigError, match=damage.said):
        reader.restore_params(8, {})
    newest = reader.newest()
    assert newest is not None
    # Files exchanged between two steps leave neither as it was.
    assert newest.step == (3 if "exchanged" in name else 6)
    assert list(newest.damaged) == [step for step in (8, 6) if step > newest.step]
    assert contents(run) == before


@pytest.mark.parametrize(
    "name",
    [x if x in CONTINUED else pytest.param(x, marks=pytest.mark.slow) for x in DAMAGES],
)
def test_a_run_goes_on_from_the_step_before_and_ends_as_if_nothing_had_been(
    make_config: Any, run: pathlib.Path, whole: pathlib.Path, name: str
) -> None:
    damage, stream = DAMAGES[name], io.StringIO()
    damage.do(folder_of(run, 8), folder_of(run, 6))
    assert train(make_config(), run, stream=stream).step == RUN_STEPS
    shown = stream.getvalue()
    assert "checkpoint of step 8 is damaged (" in shown
    assert "checkpoints/8 has become 8.damaged-1" in shown
    before = 3 if "exchanged" in name else 6
    assert f"starting from checkpoint of step {before}" in shown
    jax.tree.map(np.testing.assert_array_equal, final_params(run), final_params(whole))
    for step, line in last_lines(whole).items():
        assert last_lines(run)[step][records.LOSS] == line[records.LOSS]
    reader = Checkpointer(run, CheckpointConfig(), read_only=True)
    assert reader.all_steps() == list(STEPS)
    newest = reader.newest()
    assert newest is not None
    assert (newest.step, newest.damaged) == (RUN_STEPS, {})
    assert folder_of(run, 8).with_name("8.damaged-1").exists()


def test_a_save_that_was_cut_off_before_its_rename_is_made_again(
    make_config: Any, run: pathlib.Path, whole: pathlib.Path
) -> None:
    step = folder_of(run, 8)
    left = step.with_name("8.orbax-checkpoint-tmp")
    step.rename(left)
    stream = io.StringIO()
    train(make_config(), run, stream=stream)
    assert "starting from checkpoint of step 6" in stream.getvalue()
    assert not left.exists()
    jax.tree.map(np.testing.assert_array_equal, final_params(run), final_params(whole))


def test_where_no_step_is_whole_all_are_named_and_nothing_is_touched(
    make_config: Any, run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in STEPS:
        cut_short(folder_of(run, step) / "meta" / "metadata", step)
    before = contents(run)
    said = "; ".join(rf"step {step}: meta/metadata has {step} bytes.*" for step in (8, 6, 3))
    for knobs, folder in (
        ({}, run),
        ({"checkpoint__restore_from": run}, tmp_path / "new"),
        ({"checkpoint__init_from": run}, tmp_path / "new"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            train(make_config(**knobs), folder)
        assert "take a new workdir, or move them away" in str(caught.value)
    for verb in ("evaluate", "train"):
        assert main([verb, "--workdir", str(run)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("jaxscale: every checkpoint in ")
        assert error.count("\n") == 1
    assert contents(run) == before
    assert not list((tmp_path / "new").iterdir())


def test_a_run_that_cannot_start_moves_nothing(make_config: Any, run: pathlib.Path) -> None:
    flip_byte(largest(folder_of(run, 8)))
    before = contents(run)
    with pytest.raises(ConfigError, match="train.steps=5 is less than the 6 steps"):
        train(make_config(train__steps=5), run)
    with pytest.raises(ConfigError, match="blocks/mlp/down is"):
        train(make_config(model__hidden=32), run, allow_config_change=True)
    assert contents(run) == before


def test_readers_pass_over_damage_and_write_nothing(
    make_config: Any, run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_byte(largest(folder_of(run, 8)))
    before = contents(run)
    trained = open_trained(run)
    assert trained.step == 6
    (note,) = trained.notes
    assert note.startswith("checkpoint of step 8 is damaged (params/")
    assert note.endswith("going on from step 6")
    generate = ["generate", "--workdir", str(run), "--prompt=mesh", "--max-tokens=1"]
    assert main([*generate, "--step=8"]) == 2
    error = capsys.readouterr().err
    assert "checkpoints/8 is damaged (params/" in error
    assert error.count("\n") == 1
    for knob, words in (
        ("checkpoint__restore_from", "starting from step 6 of"),
        ("checkpoint__init_from", "starting from parameters of step 6 of"),
    ):
        stream = io.StringIO()
        train(make_config(train__steps=7, **{knob: run}), tmp_path / knob, stream=stream)
        assert note in stream.getvalue()
        assert words in stream.getvalue()
    assert contents(run) == before


def test_what_was_moved_aside_is_kept_and_not_counted(make_config: Any, run: pathlib.Path) -> None:
    for _ in range(2):
        flip_byte(largest(folder_of(run, 8)))
        train(make_config(checkpoint__keep_last=2), run)
    names = sorted(path.name for path in (run / records.CHECKPOINTS_DIR).iterdir())
    assert names == ["6", "8", "8.damaged-1", "8.damaged-2"]


def test_lines_cut_short_by_a_crash_do_not_stop_a_run(
    make_config: Any, run: pathlib.Path, whole: pathlib.Path
) -> None:
    shutil.rmtree(folder_of(run, 8))
    for name in (records.METRICS_FILE, records.GOODPUT_FILE):
        path = run / name
        path.write_bytes(path.read_bytes()[:-20])
    cut_short(run / records.ENVIRONMENT_FILE)
    train(make_config(), run)
    assert list(last_lines(run)) == list(last_lines(whole))
    assert last_lines(run)[8][records.LOSS] == last_lines(whole)[8][records.LOSS]
    records.read_json(run / records.ENVIRONMENT_FILE)
    cut_short(run / records.CONFIG_FILE)
    with pytest.raises(ConfigError, match=r"config.json is damaged"):
        train(make_config(), run)
