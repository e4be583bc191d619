"""A trained model out of a workdir, for the verbs that read one: evaluate, generate, export."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence

import jax

from jaxscale import config_source, workdir
from jaxscale.bundle.sampling import Sampling
from jaxscale.checkpoint import Checkpointer
from jaxscale.config import Config, ConfigError
from jaxscale.data.ngram import ngram_bits_per_byte
from jaxscale.data.tokenizer import Tokenizer, load_tokenizer
from jaxscale.inference import Generator
from jaxscale.model.decoder import Params
from jaxscale.parallel.mesh import ONE_DEVICE, SPREAD
from jaxscale.resolve import resolve
from jaxscale.train.evaluate import Evaluation, evaluate
from jaxscale.train.restore import check_tokenizer
from jaxscale.train.start import open_data, with_own_tokenizer
from jaxscale.train.state import Assembly, assemble, in_stage_order


@dataclasses.dataclass(frozen=True)
class Trained:
    """Parameters on a mesh, with what they belong to.

    Attributes:
      assembly: the program they were trained with, on this mesh.
      params: the parameters.
      tokenizer: of the data.
      step: steps trained.
      data: fingerprint of the tokens that they were trained on.
      notes: what a person should know, such as another mesh than the config's.
    """

    assembly: Assembly
    params: Params
    tokenizer: Tokenizer
    step: int
    data: str
    notes: tuple[str, ...] = ()


def open_trained(
    folder: str | os.PathLike[str],
    config: Config | None = None,
    *,
    step: int | None = None,
    other_mesh: bool = True,
) -> Trained:
    """Load the parameters of a workdir's newest whole step, or of `step`.

    Args:
      folder: the workdir.
      config: None takes the workdir's own.
      step: a step that was saved.
      other_mesh: where the config's mesh does not fit the devices at hand, take one that does.

    Raises:
      ConfigError: the folder holds no run, or no such step; the step, or each that there is, is
        damaged; another tokenizer than the run's.
    """
    own = workdir.read_config(folder)
    config = resolve(config or own)
    if config.data.tokenizer == own.data.tokenizer:
        config = dataclasses.replace(config, data=with_own_tokenizer(config.data, folder))
    assembly, notes = _assemble(config, other_mesh=other_mesh)
    different = config_source.model_changes(own, config)
    if different:
        notes.append(f"reading the model of {folder}{different}")
    checkpointer = Checkpointer(folder, config.checkpoint, read_only=True)
    if step is None:
        newest = checkpointer.newest()
        if newest is None:
            raise ConfigError(f"--workdir={folder} has no checkpoint yet; run jaxscale train first")
        step = newest.step
        notes.extend(newest.notes())
    meta = checkpointer.read_meta(step)
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_tokenizer(config, tokenizer, meta, folder)
    params = checkpointer.restore_params(step, assembly.definition.abstract(assembly.mesh))
    params = in_stage_order(assembly, params)
    return Trained(assembly, params, tokenizer, step, meta["data"], tuple(notes))


def _assemble(config: Config, *, other_mesh: bool) -> tuple[Assembly, list[str]]:
    """Assemble on the config's mesh, or else on the first of some others that fits."""
    devices = jax.devices()
    try:
        return assemble(config, devices), []
    except ConfigError:
        if not other_mesh:
            raise
        whole_batch = dataclasses.replace(config.rules, batch=None)
        others = [(SPREAD, config.rules, devices), (SPREAD, whole_batch, devices)]
        if jax.process_count() == 1:
            others.append((ONE_DEVICE, config.rules, devices[:1]))
        for mesh, rules, used in others:
            with contextlib.suppress(ConfigError):
                assembly = assemble(dataclasses.replace(config, mesh=mesh, rules=rules), used)
                note = f"the run's mesh does not fit {len(devices)} device(s); using {len(used)}"
                return assembly, [note]
        raise


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model beside n-gram models, all in bits per byte on the same held-out windows.

    Attributes:
      step: steps trained.
      evaluation: of the model.
      unigram: bits per byte of token frequencies; None unless asked for.
      bigram: bits per byte of a smoothed bigram model; None unless asked for.
      same_data: whether the held-out documents belong to the data that the model was trained on.
    """

    step: int
    evaluation: Evaluation
    unigram: float | None
    bigram: float | None
    same_data: bool


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
    loader = open_data(trained.assembly).loader
    evaluation = evaluate(trained.assembly, trained.params, loader, num_batches=num_batches)
    scores: list[float | None] = [None, None]
    if baselines:
        scores = [
            ngram_bits_per_byte(loader.cache, config.data, order, num_windows=evaluation.windows)
            for order in (1, 2)
        ]
    same_data = loader.cache.fingerprint == trained.data
    return Comparison(trained.step, evaluation, scores[0], scores[1], same_data)


def generate_text(trained: Trained, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """Return the continuation of each prompt."""
    tokenizer, assembly = trained.tokenizer, trained.assembly
    generator = Generator(
        assembly.definition, assembly.mesh, num_ids=tokenizer.size, eos_id=tokenizer.eos_id
    )
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    tokens = generator.generate(trained.params, ids, sampling)
    return [tokenizer.continuation(*pair) for pair in zip(ids, tokens, strict=True)]
