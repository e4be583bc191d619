"""Text from the live model: prefill of a batch of prompts, then cached decode, on any mesh.

Prompts are padded to a bucket, so that few shapes are compiled; several decode steps run in each
dispatch. Used by `generate` and by the samples during training.
"""

# B batch, L prompt bucket, V vocab

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxscale.bundle.sampling import NEVER, Sampling, choose
from jaxscale.config import ConfigError
from jaxscale.model.attention.dense import Span
from jaxscale.model.cache import Cache, empty_cache
from jaxscale.model.decoder import Definition, Params

STEPS_PER_DISPATCH = 32
SMALLEST_BUCKET = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Where a batch of sequences stands while it is decoded.

    Attributes:
      tokens_B: the newest token of each row, not yet in the cache.
      positions_B: its position.
      cache: keys and values of all tokens before it.
    """

    tokens_B: jax.Array
    positions_B: jax.Array
    cache: Cache


class Generator:
    """Generates tokens with a decoder's parameters, wherever these lie."""

    def __init__(self, definition: Definition, mesh: Mesh, *, num_ids: int, eos_id: int) -> None:
        """Prepare the programs.

        Args:
          definition: the decoder.
          mesh: where the parameters lie; the batch is repeated over its batch axes.
          num_ids: size of the tokenizer; padded rows of the vocabulary are never chosen.
          eos_id: the token that ends a sequence.
        """
        self.definition = definition.with_rules(definition.rules.without_batch())
        self.mesh, self.num_ids, self.eos_id = mesh, num_ids, eos_id
        self._prefill = jax.jit(self._prefill_program, static_argnums=(3, 4))
        self._decode = jax.jit(self._decode_program, static_argnums=2, donate_argnums=1)

    def generate(
        self, params: Params, prompts: Sequence[Sequence[int] | np.ndarray], sampling: Sampling
    ) -> list[list[int]]:
        """Return the new tokens of each prompt, up to and without the end-of-text token.

        The number of a prompt in the batch is that of its request: it decides, with the seed, what
        is drawn for it.

        Raises:
          ConfigError: an empty prompt, or one that leaves a learned-position model no room.
        """
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths, default=0) == 0:
            raise ConfigError("a prompt is empty; give it at least one character")
        model = self.definition.model
        slots = max(lengths) + sampling.max_tokens
        if model.positions == "learned" and slots > model.max_length:
            raise ConfigError(
                f"prompt and max_tokens need {slots} positions, but "
                f"model.max_length={model.max_length}"
            )
        slots = -(-slots // SMALLEST_BUCKET) * SMALLEST_BUCKET + STEPS_PER_DISPATCH
        bucket = max(SMALLEST_BUCKET, 1 << (max(lengths) - 1).bit_length())
        tokens_BL = np.zeros((len(prompts), min(bucket, slots)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BL[row, : len(prompt)] = prompt
        with jax.set_mesh(self.mesh):
            decoding = self._prefill(params, tokens_BL, np.asarray(lengths), slots, sampling)
            chosen = [np.asarray(decoding.tokens_B)[None]]
            while sum(map(len, chosen)) < sampling.max_tokens and not self._all_ended(chosen):
                decoding, tokens_TB = self._decode(params, decoding, sampling)
                chosen.append(np.asarray(tokens_TB))
        new_BT = np.concatenate(chosen).T[:, : sampling.max_tokens]
        return [self._until_end(row) for row in new_BT.tolist()]

    def _all_ended(self, chosen: list[np.ndarray]) -> bool:
        return bool((np.concatenate(chosen) == self.eos_id).any(axis=0).all())

    def _until_end(self, tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(self.eos_id)] if self.eos_id in tokens else tokens

    def _prefill_program(
        self, params: Params, tokens_BL: Any, lengths_B: Any, slots: int, sampling: Sampling
    ) -> Decoding:
        definition = self.definition
        B, L = tokens_BL.shape
        decoder = definition.bind(params)
        empty = empty_cache(definition.model, definition.rules, batch=B, slots=slots)
        positions_BL = jax.lax.broadcasted_iota(jnp.int32, (B, L), 1)
        x_BLD, cache = decoder(tokens_BL, Span(positions_BL), empty)
        assert cache is not None
        last_BL1 = (positions_BL == lengths_B[:, None] - 1)[:, :, None]
        x_B1D = jnp.sum(jnp.where(last_BL1, x_BLD, 0), axis=1, keepdims=True)
        lengths_B = jnp.asarray(lengths_B, jnp.int32)
        return Decoding(self._choose(decoder, x_B1D, lengths_B, sampling), lengths_B, cache)

    def _decode_program(
        self, params: Params, decoding: Decoding, sampling: Sampling
    ) -> tuple[Decoding, jax.Array]:
        decoder = self.definition.bind(params)

        def step(decoding: Decoding, _: None) -> tuple[Decoding, jax.Array]:
            positions_B1 = decoding.positions_B[:, None]
            x_B1D, cache = decoder(decoding.tokens_B[:, None], Span(positions_B1), decoding.cache)
            assert cache is not None
            positions_B = decoding.positions_B + 1
            tokens_B = self._choose(decoder, x_B1D, positions_B, sampling)
            return Decoding(tokens_B, positions_B, cache), tokens_B

        return jax.lax.scan(step, decoding, length=STEPS_PER_DISPATCH)

    def _choose(
        self, decoder: Any, x_B1D: jax.Array, positions_B: jax.Array, sampling: Sampling
    ) -> jax.Array:
        logits_B1V = decoder.logits(x_B1D)
        logits_BV = self.definition.rules.place(logits_B1V, None, None, None)[:, 0]
        logits_BV = jnp.where(
            jnp.arange(logits_BV.shape[1])[None, :] < self.num_ids, logits_BV, NEVER
        )
        return choose(logits_BV, positions_B, jnp.arange(logits_BV.shape[0]), sampling)
