"""How far gradients that devices sum in bfloat16, and the losses they lead to, are from float32."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from jaxscale.train.step import loss_and_gradients
from tests.programs import (
    BATCH,
    GRADIENT_TOLERANCE_F32,
    assemble_tiny,
    batch_on,
    first_state,
    relative_errors,
    train_steps,
)

MESHES = [{"fsdp": 8}, pytest.param({"data": 8}, marks=pytest.mark.slow)]
NUM_DEVICES = 8
ROUNDING = 2.0**-9
# A sum over 8 devices in bfloat16 rounds each device's term once, and then each of at most 7
# partial sums; none of these is larger than the sum of the terms' sizes.
REDUCE_ROUNDINGS = 1 + (NUM_DEVICES - 1)
# Of what a loss has fallen: a step's progress is gradient times update, and both err by a rounding
# of each of 8 terms, which add up like a random walk.
PROGRESS_TOLERANCE = 2 * ROUNDING * NUM_DEVICES**0.5
# Summed in float32 whatever the knob says: the table of a lookup, and vectors.
IN_FLOAT32 = ("embedding", "scale")


@functools.cache
def on_one_device() -> tuple[Any, Any]:
    """Return the gradients of a batch, and the sum over devices of the size of each one's term.

    Each of eight devices has a row of the batch.
    """
    assembly = assemble_tiny()
    compute = jax.jit(functools.partial(loss_and_gradients, assembly))
    params, batch = first_state(assembly).params, batch_on(assembly, 0)
    weights = np.asarray(batch["weights"])
    sizes = jax.tree.map(lambda p: np.zeros(p.shape), params)
    for row in range(BATCH):
        alone = np.where(np.arange(BATCH)[:, None] == row, weights, 0)
        share = alone.sum() / weights.sum()
        term = jax.device_get(compute(params, {**batch, "weights": alone})[1])
        sizes = jax.tree.map(lambda a, b, share=share: a + np.abs(b) * share, sizes, term)
    return jax.device_get(compute(params, batch)[1]), sizes


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_gradients_summed_in_bfloat16_err_by_its_roundings(mesh: dict[str, int]) -> None:
    assembly = assemble_tiny(mesh=mesh, train={"gradient_reduce_dtype": "bfloat16"})
    params = first_state(assembly).params
    with jax.set_mesh(assembly.mesh):
        compute = jax.jit(functools.partial(loss_and_gradients, assembly))
        found = jax.device_get(compute(params, batch_on(assembly, 0))[1])
    exact, sizes = on_one_device()
    errors = relative_errors(found, exact)
    terms = jax.tree.map(lambda size, g: size.max() / np.abs(g).max(), sizes, exact)
    for (name, error), size in zip(errors.items(), jax.tree.leaves(terms), strict=True):
        if any(kind in name for kind in IN_FLOAT32):
            assert error <= GRADIENT_TOLERANCE_F32, name
            continue
        assert error <= ROUNDING * REDUCE_ROUNDINGS * size, name
        # Nothing but the rounding of float32 would mean that the knob does nothing.
        assert error > 10 * GRADIENT_TOLERANCE_F32, name


def losses(dtype: str) -> np.ndarray:
    assembly = assemble_tiny(mesh={"fsdp": 8}, train={"gradient_reduce_dtype": dtype})
    return np.array(train_steps(assembly, 40)[0])


@pytest.mark.slow
def test_40_steps_with_sums_in_bfloat16_stay_close_to_float32() -> None:
    plain, rounded = losses("float32"), losses("bfloat16")
    fall = plain[0] - plain.min()
    assert fall > 0.5 * plain[0]
    drift = np.abs(rounded - plain).max()
    assert 0 < drift <= PROGRESS_TOLERANCE * fall
