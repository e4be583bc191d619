"""Sharding rules: the model speaks logical axes, `Rules` says on which mesh axes each one lies.

With `mesh.py`, the only place that names mesh axes. Without a mesh every rule is None, so that the
same model code runs on one device and under export.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxscale.config import ConfigError, RulesConfig
from jaxscale.parallel.mesh import AXES, STAGE_AXIS, AnyMesh

Axis = str | None
# The logical axes that a config may move.
RULES = tuple(field.name for field in dataclasses.fields(RulesConfig))


def map_axes(function: Callable[[tuple[Axis, ...]], Any], axes: Any) -> Any:
    """Apply a function to each tuple of logical axes in a pytree of them."""
    return jax.tree.map(function, axes, is_leaf=lambda value: isinstance(value, tuple))


@dataclasses.dataclass(frozen=True)
class Rules:
    """The mesh axes of each logical axis, outermost first; hashable, so that jit can close over it.

    Attributes:
      table: logical axis and its mesh axes.
      reduce_dtype: dtype in which gradients of gathered parameters are summed over devices.
      pipeline_rounds: times that a microbatch passes through the stages.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...]
    reduce_dtype: str = "float32"
    pipeline_rounds: int = 1

    @classmethod
    def make(
        cls, rules: RulesConfig, *, reduce_dtype: str = "float32", pipeline_rounds: int = 1
    ) -> "Rules":
        """Read the rules section.

        Raises:
          ConfigError: a rule names an unknown mesh axis, or one twice.
        """
        # A head is computed whole, and only a pipeline cuts the stack of layers.
        table: list[tuple[str, tuple[str, ...]]] = [("head_dim", ()), ("layers", (STAGE_AXIS,))]
        for field in dataclasses.fields(rules):
            value = getattr(rules, field.name)
            axes = tuple(part.strip() for part in value.split(",")) if value else ()
            for axis in axes:
                if axis not in AXES:
                    raise ConfigError(
                        f"rules.{field.name}={value}: no mesh axis {axis}; "
                        f"axes are {', '.join(AXES)}"
                    )
            if len(set(axes)) < len(axes):
                raise ConfigError(f"rules.{field.name}={value} names a mesh axis twice")
            table.append((field.name, axes))
        _check_together(dict(table))
        return cls(tuple(table), reduce_dtype, pipeline_rounds)

    def replace(self, **axes: tuple[str, ...]) -> "Rules":
        """Return these rules with other mesh axes for some logical axes."""
        table = {**dict(self.table), **axes}
        return dataclasses.replace(self, table=tuple(table.items()))

    def without_batch(self) -> "Rules":
        """Return the rules for a batch too small to shard: only parameters and heads are."""
        return self.replace(batch=(), length=(), residual_length=())

    def mesh_axes(self, logical: Axis, mesh: Any = None) -> tuple[str, ...]:
        """Return the mesh axes larger than 1 of a logical axis, on `mesh` or the current one."""
        if logical is None:
            return ()
        shape = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
        return tuple(axis for axis in dict(self.table)[logical] if shape.get(axis, 1) > 1)

    def spec(self, *logical: Axis, mesh: Any = None) -> PartitionSpec | None:
        """Return the PartitionSpec of an array with these logical axes; None without a mesh.

        Raises:
          ConfigError: two of its axes lie on one mesh axis.
        """
        if mesh is None and jax.sharding.get_abstract_mesh().empty:
            return None
        parts = [self.mesh_axes(name, mesh) for name in logical]
        used = [axis for part in parts for axis in part]
        if len(set(used)) < len(used):
            twice = next(axis for axis in used if used.count(axis) > 1)
            raise _both_take(
                twice, [name for name in logical if twice in self.mesh_axes(name, mesh)]
            )
        return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))

    def sharding(self, mesh: Mesh, *logical: Axis) -> NamedSharding:
        """Return the NamedSharding on `mesh` of an array with these logical axes."""
        spec = self.spec(*logical, mesh=mesh)
        assert spec is not None
        return NamedSharding(mesh, spec)

    def num_shards(self, logical: Axis, mesh: Any = None) -> int:
        """Return in how many parts a logical axis is cut."""
        shape = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
        size = 1
        for axis in self.mesh_axes(logical, mesh):
            size *= shape[axis]
        return size

    def place(self, x: jax.Array, *logical: Axis) -> jax.Array:
        """Reshard an activation to where its logical axes belong; nothing without a mesh."""
        spec = self.spec(*logical)
        return x if spec is None else jax.reshard(x, spec)

    def gather(self, weight: jax.Array, logical: tuple[Axis, ...], dtype: Any) -> jax.Array:
        """Return a parameter in the compute dtype without its FSDP shards, for use in one block.

        What travels is the compute dtype. Its gradient stays a partial sum on each device until one
        reduction, in `reduce_dtype`, brings it back to the parameter's shards.
        """
        sharded = self.spec(*logical)
        if sharded is None:
            return weight.astype(dtype)
        whole, partial = self._gathered(logical)
        return _gather(weight, whole, sharded, partial, (jnp.dtype(dtype), self.reduce_dtype))

    def lookup(
        self, table: jax.Array, logical: tuple[Axis, ...], ids_BL: jax.Array, dtype: Any
    ) -> jax.Array:
        """Return the rows `table[ids]` in the compute dtype, (B, L, D), sharded like activations.

        The table travels in the compute dtype. Its gradient, a sum over all tokens of an id, is
        added up in float32, where a frequent token's many small terms are not rounded away.
        """
        specs = (*self._gathered(logical), self.spec("batch", "length", "width"))
        return _lookup(table, ids_BL, specs, jnp.dtype(dtype))

    def defer_sum(self, weight: jax.Array, logical: tuple[Axis, ...]) -> jax.Array:
        """Return a parameter whose gradient each device keeps as its own sum, until `sum_deferred`.

        Only over axes that do not cut the parameter itself; for one that all tokens share, like the
        scale of a norm, nothing changes.
        """
        spec = self._deferred(logical, "reduced")
        return weight if spec is None else jax.reshard(weight, spec)

    def deferred_zeros(self, weight: jax.Array, logical: tuple[Axis, ...]) -> jax.Array:
        """Return the zeros to which gradients of `defer_sum` parameters are added, in float32."""
        spec = self._deferred(logical, "unreduced")
        return jnp.zeros(weight.shape, jnp.float32, out_sharding=spec or self.spec(*logical))

    def sum_deferred(self, gradient: jax.Array, logical: tuple[Axis, ...]) -> jax.Array:
        """Return a gradient in its parameter's sharding, added up over devices in reduce_dtype."""
        if self._deferred(logical, "unreduced") is None:
            return gradient
        own = gradient.astype(self.reduce_dtype)
        return jax.reshard(own, self.spec(*logical)).astype(gradient.dtype)

    def _deferred(self, logical: tuple[Axis, ...], kind: str) -> PartitionSpec | None:
        """Return the spec of a deferred parameter or gradient, or None where there is no such."""
        spec = self.spec(*logical)
        # `embed` is what parameters have that go through `gather` or `lookup`.
        if spec is None or "embed" not in logical:
            return None
        own = {axis for name in logical for axis in self.mesh_axes(name)}
        axes = self._gathered(logical)[1] - own
        return PartitionSpec(*spec, **{kind: axes}) if axes else None

    def _gathered(self, logical: tuple[Axis, ...]) -> tuple[Any, frozenset[str]]:
        """Return a parameter's spec without its FSDP shards, and the axes that cut the tokens.

        Over the latter each device's gradient is a partial sum.
        """
        whole = self.spec(*(None if name == "embed" else name for name in logical))
        return whole, frozenset(self.mesh_axes("batch") + self.mesh_axes("length"))


