"""The n-gram baselines: against a direct count, and on the very targets of an evaluation."""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from jaxscale.config import ConfigError, DataConfig
from jaxscale.data import ngram
from jaxscale.data.loader import Loader
from jaxscale.data.ngram import Pairs, count_pairs, ngram_bits_per_byte
from jaxscale.data.prepare import prepare
from jaxscale.data.token_cache import TokenCache

VOCAB = 257
EOS = 256


def evaluated_pairs(cache: TokenCache, data: DataConfig, num_batches: int) -> list[tuple[int, int]]:
    """Return (token, target) of every weighted position of an evaluation."""
    loader = Loader(cache, data, global_batch_size=4, seed=0)
    pairs: list[tuple[int, int]] = []
    for batch in loader.evaluation_batches(num_batches):
        kept = batch["weights"] > 0
        pairs += zip(batch["tokens"][kept].tolist(), batch["targets"][kept].tolist(), strict=True)
    return pairs


def direct_bits_per_byte(
    train: list[tuple[int, int]], scored: list[tuple[int, int]], strengths: tuple[float, ...]
) -> float:
    """Score pair by pair with dense tables."""
    table = np.zeros((VOCAB, VOCAB))
    for previous, following in train:
        table[previous, following] += 1
    unigram = (table.sum(0) + strengths[0] / VOCAB) / (table.sum() + strengths[0])
    nats = 0.0
    for previous, following in scored:
        p = unigram[following]
        if len(strengths) == 2:
            k = strengths[1]
            p = (table[previous, following] + k * p) / (table[previous].sum() + k)
        nats -= math.log(p)
    num_bytes = sum(following != EOS for _, following in scored)
    return nats / math.log(2) / num_bytes


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("num_batches", [0, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_score_is_of_the_evaluation_targets(
    cache: TokenCache,
    data: DataConfig,
    *,
    order: int,
    mask: bool,
    num_batches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ngram, "STRENGTHS", (3.0,))
    monkeypatch.setattr(ngram, "BLOCK_TOKENS", 1_000)
    data = dataclasses.replace(data, document_mask=mask)
    split = cache.split("train")
    stream = split.read(0, split.num_tokens).tolist()
    train = [pair for pair in itertools.pairwise(stream) if not (mask and pair[0] == EOS)]
    found = ngram_bits_per_byte(cache, data, order, num_windows=4 * num_batches)
    scored = evaluated_pairs(cache, data, num_batches)
    expected = direct_bits_per_byte(train, scored, (3.0,) * order)
    assert found == pytest.approx(expected, rel=1e-9)


def test_counts_leave_out_the_unweighted(cache: TokenCache) -> None:
    split = cache.split("train")
    last = split.num_tokens - 1
    free = count_pairs(split, 0, last, vocab=VOCAB, document_mask=False)
    masked = count_pairs(split, 0, last, vocab=VOCAB, document_mask=True)
    assert free.counts.sum() == last
    assert masked.counts.sum() == last - (split.num_documents - 1)
    assert free.preceding[EOS] == split.num_documents - 1
    assert masked.preceding[EOS] == 0


def test_strengths_are_those_that_fit_held_out_text_best() -> None:
    pairs = Pairs(np.array([0, 1, 4]), np.array([5.0, 2.0, 9.0]), vocab=3)
    np.testing.assert_array_equal(pairs.following, [5, 11, 0])
    np.testing.assert_array_equal(pairs.preceding, [7, 9, 0])
    np.testing.assert_array_equal(pairs.look_up(np.array([4, 0, 7, 2])), [9, 5, 0, 0])
    nothing = ngram._merge([], vocab=3)
    np.testing.assert_array_equal(nothing.look_up(np.array([4, 0])), [0, 0])
    # The best of the grid is next to the minimum.
    assert ngram._best(lambda k: abs(math.log(k / 60))) == pytest.approx(60, rel=0.4)


def test_bigram_beats_unigram_beats_uniform(tmp_path: pathlib.Path) -> None:
    data = DataConfig(source="synthetic", length=256, cache_dir=str(tmp_path))
    cache = TokenCache(prepare(data).path)
    unigram, bigram = (ngram_bits_per_byte(cache, data, order) for order in (1, 2))
    assert 1.0 < bigram < unigram - 0.5 < math.log2(VOCAB) - 3


def test_a_larger_vocabulary_is_scored_per_byte_of_text(
    fresh: DataConfig, train_tokenizer: Callable[[list[str]], str]
) -> None:
    """With whole-split windows the bytes are those of the text, less the first token's share."""
    data = dataclasses.replace(fresh, tokenizer=train_tokenizer(["</s>"]), document_mask=False)
    cache = TokenCache(prepare(data).path)
    split = cache.split("validation")
    data = dataclasses.replace(data, length=split.num_tokens - 1)
    loader = Loader(cache, data, global_batch_size=1, seed=0)
    num_bytes = loader.validation_windows.text_bytes(1)
    assert num_bytes == pytest.approx(split.num_bytes, rel=1e-3)
    assert split.num_bytes > 1.1 * (split.num_tokens - split.num_documents)
    assert 0.5 < ngram_bits_per_byte(cache, data, 2) < ngram_bits_per_byte(cache, data, 1) < 8


def test_mistakes_are_named(cache: TokenCache, data: DataConfig) -> None:
    with pytest.raises(ValueError, match="order=3"):
        ngram_bits_per_byte(cache, data, 3)
    with pytest.raises(ConfigError, match=r"data\.length=\d+ .*validation"):
        ngram_bits_per_byte(cache, dataclasses.replace(data, length=10**7), 1)


def test_few_blocks_of_pairs_are_held_at_once(
    cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At real sizes pairs of all blocks would be many times those that differ."""
    split = cache.split("train")
    count = functools.partial(
        count_pairs, split, 0, split.num_tokens - 1, vocab=VOCAB, document_mask=True
    )
    expected = count()
    merge, held = ngram._merge, []

    def watched(parts: list[Pairs], vocab: int) -> Pairs:
        held.append(len(parts))
        return merge(parts, vocab)

    monkeypatch.setattr(ngram, "_merge", watched)
    monkeypatch.setattr(ngram, "BLOCK_TOKENS", split.num_tokens // 100)
    found = count()
    assert max(held) <= 16
    assert len(held) > 6
    np.testing.assert_array_equal(found.keys, expected.keys)
    np.testing.assert_array_equal(found.counts, expected.counts)
