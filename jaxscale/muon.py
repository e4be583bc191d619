"""Muon: the momentum of each layer's matrices, made orthogonal.

Which dims form the matrix follows from logical axes: `embed` is one side, all else but `layers` the
other. Embeddings, head, norms and biases are not Muon's; `optimizer.py` gives them AdamW's rule.

Sources: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), for the
rule and its coefficients; Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982, for
the scale.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxscale.parallel.by_layer import map_layers

# The odd polynomial that one Newton-Schulz iteration applies to the singular values.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# With this root mean square an update is as large as AdamW's usually are, whatever the matrix's
# shape, so that both rules share one learning rate and one weight decay.
UPDATE_RMS = 0.2


def is_hidden_matrix(axes: tuple[str | None, ...]) -> bool:
    """Tell whether a parameter of these logical axes holds a matrix per layer."""
    return axes[0] == "layers" and "embed" in axes


def scale_by_muon(
    momentum: float, epsilon: float, axes: Any, *, dtype: str
) -> optax.GradientTransformation:
    """Return Muon's rule: Nesterov momentum, orthogonalised and scaled to UPDATE_RMS.

    Args:
      momentum: decay of the running sum of gradients.
      epsilon: added to the norm of that sum.
      axes: pytree of tuples of logical axes, one per parameter; each is a hidden matrix.
      dtype: in which the running sum is kept.
    """

    def orthogonalise(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(
            lambda stack, names: _orthogonal_layers(stack, names, epsilon), updates, axes
        )

    trace = optax.trace(momentum, nesterov=True, accumulator_dtype=dtype)
    return optax.chain(trace, optax.stateless(orthogonalise))


def _orthogonal_layers(stack: jax.Array, axes: tuple[str | None, ...], epsilon: float) -> jax.Array:
    embed = axes.index("embed") - 1

    def of_layer(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, embed, 0)
        matrix = x.reshape(x.shape[0], -1)
        scale = UPDATE_RMS * math.sqrt(max(matrix.shape))
        return jnp.moveaxis(scale * orthogonal(matrix, epsilon).reshape(x.shape), 0, embed)

    return map_layers(of_layer, stack)


def orthogonal(matrix: jax.Array, epsilon: float) -> jax.Array:
    """Return nearly U V' of a matrix U S V': singular values between about 0.7 and 1.2.

    Singular values below some 1/500 of the matrix's norm stay smaller than that.
    """
    a, b, c = COEFFICIENTS
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix
    # The Frobenius norm is at least the largest singular value.
    x = x / (jnp.linalg.norm(x) + epsilon)

    def iterate(_: int, x: jax.Array) -> jax.Array:
        gram = x @ x.T
        return a * x + (b * gram + c * gram @ gram) @ x

    x = jax.lax.fori_loop(0, ITERATIONS, iterate, x)
    return x.T if rows > columns else x
