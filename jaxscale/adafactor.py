"""Adafactor: a matrix's second moments kept as one row and one column.

Which dims form the matrix follows from logical axes: `embed` is one side, all else but `layers` the
other, so that each layer is factored by itself. Parameters that are no matrices keep all of theirs.

Source: Shazeer and Stern, "Adafactor: Adaptive learning rates with sublinear memory cost",
arXiv:1804.04235. As in Zhai et al., "Scaling vision transformers", arXiv:2106.04560, the decay has
an upper limit and the learning rate is not scaled by the parameter's size; no first moment is kept.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Of the decay 1 - step^-0.8, which makes a correction of the first steps' bias needless.
DECAY_POWER = 0.8
# Largest root mean square of a layer's update.
UPDATE_RMS = 1.0
# The paper's: what is added to squares at least, so that float32 can hold it.
LEAST_SQUARE = 1e-30


class FactoredMoments(NamedTuple):
    """State of the rule.

    Attributes:
      num_updates: int32, updates so far.
      moments: for each parameter a pair (mean over columns, mean over rows) or its full moments.
    """

    num_updates: jax.Array
    moments: Any


def scale_by_adafactor(
    beta2: float, epsilon: float, axes: Any
) -> optax.GradientTransformationExtraArgs:
    """Return Adafactor's rule.

    Args:
      beta2: upper limit of the second moment's decay.
      epsilon: its square is added to squared gradients.
      axes: pytree of tuples of logical axes, one per parameter.
    """
    least = max(epsilon**2, LEAST_SQUARE)

    def init(params: Any) -> FactoredMoments:
        def zeros(param: jax.Array, names: tuple[str | None, ...]) -> tuple[jax.Array, ...]:
            # The mean has the sharding of the dims that it keeps.
            return tuple(jnp.zeros_like(jnp.mean(param, dims)) for dims in _means(names))

        return FactoredMoments(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params, axes))

    def update(gradients: Any, state: FactoredMoments, params: Any = None) -> Any:
        del params
        number = state.num_updates + 1
        decay = jnp.minimum(1.0 - number.astype(jnp.float32) ** -DECAY_POWER, beta2)

        def move(g: jax.Array, old: tuple[jax.Array, ...], names: Any) -> tuple[jax.Array, ...]:
            squares = jnp.square(g) + least
            means = (jnp.mean(squares, dims) for dims in _means(names))
            return tuple(
                decay * m + (1.0 - decay) * mean for m, mean in zip(old, means, strict=True)
            )

        moments = jax.tree.map(move, gradients, state.moments, axes)
        updates = jax.tree.map(_scaled, gradients, moments, axes)
        return updates, FactoredMoments(number, moments)

    return optax.GradientTransformation(init, update)


def _means(axes: tuple[str | None, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the dims over which each of a parameter's moments is a mean."""
    if "embed" not in axes:
        return ((),)
    columns = tuple(i for i, name in enumerate(axes) if name not in ("layers", "embed"))
    return columns, (axes.index("embed"),)


def _scaled(
    gradient: jax.Array, moments: tuple[jax.Array, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """Divide a gradient by the root of its second moments, and limit each layer's update."""
    means = _means(axes)
    whole = [jnp.expand_dims(m, dims) for m, dims in zip(moments, means, strict=True)]
    if len(whole) == 2:
        # The moments are their outer product over their common mean.
        whole[0] = whole[0] / jnp.mean(whole[0], means[1], keepdims=True)
    update = gradient
    for moment in whole:
        update = update * jax.lax.rsqrt(moment)
    in_layer = tuple(i for i, name in enumerate(axes) if name != "layers")
    size = jnp.sqrt(jnp.mean(jnp.square(update), in_layer, keepdims=True))
    return update / jnp.maximum(size / UPDATE_RMS, 1.0)
