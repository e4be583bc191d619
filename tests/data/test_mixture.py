"""Mixtures: whose window comes when, and that shares over a run are the weights."""

import collections
import contextlib
import dataclasses
import itertools
import math
import pathlib
from fractions import Fraction

import numpy as np
import pytest

from jaxscale.config import ConfigError, DataConfig
from jaxscale.data import ngram
from jaxscale.data.corpus import open_corpus, prepare_corpus
from jaxscale.data.loader import Loader, Windows, mixed_windows
from jaxscale.data.mixture import Mixture, drawn, parse_mixture, place
from jaxscale.data.ngram import ngram_bits_per_byte

# What each part of the corpus below is written with.
LETTERS = "abc"
WEIGHTS = ("0.6", "0.3", "0.1")


@pytest.mark.parametrize(
    ("spec", "sources", "weights"),
    [
        ("python_stdlib", ["python_stdlib"], (1,)),
        ("files:a b/*.txt", ["files:a b/*.txt"], (1,)),
        ("0.7 files:a/*.txt; 0.3 tfds:b", ["files:a/*.txt", "tfds:b"], (7, 3)),
        ("70 files:a b;30 synthetic", ["files:a b", "synthetic"], (7, 3)),
        ("1/3 synthetic; 1e-1 tfds:b/c:1.0.0#d", ["synthetic", "tfds:b/c:1.0.0#d"], (10, 3)),
        ("2 synthetic", ["synthetic"], (1,)),
    ],
)
def test_parts_and_weights_are_read(
    spec: str, sources: list[str], weights: tuple[int, ...]
) -> None:
    assert parse_mixture(spec) == (sources, weights)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("0.7 files:a; files:b", r"'files:b' has no weight; write a mixture as '0\.7 SOURCE; 0\.3"),
        ("files:a; files:b", r"'files:a' has no weight"),
        ("0.7 files:a;", r"'' has no weight"),
        ("0 files:a; 1 files:b", r": 0 is no weight; give a number above 0"),
        ("-1 files:a; 1 files:b", r": -1 is no weight"),
        ("1x files:a; 1 files:b", r": 1x is no weight"),
        ("1/0 files:a; 1 files:b", r": 1/0 is no weight"),
    ],
)
def test_bad_mixtures_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_mixture(spec)


def test_the_order_by_hand() -> None:
    """Of 1 and 2 and 5 in 8: the rarest at every eighth turn, and the others between evenly."""
    order = [place(index, (5, 1, 2)) for index in range(16)]
    assert "".join(LETTERS[part] for part, _ in order) == "bcaacaaabcaacaaa"
    assert [number for _, number in order] == [0, 0, 0, 1, 1, 2, 3, 4, 1, 2, 5, 6, 3, 7, 8, 9]


