"""A training step against its definition: clipped AdamW at the schedule's rate, in plain numpy."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale import records
from jaxscale.train.step import compile_step, loss_and_gradients
from tests.programs import assemble_tiny, batch_on, first_state, relative_errors

PEAK, WARMUP, SPAN, FINAL = 0.1, 2, 6, 0.1
# Parameters of size 1 round at 6e-8, and the least update is about a third of FINAL x PEAK = 1e-2;
# the roundings of the gradients come on top.
UPDATE_TOLERANCE = 5e-5
# A part's gradient is rounded once to bfloat16, by 2^-9 of its size at most. So is the gradient
# that it is compared with, and parts of opposite signs are larger than their sum. Sums in bfloat16
# would be rounded again with each part.
PARTS_TOLERANCE_BF16 = 3 * 2.0**-9


def rate(step: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then half a cosine."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    progress = min((step - WARMUP) / (SPAN - WARMUP), 1)
    return PEAK * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress)))


def test_steps_equal_clipped_adamw_by_hand() -> None:
    knobs = {
        "learning_rate": PEAK,
        "warmup_steps": WARMUP,
        "schedule_steps": SPAN,
        "final_fraction": FINAL,
        "clip_norm": 0.5,
        "weight_decay": 0.3,
        "beta1": 0.8,
        "beta2": 0.9,
    }
    assembly = assemble_tiny(optimizer=knobs, model={"biases": "all", "norm": "layernorm"})
    state, step = first_state(assembly), compile_step(assembly)
    gradients_of = jax.jit(functools.partial(loss_and_gradients, assembly))
    paths = jax.tree_util.tree_leaves_with_path(state.params)
    axes = [
        functools.reduce(lambda tree, key: tree[key.key], path, assembly.definition.axes)
        for path, _ in paths
    ]
    first = [np.zeros(leaf.shape) for _, leaf in paths]
    second = [np.zeros(leaf.shape) for _, leaf in paths]
    for number in range(SPAN + 2):
        batch = batch_on(assembly, number)
        params = jax.device_get(state.params)
        before = [leaf.astype(np.float64) for leaf in jax.tree.leaves(params)]
        with jax.set_mesh(assembly.mesh):
            gradients = jax.device_get(gradients_of(state.params, batch)[1])
            state, metrics = step(state, batch)
        leaves = [leaf.astype(np.float64) for leaf in jax.tree.leaves(gradients)]
        norm = math.sqrt(sum((leaf**2).sum() for leaf in leaves))
        assert norm > 0.5
        np.testing.assert_allclose(metrics[records.GRADIENT_NORM], norm, rtol=1e-5)
        np.testing.assert_allclose(metrics[records.LEARNING_RATE], rate(number), rtol=1e-6)
        expected = []
        for place, gradient in enumerate(leaves):
            clipped = gradient * 0.5 / norm
            first[place] = 0.8 * first[place] + 0.2 * clipped
            second[place] = 0.9 * second[place] + 0.1 * clipped**2
            m = first[place] / (1 - 0.8 ** (number + 1))
            v = second[place] / (1 - 0.9 ** (number + 1))
            decay = 0.3 * before[place] if "embed" in axes[place] else 0.0
            expected.append(-rate(number) * (m / (np.sqrt(v) + 1e-8) + decay))
        after = jax.tree.leaves(jax.device_get(state.params))
        updates = [new - old for new, old in zip(after, before, strict=True)]
        assert max(relative_errors(updates, expected).values()) < UPDATE_TOLERANCE


def test_bfloat16_parameters_keep_float32_moments_and_sums() -> None:
    """A second moment in bfloat16 would not move: 0.999 of it rounds to itself."""
    knobs = {"param_dtype": "bfloat16", "compute_dtype": "float32"}
    assembly = assemble_tiny(model=knobs)
    state = first_state(assembly)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}

    def gradients(parts: int) -> Any:
        assembly = assemble_tiny(model=knobs, train={"accumulation_steps": parts})
        compute = jax.jit(functools.partial(loss_and_gradients, assembly))
        with jax.set_mesh(assembly.mesh):
            found = compute(first_state(assembly).params, batch_on(assembly, 0))[1]
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)

    errors = relative_errors(gradients(8), gradients(1))
    assert max(errors.values()) < PARTS_TOLERANCE_BF16


def test_without_a_document_mask_tokens_see_the_documents_before() -> None:
    assembly = assemble_tiny(mesh={"data": 2})
    data = dataclasses.replace(assembly.config.data, document_mask=False)
    unmasked = dataclasses.replace(assembly, config=dataclasses.replace(assembly.config, data=data))
    params, batch = first_state(assembly).params, batch_on(assembly, 0)
    single = {**batch, "segments": jnp.ones_like(batch["segments"])}
    losses = []
    with jax.set_mesh(assembly.mesh):
        for program, rows in ((unmasked, batch), (assembly, single), (assembly, batch)):
            compute = jax.jit(functools.partial(loss_and_gradients, program))
            losses.append(float(compute(params, rows)[0]))
    assert losses[0] == losses[1] != losses[2]
