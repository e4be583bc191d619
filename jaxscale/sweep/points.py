"""Which points a sweep has: presets, `--vary KNOB=a,b,c` and their product, for each technique.

No device is touched here: the points run in processes of their own, which want them all.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxscale import config_source, records
from jaxscale.config import CheckpointConfig, Config, ConfigError
from jaxscale.config_source import Settings, with_settings
from jaxscale.parallel.mesh import AXES, mesh_sizes
from jaxscale.resolve import fill, resolve
from jaxscale.sweep.techniques import chosen, settings_of, why_not

PRESETS = LENGTH, BATCH, MESH, PRECISION = "length", "batch", "mesh", "precision"
LENGTH_KNOB, BATCH_KNOB = "data.length", "train.global_batch_size"
# First and last value; each is twice the one before.
RANGES = {LENGTH: (LENGTH_KNOB, 512, 32_768), BATCH: (BATCH_KNOB, 1, 256)}
DTYPES = (
    ("model.param_dtype", ("float32", "bfloat16")),
    ("model.compute_dtype", ("float32", "bfloat16", "float16")),
)
REDUCE_DTYPES = ("train.gradient_reduce_dtype", ("float32", "bfloat16"))
SCALINGS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
UNITS = {"B": 1, **{f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}

# Of the trainings that compare batch sizes.
TOKENS = 2**18

Varied = tuple[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asks for.

    Attributes:
      preset: one of PRESETS, or empty.
      vary: such as "data.length=512,1024"; the points are the product of all.
      first: of the preset's values; 0 = its own.
      last: of them; 0 = its own.
      techniques: such as "all" or "chunked,remat-full"; empty = the config as it is.
      compile_only: whether nothing runs and no time is taken.
      steps: after which the loss is read.
      memory_limit: bytes of a device; 0 = what it has.
      tokens: of the training that compares batch sizes; 0 = none.
      scale_learning_rate: with the batch size: one of SCALINGS.
      tolerance: share by which the validation loss may lie above the lowest.
      timeout: seconds after which a point has failed.
      devices: empty for those at hand, or such as "cpu:8".
      workdir: where rows are kept; empty = nowhere.
      force: whether what the workdir knows is measured again.
    """

    preset: str = ""
    vary: tuple[str, ...] = ()
    first: int = 0
    last: int = 0
    techniques: tuple[str, ...] = ()
    compile_only: bool = False
    steps: int = 3
    memory_limit: int = 0
    tokens: int = 0
    scale_learning_rate: str = "none"
    tolerance: float = 0.01
    timeout: int = 600
    devices: str = ""
    workdir: str = ""
    force: bool = False


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices that the points run on.

    Attributes:
      environment: versions, devices and host.
      platform: "cpu", "gpu" or "tpu".
      num_devices: how many.
      memory_bytes: of the smallest, by its own count; None where it has none, as on a CPU.
    """

    environment: dict[str, Any]
    platform: str
    num_devices: int
    memory_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Point:
    """One way to run the config.

    Attributes:
      key: hash of all that its figures depend on.
      technique: its name.
      settings: of the varied knobs.
      config: resolved; None where it does not apply.
      reason: why it does not.
    """

    key: str
    technique: str
    settings: Settings
    config: Config | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All points of a sweep.

    Attributes:
      config: as given.
      options: as given.
      machine: that the points run on.
      axis: the knob that figures are drawn against; empty where no number varies.
      points: in the order in which they are run.
    """

    config: Config
    options: Options
    machine: Machine
    axis: str
    points: tuple[Point, ...]

    @property
    def limit(self) -> int | None:
        """The memory of a device in bytes: as asked for, else its own; None if nobody knows."""
        return self.options.memory_limit or self.machine.memory_bytes

    @property
    def fake(self) -> bool:
        """Whether the devices are fake, so that no speed means anything."""
        return bool(self.machine.environment["fake_devices"])


def parse_bytes(text: str) -> int:
    """Return the bytes of a text like "2GiB".

    Raises:
      ConfigError: it has no unit, or is no number.
    """
    match = re.fullmatch(r"([\d.]+) ?([A-Za-z]*)", text)
    if match is None or match[1].count(".") > 1 or match[2] not in UNITS:
        raise ConfigError(f"--memory-limit={text} is no size with a unit; write one like 2GiB")
    size = int(float(match[1]) * UNITS[match[2]])
    if size == 0:
        raise ConfigError(f"--memory-limit={text} leaves nothing; write one like 2GiB")
    return size


def make_options(values: Mapping[str, Any]) -> Options:
    """Return the options of a mapping that may hold more, as the command line gives it.

    Raises:
      ConfigError: one of them is wrong, or at odds with another.
    """
    options = {f.name: values.get(f.name, f.default) for f in dataclasses.fields(Options)}
    preset, compile_only = options["preset"], options["compile_only"]
    if options["tokens"] and (compile_only or preset != BATCH):
        raise ConfigError("--tokens trains, which is for `sweep batch` alone; leave it out")
    if options["tokens"] is None:
        options["tokens"] = TOKENS if preset == BATCH and not compile_only else 0
    if not options["tolerance"] >= 0:
        raise ConfigError(f"--tolerance={options['tolerance']} is below 0; try 0.01")
    limit = options["memory_limit"]
    options["memory_limit"] = parse_bytes(limit) if isinstance(limit, str) and limit else 0
    options["workdir"] = options["workdir"] or ""
    lists = {name: tuple(options[name]) for name in ("vary", "techniques")}
    return Options(**{**options, **lists})


