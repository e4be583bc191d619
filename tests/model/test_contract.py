"""Contractions against float32 einsums, with gradients, in every orientation the model uses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.model import contract as module
from jaxscale.model.contract import contract
from tests.programs import relative_errors

# Sums of at most 256 terms; bfloat16 rounds each result once, by 2^-9 of itself.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8}

# Equation, shapes of both operands, and the specs of operands and result on a mesh of axes d and t.
# Where the second is a gathered weight, its gradient is a partial sum over d.
CASES: dict[str, tuple[Any, ...]] = {
    "bld,df->blf": ((4, 8, 16), (16, 32), P("d"), P(None, "t"), P("d", None, "t")),
    "blf,fd->bld": ((4, 8, 32), (32, 16), P("d", None, "t"), P("t"), P("d")),
    "bld,dnh->blnh": ((4, 8, 16), (16, 4, 8), P("d"), P(None, "t"), P("d", None, "t")),
    "blnh,nhd->bld": ((4, 8, 4, 8), (4, 8, 16), P("d", None, "t"), P("t"), P("d")),
    "bld,vd->blv": ((4, 8, 16), (32, 16), P("d"), P("t"), P("d", None, "t")),
    "bkglh,bksh->bkgls": ((4, 2, 3, 8, 8), (4, 2, 8, 8), P("d", "t"), P("d", "t"), P("d", "t")),
    "bkgls,bksh->bkglh": ((4, 2, 3, 8, 8), (4, 2, 8, 8), P("d", "t"), P("d", "t"), P("d", "t")),
}


def operands(equation: str, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return both operands and the gradient of the result."""
    random = np.random.default_rng(0)
    first, second = CASES[equation][:2]
    a, b = (jnp.asarray(random.standard_normal(shape), dtype) for shape in (first, second))
    shape = jax.eval_shape(functools.partial(jnp.einsum, equation), a, b).shape
    return a, b, jnp.asarray(random.standard_normal(shape), dtype)


def reference(equation: str, dtype: str) -> Any:
    """Return result and gradients, all in float32, of operands rounded to the dtype."""
    a, b, gradient = (x.astype(jnp.float32) for x in operands(equation, dtype))
    out, transpose = jax.vjp(functools.partial(jnp.einsum, equation), a, b)
    return out, *transpose(gradient)


def check(found: Any, equation: str, dtype: str) -> None:
    assert all(leaf.dtype == dtype for leaf in found)
    found = tuple(np.asarray(leaf.astype(jnp.float32)) for leaf in found)
    errors = relative_errors(found, reference(equation, dtype))
    assert max(errors.values()) <= TOLERANCE[dtype], errors


def with_gradients(equation: str, a: Any, b: Any, gradient: Any, spec: Any = None) -> Any:
    out, transpose = jax.vjp(functools.partial(contract, equation, spec=spec), a, b)
    return out, *transpose(gradient)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("equation", CASES)
def test_result_and_gradients_equal_float32(equation: str, dtype: str) -> None:
    found = jax.jit(functools.partial(with_gradients, equation))(*operands(equation, dtype))
    check(found, equation, dtype)


@pytest.mark.parametrize("equation", CASES)
def test_other_platforms_compute_the_same(equation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_kind", lambda: "TPU v4")
    found = jax.jit(functools.partial(with_gradients, equation))(*operands(equation, "float32"))
    check(found, equation, "float32")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("equation", CASES)
def test_shards_of_a_mesh_compute_the_same(equation: str, dtype: str) -> None:
    mesh = jax.make_mesh((4, 2), ("d", "t"), (AxisType.Explicit,) * 2)
    of_a, of_b, of_out = CASES[equation][2:]

    def run(a: Any, b: Any, gradient: Any) -> Any:
        if "d" not in of_b:
            b = jax.reshard(b, P(*of_b, reduced={"d"}))
        out, for_a, for_b = with_gradients(equation, a, b, gradient, of_out)
        return out, for_a, jax.reshard(for_b, of_b)

    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(value, NamedSharding(mesh, spec))
            for value, spec in zip(operands(equation, dtype), (of_a, of_b, of_out), strict=True)
        ]
        found = jax.jit(run)(*placed)
    assert found[1].sharding.is_equivalent_to(placed[0].sharding, found[1].ndim)
    # A partial sum of each device is rounded before they are added.
    check(found, equation, dtype)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_product_is_of_bfloat16_and_summed_in_float32_by_the_cpu(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "device_kind", lambda: "cpu" if on_cpu else "TPU v4")
    for equation in CASES:
        traced = jax.make_jaxpr(functools.partial(with_gradients, equation))(
            *operands(equation, "bfloat16")
        )
        products = [e for e in all_equations(traced.jaxpr) if e.primitive.name == "dot_general"]
        assert len(products) == 3
        assert {str(v.aval.dtype) for e in products for v in e.invars} == {"bfloat16"}
        # Elsewhere the matrix units do that by themselves, and partial sums travel in bfloat16.
        found = {str(v.aval.dtype) for e in products for v in e.outvars}
        assert found == {"float32" if on_cpu else "bfloat16"}


def all_equations(jaxpr: Any) -> list[Any]:
    """Return the equations of a jaxpr and of those inside it."""
    values = [value for equation in jaxpr.eqns for value in equation.params.values()]
    inner = [value.jaxpr for value in values if hasattr(value, "jaxpr")]
    return [*jaxpr.eqns, *(equation for one in inner for equation in all_equations(one))]
