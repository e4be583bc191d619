"""A trained model out of a workdir, for the verbs that read one: evaluate, generate, export."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax

from jaxscale import workdir
from jaxscale.bundle.sampling import Sampling
from jaxscale.checkpoint import Checkpointer
from jaxscale.config import Config, ConfigError, MeshConfig, resolve
from jaxscale.data.ngram import ngram_bits_per_byte
from jaxscale.data.tokenizer import Tokenizer, load_tokenizer
from jaxscale.inference import Generator
from jaxscale.model.decoder import Params
from jaxscale.parallel.mesh import AXES, axis_sizes
from jaxscale.train.evaluate import Evaluation, evaluate
from jaxscale.train.start import open_data
from jaxscale.train.state import Assembly, assemble


@dataclasses.dataclass(frozen=True)
class Trained:
    """Parameters on a mesh, with what they belong to.

    Attributes:
      assembly: the program they were trained with, on this mesh.
      params: the parameters.
      tokenizer: of the data.
      step: steps trained.
      notes: what a person should know, such as another mesh than the config's.
    """

    assembly: Assembly
    params: Params
    tokenizer: Tokenizer
    step: int
    notes: tuple[str, ...] = ()


def open_trained(
    folder: str | os.PathLike[str], config: Config | None = None, *, step: int | None = None
) -> Trained:
    """Load the parameters of a workdir's newest step, or of `step`.

    Args:
      folder: the workdir.
      config: None takes the workdir's own; a mesh that does not fit the devices at hand is then
        replaced by one device.
      step: a step that was saved.

    Raises:
      ConfigError: the folder holds no run, or no such step.
    """
    notes: list[str] = []
    own = config is None
    config = resolve(config or workdir.read_config(folder))
    devices: list[Any] = jax.devices()
    if own and not _fits(config.mesh, len(devices)):
        notes.append(f"the run's mesh does not fit {len(devices)} device(s); using one device")
        config = dataclasses.replace(config, mesh=MeshConfig(**dict.fromkeys(AXES, 1)))
        devices = devices[:1]
    assembly = assemble(config, devices)
    checkpointer = Checkpointer(folder, config.checkpoint, read_only=True)
    step = checkpointer.latest_step() if step is None else step
    if step is None:
        raise ConfigError(f"--workdir={folder} has no checkpoint yet; run jaxscale train first")
    params = checkpointer.restore_params(step, assembly.definition.abstract(assembly.mesh))
    tokenizer = load_tokenizer(config.data.tokenizer)
    return Trained(assembly, params, tokenizer, step, tuple(notes))


def _fits(mesh: MeshConfig, num_devices: int) -> bool:
    try:
        axis_sizes(mesh, num_devices)
    except ConfigError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model beside n-gram models, all in bits per byte on the same held-out windows.

    Attributes:
      step: steps trained.
      evaluation: of the model.
      unigram: bits per byte of token frequencies; None unless asked for.
      bigram: bits per byte of a smoothed bigram model; None unless asked for.
    """

    step: int
    evaluation: Evaluation
    unigram: float | None
    bigram: float | None


def evaluate_trained(
    trained: Trained, *, num_batches: int = 0, baselines: bool = False
) -> Comparison:
    """Score a trained model on the validation windows, and n-gram models beside it.

    Args:
      trained: the model.
      num_batches: batches of train.global_batch_size sequences; 0 = all.
      baselines: also count and score the n-gram models.

    Raises:
      ConfigError: nothing is held apart (data.validation_fraction).
    """
    config = trained.assembly.config
    _, loader = open_data(trained.assembly)
    evaluation = evaluate(trained.assembly, trained.params, loader, num_batches=num_batches)
    scores: list[float | None] = [None, None]
    if baselines:
        scores = [
            ngram_bits_per_byte(loader.cache, config.data, order, num_windows=evaluation.windows)
            for order in (1, 2)
        ]
    return Comparison(trained.step, evaluation, scores[0], scores[1])


def generate_text(trained: Trained, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """Return the continuation of each prompt."""
    tokenizer, assembly = trained.tokenizer, trained.assembly
    generator = Generator(
        assembly.definition, assembly.mesh, num_ids=tokenizer.size, eos_id=tokenizer.eos_id
    )
    tokens = generator.generate(trained.params, [tokenizer.encode(p) for p in prompts], sampling)
    return [tokenizer.decode(row) for row in tokens]
