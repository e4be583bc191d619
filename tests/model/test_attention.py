"""Dense attention against plain numpy, one query at a time."""

import numpy as np
import pytest

from jaxscale.config import RulesConfig
from jaxscale.model.attention.dense import Span, dense_attention, visible
from jaxscale.parallel.sharding import Rules

B, L, N, K, H = 2, 6, 4, 2, 8


def by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray) -> np.ndarray:
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            for i in range(L):
                seen = [j for j in range(i + 1) if segments[b, i] == segments[b, j]]
                scores = np.array([q[b, i, n] @ k[b, j, n * K // N] for j in seen]) / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                values = v[b, seen, n * K // N]
                out[b, i, n] = (weights / weights.sum()) @ values
    return out


@pytest.mark.parametrize("documents", [1, 3])
def test_dense_attention_equals_the_definition(documents: int) -> None:
    random = np.random.default_rng(0)
    q = random.normal(size=(B, L, N, H)).astype(np.float32)
    k, v = random.normal(size=(2, B, L, K, H)).astype(np.float32)
    segments = np.sort(random.integers(0, documents, (B, L)), axis=1)
    span = Span(np.broadcast_to(np.arange(L), (B, L)), segments)
    out = dense_attention(q, k, v, visible(span, span), rules=Rules.make(RulesConfig()))
    np.testing.assert_allclose(out, by_hand(q, k, v, segments), rtol=2e-5, atol=2e-6)
