"""Cross entropy, in float32, with a vocabulary that may be sharded.

No gather from the logits: the label's logit is picked by comparison, so each shard of the
vocabulary works alone. With `chunk_tokens`, only that many tokens' logits exist at once on each
device.
"""

# B batch, L query length, D width, V vocab, C chunks

import jax
import jax.numpy as jnp

from jaxscale.model.decoder import Decoder
from jaxscale.parallel.sharding import Rules


def token_losses(logits_BLV: jax.Array, targets_BL: jax.Array, rules: Rules) -> jax.Array:
    """Return -log p(target) of every token, float32 (B, L), in nats."""
    V = logits_BLV.shape[-1]
    spec = rules.spec(None, None, "vocab")
    ids_11V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, V), 2, out_sharding=spec)
    peak_BL1 = jax.lax.stop_gradient(jnp.max(logits_BLV, axis=-1, keepdims=True))
    total_BL = jnp.sum(jnp.exp(logits_BLV - peak_BL1), axis=-1)
    picked_BLV = jnp.where(ids_11V == targets_BL[:, :, None], logits_BLV, 0.0)
    return jnp.log(total_BL) + peak_BL1[:, :, 0] - jnp.sum(picked_BLV, axis=-1)


@jax.named_scope("head")
def loss_sum(
    decoder: Decoder,
    x_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    *,
    chunk_tokens: int = 0,
) -> jax.Array:
    """Return the weighted sum of token losses, a float32 scalar in nats.

    Args:
      decoder: gives the head.
      x_BLD: normalised last hidden states.
      targets_BL: int32 ids.
      weights_BL: float32 weight of each token.
      chunk_tokens: tokens per device whose logits exist at once; 0 = all.
    """
    # Gathered once for all chunks. In float32, so that the chunks' gradients add up in float32.
    head = decoder.head_weights().astype(jnp.float32)

    def of_chunk(x_BLD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
        logits_BLV = decoder.logits(x_BLD, head.astype(x_BLD.dtype))
        losses_BL = token_losses(logits_BLV, targets_BL, decoder.rules)
        return jnp.sum(losses_BL * weights_BL)

    count = _num_chunks(x_BLD, decoder.rules, chunk_tokens)
    if count == 1:
        return of_chunk(x_BLD, targets_BL, weights_BL)

    def add_chunk(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(of_chunk, prevent_cse=False)(*chunk), None

    chunks = tuple(_cut_length(a, count, decoder.rules) for a in (x_BLD, targets_BL, weights_BL))
    return jax.lax.scan(add_chunk, jnp.float32(0), chunks)[0]


def _num_chunks(x_BLD: jax.Array, rules: Rules, chunk_tokens: int) -> int:
    """Return the least number of equal chunks of a device's length that obey `chunk_tokens`."""
    rows = x_BLD.shape[0] // rules.num_shards("batch")
    length = x_BLD.shape[1] // rules.num_shards("length")
    if not chunk_tokens:
        return 1
    fitting = (
        c for c in range(1, length + 1) if length % c == 0 and rows * length <= chunk_tokens * c
    )
    return next(fitting, length)


def _cut_length(a: jax.Array, count: int, rules: Rules) -> jax.Array:
    """Cut (B, L, ...) into (C, B, L/C, ...), each device cutting its own part of the length."""
    B, L, *rest = a.shape
    shards = rules.num_shards("length")
    free = [None] * len(rest)
    apart = rules.spec("batch", "length", None, None, *free)
    joined = rules.spec(None, "batch", "length", *free)
    a = rules.place(a, "batch", "length", *free)
    a = jax.lax.reshape(a, (B, shards, count, L // shards // count, *rest), out_sharding=apart)
    a = jnp.moveaxis(a, 2, 0)
    return jax.lax.reshape(a, (count, B, L // count, *rest), out_sharding=joined)
