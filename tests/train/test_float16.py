"""Training in float16: gradients, an overflow that is really one, and the scale that follows it."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import records
from jaxscale.checkpoint import Checkpointer
from jaxscale.config import CheckpointConfig, ConfigError
from jaxscale.train.loop import train
from jaxscale.train.loss_scale import FIRST, GROWTH_STEPS, LEAST, MOST, LossScale, adjusted
from jaxscale.train.restore import optimizer_item, restore_state
from jaxscale.train.state import Assembly, Batch, TrainState
from jaxscale.train.step import compile_step, loss_and_gradients
from jaxscale.train.trained import open_trained
from tests.programs import (
    assemble_tiny,
    batch_on,
    first_state,
    last_lines,
    relative_errors,
    tiny_config,
)

# As GRADIENT_TOLERANCE_BF16 in test_equality.py, for 11 bits: one rounding errs by at most 2^-12,
# some 20 add up like a random walk, and the largest of a leaf's errors counts: 4 deviations.
GRADIENT_TOLERANCE_F16 = 0.0044
# Of what a loss has fallen: a step's progress is gradient times update, and both err.
PROGRESS_TOLERANCE_F16 = 2 * GRADIENT_TOLERANCE_F16
# A rule whose update has the gradient's size: AdamW's would hide a factor.
SGD = {"name": "sgd", "weight_decay": 0.0, "clip_norm": 0.5, "learning_rate": 0.3}
MESH = {"fsdp": 2, "sequence": 2, "tensor": 2}


@functools.cache
def program(dtype: str, loss_scale: float = 0.0) -> tuple[Assembly, Any]:
    """Return a program on MESH with accumulation, and its compiled step."""
    assembly = assemble_tiny(
        mesh=MESH,
        model={"compute_dtype": dtype},
        train={"accumulation_steps": 2, "loss_scale": loss_scale},
        optimizer=SGD,
    )
    return assembly, compile_step(assembly)


def steps(
    program: tuple[Assembly, Any], state: TrainState, batches: list[Batch]
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Run some steps and return the metrics of each."""
    assembly, step = program
    lines = []
    with jax.set_mesh(assembly.mesh):
        for batch in batches:
            state, metrics = step(state, batch)
            lines.append({name: value.item() for name, value in metrics.items()})
    return state, lines


def copied(state: TrainState) -> TrainState:
    """Return a copy, as a step donates its state."""
    return jax.tree.map(jnp.copy, state)


def sharp_state(assembly: Assembly) -> TrainState:
    """Return a state whose last hidden features reach 5 and more."""
    state = first_state(assembly)
    norm = {"scale": state.params["norm"]["scale"] * 3.0}
    return dataclasses.replace(state, params={**state.params, "norm": norm})


def overflowing(assembly: Assembly) -> Batch:
    """Return a batch whose one weighted token has a gradient of FIRST x (p - 1) in its logits.

    That is a number of float16; its products with the features of `sharp_state` are not.
    """
    batch = batch_on(assembly, 9)
    weights = np.zeros(batch["weights"].shape, np.float32)
    weights[3, 7] = 1.0
    return {**batch, "weights": jax.device_put(weights, assembly.batch_sharding)}


@functools.cache
def gradients_of(dtype: str) -> Any:
    assembly = program(dtype)[0]
    return jax.jit(functools.partial(loss_and_gradients, assembly))


def first_gradients(dtype: str, batch: Batch, factor: float | None) -> Any:
    assembly = program(dtype)[0]
    params = first_state(assembly).params
    with jax.set_mesh(assembly.mesh):
        found = gradients_of(dtype)(params, batch, factor and jnp.float32(factor))
    return jax.device_get(found[1])


