"""What training is made of: mesh, rules, decoder, optimizer; and the state that a step transforms.

`assemble` turns a config into these without making a weight. The abstract state feeds restore,
ahead-of-time compilation and the planner; `init_state` makes the real one, sharded from birth.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxscale.config import OFFLOAD, Config
from jaxscale.model.attention.attend import check_attention
from jaxscale.model.decoder import Definition, Params, check_mesh, define
from jaxscale.optimizer import Schedule, make_optimizer, make_schedule
from jaxscale.parallel.host_memory import (
    check_host_memory,
    in_host_memory,
    is_on_host,
    to_device,
    to_host,
)
from jaxscale.parallel.mesh import STAGE_AXIS, AnyMesh, make_mesh
from jaxscale.parallel.pipeline import check_pipeline, stage_order
from jaxscale.parallel.sharding import Rules, check_divides, map_axes
from jaxscale.train.loss_scale import LossScale, first_loss_scale

BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "segments": jnp.int32,
    "weights": jnp.float32,
}
Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32, steps done.
      params: the parameters.
      optimizer: optax state.
      skipped_steps: int32, steps skipped for a non-finite loss or gradient.
      skipped_in_a_row: int32, how many of them were the last ones; those that only lowered the
        loss scale are left out.
      loss_scale: of float16; None where the config has no dynamic one.
    """

    step: jax.Array
    params: Params
    optimizer: Any
    skipped_steps: jax.Array
    skipped_in_a_row: jax.Array
    loss_scale: LossScale | None


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A training program before its weights: config, mesh, decoder, optimizer and schedule."""

    config: Config
    mesh: Mesh
    definition: Definition
    optimizer: optax.GradientTransformation
    schedule: Schedule

    @property
    def rules(self) -> Rules:
        """The sharding rules."""
        return self.definition.rules

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of a batch's arrays, (global_batch_size, length)."""
        return self.rules.sharding(self.mesh, "batch", "length")


def assemble(config: Config, devices: Sequence[Any] | None = None) -> Assembly:
    """Put together what a resolved config describes, on `devices` (default: all).

    Raises:
      ConfigError: the mesh does not fit the devices, the model or the batch.
    """
    mesh = make_mesh(config.mesh, devices)
    rules = check_fit(config, mesh)
    _check_offload(config, mesh)
    definition = define(config.model, rules)
    optimizer = make_optimizer(config.optimizer, definition.axes)
    return Assembly(config, mesh, definition, optimizer, make_schedule(config.optimizer))


def check_fit(config: Config, mesh: AnyMesh) -> Rules:
    """Check that a mesh cuts model and batch of a resolved config evenly; return its rules.

    Needs the sizes of the axes alone, so that a planner can ask without devices.

    Raises:
      ConfigError: naming the knobs and the remedy.
    """
    model, train = config.model, config.train
    rules = Rules.make(
        config.rules,
        reduce_dtype=train.gradient_reduce_dtype,
        pipeline_rounds=train.pipeline_rounds,
    )
    check_mesh(model, rules, mesh)
    rows = train.global_batch_size // train.accumulation_steps
    check_divides(
        rules,
        mesh,
        {
            "batch": (rows, "train.global_batch_size / train.accumulation_steps"),
            "length": (config.data.length, "data.length"),
            "residual_length": (config.data.length, "data.length"),
        },
    )
    stages = mesh.shape[STAGE_AXIS]
    check_pipeline(model.num_layers, stages, train.accumulation_steps, train.pipeline_rounds)
    check_attention(model, rules, mesh, config.data.length)
    return rules


def _check_offload(config: Config, mesh: Mesh) -> None:
    if config.train.offload != "none":
        knob = f"train.offload={config.train.offload}"
        check_host_memory(mesh, knob, "set train.offload=none")
    names = [name for name in config.model.remat_names if name.startswith(OFFLOAD)]
    if names and config.model.remat == "names":
        remedy = f"take {OFFLOAD} away, or set model.remat=full"
        check_host_memory(mesh, f"model.remat_names={','.join(names)}", remedy)


def optimizer_axes(definition: Definition) -> Any:
    """Return each parameter's logical axes as its optimizer state has them (ZeRO)."""
    return map_axes(
        lambda names: tuple("optimizer_embed" if name == "embed" else name for name in names),
        definition.axes,
    )


def place(rules: Rules, values: Any, axes: Any) -> Any:
    """Reshard a pytree of arrays shaped like the parameters to where its logical axes lie."""
    return jax.tree.map(lambda value, names: rules.place(value, *names), values, axes)


def in_float32(values: Any) -> Any:
    """Return a pytree of arrays in float32, in which sums and moments of parameters are kept."""
    return jax.tree.map(lambda value: value.astype(jnp.float32), values)


