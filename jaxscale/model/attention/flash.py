"""Flash attention: the platform's own fused kernel, and `chunked` where there is none that fits.

Splash attention (Pallas) on TPUs, cuDNN on NVIDIA GPUs. What a kernel does not take is computed by
`chunked`, and the reason is said once, so that a config runs anywhere.

Source: jax.experimental.pallas.ops.tpu.splash_attention; jax.nn.dot_product_attention.
"""

# B batch, L query length, S key length, N heads, H head dim

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_info,
)

from jaxscale.model.attention.chunked import chunked_attention
from jaxscale.model.attention.dense import Operands
from jaxscale.model.contract import device_kind

# A TPU's vector lanes: splash attention cuts the length into multiples of so many tokens.
LANES = 128
# Larger blocks of 256 features in float32 do not fit the scoped vector memory of a TPU v5e.
LARGEST_BLOCK = 512
SPLASH_HEAD_DIM = 256
# GPUs before Hopper take no more; cuDNN wants a multiple of 8.
CUDNN_HEAD_DIM = 128


def flash_attention(x: Operands, window: int, rank: Any = None) -> jax.Array:
    """Return softmax(q k) v, (B, L, N, H), in q's dtype, by the platform's kernel.

    Args:
      x: queries, keys, values; the keys stand at 0, 1, ...
      window: tokens that a query sees, itself among them; 0 = all before it.
      rank: which of the equal parts of the length the queries are; None: all of it.
    """
    kind = device_kind()
    attend: Callable[..., jax.Array]
    if kind.startswith("TPU"):
        attend, obstacle = splash_attention, _obstacle_to_splash(x)
    elif kind.startswith("NVIDIA"):
        attend, obstacle = cudnn_attention, _obstacle_to_cudnn(x, rank)
    else:
        attend, obstacle = chunked_attention, f"there is no kernel for device {kind}"
    if obstacle:
        warn_once(f"model.attention=flash computes as chunked here: {obstacle}")
        attend = chunked_attention
    return attend(x, window, rank)


@functools.cache
def warn_once(message: str) -> None:
    """Warn of something, once per process; a step is traced several times."""
    warnings.warn(message, stacklevel=2)


def _obstacle_to_splash(x: Operands) -> str:
    """Return why splash attention cannot compute this; empty if it can."""
    L, H = x.q_BLNH.shape[1], x.q_BLNH.shape[3]
    if x.q_BLNH.dtype == jnp.float16:
        return "TPU kernels take no model.compute_dtype=float16; take bfloat16"
    if L % LANES:
        return f"a device's {L} tokens of data.length are no multiple of {LANES}"
    if H > SPLASH_HEAD_DIM:
        return f"model.head_dim={H} is larger than {SPLASH_HEAD_DIM}"
    return ""


def _obstacle_to_cudnn(x: Operands, rank: Any) -> str:
    """Return why cuDNN cannot compute this; empty if it can."""
    H = x.q_BLNH.shape[3]
    if x.q_BLNH.dtype == jnp.float32:
        return "cuDNN takes no model.compute_dtype=float32; take bfloat16"
    if x.queries.segments_BL is not None:
        return "cuDNN cannot keep documents apart; it can with data.document_mask=False"
    if rank is not None:
        return "cuDNN knows no part of a length; take model.sequence_attention=all_to_all or ring"
    if H % 8 or H > CUDNN_HEAD_DIM:
        return f"model.head_dim={H} is no multiple of 8 up to {CUDNN_HEAD_DIM}"
    return ""


def splash_attention(
    x: Operands, window: int, rank: Any = None, *, interpret: bool = False
) -> jax.Array:
    """Return the attention as `flash_attention` does, by the Pallas kernel for TPUs.

    Inside a shard_map it needs `check_vma=False`. With `interpret` it runs on any device, slowly.
    """
    L, S = x.q_BLNH.shape[1], x.k_BSKH.shape[1]
    kernel = _splash_kernel(S, S // L, x.q_BLNH.shape[2], window, interpret)
    if rank is not None:
        kernel = jax.tree.map(functools.partial(_part, rank=rank, num_parts=S // L), kernel)
    segments = None
    if x.queries.segments_BL is not None and x.keys.segments_BL is not None:
        segments = splash.SegmentIds(x.queries.segments_BL, x.keys.segments_BL)
    operands = (x.q_BLNH, x.k_BSKH, x.v_BSKH)
    out_BNLH: Any = jax.vmap(kernel)(*(jnp.swapaxes(a, 1, 2) for a in operands), segments)
    return jnp.swapaxes(out_BNLH, 1, 2)


@functools.cache
def _splash_kernel(
    length: int, num_parts: int, num_heads: int, window: int, interpret: bool
) -> splash.SplashAttentionKernel:
    """Return the kernel for queries and keys of the whole length, cut into equal parts.

    Kept, for its mask is looked at block by block, in numpy: seconds at 32k.
    """
    part = length // num_parts
    block = next(b for b in range(LARGEST_BLOCK, 0, -LANES) if part % b == 0)
    shape = (length, length)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    heads = masks.MultiHeadMask([mask] * num_heads)
    cut = {"head_shards": 1, "q_seq_shards": num_parts}
    # `make_splash_mha` does the same on the current mesh, whose devices may only be described.
    info, mask_function = mask_info.process_mask(heads, (block, block), **cut)
    info_dkv, _ = mask_info.process_mask_dkv(heads, (block, block), **cut)
    return splash.SplashAttentionKernel(
        info,
        info,
        info_dkv,
        # No fused backward kernel: its memory grows with length^2.
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="context",
        mask_function=mask_function,
        interpret=interpret,
    )


def _part(info: jax.Array, *, rank: Any, num_parts: int) -> jax.Array:
    """Cut an array of the mask, (heads, query blocks, key blocks) or (queries,), by its queries."""
    axis = min(info.ndim - 1, 1)
    size = info.shape[axis] // num_parts
    return jax.lax.dynamic_slice_in_dim(info, rank * size, size, axis)


def cudnn_attention(x: Operands, window: int, rank: Any = None) -> jax.Array:
    """Return the attention as `flash_attention` does, by cuDNN, of whole and single documents."""
    del rank
    out_BLNH = jax.nn.dot_product_attention(
        x.q_BLNH,
        x.k_BSKH,
        x.v_BSKH,
        scale=1.0,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
    return checkpoint_name(out_BLNH, "context")
