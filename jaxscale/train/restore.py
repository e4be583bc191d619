"""Where the state of a run comes from, and the form it has in a checkpoint.

It is the first that exists of: this workdir's newest whole checkpoint; that of
`checkpoint.restore_from`; the parameters alone of `checkpoint.init_from`; new parameters. A damaged
checkpoint is passed over with a note; where nothing else is left, it is an error.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale import config_source, records, workdir
from jaxscale.checkpoint import OPTIMIZER, Checkpointer, Newest, set_aside
from jaxscale.config import Config, ConfigError
from jaxscale.data.tokenizer import Tokenizer
from jaxscale.train.loss_scale import new_loss_scale
from jaxscale.train.state import Assembly, TrainState, abstract_state, in_stage_order, init_state

INIT_FROM = "checkpoint.init_from"
LOSS_SCALE = "loss_scale"


@dataclasses.dataclass(frozen=True)
class Source:
    """A verified checkpoint to start from.

    Attributes:
      folder: workdir that it lies in.
      knob: what named that workdir; empty where it is the run's own.
      reader: reads the checkpoints of that workdir.
      newest: the step to take, and the damaged ones after it.
    """

    folder: str
    knob: str
    reader: Checkpointer
    newest: Newest

    @property
    def step(self) -> int:
        """Steps done."""
        return self.newest.step

    @property
    def goes_on(self) -> bool:
        """Whether the run goes on with all of the state; else it takes the parameters alone."""
        return self.knob != INIT_FROM

    @property
    def words(self) -> str:
        """Where the state comes from."""
        if not self.knob:
            return f"checkpoint of step {self.step}"
        return f"{'' if self.goes_on else 'parameters of '}step {self.step} of {self.folder}"


def find_source(config: Config, folder: str | os.PathLike[str]) -> Source | None:
    """Return the checkpoint that a run in a workdir starts from; None for new parameters.

    Raises:
      ConfigError: a knob names a workdir without a checkpoint; all that there are are damaged.
    """
    knobs = config.checkpoint
    for place, knob in (
        (os.fspath(folder), ""),
        (knobs.restore_from, "checkpoint.restore_from"),
        (knobs.init_from, INIT_FROM),
    ):
        if not place:
            continue
        reader = Checkpointer(place, knobs, read_only=True)
        newest = reader.newest()
        if newest is not None:
            return Source(place, knob, reader, newest)
        if knob:
            raise ConfigError(f"{knob}: no checkpoint in {reader.directory}")
    return None


def make_way(source: Source | None) -> list[str]:
    """Move damaged checkpoints of a run's own workdir aside, and return all notes about damage."""
    if source is None:
        return []
    own = bool(source.newest.damaged) and not source.knob
    return source.newest.notes() + (set_aside(source.folder, source.newest.damaged) if own else [])


def first_state(
    assembly: Assembly, source: Source | None, tokenizer: Tokenizer
) -> tuple[TrainState, str]:
    """Return the state to start from, and where it came from in words.

    Raises:
      ConfigError: the parameters do not fit the model, or learnt another tokenizer.
    """
    if source is None:
        return init_state(assembly), "new parameters"
    if source.goes_on:
        return restore_state(assembly, source.reader, source.step), source.words
    config = assembly.config
    meta = source.reader.read_meta(source.step)
    remedy = f"take data.tokenizer={source.folder}/{records.TOKENIZER_FILE}"
    check_tokenizer(config, tokenizer, meta, source.folder, remedy=remedy)
    differences = config_source.model_changes(workdir.read_config(source.folder), config)
    abstract = assembly.definition.abstract(assembly.mesh)
    params = source.reader.restore_params(source.step, abstract)
    return init_state(assembly, in_stage_order(assembly, params)), f"{source.words}{differences}"


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


def restore_state(assembly: Assembly, reader: Checkpointer, step: int) -> TrainState:
    """Read the state of a step onto the assembly's mesh, whatever mesh wrote it.

    A loss scale that the run had not starts anew, and one that the config has not is dropped: the
    compute dtype has changed.
    """
    abstract = abstract_state(assembly)
    replicated = NamedSharding(assembly.mesh, PartitionSpec())
    new_scale = jax.device_put(new_loss_scale(), replicated)
    item = optimizer_item(dataclasses.replace(abstract, loss_scale=None))
    if reader.holds(step, OPTIMIZER, LOSS_SCALE):
        item[LOSS_SCALE] = new_scale
    found = reader.restore(step, params=abstract.params, optimizer=item)
    scale = found.optimizer.get(LOSS_SCALE, new_scale)
    state = TrainState(
        step=jax.device_put(jnp.int32(step), replicated),
        params=found.params,
        optimizer=found.optimizer["state"],
        skipped_steps=found.optimizer["skipped_steps"],
        skipped_in_a_row=found.optimizer["skipped_in_a_row"],
        loss_scale=None if abstract.loss_scale is None else scale,
    )
    return in_stage_order(assembly, state)


def optimizer_item(state: TrainState) -> dict[str, Any]:
    """Return the checkpoint's `optimizer` item: all of the state but step and parameters."""
    item = {
        "state": state.optimizer,
        "skipped_steps": state.skipped_steps,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
    return item if state.loss_scale is None else {**item, LOSS_SCALE: state.loss_scale}
