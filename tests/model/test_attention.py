"""Attention against plain numpy, one query at a time, and every kind against the dense one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.config import ConfigError, MeshConfig, ModelConfig, RulesConfig
from jaxscale.model.attention.attend import ALGORITHMS, check_attention
from jaxscale.model.attention.chunked import (
    block_size,
    chunked_attention,
    no_gradients,
    no_sums,
)
from jaxscale.model.attention.dense import Operands, dense_attention
from jaxscale.model.attention.ring import zigzag_order
from jaxscale.parallel.mesh import make_mesh
from jaxscale.parallel.sharding import Rules
from tests.attentions import K, N, draw, with_gradients
from tests.programs import GRADIENT_TOLERANCE_F32, relative_errors


def by_hand(x: Operands, window: int) -> np.ndarray:
    q, k, v, segments = x.q_BLNH, x.k_BSKH, x.v_BSKH, x.queries.segments_BL
    out = np.zeros_like(q)
    for b, i, n in np.ndindex(q.shape[:3]):
        oldest = max(0, i - window + 1) if window else 0
        seen = [j for j in range(oldest, i + 1) if segments[b, i] == segments[b, j]]
        scores = np.array([q[b, i, n] @ k[b, j, n * K // N] for j in seen])
        weights = np.exp(scores - scores.max())
        values = v[b, seen, n * K // N]
        out[b, i, n] = (weights / weights.sum()) @ values
    return out


@pytest.mark.filterwarnings("ignore:model.attention=flash computes as chunked")
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_attention_equals_the_definition(kind: str, documents: int, window: int) -> None:
    x = draw(12, documents)
    out = ALGORITHMS[kind](x, window)
    np.testing.assert_allclose(out, by_hand(x, window), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize("documents", [1, 4])
# Pairs written out, of one token and of more; a prime, so blocks of one token; pairs in a loop.
@pytest.mark.parametrize("length", [5, 64, 13, 78])
def test_chunked_equals_dense(length: int, documents: int, window: int) -> None:
    x = draw(length, documents)
    found = with_gradients(chunked_attention, x, window)
    expected = with_gradients(dense_attention, x, window)
    assert max(relative_errors(found, expected).values()) < GRADIENT_TOLERANCE_F32


def test_what_is_added_up_over_blocks_of_bfloat16_is_float32() -> None:
    q, k = jnp.ones((1, 2, 2, 4, 8), jnp.bfloat16), jnp.ones((1, 2, 4, 8), jnp.bfloat16)
    carried = (*no_sums(q), *no_gradients(q, k, k))
    assert {x.dtype.name for x in carried} == {"float32"}


def test_all_to_all_needs_the_heads_that_tensor_leaves() -> None:
    mesh = make_mesh(MeshConfig(data=1, sequence=4, tensor=2), jax.devices())
    rules = Rules.make(RulesConfig())
    model = ModelConfig(sequence_attention="all_to_all", num_heads=8)
    check_attention(model, rules, mesh, 16)
    with pytest.raises(ConfigError, match="mesh.sequence=4 does not divide the 2 heads of"):
        check_attention(dataclasses.replace(model, num_heads=4), rules, mesh, 16)


def test_a_length_that_makes_no_good_blocks_is_refused() -> None:
    mesh, rules = make_mesh(MeshConfig(data=1), jax.devices()[:1]), Rules.make(RulesConfig())
    for length in (13, 1000, 1024, 1 << 20):
        check_attention(ModelConfig(attention="chunked"), rules, mesh, length)
    check_attention(ModelConfig(attention="dense"), rules, mesh, 1031)
    for length in (1031, 2 * 1031):
        with pytest.raises(ConfigError, match=f"data.length={length} has no divisor .* of 64"):
            check_attention(ModelConfig(attention="chunked"), rules, mesh, length)


def test_blocks_divide_the_length() -> None:
    sizes = {1: 1, 4: 1, 13: 1, 64: 16, 256: 64, 4096: 512, 1 << 15: 512}
    assert {length: block_size(length) for length in sizes} == sizes


def test_hidden_pairs_of_blocks_cost_nothing() -> None:
    def flops(window: int) -> float:
        x = draw(64, 1)
        program = jax.jit(functools.partial(chunked_attention, window=window))
        return float(program.lower(x).compile().cost_analysis()["flops"])

    # Blocks of 16: ten of the sixteen pairs are causal; seven of them reach into the window.
    assert flops(16) == pytest.approx(flops(0) * 7 / 10, rel=0.05)


def test_zigzag_order_gives_each_part_an_early_and_a_late_chunk() -> None:
    assert zigzag_order(16, 4).tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
