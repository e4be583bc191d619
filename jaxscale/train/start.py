"""From a config and a workdir to a run that is ready for its next step: checks, data, state.

Every user's mistake shows here, before anything compiles. The state comes from the first of: this
workdir's newest checkpoint; `checkpoint.restore_from`; `checkpoint.init_from` (parameters alone);
nothing.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale import config_source, records, runtime, workdir
from jaxscale.checkpoint import Checkpointer
from jaxscale.config import Config, ConfigError
from jaxscale.data.loader import Loader
from jaxscale.data.prepare import Progress, prepare
from jaxscale.data.token_cache import TokenCache
from jaxscale.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from jaxscale.resolve import fill, validate
from jaxscale.train.state import Assembly, TrainState, abstract_state, assemble, init_state


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before its next step.

    Attributes:
      assembly: the training program, on its mesh.
      folder: the workdir.
      tokenizer: of the data.
      loader: gives batches.
      checkpointer: of the workdir.
      state: to go on from.
      origin: where the state came from, in words.
      environment: versions, devices and host.
    """

    assembly: Assembly
    folder: pathlib.Path
    tokenizer: Tokenizer
    loader: Loader
    checkpointer: Checkpointer
    state: TrainState
    origin: str
    environment: dict[str, Any]


def open_data(assembly: Assembly, progress: Progress | None = None) -> tuple[Tokenizer, Loader]:
    """Prepare or find the token cache, and return its tokenizer and batches for this mesh.

    Raises:
      ConfigError: the corpus or the tokenizer cannot be used with this config.
    """
    config = assembly.config
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(tokenizer, config.model.vocab_size)
    loader = Loader(
        TokenCache(prepare(config.data, progress=progress).path),
        config.data,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        sharding=assembly.batch_sharding,
    )
    return tokenizer, loader


def open_run(
    config: Config,
    folder: pathlib.Path,
    *,
    allow_config_change: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Check everything, prepare the data, and restore or make the state.

    Args:
      config: as the user gave it, not yet resolved.
      folder: the workdir, which can be written.
      allow_config_change: go on in a workdir whose config differs.
      progress: told of the documents prepared.

    Raises:
      ConfigError: a user's mistake, in one line.
    """
    resolved = resolve_for(config, folder)
    config, origin = resolved.config, resolved.origin
    if resolved.previous and not allow_config_change:
        workdir.check_same_run(resolved.previous, config, origin or folder)
    assembly = assemble(config)
    _check_steps(origin, config)
    tokenizer, loader = open_data(assembly, progress)
    if origin and not allow_config_change:
        _check_same_data(origin, config, tokenizer, loader)
    check_samples(config)
    environment = runtime.describe()
    checkpointer = Checkpointer(folder, config.checkpoint)
    with contextlib.ExitStack() as undo:
        undo.enter_context(checkpointer)
        state, words = first_state(assembly, checkpointer, tokenizer)
        # Last, so that a run that could not start leaves the workdir as it was.
        if runtime.is_primary():
            workdir.write_config(folder, config, environment)
        undo.pop_all()
    return Run(assembly, folder, tokenizer, loader, checkpointer, state, words, environment)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A config made ready for a workdir.

    Attributes:
      config: resolved; a run that goes on keeps the span of its schedule.
      origin: workdir of the run that goes on; empty for a new one.
      previous: config of the run that goes on, or that ended in the workdir before its first save.
    """

    config: Config
    origin: str
    previous: Config | None


def resolve_for(config: Config, folder: str | pathlib.Path) -> Resolved:
    """Resolve a config for a run in a workdir.

    Raises:
      ConfigError: a knob is out of its limits or at odds with another.
    """
    origin = _origin(config, folder)
    previous = workdir.read_config(origin) if origin else None
    if previous is None and (pathlib.Path(folder) / records.METRICS_FILE).exists():
        previous = workdir.previous_config(folder)
    config = fill(config, previous)
    if previous and not previous.optimizer.schedule_steps:
        # A run of no steps has set the span of no schedule.
        previous = config_source.override(
            previous, "optimizer.schedule_steps", str(config.optimizer.schedule_steps)
        )
    validate(config)
    return Resolved(config, origin, previous)


def _origin(config: Config, folder: str | pathlib.Path) -> str:
    """Return the workdir of the run that this one goes on with: its own, another, or none."""
    if _reader(folder, config).latest_step() is not None:
        return str(folder)
    other = config.checkpoint.restore_from
    if other and workdir.previous_config(other) is None:
        raise ConfigError(f"checkpoint.restore_from={other} holds no run; name a workdir")
    return other


def _reader(folder: str | pathlib.Path, config: Config) -> Checkpointer:
    return Checkpointer(folder, config.checkpoint, read_only=True)


def _check_steps(origin: str, config: Config) -> None:
    done = _reader(origin, config).latest_step() if origin else None
    if done is not None and done > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps} is less than the {done} steps that the run in "
            f"{origin} has done; raise it, or take a new workdir"
        )


