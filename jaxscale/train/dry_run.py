"""What a config would train, before anything long starts: arrays, shardings, bytes, FLOPs.

Nothing is allocated and no data is read: the state is abstract, and the step is compiled as the
real run would compile it. `jaxscale train --dry-run` shows it.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxscale.config import Config
from jaxscale.console import format_bytes
from jaxscale.model.cost import num_parameters, train_flops_per_token
from jaxscale.parallel.mesh import STAGE_AXIS
from jaxscale.parallel.pipeline import bubble_words
from jaxscale.parallel.program import program_bytes, read_program
from jaxscale.train.memory import bytes_on_device, bytes_on_host, memory_of_device
from jaxscale.train.state import abstract_batch, abstract_state, assemble
from jaxscale.train.step import compile_step


@dataclasses.dataclass(frozen=True)
class ArrayRow:
    """One parameter.

    Attributes:
      name: its path.
      shape: whole, over all devices.
      dtype: of the stored parameter.
      axes: the logical axis of each dimension; None for one that no rule cuts.
      sharding: the mesh axes that cut each dimension.
      device_shape: the part that one device holds.
      device_bytes: of that part, on the device or in host memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    sharding: tuple[str, ...]
    device_shape: tuple[int, ...]
    device_bytes: int


@dataclasses.dataclass(frozen=True)
class CollectiveRow:
    """The collectives of one kind over the same mesh axes, per device and step.

    Attributes:
      kind: as XLA calls it.
      axes: mesh axes, with commas between.
      number: how often one runs.
      payload_bytes: of their arrays together.
    """

    kind: str
    axes: str
    number: int
    payload_bytes: int


