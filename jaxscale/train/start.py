"""From a config and a workdir to a run that is ready for its next step: checks, data, state.

Every user's mistake shows here, before anything compiles. `restore.py` knows where the state comes
from.
"""

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxscale import config_source, records, runtime, workdir
from jaxscale.checkpoint import Checkpointer
from jaxscale.config import Config, ConfigError, DataConfig
from jaxscale.data.bpe import bpe_size, vocabulary_size
from jaxscale.data.corpus import open_corpus, prepare_corpus
from jaxscale.data.loader import Loader
from jaxscale.data.mixture import Mixture
from jaxscale.data.prepare import Progress
from jaxscale.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from jaxscale.data.workers import Stop, never
from jaxscale.resolve import fill, validate
from jaxscale.train.restore import (
    Source,
    check_tokenizer,
    find_source,
    first_state,
    make_way,
    optimizer_item,
)
from jaxscale.train.state import Assembly, TrainState, assemble, in_layer_order


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
      notes: what a person should know, such as a damaged checkpoint or how fast data was copied.
    """

    assembly: Assembly
    folder: pathlib.Path
    tokenizer: Tokenizer
    loader: Loader
    checkpointer: Checkpointer
    state: TrainState
    origin: str
    environment: dict[str, Any]
    notes: list[str]


class OpenData(NamedTuple):
    """The tokenizer, the batches for a mesh, and what a person should know of the token caches."""

    tokenizer: Tokenizer
    loader: Loader
    notes: tuple[str, ...]


def open_data(
    assembly: Assembly,
    *,
    origin: str = "",
    progress: Progress | None = None,
    stop: Stop = never,
) -> OpenData:
    """Prepare or find the token caches, and return their tokenizer and batches for this mesh.

    Args:
      assembly: for whose config and mesh.
      origin: workdir of the run that goes on, which keeps the tokenizer that it trained.
      progress: told of the documents prepared.
      stop: asked now and then whether to stop preparing.

    Raises:
      ConfigError: the corpus or the tokenizer cannot be used with this config, or another process
        found other tokens.
      Stopped: `stop` said so.
    """
    config = assembly.config
    check_vocabulary(vocabulary_size(config.data.tokenizer), config.model.vocab_size)
    data = with_own_tokenizer(config.data, origin) if origin else config.data
    prepared = prepare_corpus(data, progress=progress, stop=stop)
    corpus = open_corpus(config.data, prepared)
    loader = Loader(
        corpus,
        config.data,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        sharding=assembly.batch_sharding,
    )
    _check_same_everywhere(corpus, config)
    notes = tuple(note for result in prepared for note in result.notes)
    return OpenData(load_tokenizer(str(corpus.tokenizer_path)), loader, notes)


def _check_same_everywhere(corpus: Mixture, config: Config) -> None:
    """Check that the processes, each on its host's files, found the same tokens."""
    if jax.process_count() == 1:
        return
    own = np.frombuffer(bytes.fromhex(corpus.fingerprint), np.uint32)
    every = np.asarray(multihost_utils.process_allgather(own))
    others = np.flatnonzero((every != every[0]).any(1)).tolist()
    if others:
        raise ConfigError(
            f"data.source={config.data.source} holds other tokens for processes {others} than for "
            "process 0; give all hosts the same files, or one data.cache_dir and corpus to share"
        )


def with_own_tokenizer(data: DataConfig, origin: str | os.PathLike[str]) -> DataConfig:
    """Return a run's data config with the tokenizer that the run trained in place of `bpe:SIZE`.

    It stays the same when the corpus changes.
    """
    if bpe_size(data.tokenizer) is None:
        return data
    return dataclasses.replace(data, tokenizer=os.path.join(origin, records.TOKENIZER_FILE))


def open_run(
    config: Config,
    folder: pathlib.Path,
    *,
    allow_config_change: bool = False,
    progress: Progress | None = None,
    stop: Stop = never,
) -> Run:
    """Check everything, prepare the data, and restore or make the state.

    Args:
      config: as the user gave it, not yet resolved.
      folder: the workdir, which can be written.
      allow_config_change: go on in a workdir whose config differs.
      progress: told of the documents prepared.
      stop: asked now and then whether to stop preparing.

    Raises:
      ConfigError: a user's mistake, or damage that leaves nothing to go on from, in one line.
      Stopped: `stop` said so.
    """
    resolved = resolve_for(config, folder)
    config, origin = resolved.config, resolved.origin
    if resolved.previous and not allow_config_change:
        workdir.check_same_run(resolved.previous, config, origin or folder)
    assembly = assemble(config)
    source = find_source(config, folder)
    _check_steps(source, config)
    tokenizer, loader, data_notes = open_data(assembly, origin=origin, progress=progress, stop=stop)
    if not allow_config_change:
        _check_same_data(source, config, tokenizer, loader)
    check_samples(config)
    environment = runtime.describe()
    state, words = first_state(assembly, source, tokenizer)
    # Last, so that a run that could not start leaves the workdir as it was.
    notes = [*data_notes, *make_way(source)]
    if runtime.is_primary():
        workdir.write_config(folder, config, environment)
        workdir.write_tokenizer(folder, tokenizer.to_json())
    checkpointer = Checkpointer(folder, config.checkpoint)
    return Run(assembly, folder, tokenizer, loader, checkpointer, state, words, environment, notes)


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
    if Checkpointer(folder, config.checkpoint, read_only=True).all_steps():
        return str(folder)
    other = config.checkpoint.restore_from
    if other and workdir.previous_config(other) is None:
        raise ConfigError(f"checkpoint.restore_from={other} holds no run; name a workdir")
    return other


def _check_steps(source: Source | None, config: Config) -> None:
    if source and source.goes_on and source.step > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps} is less than the {source.step} steps that the run "
            f"in {source.folder} has done; raise it, or take a new workdir"
        )


def _check_same_data(
    source: Source | None, config: Config, tokenizer: Tokenizer, loader: Loader
) -> None:
    if source is None or not source.goes_on:
        return
    meta = source.reader.read_meta(source.step)
    remedy = "restore it, or --allow-config-change to go on all the same"
    check_tokenizer(config, tokenizer, meta, source.folder, remedy=remedy)
    if meta["data"] != loader.cache.fingerprint:
        raise ConfigError(
            f"data.source={config.data.source} has changed since the run in {source.folder} began; "
            f"{remedy}"
        )


def check_samples(config: Config) -> None:
    """Check that the text samples of a run can be made.

    Raises:
      ConfigError: there is no prompt.
    """
    if config.train.sample_every and not config.train.sample_prompt:
        raise ConfigError("train.sample_prompt is empty; give it text or set train.sample_every=0")


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
    state = in_layer_order(run.assembly, state)
    return run.checkpointer.save(
        step, params=state.params, optimizer=optimizer_item(state), meta=meta
    )
