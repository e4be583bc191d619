"""Cross entropy against its definition, and in chunks."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxscale.config import RulesConfig
from jaxscale.model import loss as loss_module
from jaxscale.model.attention.dense import Span
from jaxscale.model.loss import loss_sum, token_losses
from jaxscale.parallel.sharding import Rules
from tests.programs import BATCH, LENGTH, assemble_tiny, first_state, host_batch


def test_token_losses_are_minus_log_probabilities() -> None:
    random = np.random.default_rng(0)
    logits = (50 * random.normal(size=(2, 3, 7))).astype(np.float32)
    targets = random.integers(0, 7, (2, 3))
    wide = logits.astype(np.float64)
    expected = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    expected -= np.take_along_axis(wide, targets[..., None], -1)[..., 0]
    found = token_losses(logits, targets, Rules.make(RulesConfig()))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 16, 24, 1000])
def test_chunks_change_neither_value_nor_count(
    chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = assemble_tiny()
    batch, shapes = host_batch(0), []
    plain = loss_module.token_losses

    def spy(logits: Any, targets: Any, rules: Rules) -> jax.Array:
        shapes.append(logits.shape)
        return plain(logits, targets, rules)

    monkeypatch.setattr(loss_module, "token_losses", spy)

    def total(params: Any, chunk_tokens: int) -> jax.Array:
        decoder = assembly.definition.bind(params)
        positions = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
        x, _ = decoder(batch["tokens"], Span(positions, batch["segments"]))
        return loss_sum(decoder, x, batch["targets"], batch["weights"], chunk_tokens=chunk_tokens)

    params = jax.device_get(first_state(assembly).params)
    expected = jax.jit(total, static_argnums=1)(params, 0)
    found = jax.jit(total, static_argnums=1)(params, chunk_tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # A row is the least that a chunk of the length can be cut to: 8 rows of one token.
    assert shapes[-1][0] * shapes[-1][1] <= max(chunk_tokens, BATCH)
