"""What there is to choose from: every mesh, remat and microbatch that a config can take on a slice.

The rules are the project's own, asked of meshes without devices. A candidate is a whole config, so
what the planner recommends is what training would run.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from jax.sharding import AbstractMesh

from jaxscale.config import Config, ConfigError, MeshConfig, ModelConfig
from jaxscale.parallel.mesh import AXES, STAGE_AXIS, abstract_mesh, mesh_sizes
from jaxscale.parallel.sharding import Rules
from jaxscale.plan.torus import Slice
from jaxscale.resolve import resolve
from jaxscale.train.state import check_fit

# Schedules of a pipeline: so many times as many microbatches as stages, at most.
MOST_TURNS = 8


@dataclasses.dataclass(frozen=True)
class Remat:
    """What the backward pass keeps: `model.remat`, and its names where it is "names"."""

    kind: str
    names: tuple[str, ...] = ()

    def of(self, model: ModelConfig) -> ModelConfig:
        """Return the model section with this remat."""
        names = self.names or model.remat_names
        return dataclasses.replace(model, remat=self.kind, remat_names=names)


# From what keeps the most to what keeps the least.
REMATS = (
    Remat("none"),
    Remat("names", ("query", "key", "value", "context", "attention_out", "gate", "up")),
    Remat("dots"),
    Remat("names", ("query", "key", "value", "context", "attention_out")),
    Remat("names", ("query", "key", "value", "context")),
    Remat("names", ("context", "attention_out")),
    Remat("full"),
)


# Compared by identity: thousands of them key caches.
@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A resolved config with every mesh axis filled in, and what its mesh section amounts to."""

    config: Config
    mesh: AbstractMesh
    rules: Rules

    @property
    def mesh_words(self) -> str:
        """The axes larger than 1, such as "fsdp=64 tensor=4"."""
        return " ".join(f"{a}={s}" for a, s in self.mesh.shape.items() if s > 1) or "one device"

    @property
    def remat_words(self) -> str:
        """The remat, such as "names:query,key"."""
        model = self.config.model
        names = ":" + ",".join(model.remat_names) if model.remat == "names" else ""
        return model.remat + names


def candidate(config: Config, slice_: Slice) -> Candidate:
    """Return a resolved config as a candidate for a slice.

    Raises:
      ConfigError: its mesh does not fit the slice, the model or the batch.
    """
    mesh = abstract_mesh(config.mesh, slice_.num_devices)
    sizes = MeshConfig(**mesh.shape, num_slices=config.mesh.num_slices)
    return Candidate(dataclasses.replace(config, mesh=sizes), mesh, check_fit(config, mesh))


def candidates(
    config: Config,
    slice_: Slice,
    *,
    meshes: Literal["auto"] | Sequence[MeshConfig] = "auto",
    remat: Literal["auto"] | Sequence[Remat] = "auto",
    batch: int | None = None,
    length: int | None = None,
) -> Iterator[Candidate]:
    """Yield every candidate: mesh by mesh, fewest microbatches first, and what keeps most first.

    Args:
      config: a resolved config; what is chosen here is replaced.
      slice_: the devices.
      meshes: those to try; auto: all that multiply out.
      remat: kinds to try; auto: REMATS.
      batch: sequences per step; None: the config's.
      length: tokens per sequence; None: the config's.

    Raises:
      ConfigError: the batch or length is at odds with another knob.
    """
    config = _sized(config, batch, length)
    remats = REMATS if remat == "auto" else remat
    # The same names with another kind than "names" would be the same program.
    models = list(dict.fromkeys(kind.of(config.model) for kind in remats))
    for mesh in _meshes(slice_) if meshes == "auto" else meshes:
        mesh = dataclasses.replace(mesh, num_slices=slice_.num_slices)
        for found in _by_microbatches(dataclasses.replace(config, mesh=mesh), slice_):
            for model in models:
                whole = dataclasses.replace(found.config, model=model)
                yield dataclasses.replace(found, config=whole)


def _sized(config: Config, batch: int | None, length: int | None) -> Config:
    data, train = config.data, config.train
    data = dataclasses.replace(data, length=length or data.length)
    train = dataclasses.replace(
        train, global_batch_size=batch or train.global_batch_size, accumulation_steps=1
    )
    return resolve(dataclasses.replace(config, data=data, train=train))


def _meshes(slice_: Slice) -> Iterator[MeshConfig]:
    one = (1,) * len(AXES)
    for sizes in mesh_sizes(slice_.num_devices) if slice_.num_devices > 1 else [one]:
        yield MeshConfig(**dict(zip(AXES, sizes, strict=True)))


def _by_microbatches(config: Config, slice_: Slice) -> Iterator[Candidate]:
    """Yield a mesh with 1, 2, 4, ... microbatches; of a pipeline, as many as stages and more."""
    stages = getattr(config.mesh, STAGE_AXIS)
    # `resolve` has seen all that does not depend on the mesh.
    most = config.train.global_batch_size if stages == 1 else stages * MOST_TURNS
    parts = stages
    while parts <= most and config.train.global_batch_size % parts == 0:
        train = dataclasses.replace(config.train, accumulation_steps=parts)
        try:
            yield candidate(dataclasses.replace(config, train=train), slice_)
        except ConfigError:
            # With more microbatches the rows of each only get fewer.
            return
        parts *= 2
