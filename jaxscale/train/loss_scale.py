"""Loss scaling for float16: small gradients are lifted above what float16 rounds to zero.

The loss is multiplied by a factor before the backward pass and the gradients are divided by it
after. With `train.loss_scale=0` the factor is dynamic and a part of the state: it halves when a
gradient overflows, and doubles after many steps without. Source: Micikevicius et al., "Mixed
precision training", arXiv:1710.03740.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxscale.config import Config

FIRST, LEAST, MOST = 2.0**15, 1.0, 2.0**24
# Good steps in a row before the factor doubles.
GROWTH_STEPS = 2000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """A dynamic loss scale.

    Attributes:
      factor: float32, of the loss; a power of two, so that dividing by it is exact.
      good_steps: int32, steps in a row without an overflow since the factor last changed.
    """

    factor: jax.Array
    good_steps: jax.Array


def first_loss_scale(config: Config) -> LossScale | None:
    """Return the dynamic loss scale of step 0; None where the config has none."""
    if config.model.compute_dtype != "float16" or config.train.loss_scale:
        return None
    return new_loss_scale()


def new_loss_scale() -> LossScale:
    """Return a scale that has seen no step."""
    return LossScale(jnp.float32(FIRST), jnp.zeros((), jnp.int32))


def loss_factor(config: Config, scale: LossScale | None) -> jax.Array | None:
    """Return the factor of the loss, dynamic or fixed; None for a dtype that needs none."""
    if scale is not None:
        return scale.factor
    return jnp.float32(config.train.loss_scale) if config.train.loss_scale else None


def adjusted(scale: LossScale, is_finite: jax.Array) -> LossScale:
    """Return the scale for the next step, after one whose gradients were finite or not."""
    good_steps = jnp.where(is_finite, scale.good_steps + 1, 0)
    grows = good_steps >= GROWTH_STEPS
    factor = jnp.where(is_finite, scale.factor * jnp.where(grows, 2.0, 1.0), scale.factor / 2.0)
    return LossScale(jnp.clip(factor, LEAST, MOST), jnp.where(grows, 0, good_steps))


def can_fall(scale: LossScale) -> jax.Array:
    """Tell whether a lower factor is left to try."""
    return scale.factor > LEAST
