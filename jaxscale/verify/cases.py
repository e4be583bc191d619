"""What to check for a config: the meshes that fit it, and the other ways to run it.

A way to run it is a knob that may change when a run resumes, so that no number may depend on it.
Those with choices are found by their metadata: a new choice is checked without a change here.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxscale.config import Config, ConfigError, MeshConfig, is_free
from jaxscale.config_source import Settings, settings_name, with_settings
from jaxscale.parallel.mesh import (
    AXES,
    ONE_DEVICE,
    Sizes,
    axis_sizes,
    mesh_sizes,
    parse_mesh,
)
from jaxscale.resolve import resolve
from jaxscale.train.state import Assembly, assemble
from jaxscale.verify.compare import SGD

# What each device gets at most, so that a mesh takes seconds; more can be asked for.
ROWS_PER_DEVICE, TOKENS_PER_DEVICE = 1, 16
# Sections with knobs that say how to compute, and not what.
SECTIONS = ("model", "mesh", "train")
# A variant runs on the mesh that cuts most of these.
WANTED_CUTS = ("embed", "length", "heads")
MESHES, VARIANTS = "meshes", "variants"

# Knobs that change the numbers, and those of the data and of parts that have no meaning here.
EXACT = (
    ("model.compute_dtype", "float32"),
    ("model.param_dtype", "float32"),
    ("train.gradient_reduce_dtype", "float32"),
    ("train.loss_scale", 0.0),
    ("train.accumulation_steps", 1),
    ("train.pipeline_rounds", 1),
    ("data.window_stride", 0),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asks for.

    Attributes:
      steps: steps on each mesh.
      length: tokens of a sequence; 0 = the config's, but few.
      batch: sequences of a batch; 0 = the config's, but few.
      layers: transformer blocks; 0 = the config's.
      meshes: such as "fsdp=2,tensor=4"; empty = all that fit.
      fewer_devices: whether meshes of fewer devices are checked as well.
      limit: the most meshes.
      only: MESHES, VARIANTS or empty for both.
    """

    steps: int = 3
    length: int = 0
    batch: int = 0
    layers: int = 0
    meshes: tuple[str, ...] = ()
    fewer_devices: bool = False
    limit: int = 40
    only: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to run the config.

    Attributes:
      settings: value of each knob that differs from the config, by "section.knob".
      assembly: its program.
    """

    settings: Settings
    assembly: Assembly

    @property
    def variant(self) -> str:
        """The settings, or nothing where the mesh alone is checked."""
        return settings_name(self.settings)

    @property
    def mesh(self) -> str:
        """The axes larger than 1 and their sizes."""
        shape = self.assembly.mesh.shape
        sizes = " ".join(f"{axis}={size}" for axis, size in shape.items() if size > 1)
        return sizes or "one device"

    @property
    def name(self) -> str:
        """Settings and mesh."""
        return f"{self.variant} on {self.mesh}" if self.settings else self.mesh


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is going to be checked.

    Attributes:
      config: the one that is checked, in float32 and small enough.
      reference: the plainest way to run it, on one device.
      cases: what must equal that.
      num_meshes: meshes that fit, whether checked or not.
      num_refused: meshes that do not fit the config.
      left_out: variants that no mesh fits, each with the reason.
      num_steps: of each case.
    """

    config: Config
    reference: Assembly
    cases: list[Case]
    num_meshes: int
    num_refused: int
    left_out: list[str]
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """Another way to run the config.

    Attributes:
      settings: value of each knob, by "section.knob".
      cut: logical axes that the mesh must cut.
      whole: logical axes that it must not.
    """

    settings: Settings
    cut: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The settings."""
        return settings_name(self.settings)


def make_plan(config: Config, options: Options) -> Plan:
    """Find what to check of a resolved config on the devices at hand.

    Raises:
      ConfigError: there are no meshes to compare, or one that was asked for does not fit.
    """
    devices = jax.devices()
    if len(devices) == 1:
        raise ConfigError("verify compares meshes and here is one device; add --devices=cpu:8")
    if jax.process_count() > 1:
        raise ConfigError("verify works in a single process; unset WORLD_SIZE, or set it to 1")
    config = checkable(config, options, len(devices))
    asked = list(dict.fromkeys(parse_mesh(text, len(devices)) for text in options.meshes))
    every = mesh_sizes(len(devices), fewer=options.fewer_devices)
    tried = asked or list(dict.fromkeys([*_own_mesh(config, len(devices)), *every]))
    fitting, refused = _assemble_all(config, tried)
    if asked and refused:
        raise refused[0]
    if not fitting:
        raise ConfigError(f"no mesh of {len(devices)} devices fits: {refused[0]}")
    cases: list[Case] = []
    left_out: list[str] = []
    if options.only != VARIANTS:
        alone = assemble(dataclasses.replace(config, mesh=ONE_DEVICE), devices[:1])
        cases = [Case((), assembly) for assembly in [alone, *fitting[: options.limit]]]
    if options.only != MESHES:
        fits = {v: fit_variant(v, fitting) for v in variants(config, len(devices))}
        left_out = [f"{v.name}: {reason}" for v, reason in fits.items() if isinstance(reason, str)]
        known = {case.assembly.config for case in cases}
        found = [case for case in fits.values() if isinstance(case, Case)]
        # Of several names for one program the first stays, which says most.
        new: dict[Config, Case] = {}
        for case in found:
            if case.assembly.config not in known:
                new.setdefault(case.assembly.config, case)
        cases += sorted(new.values(), key=lambda case: case.mesh)
    return Plan(
        config=config,
        reference=assemble(plainest(config), devices[:1]),
        cases=cases,
        num_meshes=len(fitting),
        num_refused=len(refused),
        left_out=left_out,
        num_steps=options.steps,
    )


def checkable(config: Config, options: Options, num_devices: int) -> Config:
    """Return a resolved config in float32, with SGD and with a batch that is quick to compute.

    Raises:
      ConfigError: the sizes that were asked for are at odds with the config.
    """
    length = min(config.data.length, TOKENS_PER_DEVICE * num_devices)
    rows = min(config.train.global_batch_size, ROWS_PER_DEVICE * num_devices)
    sizes = {
        "model.num_layers": options.layers or config.model.num_layers,
        "data.length": options.length or length,
        "train.global_batch_size": options.batch or rows,
    }
    small = with_settings(config, (*EXACT, *sizes.items()))
    return resolve(dataclasses.replace(small, optimizer=SGD))


def plainest(config: Config) -> Config:
    """Return the config on one device, with the first choice of each knob that says how to run."""
    plain = [(knob, choices[0]) for knob, choices in free_choices().items()]
    numbers = [("model.scan_unroll", 1), ("train.loss_chunk_tokens", 0)]
    return dataclasses.replace(with_settings(config, (*plain, *numbers)), mesh=ONE_DEVICE)


def free_choices() -> dict[str, tuple[Any, ...]]:
    """Return the values of every knob with choices that says how to compute and not what."""
    found: dict[str, tuple[Any, ...]] = {}
    for section in SECTIONS:
        for field in dataclasses.fields(getattr(Config(), section)):
            choices = (False, True) if isinstance(field.default, bool) else ()
            choices = field.metadata["choices"] or choices
            if choices and is_free(section, field.name):
                found[f"{section}.{field.name}"] = choices
    return found


def _own_mesh(config: Config, num_devices: int) -> Iterator[Sizes]:
    """Yield the config's own mesh, which comes first, if it uses all devices."""
    with contextlib.suppress(ConfigError):
        yield tuple(axis_sizes(config.mesh, num_devices).values())


