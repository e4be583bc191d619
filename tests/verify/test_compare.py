"""The errors that `verify` computes, and their tolerances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.train.state import assemble
from jaxscale.verify.compare import Numbers, compare, loss_tolerance, on_host, relative_errors
from tests.programs import tiny_config


def test_replicas_that_differ_are_seen(devices: list[jax.Device]) -> None:
    assembly = assemble(tiny_config(mesh={"data": 8}))
    expected = {"norm": {"scale": np.arange(1, 5, dtype=np.float32)}}
    parts = [jax.device_put(expected["norm"]["scale"], device) for device in devices]
    sharding = assembly.rules.sharding(assembly.mesh, None)
    make = functools.partial(jax.make_array_from_single_device_arrays, (4,), sharding)
    assert relative_errors({"norm": {"scale": make(parts)}}, expected) == {"norm/scale": 0.0}
    parts[5] = parts[5] + 1
    assert relative_errors({"norm": {"scale": make(parts)}}, expected) == {"norm/scale": 0.25}


def test_a_tensor_that_vanishes_is_measured_by_those_beside_it() -> None:
    expected = {"key_bias": np.full(2, 1e-9, np.float32), "value": np.full(2, 0.5, np.float32)}
    found = {name: jnp.asarray(value) for name, value in expected.items()}
    noisy = {**found, "key_bias": jnp.full(2, 2e-9)}
    assert relative_errors(noisy, expected)["key_bias"] < 1e-8
    assert relative_errors({**found, "key_bias": jnp.full(2, 0.05)}, expected)["key_bias"] > 0.09
    assert relative_errors({**found, "value": jnp.full(2, jnp.nan)}, expected)["value"] == np.inf


def test_what_is_zero_on_one_device_must_be_zero() -> None:
    def numbers(value: float) -> Numbers:
        tree = {"norm": {"scale": jnp.full(2, value)}}
        return Numbers(tree, tree, tree, losses=[value], gradient_norms=[value], hashes=[1])

    zero = on_host(numbers(0.0))
    assert all(deviation.passed for deviation in compare(numbers(0.0), zero, 1))
    wrong = [d.quantity for d in compare(numbers(1e-9), zero, 1) if not d.passed]
    assert wrong == ["loss", "gradient norm", "initial parameter", "gradient", "parameter"]


def test_the_tolerance_of_a_loss_grows_like_the_root_of_its_tokens() -> None:
    assert loss_tolerance(128) == loss_tolerance(16) == 1e-6
    assert loss_tolerance(12_800) == pytest.approx(1e-5)
    # The largest mean error of sums in another order that is seen, one term after the other.
    dice = np.random.default_rng(0)
    for count in (128, 2048, 32_768):
        terms = dice.gamma(4.0, 1.5, (100, count)).astype(np.float32)
        in_order = np.cumsum(terms, axis=1)[:, -1].astype(np.float64)
        error = np.abs(in_order / terms.astype(np.float64).sum(axis=1) - 1).max()
        assert error < loss_tolerance(count)
        assert error > loss_tolerance(count) / 30