def start_state(assembly: Assembly, params: Params) -> TrainState:
    """Return the state of step 0 around given parameters; for use under the mesh, jitted.

    All of it lies on the device; `stored` brings it to where it lies between steps.
    """
    axes = optimizer_axes(assembly.definition)
    optimizer = assembly.optimizer.init(in_float32(place(assembly.rules, params, axes)))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer, zero, zero, first_loss_scale(assembly.config))


def stored(config: Config, state: TrainState, to_store: Callable[[Any], Any]) -> TrainState:
    """Apply `to_store` to what lies in host memory between steps, as `train.offload` says."""
    offload = config.train.offload
    params = to_store(state.params) if offload == "all" else state.params
    optimizer = state.optimizer if offload == "none" else to_store(state.optimizer)
    return dataclasses.replace(state, params=params, optimizer=optimizer)


def abstract_state(assembly: Assembly) -> TrainState:
    """Return the state as ShapeDtypeStructs with shardings on the mesh, where it lies stored."""
    params = assembly.definition.abstract(assembly.mesh)
    with jax.set_mesh(assembly.mesh):
        shapes = jax.eval_shape(lambda params: start_state(assembly, params), params)
    state = jax.tree.map(lambda leaf: _concrete(leaf, assembly.mesh), shapes)
    return stored(assembly.config, state, in_host_memory)


def _concrete(leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    spec = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def abstract_batch(assembly: Assembly) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a training batch as ShapeDtypeStructs with shardings on the mesh."""
    shape = (assembly.config.train.global_batch_size, assembly.config.data.length)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=assembly.batch_sharding)
        for name, dtype in BATCH_DTYPES.items()
    }


def jit_init_params(assembly: Assembly) -> Any:
    """Return the jitted `key -> params`; each device draws only its own shards."""
    # Outside the mesh: there the output shardings reach back into the random bits, whereas under an
    # explicit mesh every array would be drawn whole on each device before it is cut.
    shardings = assembly.definition.shardings(assembly.mesh)

    def init(key: jax.Array) -> Params:
        return _reordered(assembly.definition.init(key), stage_order(*_schedule(assembly)))

    return jax.jit(init, out_shardings=shardings)


def init_params(assembly: Assembly) -> Params:
    """Draw the parameters, sharded from birth; the same values on every mesh."""
    return jit_init_params(assembly)(jax.random.key(assembly.config.train.seed))


def in_stage_order(assembly: Assembly, tree: Any) -> Any:
    """Return parameters, or a state of them, with the layers where the stages want them.

    In a checkpoint the layers stand in their own order, whatever the schedule.
    """
    return _move_layers(assembly, tree, stage_order(*_schedule(assembly)))


def in_layer_order(assembly: Assembly, tree: Any) -> Any:
    """Undo `in_stage_order`."""
    return _move_layers(assembly, tree, np.argsort(stage_order(*_schedule(assembly))))


def _schedule(assembly: Assembly) -> tuple[int, int, int]:
    """Return layers, stages and rounds."""
    stages = assembly.mesh.shape[STAGE_AXIS]
    rounds = assembly.rules.pipeline_rounds if stages > 1 else 1
    return assembly.config.model.num_layers, stages, rounds


def _move_layers(assembly: Assembly, tree: Any, order: np.ndarray) -> Any:
    if (order == np.arange(len(order))).all():
        return tree
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
    on_host = jax.tree.map(is_on_host, tree)

    def move(tree: Any) -> Any:
        moved = _reordered(to_device(tree), order)
        return jax.tree.map(lambda leaf, host: to_host(leaf) if host else leaf, moved, on_host)

    with jax.set_mesh(assembly.mesh):
        return jax.jit(move, out_shardings=shardings)(tree)


def _reordered(tree: Any, order: np.ndarray) -> Any:
    """Return a pytree with other order of the layers in all arrays below `blocks`."""

    def reorder(path: Any, leaf: jax.Array) -> jax.Array:
        if "blocks" not in [getattr(entry, "key", None) for entry in path]:
            return leaf
        sharding = jax.typeof(leaf).sharding
        if sharding.mesh.empty:
            return leaf[order]
        whole = jax.reshard(leaf, PartitionSpec(None, *sharding.spec[1:]))
        return jax.reshard(whole[order], sharding.spec)

    return jax.tree_util.tree_map_with_path(reorder, tree)


def init_state(assembly: Assembly, params: Params | None = None) -> TrainState:
    """Make the state of step 0, sharded from birth, around given or newly drawn parameters."""
    params = init_params(assembly) if params is None else params
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(assembly))
    # Memory of the device cannot become memory of the host.
    donated = () if assembly.config.train.offload == "all" else (0,)
    with jax.set_mesh(assembly.mesh):
        make = jax.jit(
            lambda params: stored(assembly.config, start_state(assembly, params), to_host),
            out_shardings=shardings,
            donate_argnums=donated,
        )
        return make(params)