def _check_same_data(origin: str, config: Config, tokenizer: Tokenizer, loader: Loader) -> None:
    reader = _reader(origin, config)
    meta = reader.read_meta(_newest(reader, "checkpoint.restore_from"))
    remedy = "restore it, or --allow-config-change to go on all the same"
    check_tokenizer(config, tokenizer, meta, origin, remedy=remedy)
    if meta["data"] != loader.cache.fingerprint:
        raise ConfigError(
            f"data.source={config.data.source} has changed since the run in {origin} began; "
            f"{remedy}"
        )


def check_tokenizer(
    config: Config,
    tokenizer: Tokenizer,
    meta: Mapping[str, Any],
    origin: str | os.PathLike[str],
    *,
    remedy: str = "restore it",
) -> None:
    """Check that a tokenizer is the one that a checkpoint's model has learnt to read.

    Args:
      config: names the tokenizer.
      tokenizer: of the config.
      meta: of the checkpoint.
      origin: workdir of the checkpoint.
      remedy: what the user can do.

    Raises:
      ConfigError: it is another.
    """
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} is not the tokenizer that the run in {origin} "
            f"began with; {remedy}"
        )


def check_samples(config: Config) -> None:
    """Check that the text samples of a run can be made.

    Raises:
      ConfigError: there is no prompt.
    """
    if config.train.sample_every and not config.train.sample_prompt:
        raise ConfigError("train.sample_prompt is empty; give it text or set train.sample_every=0")


def first_state(
    assembly: Assembly, checkpointer: Checkpointer, tokenizer: Tokenizer
) -> tuple[TrainState, str]:
    """Return the state to start from, and where it came from in words."""
    config = assembly.config.checkpoint
    step = checkpointer.latest_step()
    if step is not None:
        return restore_state(assembly, checkpointer, step), f"checkpoint of step {step}"
    if config.restore_from:
        other = _reader(config.restore_from, assembly.config)
        step = _newest(other, "checkpoint.restore_from")
        return restore_state(assembly, other, step), f"step {step} of {config.restore_from}"
    if config.init_from:
        other = _reader(config.init_from, assembly.config)
        step = _newest(other, "checkpoint.init_from")
        check_tokenizer(assembly.config, tokenizer, other.read_meta(step), config.init_from)
        differences = config_source.model_changes(
            workdir.read_config(config.init_from), assembly.config
        )
        params = other.restore_params(step, assembly.definition.abstract(assembly.mesh))
        words = f"parameters of step {step} of {config.init_from}{differences}"
        return init_state(assembly, params), words
    return init_state(assembly), "new parameters"


def _newest(checkpointer: Checkpointer, knob: str) -> int:
    step = checkpointer.latest_step()
    if step is None:
        raise ConfigError(f"{knob}: no checkpoint in {checkpointer.directory}")
    return step


def restore_state(assembly: Assembly, checkpointer: Checkpointer, step: int) -> TrainState:
    """Read the state of a step onto the assembly's mesh, whatever mesh wrote it."""
    abstract = abstract_state(assembly)
    found = checkpointer.restore(step, params=abstract.params, optimizer=optimizer_item(abstract))
    replicated = NamedSharding(assembly.mesh, PartitionSpec())
    return TrainState(
        step=jax.device_put(jnp.int32(step), replicated),
        params=found.params,
        optimizer=found.optimizer["state"],
        skipped_steps=found.optimizer["skipped_steps"],
        skipped_in_a_row=found.optimizer["skipped_in_a_row"],
    )


def optimizer_item(state: TrainState) -> dict[str, Any]:
    """Return the checkpoint's `optimizer` item: all of the state but step and parameters."""
    return {
        "state": state.optimizer,
        "skipped_steps": state.skipped_steps,
        "skipped_in_a_row": state.skipped_in_a_row,
    }


def save_state(run: Run, state: TrainState, step: int) -> float:
    """Start to save a step; return the seconds that the loop was held up."""
    config = run.assembly.config
    meta = {
        "step": step,
        "seed": config.train.seed,
        "sequences_read": step * config.train.global_batch_size,
        "config": config_source.to_mapping(config),
        "mesh": dict(run.assembly.mesh.shape),
        "environment": run.environment,
        "tokenizer": run.tokenizer.fingerprint,
        "data": run.loader.cache.fingerprint,
    }
    return run.checkpointer.save(
        step, params=state.params, optimizer=optimizer_item(state), meta=meta
    )