@pytest.mark.parametrize("weights", [(1,), (7, 3), (6, 3, 1), (1, 1, 1, 1), (97, 2, 1), (0, 5, 2)])
def test_each_part_takes_its_share_at_every_point(weights: tuple[int, ...]) -> None:
    total = sum(weights)
    seen: collections.Counter[int] = collections.Counter()
    for index in range(3 * total):
        assert drawn(index, weights) == [seen[part] for part in range(len(weights))]
        part, number = place(index, weights)
        assert number == seen[part]
        seen[part] += 1
        for part, weight in enumerate(weights):
            assert abs(seen[part] - Fraction((index + 1) * weight, total)) < len(weights)
    assert [seen[part] for part in range(len(weights))] == [3 * weight for weight in weights]
    used = sum(weight > 0 for weight in weights)
    assert len({place(index, weights)[0] for index in range(used)}) == used, "one of each at first"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Return a mixture of three parts of different sizes, each of a letter of its own."""
    folder = tmp_path_factory.mktemp("mixture")
    for letter, num_documents in zip(LETTERS, (20, 60, 35), strict=True):
        for number in range(num_documents):
            (folder / f"{letter}{number}.txt").write_text(letter * (30 + number))
    parts = zip(WEIGHTS, LETTERS, strict=True)
    return DataConfig(
        source="; ".join(f"{weight} files:{folder}/{letter}*.txt" for weight, letter in parts),
        length=16,
        validation_fraction=0.2,
        cache_dir=str(folder / "caches"),
    )


def part_of(row: np.ndarray) -> int:
    """Return the part that a row of tokens comes from, by its letter."""
    (letter,) = {chr(token) for token in row.tolist()} - {chr(256)}
    return LETTERS.index(letter)


def training_rows(loader: Loader, num_batches: int, start: int = 0) -> np.ndarray:
    with contextlib.closing(loader.batches(start)) as batches:
        return np.concatenate([b["tokens"] for b in itertools.islice(batches, num_batches)])


def test_shares_over_a_run_are_the_weights(mixed: DataConfig) -> None:
    loader = Loader(open_corpus(mixed), mixed, global_batch_size=10, seed=0)
    sizes = [len(part) for part in loader.windows.parts]
    assert len(set(sizes)) == 3, "shares are not those of the sizes"
    rows = training_rows(loader, 100)
    counts = collections.Counter(map(part_of, rows))
    assert [counts[part] for part in range(3)] == [600, 300, 100]
    for batch in range(100):
        of_batch = collections.Counter(map(part_of, rows[10 * batch : 10 * batch + 10]))
        assert [of_batch[part] for part in range(3)] == [6, 3, 1]


def test_rows_are_those_of_the_parts_alone_in_the_order_of_the_rule(mixed: DataConfig) -> None:
    corpus = open_corpus(mixed)
    alone = [
        training_rows(Loader(cache, mixed, global_batch_size=1, seed=3), 70)
        for cache in corpus.caches
    ]
    expected = [alone[part][number] for part, number in (place(i, (6, 3, 1)) for i in range(100))]
    loader = Loader(corpus, mixed, global_batch_size=4, seed=3)
    np.testing.assert_array_equal(training_rows(loader, 25), expected)
    np.testing.assert_array_equal(training_rows(loader, 5, start=20), expected[80:])


def test_validation_takes_each_window_of_each_part_once(mixed: DataConfig) -> None:
    corpus = open_corpus(mixed)
    loader = Loader(corpus, mixed, global_batch_size=3, seed=0)
    parts = [Windows(cache.split("validation"), 16, True) for cache in corpus.caches]
    total = sum(map(len, parts))
    assert len({len(part) for part in parts}) == 3
    rows = np.concatenate([batch["tokens"] for batch in loader.evaluation_batches()])[:total]
    found = [[row.tolist() for row in rows if part_of(row) == n] for n in range(3)]
    assert found == [[part[i]["tokens"].tolist() for i in range(len(part))] for part in parts]
    assert {part_of(row) for row in rows[:3]} == {0, 1, 2}, "the first batch has one of each"
    for stop in range(1, total):
        counts = collections.Counter(map(part_of, rows[:stop]))
        for number, part in enumerate(parts):
            assert abs(counts[number] - stop * len(part) / total) < 3
    num_bytes = 0.0
    for index in range(total):
        window = loader.validation_windows[index]
        num_bytes += (window["weights"] * (window["targets"] != 256)).sum()
        assert loader.validation_windows.text_bytes(index + 1) == num_bytes


@pytest.mark.parametrize("num_windows", [0, 7])
@pytest.mark.parametrize("order", [1, 2])
def test_baselines_count_parts_by_their_weights(
    mixed: DataConfig, order: int, num_windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngram, "STRENGTHS", (3.0,))
    corpus = open_corpus(mixed)
    scored = []
    validation = mixed_windows(corpus, "validation", mixed)
    for index in range(num_windows or len(validation)):
        window = validation[index]
        kept = window["weights"] > 0
        scored += zip(window["tokens"][kept], window["targets"][kept], strict=True)
    splits = [cache.split("train") for cache in corpus.caches]
    total = sum(split.num_tokens for split in splits)
    table = np.zeros((257, 257))
    for split, weight in zip(splits, WEIGHTS, strict=True):
        stream = split.read(0, split.num_tokens)
        for pair in itertools.pairwise(stream.tolist()):
            if pair[0] != 256:
                table[pair] += total * float(weight) / split.num_tokens
    unigram = (table.sum(0) + 3 / 257) / (table.sum() + 3)
    nats = 0.0
    for previous, following in scored:
        p = unigram[following]
        if order == 2:
            p = (table[previous, following] + 3 * p) / (table[previous].sum() + 3)
        nats -= math.log(p)
    expected = nats / math.log(2) / sum(following != 256 for _, following in scored)
    found = ngram_bits_per_byte(corpus, mixed, order, num_windows=num_windows)
    assert found == pytest.approx(expected, rel=1e-9)


def test_each_part_has_the_cache_that_it_has_alone(mixed: DataConfig) -> None:
    sources, _ = parse_mixture(mixed.source)
    results = prepare_corpus(mixed)
    assert [result.source for result in results] == sources
    assert all(result.reused for result in prepare_corpus(mixed))
    alone = prepare_corpus(dataclasses.replace(mixed, source=sources[1]))
    assert [result.path for result in alone] == [results[1].path]
    assert alone[0].reused


def test_the_fingerprint_is_of_all_parts_and_weights(mixed: DataConfig) -> None:
    caches = open_corpus(mixed).caches
    mixtures = [
        Mixture(caches, (6, 3, 1)),
        Mixture(caches, (5, 3, 2)),
        Mixture(caches[::-1], (6, 3, 1)),
        Mixture(caches[:2], (6, 3)),
        Mixture(caches[:1]),
    ]
    assert len({mixture.fingerprint for mixture in mixtures}) == len(mixtures)
    assert open_corpus(mixed).fingerprint == mixtures[0].fingerprint
    assert mixtures[-1].fingerprint == caches[0].fingerprint, "a bare source is as it was"


def test_a_part_without_a_window_is_named(mixed: DataConfig, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    data = dataclasses.replace(mixed, source=f"{mixed.source}; 1 files:{tmp_path}/a.txt")
    with pytest.raises(ConfigError, match=r"data\.length=16 needs 17 tokens.*a\.txt") as error:
        Loader(open_corpus(data), data, global_batch_size=2, seed=0)
    assert "\n" not in str(error.value)


def test_a_part_that_is_wrong_is_named_before_the_first_is_prepared(mixed: DataConfig) -> None:
    data = dataclasses.replace(
        mixed, source="1 synthetic; 1 files:none/*", cache_dir=f"{mixed.cache_dir}/new"
    )
    with pytest.raises(ConfigError, match=r"'files:none/\*' matches no local file"):
        prepare_corpus(data)
    assert not pathlib.Path(data.cache_dir).exists()