def given_values(config: Config, options: Options) -> list[Varied]:
    """Return the values of each knob that --vary names, checked as far as knobs alone go.

    Raises:
      ConfigError: an unknown knob, or a value that it does not take.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for text in options.vary:
        knob, equals, values = text.partition("=")
        if not equals or not values:
            raise ConfigError(f"--vary={text} has no values; write KNOB=a,b,c")
        if knob in found:
            raise ConfigError(f"--vary={text} varies {knob} a second time; list all values once")
        changed = [config_source.override(config, knob, value) for value in values.split(",")]
        for other in changed:
            fill(other)
        found[knob] = tuple(config_source.flatten(other)[knob] for other in changed)
    if options.preset in RANGES and 0 < options.last < options.first:
        raise ConfigError(f"--to={options.last} is below --from={options.first}")
    if (options.first or options.last) and options.preset not in RANGES:
        raise ConfigError("--from and --to are for length and batch; list the values in --vary")
    if not options.preset and not found:
        raise ConfigError(f"nothing varies; name one of {', '.join(PRESETS)}, or add --vary")
    chosen(options.techniques)
    return list(found.items())


def make_plan(config: Config, options: Options, machine: Machine) -> Plan:
    """Return all points of a config as given, on the devices of a machine.

    Raises:
      ConfigError: a knob or value is wrong, or none of the points can be run.
    """
    given = given_values(config, options)
    varied = [*_preset(options, machine, [knob for knob, _ in given]), *given]
    numeric = (k for k, values in varied if len(values) > 1 and type(values[0]) in (int, float))
    axis = RANGES[options.preset][0] if options.preset in RANGES else next(numeric, "")
    sets: list[Settings] = [
        tuple(zip([knob for knob, _ in varied], values, strict=True))
        for values in itertools.product(*(values for _, values in varied))
    ]
    if options.preset == MESH:
        sets = [(*mesh, *rest) for mesh in _meshes(machine.num_devices) for rest in sets]
    if options.preset == LENGTH and config.model.positions == "learned":
        # One model for all lengths.
        longest = max(dict(settings)[LENGTH_KNOB] for settings in sets)
        most = max(longest, config.model.max_length)
        config = with_settings(config, (("model.max_length", most),))
    plan = Plan(config, options, machine, axis, ())
    points = tuple(
        make_point(plan, name, settings) for name in chosen(options.techniques) for settings in sets
    )
    if all(point.config is None for point in points):
        raise ConfigError(f"no point can be run: {points[0].reason}")
    return dataclasses.replace(plan, points=_without_doubles(points))


def _preset(options: Options, machine: Machine, given: Sequence[str]) -> Iterator[Varied]:
    """Yield what a preset varies, but for the knobs that are given."""
    if options.preset in RANGES:
        knob, first, last = RANGES[options.preset]
        first = options.first or min(first, options.last or first)
        last = options.last or max(last, first)
        if knob not in given:
            yield knob, tuple(first << n for n in range((last // first).bit_length()))
    elif options.preset == PRECISION:
        dtypes = (*DTYPES, REDUCE_DTYPES) if machine.num_devices > 1 else DTYPES
        yield from (item for item in dtypes if item[0] not in given)


def _meshes(num_devices: int) -> Iterator[Settings]:
    for sizes in mesh_sizes(num_devices):
        yield tuple((f"mesh.{axis}", size) for axis, size in zip(AXES, sizes, strict=True))


def make_point(plan: Plan, technique: str, settings: Settings) -> Point:
    """Return the point of a technique and values of the varied knobs."""
    machine = plan.machine
    reason = why_not(
        technique, plan.config, platform=machine.platform, num_devices=machine.num_devices
    )
    config = None
    if not reason:
        try:
            # What is varied by name counts, whatever a technique sets.
            config = resolve(with_settings(plan.config, (*settings_of(technique), *settings)))
        except ConfigError as error:
            reason = str(error)
    return Point(_key(plan, config, technique, settings), technique, settings, config, reason)


def _key(plan: Plan, config: Config | None, technique: str, settings: Settings) -> str:
    options, environment = plan.options, plan.machine.environment
    what = {
        "config": config and dataclasses.replace(config, checkpoint=CheckpointConfig()),
        "point": [technique, settings],
        "options": [options.compile_only, options.steps, options.memory_limit, options.tokens],
        "training": [options.tokens and options.scale_learning_rate],
        "machine": [environment[k] for k in ("device_kind", "num_devices", "packages")],
    }
    return hashlib.sha256(json.dumps(records.to_json(what)).encode()).hexdigest()[:16]


def _without_doubles(points: Sequence[Point]) -> tuple[Point, ...]:
    """Let only the first of points with the same config be run."""
    seen: dict[Config, str] = {}
    found = []
    for point in points:
        if point.config is not None:
            first = seen.setdefault(point.config, point.technique)
            if first != point.technique:
                reason = f"it is the same as {first} here"
                point = dataclasses.replace(point, config=None, reason=reason)
        found.append(point)
    return tuple(found)


def training_config(config: Config, plan: Plan) -> Config:
    """Return the config of a training to equal tokens with this batch size.

    The schedule spans the run and its warm-up a tenth of it at most; all batch sizes are scored on
    the windows that the given config's evaluation has.
    """
    batch, own = config.train.global_batch_size, plan.config.train.global_batch_size
    steps = max(1, plan.options.tokens // (batch * config.data.length))
    factor = (batch / own) ** SCALINGS[plan.options.scale_learning_rate]
    windows = config.train.eval_batches * own
    return with_settings(
        config,
        (
            ("train.steps", steps),
            ("train.eval_every", 0),
            ("train.sample_every", 0),
            ("train.eval_batches", -(-windows // batch)),
            ("optimizer.schedule_steps", steps),
            ("optimizer.warmup_steps", min(config.optimizer.warmup_steps, steps // 10)),
            ("optimizer.learning_rate", config.optimizer.learning_rate * factor),
            ("checkpoint.restore_from", ""),
        ),
    )
