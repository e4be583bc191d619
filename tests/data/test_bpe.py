"""`bpe:SIZE`: trained on the corpus, once, the same everywhere, and kept."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
import tokenizers

from jaxscale.config import ConfigError, DataConfig, Stopped
from jaxscale.data import bpe
from jaxscale.data.bpe import bpe_size, sample_texts, train_bpe, vocabulary_size
from jaxscale.data.corpus import open_corpus, prepare_corpus
from jaxscale.data.documents import HASH_LIMIT, Document
from jaxscale.data.prepare import prepare
from jaxscale.data.sources import open_source
from jaxscale.data.token_cache import TokenCache
from jaxscale.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import SmallFiles

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = ["return self.value for value in values\n", "naïve 日本語 \U0001f600 \t\r\n\0", "", "  x"]


@pytest.fixture
def with_bpe(fresh: DataConfig) -> DataConfig:
    return dataclasses.replace(fresh, tokenizer="bpe:300")


def trained(data: DataConfig) -> Tokenizer:
    return load_tokenizer(str(open_corpus(data).tokenizer_path))


def test_it_has_the_size_that_was_asked_for_and_round_trips(with_bpe: DataConfig) -> None:
    tokenizer = trained(with_bpe)
    assert tokenizer.size == 300
    assert tokenizer.eos_id < 300
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
    text = "return self if not None else True "
    assert len(tokenizer.encode(text)) < 0.6 * len(text)
    ids = tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a <|endoftext|> b"


def test_documents_come_back_from_the_cache(with_bpe: DataConfig) -> None:
    corpus = open_corpus(with_bpe)
    tokenizer = load_tokenizer(str(corpus.tokenizer_path))
    split = corpus.caches[0].split("train")
    stop = int(split.document_starts[1])
    first = tokenizer.decode(split.read(0, stop))
    source = open_source(with_bpe.source, cache_dir="unused")
    texts = [d.text for d in map(source.__getitem__, range(len(source))) if isinstance(d, Document)]
    assert first in texts
    assert stop < 0.8 * len(first.encode())


def test_it_is_trained_once_and_kept_beside_the_caches(
    with_bpe: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_corpus(with_bpe)[0]
    (kept,) = pathlib.Path(with_bpe.cache_dir, "tokenizers").iterdir()
    assert kept.read_text() == (first.path / "tokenizer.json").read_text()
    again = prepare_corpus(dataclasses.replace(with_bpe, length=7))[0]
    assert (again.path, again.reused) == (first.path, True)
    kept.unlink()
    retrained = prepare_corpus(with_bpe)[0]
    assert (retrained.path, retrained.reused) == (first.path, True), "the same texts, the same ids"
    other = prepare_corpus(dataclasses.replace(with_bpe, tokenizer="bpe:299"))[0]
    assert other.path != first.path
    prepare_corpus(dataclasses.replace(with_bpe, validation_fraction=0.4))
    assert len(list(kept.parent.iterdir())) == 3


TRAIN = """
import sys
from jaxscale.data.bpe import sample_texts, train_bpe
from jaxscale.data.sources import open_source
texts = sample_texts([open_source(sys.argv[1], cache_dir="unused")])
print(train_bpe(texts, 300), end="")
"""


def test_every_process_trains_the_same(with_bpe: DataConfig) -> None:
    """With several threads, and with other seeds of Python's hashes."""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", TRAIN, with_bpe.source],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYTHONHASHSEED": seed,
                "TOKENIZERS_PARALLELISM": parallel,
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, parallel in (("1", "true"), ("2", "false"))
    ]
    source = open_source(with_bpe.source, cache_dir="unused")
    assert outputs == [train_bpe(sample_texts([source]), 300)] * 2


def test_a_mixture_trains_one_over_all_parts(tmp_path: pathlib.Path) -> None:
    for letter in "xy":
        (tmp_path / f"{letter}.txt").write_text(f"{letter * 7} " * 200)
    data = DataConfig(
        source=f"1 files:{tmp_path}/x.txt; 1 files:{tmp_path}/y.txt",
        tokenizer="bpe:270",
        validation_fraction=0.0,
        cache_dir=str(tmp_path / "caches"),
    )
    results = prepare_corpus(data)
    assert len({(r.path / "tokenizer.json").read_text() for r in results}) == 1
    tokenizer = trained(data)
    assert [len(tokenizer.encode(f" {letter * 7}")) for letter in "xy"] == [1, 1]
    alone = trained(dataclasses.replace(data, source=f"files:{tmp_path}/x.txt"))
    assert [len(alone.encode(f" {letter * 7}")) for letter in "xy"] == [1, 8]


def test_documents_held_apart_do_not_train_it(with_bpe: DataConfig) -> None:
    cache = TokenCache(prepare(dataclasses.replace(with_bpe, tokenizer="bytes")).path)
    source = open_source(with_bpe.source, cache_dir="unused")
    below = int(with_bpe.validation_fraction * HASH_LIMIT)
    texts = sample_texts([source], held_below=below)
    kept = [text for text in texts if text]
    assert len(kept) == cache.split("train").num_documents
    assert sum(len(text.encode()) for text in kept) == cache.split("train").num_bytes
    assert trained(with_bpe).to_json() == train_bpe(texts, 300)