def test_scaled_gradients_equal_float32_and_unscaled_ones_vanish() -> None:
    """Tokens that weigh a millionth of the others have gradients below float16's least number."""
    assembly, _ = program("float16")
    batch = batch_on(assembly, 0)
    light = np.asarray(batch["tokens"]) < 32
    weights = np.where(light, np.float32(1e-6), np.float32(1.0))
    # No token is seen by one that weighs more.
    segments = np.arange(light.size, dtype=np.int32).reshape(light.shape)
    batch |= {
        "weights": jax.device_put(weights, assembly.batch_sharding),
        "segments": jax.device_put(segments, assembly.batch_sharding),
    }
    expected = first_gradients("float32", batch, None)["embedding"]
    scaled = first_gradients("float16", batch, FIRST)["embedding"]
    plain = first_gradients("float16", batch, 1.0)["embedding"]
    assert np.abs(expected[:32]).max() < 1e-4 * np.abs(expected[32:]).max()

    def error(found: np.ndarray, rows: slice) -> float:
        return relative_errors(found[rows], expected[rows])[""]

    assert error(scaled, slice(32, None)) < GRADIENT_TOLERANCE_F16
    assert error(scaled, slice(32)) < GRADIENT_TOLERANCE_F16
    assert error(plain, slice(32, None)) < GRADIENT_TOLERANCE_F16
    assert error(plain, slice(32)) > 0.1


def test_a_step_clips_and_applies_gradients_of_their_true_size() -> None:
    moved, lines = {}, {}
    for dtype in ("float32", "float16"):
        here = program(dtype)
        start = first_state(here[0])
        before = jax.device_get(start.params)
        state, lines[dtype] = steps(here, start, [batch_on(here[0], 0)])
        moved[dtype] = jax.tree.map(np.subtract, jax.device_get(state.params), before)
    for name in (records.LOSS, records.GRADIENT_NORM):
        expected = lines["float32"][0][name]
        assert lines["float16"][0][name] == pytest.approx(expected, rel=GRADIENT_TOLERANCE_F16)
    assert lines["float32"][0][records.GRADIENT_NORM] > 2 * SGD["clip_norm"]
    errors = relative_errors(moved["float16"], moved["float32"])
    # Parameters of size 1 that move by some 1e-4 show it to 2^-24 / 1e-4.
    assert max(errors.values()) < GRADIENT_TOLERANCE_F16 + 1e-3


def test_an_overflow_is_skipped_and_training_goes_on_like_float32() -> None:
    assembly, _ = here = program("float16")
    batches = [batch_on(assembly, number % 5) for number in range(20)]
    before, lines = steps(here, sharp_state(assembly), batches[:5])
    kept = jax.device_get((before.params, before.optimizer))
    after, [bad] = steps(here, before, [overflowing(assembly)])
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.optimizer), kept)
    assert (bad[records.SKIPPED_STEPS], bad[records.SKIPPED_IN_A_ROW]) == (1, 0)
    assert np.isfinite(bad[records.LOSS]) and not np.isfinite(bad[records.GRADIENT_NORM])
    assert (bad[records.LOSS_SCALE], after.loss_scale.factor) == (FIRST, FIRST / 2)
    end, more = steps(here, after, batches[5:])
    assert more[-1][records.SKIPPED_STEPS] == 1
    assert more[-1][records.LOSS_SCALE] == FIRST / 2
    assert int(end.loss_scale.good_steps) == 15
    # In float32 the same batches, and one skipped in the same place.
    plain = program("float32")
    state, expected = steps(plain, sharp_state(plain[0]), batches[:5])
    state = dataclasses.replace(state, step=state.step + 1)
    expected += steps(plain, state, batches[5:])[1]
    losses, exact = ([x[records.LOSS] for x in run] for run in (lines + more, expected))
    assert exact[-1] < 0.8 * exact[0]
    tolerance = PROGRESS_TOLERANCE_F16 * (exact[0] - exact[-1])
    np.testing.assert_allclose(losses, exact, atol=tolerance, rtol=0)


