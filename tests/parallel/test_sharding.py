"""Sharding rules: logical axes to mesh axes, and the gather that FSDP is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale.config import ConfigError, MeshConfig, RulesConfig
from jaxscale.parallel.mesh import make_mesh
from jaxscale.parallel.sharding import Rules, check_divides

RULES = Rules.make(RulesConfig())


def test_rules_drop_axes_of_size_one_and_vanish_without_a_mesh(devices: list[jax.Device]) -> None:
    assert RULES.spec("batch", "length") is None
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), devices)
    assert RULES.spec("batch", "length", "heads", mesh=mesh) == P(("data", "fsdp"), None, None)
    with jax.set_mesh(mesh):
        assert RULES.spec("embed", None) == P("fsdp", None)
        assert RULES.without_batch().spec("batch", "length") == P(None, None)
    assert RULES.num_shards("batch", mesh) == 8


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (RulesConfig(heads="model"), "rules.heads=model: no mesh axis model; axes are stage"),
        (RulesConfig(batch="data,data"), "rules.batch=data,data names a mesh axis twice"),
    ],
)
def test_a_wrong_rule_is_named(rules: RulesConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rules.make(rules)


def test_two_axes_of_an_array_on_one_mesh_axis_are_refused(devices: list[jax.Device]) -> None:
    mesh = make_mesh(MeshConfig(data=1, stage=2, tensor=4), devices)
    with pytest.raises(ConfigError) as caught:
        Rules.make(RulesConfig(embed="tensor")).spec("embed", None, "hidden", mesh=mesh)
    assert str(caught.value) == (
        "rules.embed and rules.hidden both take mesh axis tensor; take it out of one of them"
    )
    with pytest.raises(ConfigError) as caught:
        Rules.make(RulesConfig(embed="stage")).spec("layers", "embed", mesh=mesh)
    assert (
        str(caught.value) == "rules.embed takes mesh axis stage, which cuts the layers; take it out"
    )


def test_what_does_not_divide_is_named_with_its_remedy(devices: list[jax.Device]) -> None:
    mesh = make_mesh(MeshConfig(data=1, tensor=8), devices)
    expected = (
        "mesh.tensor=8 does not divide model.num_kv_heads=4; "
        "lower mesh.tensor or set rules.kv_heads=None"
    )
    with pytest.raises(ConfigError) as caught:
        check_divides(RULES, mesh, {"kv_heads": (4, "model.num_kv_heads")})
    assert str(caught.value) == expected
    rules = Rules.make(RulesConfig(kv_heads=None))
    check_divides(rules, mesh, {"kv_heads": (4, "model.num_kv_heads")})
    # No rule moves the layers.
    mesh = make_mesh(MeshConfig(data=1, stage=8), devices)
    with pytest.raises(ConfigError, match=r"divide model.num_layers=4; lower mesh.stage$"):
        check_divides(RULES, mesh, {"layers": (4, "model.num_layers")})


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_gather_moves_the_compute_dtype_and_reduces_gradients_once(
    devices: list[jax.Device], reduce_dtype: str
) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), devices)
    rules = Rules.make(RulesConfig(), reduce_dtype=reduce_dtype)
    random = np.random.default_rng(0)
    weight = random.normal(size=(16, 8)).astype(np.float32)
    inputs = random.normal(size=(8, 16)).astype(np.float32)

    def loss(weight: jax.Array, inputs: jax.Array) -> jax.Array:
        whole = rules.gather(weight, ("embed", "hidden"), jnp.bfloat16)
        assert whole.dtype == jnp.bfloat16
        outputs = jnp.einsum(
            "bd,df->bf",
            inputs.astype(jnp.bfloat16),
            whole,
            out_sharding=rules.spec("batch", "hidden"),
        )
        return jnp.sum(jnp.square(outputs.astype(jnp.float32)))

    with jax.set_mesh(mesh):
        placed = jax.device_put(weight, rules.sharding(mesh, "embed", "hidden"))
        batch = jax.device_put(inputs, rules.sharding(mesh, "batch", None))
        compiled = jax.jit(jax.grad(loss)).lower(placed, batch).compile()
        gradient = compiled(placed, batch)
    assert gradient.sharding == placed.sharding
    assert gradient.dtype == jnp.float32
    expected = jax.grad(lambda w, x: loss(w, x))(weight, inputs)
    # bf16 keeps 8 bits; eight partial sums are added.
    np.testing.assert_allclose(gradient, expected, atol=0.03 * np.abs(expected).max())
    reductions = [
        line
        for line in compiled.as_text().splitlines()
        if "= " in line and ("all-reduce(" in line or "reduce-scatter(" in line)
    ]
    assert len(reductions) == 1
    # The partial sums that are reduced: the CPU's compiler would hide their dtype.
    with jax.set_mesh(mesh):
        program = str(jax.make_jaxpr(jax.grad(loss))(placed, batch))
    short = {"float32": "f32", "bfloat16": "bf16"}[reduce_dtype]
    assert f":{short}[16@fsdp,8] = reshard" in program


@pytest.mark.parametrize("fsdp", [1, 4])
def test_the_gradient_of_a_frequent_token_loses_no_term(
    devices: list[jax.Device], fsdp: int
) -> None:
    """In bfloat16 a sum of ones ends at 256, where the next one is rounded away."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp), devices[:fsdp])
    with jax.set_mesh(mesh):
        table = jnp.ones((2, 8), out_sharding=RULES.spec("vocab", "embed"))
        ids = jnp.zeros((8, 512), jnp.int32, out_sharding=RULES.spec("batch", "length"))

        @jax.jit
        @jax.grad
        def gradient(table: jax.Array) -> jax.Array:
            rows = RULES.lookup(table, ("vocab", "embed"), ids, jnp.bfloat16)
            assert rows.dtype == jnp.bfloat16
            return jnp.sum(rows.astype(jnp.float32))

        np.testing.assert_array_equal(gradient(table), [[8 * 512] * 8, [0] * 8])
