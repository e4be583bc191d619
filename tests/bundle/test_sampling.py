"""Temperature, top-k, top-p, and keys that no neighbour can change."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.bundle.sampling import NEVER, Sampling, choose, filtered
from jaxscale.config import ConfigError

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))


def kept(sampling: Sampling) -> list[int]:
    return np.flatnonzero(np.asarray(filtered(LOGITS, sampling))[0] > NEVER / 2).tolist()


def test_top_k_and_top_p_keep_the_most_likely() -> None:
    assert kept(Sampling(top_k=2)) == [1, 3]
    assert kept(Sampling(top_k=9)) == [0, 1, 2, 3]
    assert kept(Sampling(top_p=0.65)) == [1, 3]
    assert kept(Sampling(top_p=0.75)) == [1, 2, 3]
    assert kept(Sampling(top_p=1e-6)) == [1]
    assert kept(Sampling(top_k=3, top_p=0.5)) == [1, 3]


def test_temperature_sharpens() -> None:
    cold = np.asarray(filtered(LOGITS, Sampling(temperature=0.5)))
    np.testing.assert_allclose(cold, 2 * np.asarray(LOGITS), rtol=1e-6)
    row = jnp.arange(1)
    assert int(choose(LOGITS, row, row, Sampling(temperature=0))[0]) == 1


def test_frequencies_follow_the_probabilities() -> None:
    count = 4000
    rows = jnp.broadcast_to(LOGITS, (count, 4))
    chosen = choose(rows, jnp.zeros(count, int), jnp.arange(count), Sampling(seed=1))
    shares = np.bincount(np.asarray(chosen), minlength=4) / count
    # Four standard deviations of a share of 0.4 in 4000 draws.
    np.testing.assert_allclose(shares, np.exp(LOGITS[0]), atol=4 * np.sqrt(0.24 / count))


def test_a_request_chooses_alike_alone_and_among_others() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 100)))
    together = choose(logits, jnp.arange(5), jnp.arange(5), Sampling(seed=7))
    for row in range(5):
        one = jnp.array([row])
        assert int(choose(logits[row : row + 1], one, one, Sampling(seed=7))[0]) == together[row]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"max_tokens": 0},
        {"seed": 2**32},
    ],
)
def test_a_value_out_of_its_limits_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
