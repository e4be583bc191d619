"""Cached decode == full forward, on one device and on meshes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.bundle.sampling import Sampling
from jaxscale.config import ConfigError
from jaxscale.inference import Generator
from jaxscale.model.attention.dense import Span
from jaxscale.model.cache import empty_cache
from tests.programs import VARIANTS, VOCAB, assemble_tiny, first_state

PROMPTS = [[1, 2, 3], list(range(40)), [5]]
EOS = VOCAB - 1
# Learned positions end somewhere; here behind what the tests generate.
SHAPES = {
    "llama": {},
    "gpt": {**VARIANTS["gpt"], "max_length": 256},
    # With a window.
    "relu": VARIANTS["relu"],
}


@functools.cache
def generator(mesh: tuple[tuple[str, int], ...] = (), variant: str = "llama") -> Any:
    assembly = assemble_tiny(mesh=dict(mesh), model=SHAPES[variant])
    made = Generator(assembly.definition, assembly.mesh, num_ids=VOCAB, eos_id=EOS)
    return made, first_state(assembly).params


@pytest.mark.parametrize("variant", SHAPES)
def test_cached_decode_equals_full_forward(variant: str) -> None:
    assembly = assemble_tiny(model=SHAPES[variant])
    definition = assembly.definition
    params = jax.device_get(first_state(assembly).params)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 24))
    positions = np.broadcast_to(np.arange(24), (2, 24))

    @jax.jit
    def full(params: Any) -> jax.Array:
        decoder = definition.bind(params)
        return decoder.logits(decoder(tokens, Span(positions))[0])

    @jax.jit
    def step(params: Any, cache: Any, part: jax.Array, start: jax.Array) -> tuple[Any, jax.Array]:
        decoder = definition.bind(params)
        span = Span(start[:, None] + jnp.arange(part.shape[1])[None])
        x, cache = decoder(part, span, cache)
        return cache, decoder.logits(x)

    expected = full(params)
    cache = empty_cache(definition.model, definition.rules, batch=2, slots=32)
    start = np.zeros(2, np.int32)
    pieces = []
    for width in (16, *[1] * 8):
        here = start[0]
        cache, logits = step(params, cache, tokens[:, here : here + width], start)
        pieces.append(logits)
        start = start + width
    found = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("variant", SHAPES)
def test_greedy_generation_follows_the_full_forward(variant: str) -> None:
    made, params = generator(variant=variant)
    found = made.generate(params, PROMPTS, Sampling(temperature=0, max_tokens=20))
    definition, host = made.definition, jax.device_get(params)

    @jax.jit
    def full(params: Any, tokens: jax.Array) -> jax.Array:
        decoder = definition.bind(params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        return decoder.logits(decoder(tokens, Span(positions))[0])

    for prompt, continuation in zip(PROMPTS, found, strict=True):
        whole = np.array([*prompt, *continuation, *[0] * (60 - len(prompt) - len(continuation))])
        best = np.asarray(full(host, whole[None]))[0].argmax(-1)
        expected = best[len(prompt) - 1 : len(prompt) - 1 + 20].tolist()
        stop = expected.index(EOS) if EOS in expected else 20
        assert continuation == expected[:stop]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0, max_tokens=8), Sampling(top_k=20, top_p=0.9, seed=3, max_tokens=8)],
    ids=["greedy", "sampled"],
)
def test_every_mesh_generates_the_same_tokens(sampling: Sampling) -> None:
    made, params = generator()
    expected = made.generate(params, PROMPTS, sampling)
    for mesh in (
        {"data": 2, "tensor": 4},
        {"fsdp": 2, "sequence": 2, "tensor": 2},
        {"stage": 2, "tensor": 2},
    ):
        made, params = generator(tuple(mesh.items()))
        assert made.generate(params, PROMPTS, sampling) == expected


def test_a_circular_pipeline_generates_with_its_layers_in_order() -> None:
    model, sampling = {"num_layers": 4}, Sampling(temperature=0, max_tokens=8)
    train = {"accumulation_steps": 2, "pipeline_rounds": 2}
    found = []
    for mesh in ({}, {"stage": 2}):
        assembly = assemble_tiny(mesh=mesh, model=model, train=train)
        made = Generator(assembly.definition, assembly.mesh, num_ids=VOCAB, eos_id=EOS)
        found.append(made.generate(first_state(assembly).params, PROMPTS, sampling))
    assert found[0] == found[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_generates_alike_whatever_is_beside_it(temperature: float) -> None:
    made, params = generator()
    sampling = Sampling(temperature=temperature, max_tokens=8)
    together = made.generate(params, PROMPTS, sampling)
    for number in range(len(PROMPTS)):
        others = [[9] * (1 + 7 * number)] * number
        assert made.generate(params, [*others, PROMPTS[number]], sampling)[-1] == together[number]


def test_what_cannot_be_generated_is_named() -> None:
    made, params = generator(variant="gpt")
    with pytest.raises(ConfigError, match="a prompt is empty"):
        made.generate(params, [[]], Sampling())
    with pytest.raises(ConfigError, match="model.max_length=256"):
        made.generate(params, [[1]], Sampling(max_tokens=300))
