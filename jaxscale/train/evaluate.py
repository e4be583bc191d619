"""Loss, perplexity and bits per byte on the documents held apart."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.data.loader import Loader
from jaxscale.metrics import perplexity
from jaxscale.model.decoder import Params
from jaxscale.train.state import Assembly, Batch
from jaxscale.train.step import batch_loss, microbatches


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts the validation windows.

    Attributes:
      loss: nats per weighted token.
      perplexity: exp(loss).
      bits_per_byte: bits per byte of the text.
      tokens: weighted tokens scored.
      windows: windows scored.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    windows: int


def compile_evaluation(assembly: Assembly) -> Callable[[Params, Batch], Any]:
    """Return the jitted `(params, batch) -> (sum of losses in nats, sum of weights)`.

    It works a batch off in the parts that training does, and so fits where training fits.
    """
    loss_of = functools.partial(
        batch_loss,
        assembly.definition,
        chunk_tokens=assembly.config.train.loss_chunk_tokens,
        document_mask=assembly.config.data.document_mask,
    )

    @jax.jit
    def score(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        totals = jax.lax.map(lambda part: loss_of(params, part), microbatches(assembly, batch))
        return jnp.sum(totals), jnp.sum(batch["weights"])

    return score


def evaluate(
    assembly: Assembly,
    params: Params,
    loader: Loader,
    *,
    score: Callable[[Params, Batch], Any] | None = None,
    num_batches: int = 0,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score the first `num_batches` validation batches, or all for 0.

    Args:
      assembly: the training program.
      params: the parameters, on the assembly's mesh.
      loader: gives the batches.
      score: from `compile_evaluation`, to compile once for many evaluations.
      num_batches: batches of train.global_batch_size sequences.
      before_batch: called before each; what it raises ends the evaluation.
    """
    score = score or compile_evaluation(assembly)
    nats, tokens = 0.0, 0.0
    pending: list[Any] = []
    batches = loader.evaluation_batches(num_batches)
    with jax.set_mesh(assembly.mesh), contextlib.closing(batches):
        for batch in batches:
            before_batch()
            pending.append(score(params, batch))
            # One batch behind, so that the device always has work.
            if len(pending) > 1:
                nats, tokens = _add(nats, tokens, pending.pop(0))
        for sums in pending:
            nats, tokens = _add(nats, tokens, sums)
    windows = loader.num_evaluation_windows(num_batches)
    loss = nats / max(tokens, 1.0)
    return Evaluation(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=nats / math.log(2) / loader.validation_windows.text_bytes(windows),
        tokens=int(tokens),
        windows=windows,
    )


def _add(nats: float, tokens: float, sums: Any) -> tuple[float, float]:
    return nats + float(sums[0]), tokens + float(sums[1])
