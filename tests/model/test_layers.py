"""Rotary positions, norms and what the decoder's structure promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxscale.config import ModelConfig, RulesConfig
from jaxscale.model import layers
from jaxscale.model.attention.dense import Span
from jaxscale.model.decoder import define
from jaxscale.model.layers import MLP, Norm, rotary
from jaxscale.parallel.sharding import Rules
from tests.programs import tiny_config


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    model = ModelConfig(head_dim=16)
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(query_position: int, key_position: int) -> float:
        turned = [
            rotary(jnp.asarray(x), jnp.full((1, 1), p), model)
            for x, p in ((q, query_position), (k, key_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(5, 2) == pytest.approx(score(105, 102), rel=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-2)
    assert score(0, 0) == pytest.approx(float(np.sum(q * k)), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_of_tpus_is_that_of_others(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, random = ModelConfig(head_dim=16), np.random.default_rng(0)
    x, cotangent = (jnp.asarray(a, dtype) for a in random.normal(size=(2, 2, 8, 3, 16)))
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    found = []
    for kind in ("cpu", "TPU v5 lite"):
        monkeypatch.setattr(layers, "device_kind", lambda kind=kind: kind)
        out, transpose = jax.vjp(lambda x: rotary(x, positions, model, scale=0.3), x)
        found.append([np.asarray(a, np.float32) for a in (out, *transpose(cotangent))])
    (out, gradient), (tpu_out, tpu_gradient) = found
    np.testing.assert_array_equal(tpu_out, out)
    # Of two terms one is rounded to bfloat16, which has 8 bits, before they are summed.
    margin = 0.0 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(tpu_gradient, gradient, rtol=0, atol=margin * np.abs(gradient).max())


def test_what_turns_features_on_tpus_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_config(model={"remat": "dots"}).model
    definition = define(model, Rules.make(RulesConfig()))
    tokens = np.zeros((1, 4), np.int32)

    def kept(kind: str) -> list[tuple[int, ...]]:
        monkeypatch.setattr(layers, "device_kind", lambda: kind)
        run = lambda params: definition.bind(params)(tokens, Span(tokens))[0]  # noqa: E731
        leaves = jax.eval_shape(lambda params: jax.vjp(run, params)[1], definition.shapes)
        shapes = [leaf.shape for leaf in jax.tree.leaves(leaves)]
        return sorted(shape for shape in shapes if shape != turn)

    turn = (model.head_dim, model.head_dim)  # the constant itself
    assert kept("TPU v5 lite") == kept("cpu")


def angles(model: ModelConfig, position: int) -> np.ndarray:
    """Return by how much each pair of features is turned at a position."""
    H = model.head_dim
    x = np.zeros((1, 1, 1, H), np.float32)
    x[..., : H // 2] = 1
    turned = np.asarray(rotary(jnp.asarray(x), jnp.full((1, 1), position), model))[0, 0, 0]
    return np.arctan2(turned[H // 2 :], turned[: H // 2])


def test_linear_scaling_divides_positions() -> None:
    plain = ModelConfig(head_dim=16)
    scaled = ModelConfig(head_dim=16, rope_scaling="linear", rope_factor=4.0)
    np.testing.assert_allclose(angles(scaled, 4), angles(plain, 1), atol=1e-6)


def test_llama3_scaling_keeps_fast_turns_and_stretches_slow_ones() -> None:
    plain = ModelConfig(head_dim=128, rope_theta=500_000.0)
    scaled = ModelConfig(
        head_dim=128,
        rope_theta=500_000.0,
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_original_length=8192,
    )
    before, after = angles(plain, 1), angles(scaled, 1)
    turns = 8192 * before / (2 * np.pi)
    np.testing.assert_allclose(after[turns > 4], before[turns > 4], rtol=1e-5)
    np.testing.assert_allclose(after[turns < 1], before[turns < 1] / 8, rtol=1e-5)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert np.all((after[between] < before[between]) & (after[between] > before[between] / 8))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norms(norm: str) -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(2, 5, 32)).astype(np.float32)
    out = np.asarray(Norm(ModelConfig(norm=norm), "width", 32)(jnp.asarray(x)))
    np.testing.assert_allclose(np.mean(out**2, axis=-1), 1.0, rtol=1e-4)
    centred = np.abs(out.mean(-1)).max() < 1e-5
    assert centred == (norm == "layernorm")


def test_compile_time_does_not_grow_with_depth() -> None:
    sizes = []
    for num_layers in (2, 16):
        model = tiny_config(model={"num_layers": num_layers}).model
        definition = define(model, Rules.make(RulesConfig()))
        tokens = np.zeros((1, 4), np.int32)
        lowered = jax.jit(
            lambda params, d=definition, t=tokens: d.bind(params)(t, Span(t))[0]
        ).lower(definition.shapes)
        sizes.append(len(lowered.as_text().splitlines()))
    assert sizes[0] == sizes[1] > 100


def test_parameters_are_a_plain_dict_with_logical_axes() -> None:
    definition = define(tiny_config().model, Rules.make(RulesConfig()))
    assert definition.axes["blocks"]["attention"]["query"] == (
        "layers",
        "embed",
        "heads",
        "head_dim",
    )
    assert definition.axes["embedding"] == ("vocab", "embed")
    params = definition.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, definition.shapes)
    assert not any(isinstance(leaf, nnx.Variable) for leaf in jax.tree.leaves(params))


def test_a_bias_gradient_is_summed_in_float32() -> None:
    model = ModelConfig(width=8, hidden=16, biases="all")
    graphdef, state = nnx.split(MLP(model, Rules.make(RulesConfig()), nnx.Rngs(params=0)))
    x = jnp.zeros((4, 256, 8), jnp.bfloat16)
    direction = jnp.asarray(np.random.default_rng(0).normal(1.0, 1.0, x.shape), x.dtype)

    @jax.jit
    @jax.grad
    def gradients(params: Any) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef, params)(x) * direction, dtype=jnp.float32)

    found = gradients(nnx.to_pure_dict(state))["down_bias"]
    # In bfloat16, 1,024 terms of one sign would lose about a hundredth of their sum.
    exact = np.asarray(direction, np.float64).sum((0, 1))
    np.testing.assert_allclose(found, exact, rtol=1e-6)
