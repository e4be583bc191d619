"""Windows that overlap: all weighted in training, and each target scored once in validation."""

import dataclasses
import math

import numpy as np
import pytest

from jaxscale import config_source
from jaxscale.config import Config, ConfigError, DataConfig
from jaxscale.data.loader import Loader, Windows
from jaxscale.data.ngram import ngram_bits_per_byte
from jaxscale.data.token_cache import TokenCache, TokenSplit
from jaxscale.resolve import resolve

EOS = 256


def stream_of(windows: Windows) -> np.ndarray:
    return windows.split.read(0, windows.split.num_tokens)


class Hand(TokenSplit):
    """A stream of ten tokens in two documents, in place of one that is read from files."""

    name = "by hand"
    num_tokens = 10
    num_bytes = 8
    num_documents = 2
    document_starts = np.array([0, 4])
    prompt_tokens = None
    prompt_bytes = 0
    tokens = np.array([10, 11, 12, EOS, 20, 21, 22, 23, 24, EOS], np.int32)

    def __init__(self) -> None:
        pass

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.num_tokens
        return self.tokens[start:stop]


# Length 4 and stride 2: the windows begin at 0, 2 and 4; one at 6 would lack its last target.
TOKENS = [[10, 11, 12, EOS], [12, EOS, 20, 21], [20, 21, 22, 23]]
TARGETS = [[11, 12, EOS, 20], [EOS, 20, 21, 22], [21, 22, 23, 24]]
SEGMENTS = [[1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 1, 1]]
# 20 begins a document. Scored once, the first half of a window was the second half of that before.
WEIGHTS = {
    False: [[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]],
    True: [[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1]],
}
# Weighted targets that are no EOS, in the first windows.
TEXT = {False: [2, 4, 8], True: [2, 4, 6]}


@pytest.mark.parametrize("once", [False, True])
def test_by_hand(once: bool) -> None:
    windows = Windows(Hand(), 4, True, stride=2, once=once)
    assert len(windows) == 3
    assert [windows.num_targets(n) for n in range(4)] == [0, 4, 6, 8]
    for index in range(3):
        window = windows[index]
        assert window["tokens"].tolist() == TOKENS[index]
        assert window["targets"].tolist() == TARGETS[index]
        assert window["segments"].tolist() == SEGMENTS[index]
        assert window["weights"].tolist() == WEIGHTS[once][index]
        assert windows.text_bytes(index + 1) == TEXT[once][index]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(("length", "stride"), [(7, 1), (7, 3), (100, 50), (100, 99), (100, 100)])
def test_each_validation_target_is_scored_once(
    cache: TokenCache, length: int, stride: int, mask: bool
) -> None:
    windows = Windows(cache.split("validation"), length, mask, stride, once=True)
    split, stream = windows.split, stream_of(windows)
    number = min(len(windows), 200)
    scored = np.zeros(split.num_tokens, int)
    num_bytes = 0.0
    for index in range(number):
        window = windows[index]
        start = index * stride
        np.testing.assert_array_equal(window["tokens"], stream[start : start + length])
        np.testing.assert_array_equal(window["targets"], stream[start + 1 : start + length + 1])
        scored[start + 1 : start + length + 1] += window["weights"].astype(int)
        num_bytes += (window["weights"] * (window["targets"] != EOS)).sum()
        assert windows.text_bytes(index + 1) == num_bytes
    stop = windows.num_targets(number)
    assert stop == (number - 1) * stride + length
    expected = np.zeros(split.num_tokens, int)
    expected[1 : stop + 1] = 1
    if mask:
        expected[split.document_starts] = 0
    np.testing.assert_array_equal(scored, expected)


@pytest.mark.parametrize("length", [7, 100, 1_000])
@pytest.mark.parametrize("stride", [1, 5, 7])
def test_no_window_is_missing_and_none_reaches_past_the_end(
    cache: TokenCache, length: int, stride: int
) -> None:
    windows = Windows(cache.split("train"), length, True, stride)
    last = len(windows) - 1
    assert last * stride + length + 1 <= windows.split.num_tokens
    assert (last + 1) * stride + length + 1 > windows.split.num_tokens
    assert windows[last]["weights"].shape == (length,)


def test_training_windows_overlap_and_all_count(cache: TokenCache, data: DataConfig) -> None:
    half = dataclasses.replace(data, window_stride=50)
    loader = Loader(cache, half, global_batch_size=4, seed=0)
    plain = Loader(cache, data, global_batch_size=4, seed=0)
    assert len(loader.windows) == pytest.approx(2 * len(plain.windows), abs=2)
    for index in range(0, 40, 2):
        for name, array in plain.windows[index // 2].items():
            np.testing.assert_array_equal(loader.windows[index][name], array)


def test_a_stride_of_the_length_is_no_stride(cache: TokenCache, data: DataConfig) -> None:
    same = dataclasses.replace(data, window_stride=data.length)
    loaders = [Loader(cache, d, global_batch_size=4, seed=0) for d in (data, same)]
    for batches in zip(*(loader.evaluation_batches() for loader in loaders), strict=True):
        for name in batches[0]:
            np.testing.assert_array_equal(batches[0][name], batches[1][name])


def test_baselines_score_the_same_targets(cache: TokenCache, data: DataConfig) -> None:
    """N-gram models see no context that overlapping windows could add."""
    plain = Windows(cache.split("validation"), data.length, True)
    stop = plain.num_targets(len(plain))
    half = dataclasses.replace(data, window_stride=data.length // 2)
    windows = Windows(plain.split, data.length, True, half.window_stride, once=True)
    (number,) = (n for n in range(len(windows) + 1) if windows.num_targets(n) == stop)
    found = [ngram_bits_per_byte(cache, half, n, num_windows=number) for n in (1, 2)]
    expected = [ngram_bits_per_byte(cache, data, n) for n in (1, 2)]
    assert all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(found, expected, strict=True))


def test_a_stride_that_leaves_tokens_out_is_refused() -> None:
    config = config_source.override(Config(), "data.window_stride", "1025")
    with pytest.raises(ConfigError, match=r"data\.window_stride=1025 is larger than data\.length="):
        resolve(config)
