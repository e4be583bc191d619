"""Where a Config comes from and where it goes: config files, overrides, JSON, differences.

A config file is Python with `get_config(arg) -> ml_collections.ConfigDict`; it is named as `FILE`
or `FILE:ARG` and lists only what differs from the defaults. The dataclasses of `config.py` decide
what is a knob and of which type; ml_collections stops here.
"""

import ast
import dataclasses
import difflib
import importlib.util
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jaxscale.config import Config, ConfigError, is_free

# Knobs that there were once and that the config.json of an old run may hold.
REMOVED = frozenset({"data.prefetch_batches", "rules.layers", "train.stop_after_nonfinite"})

# Values of some knobs, by "section.knob".
Settings = tuple[tuple[str, Any], ...]


def load(source: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Read `FILE[:ARG]` and apply overrides such as `("train.steps", "100")`, later ones winning.

    Raises:
      ConfigError: no such file, an unknown key (with the nearest name), or a value of a wrong type.
    """
    config = from_mapping(_run_config_file(source))
    for key, text in overrides:
        config = override(config, key, text)
    return config


def _run_config_file(source: str) -> Mapping[str, Any]:
    name, _, argument = source.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise ConfigError(f"--config={name}: no such file; try --config=configs/lm.py:tiny")
    spec = importlib.util.spec_from_file_location("jaxscale_config_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"--config={name} fails to load: {error!r}") from error
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"--config={name} has no function get_config(arg)")
    try:
        result = get_config(argument) if argument else get_config()
    except (ValueError, KeyError) as error:
        raise ConfigError(f"--config={source}: {error}") from error
    if not hasattr(result, "to_dict"):
        kind = type(result).__name__
        raise ConfigError(f"--config={source}: get_config returns {kind}, not a ConfigDict")
    return typing.cast(Mapping[str, Any], result.to_dict())


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Build a Config from nested mappings; a knob that is absent keeps its default."""
    config = Config()
    for section, knobs in values.items():
        if not isinstance(knobs, Mapping):
            raise ConfigError(f"{section} is not a section; knobs are written SECTION.KNOB")
        for name, value in knobs.items():
            config = _replace(config, f"{section}.{name}", value)
    return config


def from_saved(values: Mapping[str, Any]) -> Config:
    """Build a Config from what `to_mapping` once gave; knobs that are gone since are dropped."""
    return from_mapping(
        {
            section: {k: v for k, v in knobs.items() if f"{section}.{k}" not in REMOVED}
            if isinstance(knobs, Mapping)
            else knobs
            for section, knobs in values.items()
        }
    )


def override(config: Config, key: str, text: str) -> Config:
    """Set one knob, `key` as in "mesh.tensor", from its text on the command line."""
    kind = _knob_type(key)
    return _replace(config, key, _parse(text, kind))


def with_settings(config: Config, settings: Settings) -> Config:
    """Return a config with other values of some knobs, which are taken as they are."""
    for knob, value in settings:
        section, _, name = knob.partition(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def settings_name(settings: Settings) -> str:
    """Return settings like "attention=chunked rules.embed=None"."""
    short = ((knob.removeprefix("model.").removeprefix("train."), v) for knob, v in settings)
    return " ".join(f"{knob}={value}" for knob, value in short)


def to_mapping(config: Config) -> dict[str, dict[str, Any]]:
    """Return the config as nested dicts for JSON; `from_saved` reads them back."""
    mapping = dataclasses.asdict(config)
    return {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in knobs.items()}
        for section, knobs in mapping.items()
    }


def flatten(config: Config) -> dict[str, Any]:
    """Return `{"model.width": 128, ...}`."""
    return {f"{s}.{k}": v for s, knobs in to_mapping(config).items() for k, v in knobs.items()}


@dataclasses.dataclass(frozen=True)
class Change:
    """One knob that differs between two configs."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def changes(old: Config, new: Config, *, only_fixed: bool = False) -> list[Change]:
    """List the knobs that differ; with `only_fixed`, those that a resume must not change."""
    before, after = flatten(old), flatten(new)
    found = [Change(key, before[key], after[key]) for key in after if before[key] != after[key]]
    if only_fixed:
        found = [c for c in found if not is_free(*c.key.split("."))]
    return found


def model_changes(old: Config, new: Config) -> str:
    """Return how the model differs where parameters of one config are read by another, in words."""
    found = [change for change in changes(old, new) if change.key.startswith("model.")]
    return f", though with {'; '.join(map(str, found))}" if found else ""


def _replace(config: Config, key: str, value: Any) -> Config:
    kind = _knob_type(key)
    section, name = key.split(".")
    section_values = getattr(config, section)
    value = _convert(key, value, kind)
    return dataclasses.replace(
        config, **{section: dataclasses.replace(section_values, **{name: value})}
    )


def _knob_type(key: str) -> Any:
    """Return the declared type of a knob, or raise with the nearest right name."""
    section, _, name = key.partition(".")
    sections = {f.name: f.type for f in dataclasses.fields(Config)}
    if section in sections:
        hints = typing.get_type_hints(sections[section])
        if name in hints:
            return hints[name]
    every = list(flatten(Config()))
    close = difflib.get_close_matches(key, every, n=1, cutoff=0.5)
    same_name = [k for k in every if k.split(".")[1] == (name or section)]
    nearest = (same_name or close or [""])[0]
    remedy = f"did you mean {nearest}?" if nearest else f"sections are {', '.join(sections)}"
    raise ConfigError(f"unknown knob {key}; {remedy}")


def _parse(text: str, kind: Any) -> Any:
    """Turn command-line text into a Python value; `_convert` then judges its type."""
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if typing.get_origin(kind) is tuple:
        parts = [part.strip() for part in text.strip("()[]").split(",")]
        element = typing.get_args(kind)[0]
        return tuple(_parse(part.strip("'\""), element) for part in parts if part)
    if isinstance(kind, types.UnionType):
        return None if text in ("None", "none", "") else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _convert(key: str, value: Any, kind: Any) -> Any:
    """Check a value against the knob's type; an int serves as a float, a list as a tuple."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        element = typing.get_args(kind)[0]
        return tuple(_convert(key, item, element) for item in value)
    if isinstance(kind, types.UnionType):
        if value is None or isinstance(value, str):
            return value
    elif kind is bool or not isinstance(value, bool):
        plain = typing.get_origin(kind) is None
        if plain and isinstance(value, kind):
            return value
    raise ConfigError(f"{key}={value!r} has a wrong type; it takes {_type_name(kind)}")


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__}, like 10,12"
    if isinstance(kind, types.UnionType):
        return "str or None"
    return str(kind.__name__)
