"""From the knobs as a user gives them to a config that is whole and can be run.

`fill` settles the knobs whose 0 or -1 means "as another knob says", and `validate` checks what can
be checked without devices; every verb calls `resolve` before it does anything.
"""

import dataclasses
import difflib
from typing import Any

from jaxscale.config import (
    MAX_SEED,
    OFFLOAD,
    REMAT_NAMES,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
)

LEAST_EPSILON = 2.0**-126  # the least normal number of float32


def resolve(config: Config) -> Config:
    """Fill in the knobs whose 0 or -1 means "as another knob says", and validate the result.

    Raises:
      ConfigError: a knob is out of its limits or at odds with another.
    """
    config = fill(config)
    validate(config)
    return config


def fill(config: Config, previous: Config | None = None) -> Config:
    """Fill in the knobs whose 0 or -1 means "as another knob says".

    Args:
      config: as the user gave it.
      previous: resolved config of the run that goes on, whose schedule stays as it was.

    Raises:
      ConfigError: a knob is out of its limits.
    """
    _check_limits_of_all(config)
    model, data, train = config.model, config.data, config.train
    if not model.head_dim and model.width % model.num_heads:
        raise ConfigError(
            f"model.num_heads={model.num_heads} does not divide model.width={model.width}; "
            "set model.head_dim"
        )
    model = dataclasses.replace(
        model,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.head_dim or model.width // model.num_heads,
        max_length=model.max_length or data.length,
    )
    chunk = train.loss_chunk_tokens
    train = dataclasses.replace(
        train,
        loss_chunk_tokens=(2048 if model.vocab_size >= 128_000 else 0) if chunk < 0 else chunk,
    )
    spanned = (previous and previous.optimizer.schedule_steps) or train.steps
    optimizer = dataclasses.replace(
        config.optimizer, schedule_steps=config.optimizer.schedule_steps or spanned
    )
    return dataclasses.replace(config, model=model, train=train, optimizer=optimizer)


def validate(config: Config) -> None:
    """Raise ConfigError for the first knob of a filled-in config that is at odds with another."""
    _check_model(config.model, config.data)
    _check_data(config.data)
    _check_loop(config)
    _check_mesh(config.mesh)


def _check_limits_of_all(config: Config) -> None:
    for section in dataclasses.fields(config):
        _check_limits(section.name, getattr(config, section.name))


def _check_limits(section: str, values: Any) -> None:
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        choices, minimum = field.metadata["choices"], field.metadata["minimum"]
        if choices and value not in choices:
            raise ConfigError(
                f"{section}.{field.name}={value!r} is not one of {', '.join(choices)}"
            )
        if minimum is not None and not value >= minimum:
            raise ConfigError(
                f"{section}.{field.name}={value} is too small; the least is {minimum}"
            )


def _check_model(model: ModelConfig, data: DataConfig) -> None:
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide "
            f"model.num_heads={model.num_heads}"
        )
    _check_remat(model)
    if model.positions == "rotary" and model.head_dim % 2:
        raise ConfigError(
            f"model.head_dim={model.head_dim} is odd; rotary positions need pairs of features"
        )
    if model.positions == "learned" and 0 < model.max_length < data.length:
        raise ConfigError(
            f"data.length={data.length} exceeds model.max_length={model.max_length}; "
            "raise model.max_length or use model.positions=rotary"
        )


def _check_remat(model: ModelConfig) -> None:
    for entry in model.remat_names:
        name = entry.removeprefix(OFFLOAD)
        if name not in REMAT_NAMES:
            nearest = difflib.get_close_matches(name, REMAT_NAMES, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"model.remat_names names no activation {entry!r}; did you mean "
                f"{entry.removesuffix(name)}{nearest}? There are {', '.join(REMAT_NAMES)}, and "
                f"{OFFLOAD}NAME"
            )
        if entry != name and name in model.remat_names:
            raise ConfigError(
                f"model.remat_names has both {name} and {entry}; keep it on the device or in host "
                "memory"
            )
    if model.num_layers % model.remat_every:
        raise ConfigError(
            f"model.remat_every={model.remat_every} does not divide "
            f"model.num_layers={model.num_layers}"
        )
    in_parts = 1 < model.scan_unroll < model.num_layers
    if in_parts and (model.remat != "full" or model.remat_every > 1):
        raise ConfigError(
            f"model.scan_unroll={model.scan_unroll} unrolls in parts, which needs "
            "model.remat=full and model.remat_every=1; take 1 or "
            f"model.num_layers={model.num_layers}"
        )


def _check_data(data: DataConfig) -> None:
    if data.window_stride > data.length:
        raise ConfigError(
            f"data.window_stride={data.window_stride} is larger than data.length={data.length}, "
            "which would leave tokens out; lower it, or set 0 for windows side by side"
        )
    if not 0 <= data.validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction={data.validation_fraction} is not in [0, 1)")
    if "://" in data.local_cache_dir:
        raise ConfigError(
            f"data.local_cache_dir={data.local_cache_dir} is not a folder of this host; name one "
            "on a local disk"
        )


def _check_loop(config: Config) -> None:
    train, optimizer, profile = config.train, config.optimizer, config.runtime.profile_steps
    for name in ("beta1", "beta2"):
        if not getattr(optimizer, name) < 1:
            raise ConfigError(f"optimizer.{name}={getattr(optimizer, name)} is not in [0, 1)")
    # A gradient of 0 divided by a root of 0 would be no number.
    if not optimizer.epsilon >= LEAST_EPSILON:
        raise ConfigError(
            f"optimizer.epsilon={optimizer.epsilon} is nothing in float32; take one like 1e-8"
        )
    if not optimizer.decay_fraction <= 1:
        raise ConfigError(
            f"optimizer.decay_fraction={optimizer.decay_fraction} is not in [0, 1], a share of the "
            "schedule"
        )
    if train.loss_scale and config.model.compute_dtype != "float16":
        raise ConfigError(
            f"train.loss_scale={train.loss_scale} scales float16 alone; set it to 0, or "
            f"model.compute_dtype=float16 instead of {config.model.compute_dtype}"
        )
    if train.seed > MAX_SEED:
        raise ConfigError(f"train.seed={train.seed} is too large; the most is {MAX_SEED}")
    if train.global_batch_size % train.accumulation_steps:
        raise ConfigError(
            f"train.accumulation_steps={train.accumulation_steps} does not divide "
            f"train.global_batch_size={train.global_batch_size}"
        )
    if profile and (len(profile) != 2 or profile[0] > profile[1]):
        raise ConfigError(
            f"runtime.profile_steps={profile} is not a first and a last step, like 10,12"
        )


def _check_mesh(mesh: MeshConfig) -> None:
    sizes = {
        f.name: getattr(mesh, f.name) for f in dataclasses.fields(mesh) if f.name != "num_slices"
    }
    if 0 in sizes.values():
        name = next(n for n, size in sizes.items() if size == 0)
        raise ConfigError(f"mesh.{name}=0; use 1 for off or -1 for the rest of the devices")
    rest = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ConfigError(f"{' and '.join(rest)} are both -1; only one axis can take the rest")
