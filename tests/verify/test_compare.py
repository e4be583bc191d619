"""The errors that `verify` computes, and their tolerances."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.train.state import assemble
from jaxscale.verify.compare import (
    NUM_DOCUMENTS,
    Numbers,
    compare,
    loss_tolerance,
    make_batches,
    on_host,
    relative_errors,
)
from tests.conftest import ROOT
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
    # One that is small and no more is its own measure.
    small = {**expected, "key_bias": np.full(2, 1e-5, np.float32)}
    assert relative_errors({**found, "key_bias": jnp.full(2, 1.01e-5)}, small)["key_bias"] > 0.009


def test_a_batch_has_what_a_fault_may_ignore() -> None:
    """Several documents in a row, tokens without weight, and one token that is frequent."""
    config = tiny_config()
    first, second = make_batches(config, 2)
    assert all((first[name] == again).all() for name, again in make_batches(config, 1)[0].items())
    assert (first["tokens"] != second["tokens"]).any()
    rows = first["segments"]
    assert (np.diff(rows, axis=1) >= 0).all()
    assert np.mean([len(set(row)) for row in rows]) > NUM_DOCUMENTS / 2
    assert 0.6 < first["weights"].mean() < 0.9
    # A uniform number's third power is below 1/64 in one of 4 cases.
    assert np.bincount(first["tokens"].ravel()).max() > 3 * first["tokens"].size / 64


def numbers(value: float) -> Numbers:
    tree = {"norm": {"scale": jnp.full(2, value)}}
    return Numbers(tree, tree, tree, losses=[value], gradient_norms=[value], hashes=[1])


def test_what_passes_is_within_the_documented_tolerance() -> None:
    def wrong(error: float) -> list[str]:
        deviations = compare(numbers(1.0 + error), on_host(numbers(1.0)), 128)
        return [d.quantity for d in deviations if not d.passed]

    tensors = ["initial parameter", "gradient", "parameter"]
    assert wrong(9e-7) == []
    assert wrong(1.1e-6) == wrong(1.9e-5) == ["loss"]
    assert wrong(2.1e-5) == ["loss", "gradient norm", *tensors]
    assert wrong(math.nan) == ["loss", "gradient norm", *tensors]
    assert "| 2e-5 |" in (ROOT / "docs" / "verify.md").read_text()


def test_what_is_zero_on_one_device_must_be_zero() -> None:
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