@dataclasses.dataclass(frozen=True)
class DryRun:
    """A training program that was compiled and not run; bytes are per device.

    Attributes:
      mesh: size of each mesh axis.
      device_kind: of the devices, as they name themselves.
      parameters: one row per parameter, in the order of their names.
      num_parameters: scalars in all of them.
      params_bytes: parameters.
      optimizer_bytes: optimizer state.
      host_bytes: parameters and optimizer state that lie in host memory; they count there alone.
      batch_bytes: one global batch.
      step_bytes: what the compiled step needs: state, batch, results and temporaries.
      device_bytes: memory there is; on CPUs an equal share of the host's.
      pipeline: stages, microbatches and bubble in words; empty without a pipeline.
      tokens_per_step: over all devices.
      model_flops_per_step: over all devices; docs/design.md has the formula.
      compiled_flops: of the matmuls of the compiled step on each device; None if unknown.
      collectives: what the compiled step sends, the most bytes first; None if unknown.
      compile_seconds: time the compiler took, or the compile cache.
    """

    mesh: dict[str, int]
    device_kind: str
    parameters: tuple[ArrayRow, ...]
    num_parameters: int
    params_bytes: int
    optimizer_bytes: int
    host_bytes: int
    batch_bytes: int
    step_bytes: int | None
    device_bytes: int
    pipeline: str
    tokens_per_step: int
    model_flops_per_step: float
    compiled_flops: float | None
    collectives: tuple[CollectiveRow, ...] | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step's bytes are within the device's memory, or nobody knows."""
        return self.step_bytes is None or self.step_bytes <= self.device_bytes


def dry_run(config: Config) -> DryRun:
    """Compile the step of a resolved config on the devices at hand.

    Raises:
      ConfigError: the mesh does not fit the devices, the model or the batch.
    """
    assembly = assemble(config)
    state = abstract_state(assembly)
    start = time.perf_counter()
    program = compile_step(assembly)
    seconds = time.perf_counter() - start
    tokens = config.train.global_batch_size * config.data.length
    train = config.train
    schedule = (assembly.mesh.shape[STAGE_AXIS], train.accumulation_steps, train.pipeline_rounds)
    flops, collectives = _costs(program, assembly.mesh)
    return DryRun(
        mesh=dict(assembly.mesh.shape),
        device_kind=assembly.mesh.devices.flat[0].device_kind,
        parameters=tuple(_rows(state.params, assembly.definition.axes)),
        num_parameters=num_parameters(state.params),
        params_bytes=bytes_on_device(state.params),
        optimizer_bytes=bytes_on_device(state.optimizer),
        host_bytes=bytes_on_host(state),
        batch_bytes=bytes_on_device(abstract_batch(assembly)),
        step_bytes=program_bytes(program),
        device_bytes=memory_of_device(assembly.mesh),
        pipeline=bubble_words(*schedule) or "",
        tokens_per_step=tokens,
        model_flops_per_step=tokens * train_flops_per_token(config.model, config.data.length),
        compiled_flops=flops,
        collectives=collectives,
        compile_seconds=seconds,
    )


def _costs(compiled: Any, mesh: Mesh) -> tuple[float | None, tuple[CollectiveRow, ...] | None]:
    try:
        program = read_program(compiled, mesh)
    except ValueError:
        # Not every compiler tells how often its loops run.
        return None, None
    rows = [
        CollectiveRow(kind, ",".join(axes), number, payload)
        for (kind, axes), (number, payload) in program.by_kind().items()
    ]
    flops = None if program.opaque_calls else program.flops
    return flops, tuple(sorted(rows, key=lambda row: -row.payload_bytes))


def _rows(params: Any, axes: Any) -> Iterator[ArrayRow]:
    names = jax.tree.leaves(axes, is_leaf=lambda value: isinstance(value, tuple))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), logical in zip(leaves, names, strict=True):
        spec = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
        yield ArrayRow(
            name=jax.tree_util.keystr(path, simple=True, separator="/"),
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            axes=logical,
            sharding=tuple(",".join(_names(part)) for part in spec),
            device_shape=leaf.sharding.shard_shape(leaf.shape),
            device_bytes=bytes_on_device(leaf) + bytes_on_host(leaf),
        )


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def render(result: DryRun) -> Group:
    """Lay a dry run out for a terminal: a table of parameters, then the totals."""
    table = Table("parameter", "dimensions / mesh axes", "on each device", box=SIMPLE_HEAD)
    for row in result.parameters:
        cells = (row.name, ", ".join(_dimensions(row)), format_bytes(row.device_bytes))
        table.add_row(*map(Text, cells))
    totals = Table(box=None, show_header=False)
    for name, value in _totals(result):
        totals.add_row(Text(name), Text(value))
    return Group(table, totals)


def _totals(result: DryRun) -> Iterator[tuple[str, str]]:
    sizes = " ".join(f"{axis}={size}" for axis, size in result.mesh.items() if size > 1)
    dtypes = ", ".join(sorted({row.dtype for row in result.parameters}))
    yield "mesh", f"{sizes or 'one device'}, {result.device_kind}"
    if result.pipeline:
        yield "pipeline", result.pipeline
    yield "parameters", f"{result.num_parameters:,} in {dtypes}"
    yield "parameters per device", format_bytes(result.params_bytes)
    yield "optimizer state per device", format_bytes(result.optimizer_bytes)
    if result.host_bytes:
        yield "in host memory per device", format_bytes(result.host_bytes)
    yield "batch per device", format_bytes(result.batch_bytes)
    step = "unknown" if result.step_bytes is None else format_bytes(result.step_bytes)
    yield "compiled step per device", f"{step} of {format_bytes(result.device_bytes)}"
    yield "tokens per step", f"{result.tokens_per_step:,}"
    yield "model FLOPs per step", f"{result.model_flops_per_step:.3g}"
    if result.compiled_flops is not None:
        useful = (
            result.model_flops_per_step / result.compiled_flops / math.prod(result.mesh.values())
        )
        yield "matmul FLOPs per device", f"{result.compiled_flops:.3g}, {useful:.0%} of them useful"
    for row in result.collectives or ():
        sent = f"{row.number:,} x, {format_bytes(row.payload_bytes)} per step"
        yield f"{row.kind} over {row.axes}", sent
    yield "compiled in", f"{result.compile_seconds:.1f} s"


def _dimensions(row: ArrayRow) -> Iterator[str]:
    """Yield "128 embed/fsdp" and the like: size, logical axis, and the mesh axes that cut it."""
    for size, axis, mesh_axes in zip(row.shape, row.axes, row.sharding, strict=True):
        # A space at which no line is broken.
        name = f"{size}\u00a0{axis}" if axis else str(size)
        yield f"{name}/{mesh_axes}" if mesh_axes else name
