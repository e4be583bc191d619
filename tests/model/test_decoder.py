"""The whole decoder against a second one, written in plain numpy from the definitions."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from jaxscale.config import ModelConfig
from jaxscale.model.attention.dense import Span
from jaxscale.train.step import batch_loss
from tests.programs import (
    GRADIENT_TOLERANCE_F32,
    LOSS_TOLERANCE_F32,
    VARIANTS,
    VOCAB,
    assemble_tiny,
    host_batch,
    relative_errors,
)

Tree = dict[str, Any]


def in_numpy(model: ModelConfig, params: Tree, tokens: np.ndarray, segments: np.ndarray) -> Any:
    """Return the logits of a batch, (B, L, V)."""
    x = params["embedding"][tokens]
    if model.positions == "learned":
        x = x + params["positions"][: tokens.shape[1]]
    for layer in range(model.num_layers):
        block = jax.tree.map(lambda stacked, n=layer: stacked[n], params["blocks"])
        h = normalise(model, x, block["attention_norm"])
        rows = zip(h, segments, strict=True)
        attended = np.stack([attend(model, *row, block["attention"]) for row in rows])
        if model.block == "parallel":
            x = x + attended + feed_forward(model, h, block["mlp"])
        else:
            x = x + attended
            x = x + feed_forward(model, normalise(model, x, block["mlp_norm"]), block["mlp"])
    x = normalise(model, x, params["norm"])
    return x @ (params["embedding"].T if model.tie_embeddings else params["head"])


def normalise(model: ModelConfig, x: np.ndarray, norm: Tree) -> np.ndarray:
    if model.norm == "layernorm":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon)
    else:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon)
    return x * norm["scale"] + norm.get("bias", 0.0)


def attend(model: ModelConfig, h: np.ndarray, segments: np.ndarray, weights: Tree) -> np.ndarray:
    """Return the attention output of one row, (L, D)."""
    length = len(h)
    parts = {}
    for name in ("query", "key", "value"):
        part = np.tensordot(h, weights[name], 1) + weights.get(f"{name}_bias", 0.0)
        if model.qk_norm and name != "value":
            part = normalise(model, part, weights[f"{name}_norm"])
        if model.positions == "rotary" and name != "value":
            part = turn(model, part)
        parts[name] = part
    out = np.zeros((length, model.num_heads, model.head_dim))
    for head in range(model.num_heads):
        kv_head = head // (model.num_heads // model.num_kv_heads)
        for i in range(length):
            oldest = max(0, i + 1 - (model.attention_window or length))
            seen = [j for j in range(oldest, i + 1) if segments[j] == segments[i]]
            scores = parts["key"][seen, kv_head] @ parts["query"][i, head]
            share = np.exp(scores / math.sqrt(model.head_dim))
            out[i, head] = share / share.sum() @ parts["value"][seen, kv_head]
    return np.tensordot(out, weights["out"], 2) + weights.get("out_bias", 0.0)


def turn(model: ModelConfig, x: np.ndarray) -> np.ndarray:
    """Rotate each pair of features as a complex number."""
    half = model.head_dim // 2
    frequencies = model.rope_theta ** (-2 * np.arange(half) / model.head_dim)
    if model.rope_scaling == "linear":
        frequencies = frequencies / model.rope_factor
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j * np.arange(len(x))[:, None, None] * frequencies
    )
    return np.concatenate([turned.real, turned.imag], axis=-1)


def feed_forward(model: ModelConfig, h: np.ndarray, weights: Tree) -> np.ndarray:
    up = h @ weights["up"] + weights.get("up_bias", 0.0)
    if model.mlp == "gated":
        gate = h @ weights["gate"] + weights.get("gate_bias", 0.0)
        inner = activate(model.activation, gate) * up
    else:
        inner = activate(model.activation, up)
    return inner @ weights["down"] + weights.get("down_bias", 0.0)


def activate(name: str, x: np.ndarray) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def random_params(shapes: Tree, seed: int) -> Tree:
    """Return parameters none of which is trivial: biases are not 0, scales are not 1."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda s: random.normal(0.0, 0.3, s.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_loss_equal_numpy(variant: str) -> None:
    assembly = assemble_tiny(model=VARIANTS[variant])
    definition, batch = assembly.definition, host_batch(0)
    params = random_params(definition.shapes, seed=1)

    @jax.jit
    def compute(params: Tree) -> tuple[jax.Array, jax.Array]:
        decoder = definition.bind(params)
        positions = np.broadcast_to(np.arange(batch["tokens"].shape[1]), batch["tokens"].shape)
        logits = decoder.logits(decoder(batch["tokens"], Span(positions, batch["segments"]))[0])
        return logits, batch_loss(definition, params, batch, chunk_tokens=0)

    logits, loss = compute(params)
    exact = jax.tree.map(lambda a: a.astype(np.float64), params)
    expected = in_numpy(definition.model, exact, batch["tokens"], batch["segments"])
    assert logits.shape[-1] == VOCAB
    assert relative_errors(logits, expected).popitem()[1] < GRADIENT_TOLERANCE_F32
    peak = expected.max(-1, keepdims=True)
    log_probabilities = expected - peak - np.log(np.exp(expected - peak).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probabilities, batch["targets"][..., None], -1)[..., 0]
    assert 0 < batch["weights"].mean() < 1
    total = -(batch["weights"] * picked).sum()
    assert float(loss) == pytest.approx(total, rel=10 * LOSS_TOLERANCE_F32)
