"""The parts of a block: parameters with logical axes, norms, rotary positions, attention, MLP.

Flax NNX modules are containers: each declares its parameters once, with their logical axes, and
computes with them gathered in the compute dtype.
"""

# B batch, L query length, S key length, D width, N heads, K kv heads, H head dim, F hidden

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxscale.config import ModelConfig
from jaxscale.model.attention.attend import attend, attend_to_cache
from jaxscale.model.attention.dense import Operands, Span
from jaxscale.model.cache import Cache, write
from jaxscale.model.contract import contract, device_kind
from jaxscale.parallel.sharding import Axis, Rules

ACTIVATIONS = {
    "silu": jax.nn.silu,
    # By erf, whose one polynomial is quicker than the branches of jax.nn.gelu's erfc.
    "gelu": lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def matrix(
    rngs: nnx.Rngs, model: ModelConfig, shape: dict[Axis, int], *, fan_in: int, scale: float = 1.0
) -> nnx.Param[jax.Array]:
    """Declare a weight, drawn from a normal distribution of variance scale^2 / fan_in.

    Args:
      rngs: the source of randomness.
      model: gives the parameter dtype.
      shape: logical axis -> size, in order.
      fan_in: number of inputs that one output sums.
      scale: factor on the standard deviation.
    """
    values = jax.random.normal(rngs.params(), tuple(shape.values()), jnp.float32)
    values = values * (scale / math.sqrt(fan_in))
    return nnx.Param(values.astype(model.param_dtype), axes=tuple(shape))


def vector(model: ModelConfig, shape: dict[Axis, int], *, value: float) -> nnx.Param[jax.Array]:
    """Declare a bias or a norm's scale, every element equal to `value`."""
    return nnx.Param(jnp.full(tuple(shape.values()), value, model.param_dtype), axes=tuple(shape))


def gathered(param: nnx.Param[jax.Array], rules: Rules, dtype: Any) -> jax.Array:
    """Return a matrix ready for a contraction: in `dtype`, whole along FSDP."""
    axes: tuple[Axis, ...] = param.get_metadata("axes")
    return rules.gather(param[...], axes, dtype)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dimension, computed in float32."""

    def __init__(self, model: ModelConfig, axis: str, size: int) -> None:
        self.model = model
        self.scale = vector(model, {axis: size}, value=1.0)
        biased = model.norm == "layernorm" and model.biases == "all"
        self.bias = vector(model, {axis: size}, value=0.0) if biased else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x over its last dimension; the result has x's dtype."""
        x32 = x.astype(jnp.float32)
        if self.model.norm == "layernorm":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(variance + self.model.norm_epsilon)
        return _biased(x32 * _along(x32, self.scale), self.bias).astype(x.dtype)


def looked_up(
    param: nnx.Param[jax.Array], ids_BL: jax.Array, rules: Rules, dtype: Any
) -> jax.Array:
    """Return the rows of a table for some ids, (B, L, D), in `dtype`."""
    axes: tuple[Axis, ...] = param.get_metadata("axes")
    return rules.lookup(param[...], axes, ids_BL, dtype)


def _along(x: jax.Array, param: nnx.Param[jax.Array]) -> jax.Array:
    """Return a float32 vector with leading dimensions of size 1 that broadcast against x."""
    values = param[...].astype(jnp.float32)
    return values[(None,) * (x.ndim - values.ndim)]


def _biased(x: jax.Array, bias: nnx.Param[jax.Array] | None) -> jax.Array:
    """Add a bias in float32, in which its gradient, a sum over all tokens, then is as well."""
    return x if bias is None else (x.astype(jnp.float32) + _along(x, bias)).astype(x.dtype)


def rotary(
    x_BLNH: jax.Array, positions_BL: jax.Array, model: ModelConfig, *, scale: float = 1.0
) -> jax.Array:
    """Turn pairs of features (i, i + H/2) by angles that grow with the position, and scale them.

    Source: Su et al., RoFormer, arXiv:2104.09864; the pairing is that of Llama's published weights.
    """
    angles_BL1H = (positions_BL[:, :, None] * _frequencies(model)[None, None, :])[:, :, None, :]
    sin, cos = (jnp.tile(f(angles_BL1H), 2) for f in (jnp.sin, jnp.cos))
    turned = x_BLNH.astype(jnp.float32) * cos + _quarter_turn(x_BLNH) * sin
    return (scale * turned).astype(x_BLNH.dtype)


def _quarter_turn(x_BLNH: jax.Array) -> jax.Array:
    """Turn pairs of features (i, i + H/2) by 90 degrees, (a, b) to (-b, a); float32.

    A TPU moves features between its lanes several times faster by a product with a matrix of 0, 1
    and -1, which is exact. Of the two terms of the gradient one is rounded to x's dtype there.
    """
    if not device_kind().startswith("TPU"):
        first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([-second, first], axis=-1)
    H = x_BLNH.shape[-1]
    turn_HH = np.eye(H, k=H // 2) - np.eye(H, k=-H // 2)
    return jnp.einsum(
        "blnh,hg->blng",
        x_BLNH,
        jnp.asarray(turn_HH, x_BLNH.dtype),
        precision=jax.lax.Precision.HIGHEST if x_BLNH.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _frequencies(model: ModelConfig) -> jax.Array:
    """Return the H/2 angular frequencies per token, after `model.rope_scaling`.

    Source of "llama3": the Llama 3.1 release; slow turns are stretched by rope_factor, fast ones
    kept, and those between 1 and 4 turns per original context blended.
    """
    exponents = jnp.arange(0, model.head_dim, 2, dtype=jnp.float32) / model.head_dim
    frequencies = model.rope_theta**-exponents
    if model.rope_scaling == "none":
        return frequencies
    stretched = frequencies / model.rope_factor
    if model.rope_scaling == "linear":
        return stretched
    turns = model.rope_original_length * frequencies / (2 * math.pi)
    kept_share = jnp.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return stretched * (1 - kept_share) + frequencies * kept_share


class Attention(nnx.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, model: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        self.model, self.rules = model, rules
        D, H = model.width, model.head_dim
        queries: dict[Axis, int] = {"heads": model.num_heads, "head_dim": H}
        pairs: dict[Axis, int] = {"kv_heads": model.num_kv_heads, "head_dim": H}
        self.query = matrix(rngs, model, {"embed": D, **queries}, fan_in=D)
        self.key = matrix(rngs, model, {"embed": D, **pairs}, fan_in=D)
        self.value = matrix(rngs, model, {"embed": D, **pairs}, fan_in=D)
        fan_in, scale = model.num_heads * H, (2 * model.num_layers) ** -0.5
        self.out = matrix(rngs, model, {**queries, "embed": D}, fan_in=fan_in, scale=scale)
        biased = model.biases != "none"
        self.query_bias = vector(model, queries, value=0.0) if biased else None
        self.key_bias = vector(model, pairs, value=0.0) if biased else None
        self.value_bias = vector(model, pairs, value=0.0) if biased else None
        self.out_bias = vector(model, {"width": D}, value=0.0) if model.biases == "all" else None
        self.query_norm = Norm(model, "head_dim", H) if model.qk_norm else None
        self.key_norm = Norm(model, "head_dim", H) if model.qk_norm else None

    @jax.named_scope("attention")
    def __call__(
        self, x_BLD: jax.Array, span: Span, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Return the attention output (B, L, D) and the layer's cache with these tokens written."""
        model, rules = self.model, self.rules
        q_BLNH = self._project(x_BLD, self.query, self.query_bias)
        k_BLKH = self._project(x_BLD, self.key, self.key_bias)
        v_BLKH = self._project(x_BLD, self.value, self.value_bias)
        if self.query_norm is not None and self.key_norm is not None:
            q_BLNH, k_BLKH = self.query_norm(q_BLNH), self.key_norm(k_BLKH)
        # Of the scores; here, where it costs no pass over memory.
        scale = model.head_dim**-0.5
        if model.positions == "rotary":
            q_BLNH = rotary(q_BLNH, span.positions_BL, model, scale=scale)
            k_BLKH = rotary(k_BLKH, span.positions_BL, model)
        else:
            q_BLNH = q_BLNH * scale
        q_BLNH = _kept(q_BLNH, "query")
        k_BLKH = _kept(k_BLKH, "key")
        v_BLKH = _kept(v_BLKH, "value")
        if cache is None:
            out_BLNH = attend(Operands(q_BLNH, k_BLKH, v_BLKH, span, span), model, rules)
        else:
            cache = write(cache, k_BLKH, v_BLKH, span.positions_BL[:, 0])
            slots_BS = jnp.broadcast_to(jnp.arange(cache.keys.shape[1]), cache.keys.shape[:2])
            x = Operands(q_BLNH, cache.keys, cache.values, span, Span(slots_BS))
            out_BLNH = attend_to_cache(x, model, rules)
        out_BLD = contract(
            "blnh,nhd->bld",
            out_BLNH,
            gathered(self.out, rules, out_BLNH.dtype),
            spec=rules.spec("batch", "length", "width"),
        )
        out_BLD = rules.place(_biased(out_BLD, self.out_bias), "batch", "residual_length", "width")
        return checkpoint_name(out_BLD, "attention_out"), cache

    def _project(
        self, x_BLD: jax.Array, param: nnx.Param[jax.Array], bias: nnx.Param[jax.Array] | None
    ) -> jax.Array:
        _, heads, head_dim = param.get_metadata("axes")
        out_BLNH = contract(
            "bld,dnh->blnh",
            x_BLD,
            gathered(param, self.rules, x_BLD.dtype),
            spec=self.rules.spec("batch", "length", heads, head_dim),
        )
        return _biased(out_BLNH, bias)


def _kept(x_BLNH: jax.Array, name: str) -> jax.Array:
    """Name an activation for remat, heads before tokens, as kernels read it."""
    return jnp.swapaxes(checkpoint_name(jnp.swapaxes(x_BLNH, 1, 2), name), 1, 2)


class MLP(nnx.Module):
    """Gated (act(gate) * up) or plain (act(up)) feed-forward layer."""

    def __init__(self, model: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        self.model, self.rules = model, rules
        D, F = model.width, model.hidden
        gated, biased = model.mlp == "gated", model.biases == "all"
        self.gate = matrix(rngs, model, {"embed": D, "hidden": F}, fan_in=D) if gated else None
        self.up = matrix(rngs, model, {"embed": D, "hidden": F}, fan_in=D)
        scale = (2 * model.num_layers) ** -0.5
        self.down = matrix(rngs, model, {"hidden": F, "embed": D}, fan_in=F, scale=scale)
        self.gate_bias = vector(model, {"hidden": F}, value=0.0) if biased and gated else None
        self.up_bias = vector(model, {"hidden": F}, value=0.0) if biased else None
        self.down_bias = vector(model, {"width": D}, value=0.0) if biased else None

    @jax.named_scope("mlp")
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Return the MLP's output, (B, L, D), in x's dtype."""
        up_BLF = checkpoint_name(self._expand(x_BLD, self.up, self.up_bias), "up")
        if self.gate is None:
            inner_BLF = self._activate(up_BLF)
        else:
            gate_BLF = checkpoint_name(self._expand(x_BLD, self.gate, self.gate_bias), "gate")
            inner_BLF = self._activate(gate_BLF) * up_BLF
        out_BLD = contract(
            "blf,fd->bld",
            inner_BLF,
            gathered(self.down, self.rules, x_BLD.dtype),
            spec=self.rules.spec("batch", "length", "width"),
        )
        out_BLD = _biased(out_BLD, self.down_bias)
        return self.rules.place(out_BLD, "batch", "residual_length", "width")

    def _activate(self, x_BLF: jax.Array) -> jax.Array:
        """Apply the nonlinearity in float32; the backward pass computes it again from x alone."""
        activation = jax.checkpoint(ACTIVATIONS[self.model.activation], prevent_cse=False)
        return activation(x_BLF.astype(jnp.float32)).astype(x_BLF.dtype)

    def _expand(
        self, x_BLD: jax.Array, param: nnx.Param[jax.Array], bias: nnx.Param[jax.Array] | None
    ) -> jax.Array:
        out_BLF = contract(
            "bld,df->blf",
            x_BLD,
            gathered(param, self.rules, x_BLD.dtype),
            spec=self.rules.spec("batch", "length", "hidden"),
        )
        return _biased(out_BLF, bias)
