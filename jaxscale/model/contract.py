"""Contractions that accumulate in float32, forwards and backwards.

A plain einsum of bfloat16 operands with a float32 result has gradients that multiply float32 by
bfloat16; here each gradient is again a product of operands in the compute dtype. All matmuls of the
model are made by `contract`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, PartitionSpec


def contract(
    equation: str,
    a: jax.Array,
    b: jax.Array,
    *,
    spec: PartitionSpec | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Return the einsum of two arrays, summed in float32.

    Args:
      equation: such as "bld,df->blf"; each letter stands in two of its three parts.
      a: the first operand.
      b: the second operand, of the same dtype.
      spec: the result's sharding, where the operands' leave a choice.
      dtype: of the result; a's by default. Its gradient is rounded to the operands' dtype.
    """
    return _contract(equation, spec, jnp.dtype(dtype or a.dtype), a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _contract(equation: str, spec: Any, dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    return _product(equation, a, b, spec, dtype)


def _forward(equation, spec, dtype, a, b):  # type: ignore[no-untyped-def]
    # Not by a call of `_contract`, in which a remat policy could not see the dot.
    return _product(equation, a, b, spec, dtype), (a, b)


def _backward(equation, spec, dtype, operands, gradient):  # type: ignore[no-untyped-def]
    del spec, dtype
    a, b = operands
    first, second, result = equation.replace("->", ",").split(",")
    # Both products read it; a TPU's compiler would compute it again in each, tile by tile.
    gradient = jax.lax.optimization_barrier(gradient.astype(a.dtype))
    of_a = _product(f"{result},{second}->{first}", gradient, b, _cotangent_spec(a), a.dtype)
    of_b = _product(f"{first},{result}->{second}", a, gradient, _cotangent_spec(b), b.dtype)
    return of_a, of_b


_contract.defvjp(_forward, _backward)


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the einsum in float32, for code with a backward pass of its own."""
    return _product(equation, a, b, None, jnp.float32)


def device_kind() -> str:
    """Return the kind of device that what is being traced will run on, such as "cpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return str((device or jax.devices()[0]).device_kind)


def _cotangent_spec(x: jax.Array) -> PartitionSpec | None:
    """Return the sharding of an array's gradient: a partial sum where the array is `reduced`."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec.partitions, unreduced=spec.reduced)


def _product(
    equation: str, a: jax.Array, b: jax.Array, spec: PartitionSpec | None, dtype: Any
) -> jax.Array:
    """Return the einsum in `dtype`.

    The matrix units of TPUs and GPUs sum in float32 whatever the result's dtype. A result that is
    asked for in float32 would also cross the network in it, where devices hold partial sums.
    """
    if device_kind() == "cpu":
        if _is_partitioned():
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            product = jnp.einsum(equation, a, b, out_sharding=spec)
        else:
            product = _cpu_product(equation, a, b)
        return product.astype(dtype)
    return jnp.einsum(equation, a, b, out_sharding=spec, preferred_element_type=dtype)


def _is_partitioned() -> bool:
    """Tell whether the compiler will cut what is being traced, as it does outside of shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and AxisType.Explicit in mesh.axis_types


def _cpu_product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the einsum in float32, its left operand laid out with the summed dimensions last.

    The CPU's fast kernels want that (bfloat16 otherwise runs at the speed of float32, or not at
    all), and left to itself XLA folds the transposes that would make it so into the dot. A program
    for several devices cannot say so: the compiler would gather what has a fixed layout.
    """
    first, second, result = equation.replace("->", ",").split(",")
    if _is_ready(first, result):
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
    if _is_ready(second, result) or b.size < a.size:
        a, b, first, second = b, a, second, first
    shared = "".join(letter for letter in second if letter in first and letter in result)
    free = "".join(letter for letter in first if letter in result and letter not in second)
    summed = "".join(letter for letter in second if letter not in result)
    order = shared + free + summed
    natural = shared + free + "".join(letter for letter in second if letter not in first)
    out = jnp.einsum(
        f"{order},{second}->{natural}",
        _row_major(_transposed(a, first, order)),
        b,
        preferred_element_type=jnp.float32,
    )
    return _transposed(_row_major(out), natural, result)


def _transposed(x: jax.Array, old: str, new: str) -> jax.Array:
    return jnp.transpose(x, [old.index(letter) for letter in new])


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def _is_ready(letters: str, result: str) -> bool:
    """Tell whether the dimensions that are summed, those not in the result, come last."""
    kept = [letter in result for letter in letters]
    return kept == sorted(kept, reverse=True)