def _assemble_all(
    config: Config, meshes: Sequence[Sizes]
) -> tuple[list[Assembly], list[ConfigError]]:
    """Return the programs on those meshes that fit, and why the others do not."""
    fitting, refused = [], []
    for sizes in meshes:
        num_devices = math.prod(sizes)
        slices = config.mesh.num_slices if num_devices == jax.device_count() else 1
        mesh = MeshConfig(**dict(zip(AXES, sizes, strict=True)), num_slices=slices)
        try:
            changed = dataclasses.replace(config, mesh=mesh)
            fitting.append(assemble(changed, jax.devices()[:num_devices]))
        except ConfigError as error:
            refused.append(error)
    return fitting, refused


def variants(config: Config, num_devices: int) -> Iterator[Variant]:
    """Yield the ways to run a config other than on another mesh."""
    choices = free_choices()
    attention, crossing = "model.attention", "model.sequence_attention"
    for kind, way in itertools.product(choices[attention], choices.pop(crossing)):
        yield Variant(((attention, kind), (crossing, way)), cut=("length",))
    for kind in choices.pop(attention):
        yield Variant(((attention, kind),), whole=("length",))
    for knob, values in choices.items():
        yield from (Variant(((knob, value),)) for value in values)
    yield Variant((("train.accumulation_steps", 2),))
    rounds = (("train.accumulation_steps", 4), ("train.pipeline_rounds", 2))
    yield Variant(rounds, cut=("layers",))
    tokens = config.train.global_batch_size * config.data.length // num_devices
    yield Variant((("train.loss_chunk_tokens", max(tokens // 4, 1)),))
    yield Variant((("model.scan_unroll", config.model.num_layers),))
    if config.model.num_layers > 2:
        yield Variant((("model.scan_unroll", 2), ("model.remat", "full")))
    rules = config.rules
    yield Variant((("rules.embed", None),))
    if rules.length and rules.hidden:
        residual = f"{rules.length},{rules.hidden}"
        yield Variant((("rules.residual_length", residual),), cut=("length", "hidden"))


def fit_variant(variant: Variant, meshes: Sequence[Assembly]) -> Case | str:
    """Return the variant on the mesh that suits it best, or why it fits none."""
    reason = "no mesh cuts " + ", ".join(variant.cut) if variant.cut else "no mesh suits it"
    for on_mesh in sorted(meshes, key=_cuts, reverse=True):
        rules, mesh = on_mesh.rules, on_mesh.mesh
        parts = {axis: rules.num_shards(axis, mesh) for axis in (*variant.cut, *variant.whole)}
        if any(parts[axis] == 1 for axis in variant.cut):
            continue
        if any(parts[axis] > 1 for axis in variant.whole):
            continue
        try:
            config = resolve(with_settings(on_mesh.config, variant.settings))
            assembly = assemble(config, list(mesh.devices.flat))
        except ConfigError as error:
            reason = str(error)
            continue
        return Case(variant.settings, assembly)
    return reason


def _cuts(assembly: Assembly) -> int:
    """Return how many of the axes that variants work on this mesh cuts."""
    rules, mesh = assembly.rules, assembly.mesh
    return sum(rules.num_shards(axis, mesh) > 1 for axis in WANTED_CUTS)
