"""The techniques that save memory, as data: each a few settings on top of a baseline without any.

`sweep --techniques` takes them by name; docs/sweep.md has the table of what each saves and costs.
"""

import dataclasses
import difflib
from collections.abc import Sequence

from jaxscale.config import Config, ConfigError, RulesConfig
from jaxscale.config_source import Settings
from jaxscale.parallel.mesh import AXES

# The config as it is, without any of the settings below.
AS_CONFIGURED = "as configured"


@dataclasses.dataclass(frozen=True)
class Technique:
    """A named way to save memory.

    Attributes:
      name: of the command line.
      settings: value of each knob, by "section.knob", on top of BASELINE.
      on_devices: whether it needs several.
      platforms: where it means something; empty = everywhere.
      elsewhere: why it means nothing on others.
    """

    name: str
    settings: Settings
    on_devices: bool = False
    platforms: tuple[str, ...] = ()
    elsewhere: str = ""


def _all_devices(knob: str) -> Settings:
    """Return the settings of a mesh with all devices on one axis."""
    return tuple((f"mesh.{axis}", -1 if knob == f"mesh.{axis}" else 1) for axis in AXES)


def _sequence(way: str) -> Settings:
    return (*_all_devices("mesh.sequence"), ("model.sequence_attention", way))


# All of it that a config can do without; its mesh and its update rule stay.
BASELINE: Settings = (
    ("model.attention", "dense"),
    ("model.remat", "none"),
    ("model.remat_every", 1),
    ("model.scan_unroll", 1),
    ("model.compute_dtype", "float32"),
    ("model.param_dtype", "float32"),
    ("train.accumulation_steps", 1),
    ("train.pipeline_rounds", 1),
    ("train.loss_chunk_tokens", 0),
    ("train.loss_scale", 0.0),
    ("train.offload", "none"),
    ("train.gradient_reduce_dtype", "float32"),
    ("optimizer.moment_dtype", "float32"),
)
CHUNKED: Settings = (("model.attention", "chunked"),)
REMAT: Settings = (("model.remat", "full"),)
PARTS: Settings = (("train.accumulation_steps", 4),)
LOSS_CHUNKS: Settings = (("train.loss_chunk_tokens", 1024),)
BFLOAT16: Settings = (("model.compute_dtype", "bfloat16"),)
MOMENTS: Settings = (("optimizer.moment_dtype", "bfloat16"),)
ACCELERATORS = ("gpu", "tpu")
# The names of `model.remat_names` that are cheapest to keep for what they save.
NAMES = ("context", "attention_out")
OFFLOADED = ("context", "offload:gate", "offload:up")

TECHNIQUES = (
    Technique("baseline", ()),
    Technique("chunked", CHUNKED),
    Technique(
        "flash",
        (("model.attention", "flash"),),
        platforms=ACCELERATORS,
        elsewhere="it computes as chunked",
    ),
    Technique("remat-every-2", (*REMAT, ("model.remat_every", 2))),
    Technique("remat-dots", (("model.remat", "dots"),)),
    Technique("remat-names", (("model.remat", "names"), ("model.remat_names", NAMES))),
    Technique("remat-full", REMAT),
    Technique("accumulation", PARTS),
    Technique("loss-chunks", LOSS_CHUNKS),
    Technique("bfloat16", BFLOAT16),
    Technique("bfloat16-moments", MOMENTS),
    Technique("adafactor", (("optimizer.name", "adafactor"),)),
    Technique(
        "offload-activations",
        (("model.remat", "names"), ("model.remat_names", OFFLOADED)),
        platforms=ACCELERATORS,
        elsewhere="host memory is the device's memory",
    ),
    Technique(
        "offload-optimizer",
        (("train.offload", "optimizer"),),
        platforms=ACCELERATORS,
        elsewhere="host memory is the device's memory",
    ),
    Technique("chunked+remat-full", (*CHUNKED, *REMAT)),
    Technique("chunked+remat-full+accumulation", (*CHUNKED, *REMAT, *PARTS)),
    Technique("all-on-one-device", (*CHUNKED, *REMAT, *PARTS, *LOSS_CHUNKS, *BFLOAT16, *MOMENTS)),
    Technique("fully-sharded", _all_devices("mesh.fsdp"), on_devices=True),
    Technique("tensor-parallel", _all_devices("mesh.tensor"), on_devices=True),
    Technique(
        "tensor-parallel+residual",
        (*_all_devices("mesh.tensor"), ("rules.residual_length", RulesConfig().hidden)),
        on_devices=True,
    ),
    Technique("sequence-all-gather", _sequence("all_gather"), on_devices=True),
    Technique("sequence-all-to-all", _sequence("all_to_all"), on_devices=True),
    Technique("sequence-ring", _sequence("ring"), on_devices=True),
    Technique(
        "pipeline",
        (*_all_devices("mesh.stage"), ("train.accumulation_steps", 8)),
        on_devices=True,
    ),
    Technique("sequence-ring+remat-full", (*_sequence("ring"), *REMAT), on_devices=True),
)
BY_NAME = {technique.name: technique for technique in TECHNIQUES}
FIRST = TECHNIQUES[0].name


def chosen(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the names that `--techniques all|none|a,b` asks for, the baseline first.

    Raises:
      ConfigError: there is none of that name.
    """
    names = [name.strip() for text in texts for name in text.split(",")]
    if names in ([], ["none"]):
        return (AS_CONFIGURED,)
    if names == ["all"]:
        return tuple(BY_NAME)
    for name in names:
        if name not in BY_NAME:
            nearest = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"--techniques={name} is no technique; did you mean {nearest}? There are "
                f"{', '.join(BY_NAME)}, and all or none alone"
            )
    return tuple(dict.fromkeys([FIRST, *names]))


def settings_of(name: str) -> Settings:
    """Return all settings of a technique, those of the baseline among them."""
    if name == AS_CONFIGURED:
        return ()
    return tuple(dict((*BASELINE, *BY_NAME[name].settings)).items())


def why_not(name: str, config: Config, *, platform: str, num_devices: int) -> str:
    """Return why a technique means nothing for a config on these devices; empty if it does."""
    technique = BY_NAME.get(name)
    if technique is None:
        return ""
    if technique.on_devices and num_devices == 1:
        return "it needs several devices, and here is one"
    if technique.platforms and platform not in technique.platforms:
        return f"on a {platform} {technique.elsewhere}"
    if dict(technique.settings).get("optimizer.name") == config.optimizer.name:
        return f"the config has optimizer.name={config.optimizer.name} already"
    return ""
