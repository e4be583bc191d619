"""The loop: resume, stops, bad steps, evaluation, and the files that it leaves."""

import dataclasses
import functools
import io
import logging
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np
import pytest

from jaxscale import config_source, records, workdir
from jaxscale.checkpoint import Checkpointer
from jaxscale.config import CheckpointConfig, ConfigError
from jaxscale.goodput import read_goodput
from jaxscale.model.cost import train_flops_per_token
from jaxscale.train import loop
from jaxscale.train.loop import DONE, NON_FINITE, TrainResult, train
from jaxscale.train.state import assemble
from jaxscale.train.step import compile_step
from tests.programs import (
    LOSS_TOLERANCE_F32,
    RUN_STEPS,
    batch_on,
    final_params,
    first_state,
    last_lines,
    tiny_config,
)


def test_resume_equals_an_uninterrupted_run_bitwise(
    make_config: Any, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "run"
    assert train(make_config(train__steps=5), folder).step == 5
    assert train(make_config(), folder).step == RUN_STEPS
    assert train(make_config(), folder).loss is None
    jax.tree.map(np.testing.assert_array_equal, final_params(folder), final_params(whole))
    resumed, expected = last_lines(folder), last_lines(whole)
    for step in range(1, RUN_STEPS + 1):
        for name in (records.LOSS, records.BATCH_HASH, records.GRADIENT_NORM):
            assert resumed[step][name] == expected[step][name]
    assert len({line[records.BATCH_HASH] for line in expected.values()}) == RUN_STEPS


def test_a_save_during_the_run_holds_what_a_run_that_ends_there_does(
    make_config: Any, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    train(make_config(train__steps=3, optimizer__schedule_steps=RUN_STEPS), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path, 3), final_params(whole, 3))


def test_resume_on_another_mesh_goes_on_with_the_same_batches_and_losses(
    make_config: Any, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "run"
    train(make_config(train__steps=5), folder)
    other = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 1, "mesh__sequence": 2}
    train(make_config(**other), folder)
    resumed, expected = last_lines(folder), last_lines(whole)
    assert [x[records.BATCH_HASH] for x in resumed.values()] == [
        x[records.BATCH_HASH] for x in expected.values()
    ]
    np.testing.assert_allclose(
        [x[records.LOSS] for x in resumed.values()],
        [x[records.LOSS] for x in expected.values()],
        rtol=10 * LOSS_TOLERANCE_F32,
    )
    meta = Checkpointer(folder, CheckpointConfig(), read_only=True).read_meta(RUN_STEPS)
    assert meta["mesh"]["sequence"] == 2
    assert meta["sequences_read"] == RUN_STEPS * 8


@pytest.mark.slow
def test_a_run_goes_into_a_circular_pipeline_and_out_again(
    make_config: Any, tmp_path: pathlib.Path
) -> None:
    four_layers = functools.partial(make_config, model__num_layers=4, checkpoint__every_steps=2)
    pipeline = {"mesh__data": 1, "mesh__tensor": 1, "mesh__stage": 4, "train__pipeline_rounds": 1}
    rounds = {**pipeline, "mesh__stage": 2, "mesh__data": 2, "train__pipeline_rounds": 2}
    parts = {"train__accumulation_steps": 2}
    train(four_layers(train__steps=6, **parts), tmp_path / "expected")
    for steps, place in ((2, rounds), (4, {}), (6, rounds)):
        train(four_layers(train__steps=steps, **parts, **place), tmp_path / "run")
    train(four_layers(train__steps=6, **parts, **pipeline), tmp_path / "pipeline")
    expected = last_lines(tmp_path / "expected")
    for folder in (tmp_path / "run", tmp_path / "pipeline"):
        found = last_lines(folder)
        for name, error in ((records.BATCH_HASH, 0), (records.LOSS, 10 * LOSS_TOLERANCE_F32)):
            np.testing.assert_allclose(
                [x[name] for x in found.values()], [x[name] for x in expected.values()], rtol=error
            )


def test_the_step_is_compiled_once_per_run(
    make_config: Any, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        train(make_config(), tmp_path / "run")
    steps = [x for x in caplog.messages if x.startswith("Finished XLA compilation of jit(step)")]
    assert len(steps) == 1


def test_a_second_run_in_a_workdir_is_refused_until_the_first_ends(
    make_config: Any, tmp_path: pathlib.Path
) -> None:
    with workdir.locked(tmp_path), pytest.raises(ConfigError, match="another process trains there"):
        train(make_config(), tmp_path)
    with workdir.locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_config_of_another_run_is_refused_with_the_difference(
    make_config: Any, whole: pathlib.Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(make_config(optimizer__learning_rate=0.5, model__hidden=128), whole)
    text = str(caught.value)
    assert "model.hidden: 64 -> 128" in text
    assert "optimizer.learning_rate: 0.01 -> 0.5" in text
    assert "--allow-config-change" in text
    assert "mesh" not in text


def test_a_run_that_ended_before_its_first_checkpoint_is_not_mixed_with_another(
    make_config: Any, tmp_path: pathlib.Path
) -> None:
    train(make_config(train__steps=3), tmp_path)
    shutil.rmtree(tmp_path / records.CHECKPOINTS_DIR)
    with pytest.raises(ConfigError, match="model.width: 32 -> 64"):
        train(make_config(model__width=64), tmp_path)
    assert train(make_config(train__steps=4), tmp_path).step == 4


def test_a_schedule_without_a_length_takes_that_of_the_first_steps(
    make_config: Any, tmp_path: pathlib.Path
) -> None:
    knobs = {"optimizer__warmup_steps": 2, "optimizer__schedule_steps": 0}
    train(make_config(train__steps=0, **knobs), tmp_path / "resumed")
    for name in ("resumed", "whole"):
        train(make_config(train__steps=6, **knobs), tmp_path / name)
    rates = [
        [line[records.LEARNING_RATE] for line in last_lines(tmp_path / name).values()]
        for name in ("resumed", "whole")
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 3


def test_fewer_steps_than_done_are_refused(make_config: Any, whole: pathlib.Path) -> None:
    before = (whole / records.CONFIG_FILE).read_text()
    with pytest.raises(ConfigError, match=f"train.steps=1 is less than the {RUN_STEPS} steps"):
        train(make_config(train__steps=1), whole)
    assert (whole / records.CONFIG_FILE).read_text() == before


def test_a_change_can_be_allowed(make_config: Any, tmp_path: pathlib.Path) -> None:
    train(make_config(train__steps=2), tmp_path)
    changed = make_config(train__steps=3, optimizer__learning_rate=0.5)
    result = train(changed, tmp_path, allow_config_change=True)
    assert result.step == 3
    assert last_lines(tmp_path)[3][records.LEARNING_RATE] > 0.1


def test_parameters_of_another_run_start_a_new_one(
    make_config: Any, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    train(make_config(train__steps=1, checkpoint__init_from=whole), tmp_path / "weights")
    train(make_config(train__steps=9, checkpoint__restore_from=whole), tmp_path / "all")
    fresh, weights = last_lines(whole)[1], last_lines(tmp_path / "weights")[1]
    assert weights[records.BATCH_HASH] == fresh[records.BATCH_HASH]
    assert weights[records.LOSS] < fresh[records.LOSS]
    assert list(last_lines(tmp_path / "all")) == [9]
    for knob in ("checkpoint__init_from", "checkpoint__restore_from"):
        with pytest.raises(ConfigError, match=knob.replace("__", ".")):
            train(make_config(**{knob: tmp_path / "nothing"}), tmp_path / knob)


def test_metrics_evaluation_sample_and_goodput_are_written(
    make_config: Any, tmp_path: pathlib.Path
) -> None:
    stream = io.StringIO()
    config = make_config(train__eval_every=4, train__sample_every=4, train__log_every=2)
    result = train(config, tmp_path, stream=stream)
    assert list(last_lines(tmp_path)) == [2, 4, 6, 8]
    line = last_lines(tmp_path)[RUN_STEPS]
    for name in (
        records.PERPLEXITY,
        records.TOKENS_PER_SECOND,
        records.STEP_SECONDS,
        records.DATA_WAIT_SHARE,
        records.MFU,
        records.PEAK_BYTES,
        records.HOST_CPU_UTILIZATION,
        records.LEARNING_RATE,
    ):
        assert line[name] > 0, name
    flops = train_flops_per_token(config.model, config.data.length)
    share = line[records.TOKENS_PER_SECOND] * flops / line[records.PEAK_FLOPS_PER_SECOND]
    assert line[records.MFU] == pytest.approx(share)
    assert line[records.PEAK_BYTES_SOURCE] == "compiler"
    assert line[records.DEVICE_UTILIZATION] is None
    assert line[records.PERPLEXITY] == pytest.approx(np.exp(line[records.LOSS]))
    assert line[records.TOKENS] == RUN_STEPS * 8 * 16
    lines = records.read_lines(tmp_path / records.METRICS_FILE)
    evaluations = [x for x in lines if x[records.KIND] == records.KIND_EVALUATION]
    assert [x[records.STEP] for x in evaluations] == [4, RUN_STEPS]
    assert result.evaluation is not None
    assert evaluations[-1][records.LOSS] == result.evaluation.loss
    samples = [x for x in lines if x[records.KIND] == records.KIND_SAMPLE]
    assert [x["text"].startswith("def ") for x in samples] == [True, True]
    # What belongs to a step stands below its line, though the loop reads the line one step late.
    shown = stream.getvalue()
    places = [
        shown.index(text)
        for step in (4, RUN_STEPS)
        for text in (f"step {step}/{RUN_STEPS}", f"after step {step}")
    ]
    assert places == sorted(places)
    goodput = read_goodput(tmp_path / records.GOODPUT_FILE)
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_seconds, rel=0.01)
    assert goodput.seconds["step_seconds"] > 0
    assert goodput.seconds["evaluation_seconds"] > 0
    assert list(tmp_path.glob("events.out.tfevents.*"))
    shown = stream.getvalue()
    assert "step 8/8  loss " in shown
    assert "validation after step 8" in shown


def test_old_checkpoints_go_and_milestones_stay(make_config: Any, tmp_path: pathlib.Path) -> None:
    knobs = {
        "checkpoint__every_steps": 1,
        "checkpoint__keep_last": 2,
        "checkpoint__keep_every": 3,
    }
    train(make_config(**knobs), tmp_path)
    steps = sorted(int(x.name) for x in (tmp_path / records.CHECKPOINTS_DIR).iterdir())
    assert steps == [3, 6, 7, 8]


# The first update throws the weights so far that no later step is finite.
DIVERGING = {"optimizer__learning_rate": 1e30, "optimizer__warmup_steps": 0}


def test_too_many_bad_steps_end_the_run_and_leave_the_weights_alone(
    make_config: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MOST_BAD_STEPS", 3)
    config = make_config(train__steps=50, **DIVERGING)
    result = train(config, tmp_path)
    assert result.ending == NON_FINITE
    lines = last_lines(tmp_path)
    bad = [step for step, line in lines.items() if records.NONFINITE in line]
    assert len(bad) >= 3
    assert lines[max(lines)][records.SKIPPED_STEPS] >= 3
    assert result.step < 10


def test_a_limit_reached_on_the_last_step_counts(
    make_config: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MOST_BAD_STEPS", 3)
    config = make_config(train__steps=4, **DIVERGING)
    assert train(config, tmp_path).ending == NON_FINITE


def test_a_bad_streak_does_not_push_out_good_checkpoints(
    make_config: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MOST_BAD_STEPS", 6)
    knobs = {"checkpoint__every_steps": 1, "checkpoint__keep_last": 1, **DIVERGING}
    config = make_config(train__steps=50, **knobs)
    assert train(config, tmp_path).ending == NON_FINITE
    first_bad = min(s for s, x in last_lines(tmp_path).items() if x[records.SKIPPED_STEPS])
    steps = [int(x.name) for x in (tmp_path / records.CHECKPOINTS_DIR).iterdir()]
    assert steps == [first_bad - 1]


def test_interruptions_do_not_change_what_is_said_of_speed(
    make_config: Any, tmp_path: pathlib.Path
) -> None:
    speeds = {}
    for name, knobs in {
        "plain": {},
        "interrupted": {"train__eval_every": 1, "checkpoint__every_steps": 1},
    }.items():
        # Steps long enough to tell them from what is around them.
        config = make_config(train__global_batch_size=512, train__steps=6, **knobs)
        train(config, tmp_path / name)
        lines = list(last_lines(tmp_path / name).values())[1:]
        speeds[name] = np.median([line[records.TOKENS_PER_SECOND] for line in lines])
        goodput = read_goodput(tmp_path / name / records.GOODPUT_FILE)
        seconds = sum(line[records.STEP_SECONDS] for line in lines)
        # A step runs on while the loop waits for the next batch.
        charged = goodput.seconds[records.STEP_SECONDS] + goodput.seconds[records.DATA_WAIT_SECONDS]
        assert charged > 0.8 * seconds
    # Without waiting for the step in flight, the second would be some hundred times the first.
    assert 0.2 < speeds["interrupted"] / speeds["plain"] < 5


class Slow(io.StringIO):
    """A stream that takes its time to write the line of step 1, while step 2 runs to its end."""

    def write(self, text: str) -> int:
        if text.startswith("step 1/"):
            time.sleep(0.5)
        return super().write(text)


def test_steps_that_run_while_a_line_is_written_do_not_look_faster(
    make_config: Any, tmp_path: pathlib.Path
) -> None:
    train(make_config(train__steps=2), tmp_path, stream=Slow())
    assert last_lines(tmp_path)[2][records.STEP_SECONDS] > 0.5


def test_restore_from_goes_on_longer_and_init_only_checks(
    make_config: Any, tmp_path: pathlib.Path
) -> None:
    raw = dataclasses.replace(
        make_config(train__steps=3, optimizer__schedule_steps=0),
    )
    train(raw, tmp_path / "first")
    longer = config_source.override(raw, "train.steps", "5")
    longer = config_source.override(longer, "checkpoint.restore_from", str(tmp_path / "first"))
    wrong = config_source.override(longer, "model.hidden", "32")
    with pytest.raises(ConfigError, match="model.hidden: 64 -> 32"):
        train(wrong, tmp_path / "second")
    assert not (tmp_path / "second" / records.CONFIG_FILE).exists()
    assert train(longer, tmp_path / "second").step == 5


def test_a_change_that_cannot_be_restored_leaves_the_workdir_usable(
    make_config: Any, tmp_path: pathlib.Path
) -> None:
    train(make_config(train__steps=2), tmp_path)
    with pytest.raises(ConfigError, match="blocks/mlp/down is"):
        train(make_config(model__hidden=32), tmp_path, allow_config_change=True)
    assert train(make_config(train__steps=3), tmp_path).step == 3


def test_changed_data_is_refused(make_config: Any, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(16):
        (folder / f"{number}.txt").write_text(f"text {number} " * 40)
    config = make_config(data__source=f"files:{folder}/*.txt", train__steps=2)
    train(config, tmp_path / "run")
    (folder / "0.txt").write_text("something else " * 40)
    longer = config_source.override(config, "train.steps", "3")
    with pytest.raises(ConfigError, match="has changed since the run"):
        train(longer, tmp_path / "run")
    assert train(longer, tmp_path / "run", allow_config_change=True).step == 3


def test_one_bad_step_is_skipped_and_counted() -> None:
    config = tiny_config()
    assembly = assemble(config, jax.devices()[:1])
    state, step = first_state(assembly), compile_step(assembly)
    batch = batch_on(assembly, 0)
    poisoned = {**batch, "weights": batch["weights"] * np.nan}
    with jax.set_mesh(assembly.mesh):
        state, _ = step(state, batch)
        before = jax.device_get((state.params, state.optimizer))
        state, metrics = step(state, poisoned)
        after = jax.device_get((state.params, state.optimizer))
        jax.tree.map(np.testing.assert_array_equal, before, after)
        assert np.isnan(metrics[records.LOSS])
        assert int(metrics[records.SKIPPED_IN_A_ROW]) == 1
        state, metrics = step(state, batch)
    assert np.isfinite(metrics[records.LOSS])
    assert (int(metrics[records.SKIPPED_STEPS]), int(metrics[records.SKIPPED_IN_A_ROW])) == (1, 0)
    assert int(state.step) == 3


def test_the_result_is_plain_data(whole: pathlib.Path, make_config: Any) -> None:
    result: TrainResult = train(make_config(), whole)
    assert dataclasses.asdict(result)["ending"] == DONE
