"""The pipeline for stages that are known by hand: order, microbatches, idle ticks, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.config import ConfigError, MeshConfig, RulesConfig
from jaxscale.parallel.mesh import make_mesh
from jaxscale.parallel.pipeline import (
    bubble_share,
    bubble_words,
    check_pipeline,
    cut_rows,
    join_rows,
    pipelined,
    stage_order,
)
from jaxscale.parallel.sharding import Rules

B, L, D, LAYERS = 8, 4, 2, 4
RULES = Rules.make(RulesConfig())


def run_stage(weights: jax.Array, x: jax.Array, riders: jax.Array) -> jax.Array:
    """Multiply by each layer's weight and add its square times what rides along."""

    def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        return x * weight + weight**2 * riders[..., None], None

    return jax.lax.scan(layer, x, weights)[0]


def expected(weights: np.ndarray, x: np.ndarray, riders: np.ndarray) -> np.ndarray:
    for weight in weights:
        x = x * weight + weight**2 * riders[..., None]
    return x


SCHEDULES = [(2, 1, 1), (2, 8, 1), (4, 1, 1), (4, 4, 1), (2, 2, 2), (2, 4, 2), (2, 8, 2)]


@pytest.mark.parametrize(("stages", "parts", "rounds"), SCHEDULES)
def test_every_row_passes_all_layers_in_order(
    devices: list[jax.Device], stages: int, parts: int, rounds: int
) -> None:
    rules = Rules.make(RulesConfig(), pipeline_rounds=rounds)
    order = stage_order(LAYERS, stages, rounds)
    random = np.random.default_rng(0)
    x, riders = random.normal(size=(B, L, D)), random.normal(size=(B, L))
    weights = np.array([2.0, -3.0, 5.0, 7.0])
    mesh = make_mesh(MeshConfig(stage=stages, data=1), devices[:stages])
    with jax.set_mesh(mesh):
        stacked = jax.device_put(weights[order].astype(np.float32), RULES.sharding(mesh, "layers"))

        @jax.jit
        def run(weights: jax.Array, x: jax.Array) -> jax.Array:
            return pipelined(
                run_stage, weights, x, jnp.float32(riders), num_microbatches=parts, rules=rules
            )

        out, transpose = jax.vjp(run, stacked, jnp.float32(x))
        d_weights, d_x = map(np.asarray, transpose(jnp.ones_like(out)))
    np.testing.assert_allclose(out, expected(weights, x, riders), rtol=1e-5)
    # The product of all weights, times each row once.
    np.testing.assert_allclose(d_x, np.full_like(x, weights.prod()), rtol=1e-5)
    step = 1e-6
    for layer in range(LAYERS):
        moved = weights + step * (np.arange(LAYERS) == layer)
        slope = (expected(moved, x, riders) - expected(weights, x, riders)).sum() / step
        assert d_weights[list(order).index(layer)] == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(
    ("rounds", "bubble", "words"),
    [
        (1, 3 / 11, "4 stages, 8 microbatches: 27% of the ticks are bubble"),
        (2, 3 / 19, "4 stages, 8 microbatches, 2 rounds: 16% of the ticks are bubble"),
    ],
)
def test_each_stage_computes_once_per_tick(
    devices: list[jax.Device], rounds: int, bubble: float, words: str
) -> None:
    """T R + S - 1 ticks of one microbatch each, of which T R count: the rest is the bubble."""
    S, T, width = 4, 8, 16
    rules = Rules.make(RulesConfig(), pipeline_rounds=rounds)
    mesh = make_mesh(MeshConfig(stage=S, data=1), devices[:S])

    def matmul(weights: jax.Array, x: jax.Array, _: None) -> jax.Array:
        return x @ weights[0]

    with jax.set_mesh(mesh):
        weights = jax.ShapeDtypeStruct(
            (S * rounds, width, width),
            jnp.float32,
            sharding=RULES.sharding(mesh, "layers", None, None),
        )
        x = jax.ShapeDtypeStruct((T, L, width), jnp.float32)
        traced = jax.make_jaxpr(
            lambda w, x: pipelined(matmul, w, x, None, num_microbatches=T, rules=rules)
        )(weights, x)
    [scan] = [eqn for eqn in traced.eqns if eqn.primitive.name == "scan"]
    [product] = [eqn for eqn in scan.params["jaxpr"].eqns if eqn.primitive.name == "dot_general"]
    done = scan.params["length"] * product.outvars[0].aval.size
    useful = S * T * rounds * L * width
    assert 1 - useful / done == pytest.approx(bubble_share(S, T, rounds)) == bubble
    assert (bubble_words(S, T, rounds), bubble_words(1, T, rounds)) == (words, None)


def test_a_schedule_that_does_not_fit_is_named_with_its_remedy() -> None:
    for fitting in ((8, 4, 4, 2), (8, 4, 1, 1), (7, 1, 1, 5)):
        check_pipeline(*fitting)
    with pytest.raises(ConfigError, match="raise train.accumulation_steps=3 to 4"):
        check_pipeline(8, 4, 3, 2)
    with pytest.raises(ConfigError, match="=3 x mesh.stage=2 does not divide model.num_layers=8"):
        check_pipeline(8, 2, 2, 3)


def test_rows_are_cut_and_joined_again() -> None:
    a = np.arange(12).reshape(6, 2)
    cut = cut_rows(a, 3, RULES, ("batch", "length"))
    assert cut[:, :, 0].tolist() == [[0, 6], [2, 8], [4, 10]]
    np.testing.assert_array_equal(join_rows(cut, RULES, ("batch", "length")), a)
