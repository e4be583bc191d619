"""Unigram and bigram models of the training tokens: what a trained model has to beat.

Counted on the training split and scored on the very targets of an evaluation, in bits per byte.
Each order is smoothed towards the one below it by a Dirichlet prior (MacKay and Peto, 1995):

    p(b)     = (count(b)    + k1 / V)    / (count of all + k1)
    p(b | a) = (count(a, b) + k2 x p(b)) / (count(a)     + k2)

with the strengths k1 and k2 that fit the last tenth of the training split best, given the rest.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from jaxscale.config import DataConfig
from jaxscale.data.loader import mixed_windows
from jaxscale.data.mixture import Mixture
from jaxscale.data.token_cache import TRAIN, VALIDATION, TokenCache, TokenSplit

STRENGTHS = tuple(float(k) for k in np.geomspace(1e-2, 1e6, 33))
HELD_OUT_SHARE = 0.1
BLOCK_TOKENS = 2**22
# Blocks whose pairs are held apart before they are added up.
MAX_PARTS = 16


@dataclasses.dataclass(frozen=True)
class Pairs:
    """How often a token follows another: `keys` are previous x V + next, rising."""

    keys: np.ndarray
    counts: np.ndarray
    vocab: int

    @property
    def following(self) -> np.ndarray:
        """Counts of each token as a target, (V,)."""
        return np.bincount(self.keys % self.vocab, self.counts, self.vocab)

    @property
    def preceding(self) -> np.ndarray:
        """Counts of each token as a context, (V,)."""
        return np.bincount(self.keys // self.vocab, self.counts, self.vocab)

    def scaled(self, factor: float) -> "Pairs":
        """Return the pairs with all counts times a factor."""
        return Pairs(self.keys, self.counts * factor, self.vocab)

    def look_up(self, keys: np.ndarray) -> np.ndarray:
        """Return the counts of some keys, 0 for those never seen."""
        if not len(self.keys):
            return np.zeros(len(keys))
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.counts[places], 0)


def ngram_bits_per_byte(
    cache: TokenCache | Mixture, data: DataConfig, order: int, *, num_windows: int = 0
) -> float:
    """Return the bits per byte of an n-gram model on the validation windows.

    Args:
      cache: Train split to count, validation split to score; of a mixture those of all parts, and
        each part's counts are scaled to its weight.
      data: Of it, length, window_stride and document_mask count: they decide which targets have
        weight.
      order: 1 for the unigram, 2 for the bigram model.
      num_windows: Windows to score, from the first on; 0 is all.

    Returns:
      Nats of all weighted targets / ln 2 / `text_bytes` of those windows.
    """
    if order not in (1, 2):
        raise ValueError(f"order={order}; there are unigrams (1) and bigrams (2)")
    mixture = cache if isinstance(cache, Mixture) else Mixture((cache,))
    windows = mixed_windows(mixture, VALIDATION, data)
    windows.check_not_empty()
    num_windows = min(num_windows or len(windows), len(windows))
    vocab = mixture.caches[0].index["vocab_size"]
    count = functools.partial(count_pairs, vocab=vocab, document_mask=data.document_mask)
    first, last = _count_training(mixture, count, vocab)
    scored = _merge(
        [
            count(part.split, 0, part.num_targets(number))
            for part, number in zip(windows.parts, windows.first(num_windows), strict=True)
        ],
        vocab,
    )
    whole = _merge([first, last], vocab)
    k1 = _best(lambda k: _nats(first, last, (k,)))
    strengths: tuple[float, ...] = (k1,)
    if order == 2:
        strengths = k1, _best(lambda k: _nats(first, last, (k1, k)))
    return _nats(whole, scored, strengths) / math.log(2) / windows.text_bytes(num_windows)


def _count_training(
    mixture: Mixture, count: Callable[[TokenSplit, int, int], Pairs], vocab: int
) -> tuple[Pairs, Pairs]:
    """Count the training splits: all but the last tenth of each, and that."""
    splits = [cache.split(TRAIN) for cache in mixture.caches]
    total = sum(split.num_tokens for split in splits)
    first, last = [], []
    for split, weight in zip(splits, mixture.weights, strict=True):
        edge = int(split.num_tokens * (1 - HELD_OUT_SHARE))
        # Parts count as often as they are read, and all together as often as their tokens.
        scale = total * weight / sum(mixture.weights) / split.num_tokens
        first.append(count(split, 0, edge).scaled(scale))
        last.append(count(split, edge, split.num_tokens - 1).scaled(scale))
    return _merge(first, vocab), _merge(last, vocab)


def count_pairs(
    split: TokenSplit, start: int, stop: int, *, vocab: int, document_mask: bool
) -> Pairs:
    """Count the pairs whose first token stands in [start, stop) and whose second has weight."""
    parts = []
    for begin in range(start, stop, BLOCK_TOKENS):
        end = min(stop, begin + BLOCK_TOKENS)
        tokens = split.read(begin, end + 1).astype(np.int64)
        keys = tokens[:-1] * vocab + tokens[1:]
        keys = keys[split.has_weight(begin + 1, end + 1, document_mask=document_mask)]
        keys, counts = np.unique(keys, return_counts=True)
        parts.append(Pairs(keys, counts, vocab))
        if len(parts) == MAX_PARTS:
            parts = [_merge(parts, vocab)]
    return _merge(parts, vocab)


def _merge(parts: list[Pairs], vocab: int) -> Pairs:
    if not parts:
        return Pairs(np.empty(0, np.int64), np.empty(0), vocab)
    keys, places = np.unique(np.concatenate([p.keys for p in parts]), return_inverse=True)
    counts = np.bincount(places, np.concatenate([p.counts for p in parts]), len(keys))
    return Pairs(keys, counts, vocab)


def _nats(fit: Pairs, scored: Pairs, strengths: tuple[float, ...]) -> float:
    """Return the negative log-likelihood of the scored pairs under a model counted on `fit`."""
    k1 = strengths[0]
    seen = fit.following
    unigram = (seen + k1 / fit.vocab) / (seen.sum() + k1)
    previous, following = np.divmod(scored.keys, fit.vocab)
    probability = unigram[following]
    if len(strengths) == 2:
        k2 = strengths[1]
        contexts = fit.preceding[previous]
        probability = (fit.look_up(scored.keys) + k2 * probability) / (contexts + k2)
    return float(-(scored.counts * np.log(probability)).sum())


def _best(nats: Callable[[float], float]) -> float:
    return min(STRENGTHS, key=nats)