def _rows(table: jax.Array, ids_BL: jax.Array, specs: Any) -> jax.Array:
    whole, partial, rows = specs
    if whole is not None:
        table = jax.reshard(table, PartitionSpec(*whole, reduced=set(partial)))
    found: jax.Array = table.at[ids_BL].get(out_sharding=rows)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table: jax.Array, ids_BL: jax.Array, specs: Any, dtype: Any) -> jax.Array:
    return _rows(table.astype(dtype), ids_BL, specs)


def _lookup_forward(table, ids_BL, specs, dtype):  # type: ignore[no-untyped-def]
    return _lookup(table, ids_BL, specs, dtype), (table, ids_BL)


def _lookup_backward(specs, dtype, residuals, gradient):  # type: ignore[no-untyped-def]
    del dtype
    table, ids_BL = residuals
    # The lookup is linear: its transpose in float32 needs the table's shape and placement alone.
    _, transpose = jax.vjp(lambda t: _rows(t, ids_BL, specs), table.astype(jnp.float32))
    return transpose(gradient.astype(jnp.float32))[0].astype(table.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A value that passes from a forward to a backward function and is no array."""

    value: frozenset[str]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(
    weight: jax.Array,
    whole: PartitionSpec,
    sharded: PartitionSpec,
    partial: frozenset[str],
    dtypes: tuple[Any, str],
) -> jax.Array:
    del sharded
    return _whole(weight, whole, partial, dtypes)


def _whole(
    weight: jax.Array, whole: PartitionSpec, partial: frozenset[str], dtypes: tuple[Any, str]
) -> jax.Array:
    return jax.reshard(weight.astype(dtypes[0]), PartitionSpec(*whole, reduced=set(partial)))


def _gather_forward(weight, whole, sharded, partial, dtypes):  # type: ignore[no-untyped-def]
    del sharded
    # Not by a call of `_gather`, in which a remat policy could not see the reshard.
    deferred = jax.typeof(weight).sharding.spec.reduced
    return _whole(weight, whole, partial, dtypes), (
        jnp.zeros((0,), weight.dtype),
        _Static(deferred),
    )


def _gather_backward(whole, sharded, partial, dtypes, residual, gradient):  # type: ignore[no-untyped-def]
    del whole, partial
    like, deferred = residual
    spec = PartitionSpec(*sharded, unreduced=deferred.value)
    return (jax.reshard(gradient.astype(dtypes[1]), spec).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


# A parameter's dimensions other than `embed` stay cut while a block computes, beside its tokens.
TOKEN_AXES = ("batch", "length")
BESIDE_TOKENS = ("heads", "kv_heads", "hidden", "vocab", "width")


def _check_together(table: Mapping[str, tuple[str, ...]]) -> None:
    """Check the rules that no block could compute with.

    Raises:
      ConfigError: naming the rules and the remedy.
    """
    for name in BESIDE_TOKENS:
        for other in TOKEN_AXES:
            shared = set(table[name]) & set(table[other])
            if shared:
                raise _both_take(min(shared), [name, other])


def _both_take(axis: str, logical: Sequence[Axis]) -> ConfigError:
    """Return the error of logical axes of one array that lie on the same mesh axis."""
    rules = [f"rules.{name}" for name in logical if name in RULES]
    if len(rules) < len(logical):
        return ConfigError(f"{rules[0]} takes mesh axis {axis}, which cuts the layers; take it out")
    return ConfigError(
        f"{' and '.join(rules)} both take mesh axis {axis}; take it out of one of them"
    )


def finer_shardings(rules: Rules, mesh: Mesh, *, one_slice: bool) -> Iterator[tuple[str, Rules]]:
    """Yield knobs that may cut parameters into more parts on a mesh, and the rules they amount to.

    They are rules that have lost an axis which they have by default, and `fsdp` in place of `data`.

    Args:
      rules: the sharding rules.
      mesh: the mesh.
      one_slice: whether `data` is free to go, spanning no slow network.
    """
    default = Rules.make(RulesConfig())
    for name in ("embed", "optimizer_embed", *BESIDE_TOKENS):
        own = dict(rules.table)[name]
        axes = own + tuple(axis for axis in default.mesh_axes(name, mesh) if axis not in own)
        if axes != own:
            yield f"rules.{name}={','.join(axes)}", rules.replace(**{name: axes})
    replicas = mesh.shape["data"]
    if one_slice and replicas > 1 and mesh.shape["fsdp"] == 1:
        # On this mesh the axis `data` does what `fsdp` would do on the other.
        moved = rules.replace(embed=("data",), optimizer_embed=("data",))
        yield f"mesh.fsdp={replicas} instead of mesh.data={replicas}", moved


def check_divides(rules: Rules, mesh: AnyMesh, sizes: Mapping[str, tuple[int, str]]) -> None:
    """Check that each logical axis splits evenly on the mesh.

    Args:
      rules: the sharding rules.
      mesh: the mesh.
      sizes: logical axis -> (size, name of the knob that sets it).

    Raises:
      ConfigError: naming the mesh axes, the knob and the remedy.
    """
    for logical, (size, knob) in sizes.items():
        shards = rules.num_shards(logical, mesh)
        if size % shards:
            axes = rules.mesh_axes(logical, mesh)
            cause = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            lower = " or ".join(f"mesh.{axis}" for axis in axes)
            unset = f" or set rules.{logical}=None" if logical in RULES else ""
            raise ConfigError(f"{cause} does not divide {knob}={size}; lower {lower}{unset}")