@pytest.mark.parametrize("content", "abcdef")
def test_one_large_document_trains_it_all_the_same(content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text(f"word{content} " * 500)
    data = DataConfig(
        source=f"files:{tmp_path}/a.txt",
        tokenizer="bpe:264",
        validation_fraction=0.5,
        cache_dir=str(tmp_path / "caches"),
    )
    assert len(trained(data).encode(f" word{content}")) == 1


@pytest.mark.parametrize(("num_documents", "characters"), [(4_000, 10), (8, 50_000), (1, 300_000)])
def test_a_large_corpus_is_read_in_part_and_evenly(
    num_documents: int, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Numbers:
        """Documents in which each character tells its place in the corpus, in hundredths."""

        fingerprint = ""
        num_bytes = num_documents * characters
        read = 0

        def __len__(self) -> int:
            return num_documents

        def __getitem__(self, index: int) -> Document:
            self.read += 1
            places = [
                chr(1 + 100 * (index * characters + i) // self.num_bytes) for i in range(characters)
            ]
            return Document(str(index), "".join(places))

    monkeypatch.setattr(bpe, "MAX_TEXT_BYTES", 20_000)
    monkeypatch.setattr(bpe, "PIECE_CHARACTERS", 100)
    source = Numbers()
    text = "".join(sample_texts([source]))
    assert 15_000 <= len(text) <= 20_000
    counts = [text.count(chr(1 + place)) for place in range(100)]
    assert min(counts) >= 50
    assert source.read == min(num_documents, 2_000)


def test_no_more_is_read_where_the_documents_drawn_are_the_large_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text("é" * (1 if number % 4 else 1_000))
    monkeypatch.setattr(bpe, "MAX_TEXT_BYTES", 5_100)
    monkeypatch.setattr(bpe, "MIN_DOCUMENTS", 1)
    texts = sample_texts([open_source(f"files:{tmp_path}/*.txt", cache_dir="unused")])
    assert sum(len(text.encode()) for text in texts) == 4_000


@pytest.mark.parametrize("spec", ["bpe:", "bpe:256", "bpe:-3", "bpe:4k", "bpe:²", f"bpe:{10**20}"])
def test_a_bad_size_is_named(spec: str, with_bpe: DataConfig) -> None:
    with pytest.raises(ConfigError, match=rf"data\.tokenizer={spec} needs .* from 257 to \d+; try"):
        prepare_corpus(dataclasses.replace(with_bpe, tokenizer=spec))


def test_the_size_is_known_before_training() -> None:
    assert vocabulary_size("bpe:4096") == 4096
    assert vocabulary_size("bytes") == 257
    assert bpe_size("bytes") is None


def test_little_text_needs_fewer_ids() -> None:
    tokenizer = Tokenizer(train_bpe(["ab"], 1_000))
    assert tokenizer.size == 257


SPECIALS = ["<unk>", "</s>"]
WORDS = ["the cat sat on the mat", "the dog sat on the log"] * 20


def wordpiece() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=SPECIALS, show_progress=False
    )
    library.train_from_iterator(WORDS, trainer)
    return library


def unigram() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.Unigram())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(WORDS, trainer)
    return library


def sentencepiece() -> tokenizers.Tokenizer:
    """Return a BPE as SentencePiece makes it: spaces are letters, unknown letters are bytes."""
    byte_names = [f"<0x{byte:02X}>" for byte in range(256)]
    model = tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    library.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    library.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=[*SPECIALS, *byte_names], show_progress=False
    )
    library.train_from_iterator(WORDS, trainer)
    value = json.loads(library.to_str())
    # The trainer takes them as special tokens only; in such files they are ordinary ones.
    value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] in SPECIALS]
    return tokenizers.Tokenizer.from_str(json.dumps(value))


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (wordpiece, ["the cat sat on the log"]),
        (unigram, ["the cat sat on the log", "sat  on"]),
        (sentencepiece, ["the cat sat on the log", " the  cat", "naïve \U0001f600 cat"]),
    ],
)
def test_other_kinds_of_tokenizer_round_trip_through_a_cache(
    make: object, texts: list[str], tmp_path: pathlib.Path
) -> None:
    assert callable(make)
    make().save(str(tmp_path / "tokenizer.json"))
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    data = DataConfig(
        source=f"files:{tmp_path}/*.txt",
        tokenizer=str(tmp_path / "tokenizer.json"),
        validation_fraction=0.0,
        cache_dir=str(tmp_path / "caches"),
    )
    corpus = open_corpus(data)
    tokenizer = load_tokenizer(str(corpus.tokenizer_path))
    assert tokenizer.eos_id == 1
    split = corpus.caches[0].split("train")
    edges = [*split.document_starts.tolist(), split.num_tokens]
    for text, start, stop in zip(texts, edges, edges[1:], strict=False):
        ids = split.read(start, stop)
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("moments", [0, 3])
def test_reading_its_text_stops_when_told(with_bpe: DataConfig, moments: int) -> None:
    answers = iter([False] * moments + [True])
    with pytest.raises(Stopped, match="while text for the tokenizer was read"):
        prepare_corpus(with_bpe, stop=lambda: next(answers))
    assert list(answers) == []
    assert not list(pathlib.Path(with_bpe.cache_dir, "tokenizers").iterdir())


def test_a_full_disk_is_named_and_leaves_nothing(
    with_bpe: DataConfig, small_files: SmallFiles
) -> None:
    with (
        small_files(1_000),
        pytest.raises(ConfigError, match=r"tokenizers cannot be written \(File too large\); free"),
    ):
        prepare_corpus(with_bpe)
    assert not list(pathlib.Path(with_bpe.cache_dir, "tokenizers").iterdir())
    assert trained(with_bpe).size == 300
