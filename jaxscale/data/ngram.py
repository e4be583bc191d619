"""Unigram and bigram models of the training tokens: what a trained model has to beat.

Counted on the training split and scored on the very targets of an evaluation, in bits per byte.
Each order is smoothed towards the one below it by a Dirichlet prior (MacKay and Peto, 1995):

    p(b)     = (count(b)    + k1 / V)    / (count of all + k1)
    p(b | a) = (count(a, b) + k2 x p(b)) / (count(a)     + k2)

with the strengths k1 and k2 that fit the last tenth of the training split best, given the rest.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from jaxscale.config import DataConfig
from jaxscale.data.loader import make_windows
from jaxscale.data.token_cache import TRAIN, VALIDATION, TokenCache, TokenSplit

STRENGTHS = tuple(float(k) for k in np.geomspace(1e-2, 1e6, 33))
HELD_OUT_SHARE = 0.1
BLOCK_TOKENS = 2**22


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

    def look_up(self, keys: np.ndarray) -> np.ndarray:
        """Return the counts of some keys, 0 for those never seen."""
        if not len(self.keys):
            return np.zeros(len(keys))
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.counts[places], 0)


def ngram_bits_per_byte(
    cache: TokenCache, data: DataConfig, order: int, *, num_windows: int = 0
) -> float:
    """Return the bits per byte of an n-gram model on the validation windows.

    Args:
      cache: Train split to count, validation split to score.
      data: Of it, length, window_stride and document_mask count: they decide which targets have
        weight.
      order: 1 for the unigram, 2 for the bigram model.
      num_windows: Windows to score, from the first on; 0 is all.

    Returns:
      Nats of all weighted targets / ln 2 / `Windows.text_bytes` of those windows.
    """
    if order not in (1, 2):
        raise ValueError(f"order={order}; there are unigrams (1) and bigrams (2)")
    windows = make_windows(cache, VALIDATION, data)
    windows.check_not_empty()
    num_windows = min(num_windows or len(windows), len(windows))
    vocab = cache.index["vocab_size"]
    train = cache.split(TRAIN)
    edge = int(train.num_tokens * (1 - HELD_OUT_SHARE))
    first = count_pairs(train, 0, edge, vocab=vocab, document_mask=data.document_mask)
    last = count_pairs(
        train, edge, train.num_tokens - 1, vocab=vocab, document_mask=data.document_mask
    )
    stop = windows.num_targets(num_windows)
    scored = count_pairs(windows.split, 0, stop, vocab=vocab, document_mask=data.document_mask)
    whole = _merge([first, last], vocab)
    k1 = _best(lambda k: _nats(first, last, (k,)))
    strengths: tuple[float, ...] = (k1,)
    if order == 2:
        strengths = k1, _best(lambda k: _nats(first, last, (k1, k)))
    return _nats(whole, scored, strengths) / math.log(2) / windows.text_bytes(num_windows)


def count_pairs(
    split: TokenSplit, start: int, stop: int, *, vocab: int, document_mask: bool
) -> Pairs:
    """Count the pairs whose first token stands in [start, stop) and whose second has weight."""
    parts = []
    for begin in range(start, stop, BLOCK_TOKENS):
        end = min(stop, begin + BLOCK_TOKENS)
        tokens = split.read(begin, end + 1).astype(np.int64)
        keys = tokens[:-1] * vocab + tokens[1:]
        if document_mask:
            first, last = np.searchsorted(split.document_starts, [begin + 1, end + 1])
            keys = np.delete(keys, split.document_starts[first:last] - begin - 1)
        keys, counts = np.unique(keys, return_counts=True)
        parts.append(Pairs(keys, counts, vocab))
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
