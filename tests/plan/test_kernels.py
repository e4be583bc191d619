"""The stated model of splash attention, against blocks and units counted by hand."""

import dataclasses

import numpy as np
import pytest

from jaxscale.config import ConfigError
from jaxscale.hardware import CHIPS
from jaxscale.plan.kernels import Attention, kernel_seconds
from jaxscale.plan.schedule import Kernel
from jaxscale.plan.shares import VECTOR_OPS_PER_SCORE, Shares

WHOLE = Shares(matmul=1, vector=1, hbm=1, ici=1, dcn=1)
B, N, H = 2, 4, 128


def kernel(
    name: str, ending: str, L: int, S: int, *, block: int = 512, head_dim: int = H
) -> Kernel:
    """Return a call with so many queries and keys."""
    shapes = ((B, N, L, head_dim), (B, N, S, head_dim), (B, N, S, head_dim))
    blocks = ((f"block_q{ending}", block), (f"block_kv{ending}", block))
    return Kernel(name, shapes, blocks, hbm_bytes=0, source="")


def blocks_seen(L: int, S: int, block: int, window: int = 0, *, is_causal: bool = True) -> int:
    """Return the pairs in blocks that have any pair to compute, by looking at each pair."""
    queries, keys = np.arange(S - L, S)[:, None], np.arange(S)
    seen = np.ones((L, S), bool)
    if is_causal:
        seen = keys <= queries
    if window:
        seen &= keys > queries - window
    cut = seen.reshape(L // block, block, S // block, block)
    return int(cut.any(axis=(1, 3)).sum()) * block * block


@pytest.mark.parametrize(
    ("name", "ending", "matmuls"),
    [
        ("splash_mha_fwd_segmented_residuals", "", 2),
        ("splash_mha_dq_no_residuals", "_dq", 3),
        ("splash_mha_dkv_no_residuals", "_dkv", 4),
    ],
)
@pytest.mark.parametrize(
    ("L", "S", "window", "is_causal"),
    [(2048, 2048, 0, True), (2048, 2048, 700, True), (1024, 4096, 0, True), (2048, 2048, 0, False)],
)
def test_blocks_that_are_masked_whole_take_no_time(
    name: str, ending: str, matmuls: int, L: int, S: int, window: int, is_causal: bool
) -> None:
    chip = CHIPS["v5e"]
    attention = Attention(S, window, is_causal)
    pairs = B * N * blocks_seen(L, S, 512, window, is_causal=is_causal)
    seconds = kernel_seconds(kernel(name, ending, L, S), attention, chip, WHOLE)
    on_matrix_units = 2 * matmuls * pairs * H / chip.bf16_flops_per_second
    on_vector_units = VECTOR_OPS_PER_SCORE * pairs / chip.vector_ops_per_second
    assert seconds == pytest.approx(max(on_matrix_units, on_vector_units))


def test_heads_fill_a_part_of_a_large_matrix_unit() -> None:
    chip, attention = CHIPS["v6e"], Attention(2048)
    narrow, wide = (
        kernel_seconds(kernel("splash_mha_dkv", "_dkv", 2048, 2048, head_dim=d), attention, chip, s)
        for d, s in ((128, WHOLE), (256, WHOLE))
    )
    # Twice the features in the same time.
    assert narrow == pytest.approx(wide)


def test_two_devices_of_a_chip_share_its_units() -> None:
    chip, attention = CHIPS["tpu7x"], Attention(2048)
    call = kernel("splash_mha_dkv", "_dkv", 2048, 2048, head_dim=256)
    pairs = B * N * blocks_seen(2048, 2048, 512)
    on_matrix_units = 2 * 4 * pairs * 256 / (chip.bf16_flops_per_second / 2)
    on_vector_units = VECTOR_OPS_PER_SCORE * pairs / (chip.vector_ops_per_second / 2)
    expected = max(on_matrix_units, on_vector_units)
    assert kernel_seconds(call, attention, chip, WHOLE) == pytest.approx(expected)


def test_a_batch_of_one_may_have_no_dimension_of_its_own() -> None:
    chip, attention = CHIPS["v5e"], Attention(2048)
    call = kernel("splash_mha_fwd", "", 2048, 2048)
    alone = dataclasses.replace(call, shapes=tuple(shape[1:] for shape in call.shapes))
    one, two = (kernel_seconds(c, attention, chip, WHOLE) for c in (alone, call))
    assert two == pytest.approx(B * one)


def test_a_kernel_without_a_model_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no model of the kernel ragged"):
        kernel_seconds(kernel("ragged", "", 512, 512), Attention(512), CHIPS["v5e"], WHOLE)