def test_scale_and_counter_come_back_bitwise(tmp_path: pathlib.Path) -> None:
    assembly, _ = here = program("float16")
    batches = [batch_on(assembly, 0), overflowing(assembly), batch_on(assembly, 1)]
    saved, _ = steps(here, sharp_state(assembly), batches)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(3, params=saved.params, optimizer=optimizer_item(saved), meta={})
        checkpointer.wait()
        restored = restore_state(assembly, checkpointer, 3)
    ends = [steps(here, state, batches) for state in (restored, copied(saved))]
    jax.tree.map(np.testing.assert_array_equal, ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert float(saved.loss_scale.factor) == FIRST / 2


def test_a_run_can_change_to_another_dtype_and_back(
    make_config: Any, tmp_path: pathlib.Path
) -> None:
    """The scale is dropped, and starts anew."""
    dtypes = ("float16", "bfloat16", "float16", "float16")
    for steps, dtype in enumerate(dtypes, start=1):
        config = make_config(train__steps=steps, model__compute_dtype=dtype)
        train(config, tmp_path, allow_config_change=True)
    scales = [line.get(records.LOSS_SCALE) for line in last_lines(tmp_path).values()]
    assert scales == [FIRST, None, FIRST, FIRST]
    assert open_trained(tmp_path).step == 4


def test_a_run_whose_weights_overflow_ends_after_the_scale_has_fallen() -> None:
    assembly, _ = here = program("float16")
    state = first_state(assembly)
    huge = jax.tree.map(lambda p: p * 1e6, state.params)
    falls = int(np.log2(FIRST / LEAST))
    batches = [batch_on(assembly, 0)] * (falls + 3)
    state, lines = steps(here, dataclasses.replace(state, params=huge), batches)
    in_a_row = [line[records.SKIPPED_IN_A_ROW] for line in lines]
    assert in_a_row == [0] * falls + [1, 2, 3]
    assert lines[-1][records.SKIPPED_STEPS] == falls + 3
    assert float(state.loss_scale.factor) == LEAST


def test_the_scale_doubles_after_many_good_steps_and_keeps_its_limits() -> None:
    def after(factor: float, good_steps: int, is_finite: bool) -> tuple[float, int]:
        scale = LossScale(jnp.float32(factor), jnp.int32(good_steps))
        scale = adjusted(scale, jnp.bool_(is_finite))
        return float(scale.factor), int(scale.good_steps)

    assert after(8.0, 5, True) == (8.0, 6)
    assert after(8.0, GROWTH_STEPS - 1, True) == (16.0, 0)
    assert after(8.0, GROWTH_STEPS - 1, False) == (4.0, 0)
    assert after(MOST, GROWTH_STEPS - 1, True) == (MOST, 0)
    assert after(LEAST, 5, False) == (LEAST, 0)


def test_the_step_counts_good_steps_until_the_scale_doubles() -> None:
    assembly, _ = here = program("float16")
    state = first_state(assembly)
    counter = jax.device_put(np.int32(GROWTH_STEPS - 2), state.loss_scale.good_steps.sharding)
    scale = dataclasses.replace(state.loss_scale, good_steps=counter)
    state, lines = steps(
        here, dataclasses.replace(state, loss_scale=scale), [batch_on(assembly, 0)] * 3
    )
    assert [line[records.LOSS_SCALE] for line in lines] == [FIRST, FIRST, 2 * FIRST]
    assert int(state.loss_scale.good_steps) == 1


@pytest.mark.slow
def test_a_fixed_scale_stays_and_its_overflows_count() -> None:
    assembly, _ = here = program("float16", loss_scale=FIRST)
    bad = overflowing(assembly)
    state, lines = steps(here, sharp_state(assembly), [bad, bad, batch_on(assembly, 0)])
    assert state.loss_scale is None
    assert [line[records.LOSS_SCALE] for line in lines] == [FIRST] * 3
    assert [line[records.SKIPPED_IN_A_ROW] for line in lines] == [1, 2, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_know_no_scale(dtype: str) -> None:
    assembly = assemble_tiny(model={"compute_dtype": dtype})
    assert first_state(assembly).loss_scale is None
    with pytest.raises(ConfigError, match="train.loss_scale=2.0 scales float16 alone; set it to 0"):
        tiny_config(model={"compute_dtype": dtype}, train={"loss_scale": 2.0})
