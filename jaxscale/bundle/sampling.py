"""From logits to the next token: temperature, top-k, top-p, one key per request and position.

The key depends on seed, request and position alone, so that the tokens of a request do not depend
on what the other requests of its batch are.
"""

# B batch, V vocab

import dataclasses

import jax
import jax.numpy as jnp

from jaxscale.config import MAX_SEED, ConfigError

NEVER = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: choose among so many most likely tokens; 0 = all.
      top_p: choose among the most likely tokens that together reach this probability.
      seed: seed of the choice.
      max_tokens: new tokens at most.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 128

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its limits."""
        if self.temperature < 0:
            raise ConfigError(
                f"temperature={self.temperature} is negative; 0 means the most likely"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} is negative; 0 means all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is not in (0, 1]")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} is less than 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed={self.seed} is not in [0, {MAX_SEED}]")


def filtered(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the float32 logits, (B, V), after temperature > 0, top-k and top-p; NEVER elsewhere.

    Top-p keeps a token if those before it, most likely first, have not reached top_p: the first is
    always kept (Holtzman et al., arXiv:1904.09751).
    """
    logits_BV = logits_BV.astype(jnp.float32) / sampling.temperature
    V = logits_BV.shape[-1]
    if 0 < sampling.top_k < V:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, NEVER, logits_BV)
    if sampling.top_p < 1:
        order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
        sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
        share_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
        sorted_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, NEVER)
        logits_BV = jnp.put_along_axis(logits_BV, order_BV, sorted_BV, axis=-1, inplace=False)
    return logits_BV


def choose(
    logits_BV: jax.Array, positions_B: jax.Array, requests_B: jax.Array, sampling: Sampling
) -> jax.Array:
    """Return the next token of each row, int32 (B,).

    Args:
      logits_BV: logits of the next token.
      positions_B: position that the token will take in its sequence.
      requests_B: number of the request in each row.
      sampling: how to choose.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    key = jax.random.key(sampling.seed)

    def choose_one(logits_V: jax.Array, position: jax.Array, request: jax.Array) -> jax.Array:
        one = jax.random.fold_in(jax.random.fold_in(key, request), position)
        return jax.random.categorical(one, logits_V)

    chosen_B = jax.vmap(choose_one)(filtered(logits_BV, sampling), positions_B, requests_B)
    return chosen_B.astype(jnp.int32)
