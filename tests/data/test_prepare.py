"""Prepare: what goes into a cache, when it is reused, and that only whole caches are seen."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from jaxscale.config import ConfigError, DataConfig
from jaxscale.data import prepare as prepare_module
from jaxscale.data.documents import Document
from jaxscale.data.prepare import PrepareResult, prepare
from jaxscale.data.sources import open_source
from jaxscale.data.token_cache import SPLITS, TokenCache
from jaxscale.data.tokenizer import load_tokenizer


def documents_of(cache: TokenCache, split: str) -> list[str]:
    """Return the texts of a split, read back from its tokens."""
    tokens = cache.split(split)
    tokenizer = load_tokenizer(str(cache.path / "tokenizer.json"))
    ids = tokens.read(0, tokens.num_tokens)
    parts = np.split(ids, np.asarray(tokens.document_starts[1:]))
    assert all(part[-1] == tokenizer.eos_id for part in parts)
    return [tokenizer.decode(part) for part in parts]


def visible(data: DataConfig) -> list[str]:
    """Return what stands in the cache folder, apart from sources."""
    return [p.name for p in pathlib.Path(data.cache_dir).iterdir() if p.name != "sources"]


def texts_of(data: DataConfig) -> list[str]:
    source = open_source(data.source, cache_dir=data.cache_dir)
    documents = [source[i] for i in range(len(source))]
    return [d.text for d in documents if isinstance(d, Document) and d.text]


def test_every_document_is_in_one_split_in_order(data: DataConfig, cache: TokenCache) -> None:
    texts = texts_of(data)
    found = {name: documents_of(cache, name) for name in SPLITS}
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    for name in SPLITS:
        order = [texts.index(text) for text in found[name]]
        assert order == sorted(order)
    assert 1 <= len(found["validation"]) < len(found["train"])


def test_result_counts_what_is_there(data: DataConfig, cache: TokenCache) -> None:
    result = prepare(data)
    assert result.path == cache.path
    assert result.skipped_documents == 2
    names = {
        reason: [pathlib.Path(n).name for n in c.names] for reason, c in result.skipped.items()
    }
    assert names == {"empty": ["empty.txt"], "not UTF-8": ["latin.txt"]}
    for name, counts in (("train", result.train), ("validation", result.validation)):
        texts = documents_of(cache, name)
        assert counts.documents == len(texts)
        assert counts.bytes == sum(len(text.encode()) for text in texts)
        assert counts.tokens == counts.bytes + counts.documents


def test_a_second_call_reuses_the_cache(fresh: DataConfig) -> None:
    first, second = prepare(fresh), prepare(fresh)
    assert (first.reused, second.reused) == (False, True)
    assert dataclasses.replace(second, reused=False, seconds=first.seconds, shards=1) == first
    forced = prepare(fresh, force=True)
    assert not forced.reused
    assert visible(fresh) == [first.path.name]


def test_the_folder_is_named_by_what_goes_in(
    fresh: DataConfig,
    corpus: pathlib.Path,
    tmp_path: pathlib.Path,
    train_tokenizer: Callable[[list[str]], str],
) -> None:
    other_corpus = shutil.copytree(corpus, tmp_path / "other")
    tokenizer = train_tokenizer(["</s>"])
    variants = [
        fresh,
        dataclasses.replace(fresh, validation_fraction=0.3),
        dataclasses.replace(fresh, tokenizer=tokenizer),
        dataclasses.replace(fresh, source=f"files:{other_corpus}/**/*.txt"),
    ]
    results = [prepare(variant) for variant in variants]
    assert not any(result.reused for result in results)
    assert len({result.path for result in results}) == len(variants)
    victim = next(other_corpus.glob("*3.txt"))
    victim.write_text(victim.read_text() + "more")
    assert not prepare(variants[-1]).reused
    same = [dataclasses.replace(fresh, length=7), dataclasses.replace(fresh, document_mask=False)]
    assert all(prepare(variant).reused for variant in same)


@pytest.mark.parametrize("tokenizer", ["bytes", "trained"])
def test_processes_write_what_one_process_writes(
    fresh: DataConfig,
    tokenizer: str,
    tmp_path: pathlib.Path,
    train_tokenizer: Callable[[list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 50_000)
    if tokenizer == "trained":
        tokenizer = train_tokenizer(["</s>"])
    fresh = dataclasses.replace(fresh, tokenizer=tokenizer)
    calls: list[tuple[int, int]] = []
    caches = []
    for workers in (1, 2):
        if workers > 1:
            monkeypatch.delattr(prepare_module, "run_in_line")
        part = dataclasses.replace(fresh, cache_dir=str(tmp_path / f"workers-{workers}"))
        calls.clear()
        result = prepare(part, workers=workers, progress=lambda *call: calls.append(call))
        caches.append(TokenCache(result.path))
        assert len(calls) > 2
        assert calls[-1] == (42, 42)
        assert calls == sorted(set(calls))
    assert len(caches[0].index["splits"]["train"]["shards"]) > 2
    assert caches[0].fingerprint == caches[1].fingerprint
    texts = texts_of(fresh)
    found = [documents_of(caches[1], name) for name in SPLITS]
    assert sorted(found[0] + found[1]) == sorted(texts)
    for split in found:
        assert split == sorted(split, key=texts.index)


def test_the_split_is_of_the_content_and_not_of_names_or_order(
    fresh: DataConfig, corpus: pathlib.Path, cache: TokenCache, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "renamed"
    folder.mkdir()
    for number, path in enumerate(sorted(corpus.rglob("*.txt"), reverse=True)):
        for twin in ("a", "b"):
            shutil.copy(path, folder / f"{twin}{number:03d}.txt")
    result = prepare(dataclasses.replace(fresh, source=f"files:{folder}/*.txt"))
    renamed = TokenCache(result.path)
    for name in SPLITS:
        assert sorted(documents_of(renamed, name)) == sorted(2 * documents_of(cache, name))


def size(text: str) -> int:
    return len(text.encode())


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_no_split_stays_empty(
    fresh: DataConfig, fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 1)
    result = prepare(dataclasses.replace(fresh, validation_fraction=fraction))
    assert min(result.train.documents, result.validation.documents) > 0
    assert result.train.bytes + result.validation.bytes == sum(map(size, texts_of(fresh)))
    files = {path.name for path in result.path.iterdir()}
    assert files == {"index.json", *TokenCache(result.path).index["files"]}


def test_without_a_fraction_nothing_is_held_apart(fresh: DataConfig) -> None:
    result = prepare(dataclasses.replace(fresh, validation_fraction=0.0))
    assert (result.train.documents, result.validation.documents) == (40, 0)


@pytest.mark.parametrize("copies", [1, 2])
def test_of_a_single_document_the_end_is_held_apart(
    fresh: DataConfig, tmp_path: pathlib.Path, copies: int
) -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    for number in range(copies):
        (tmp_path / f"{number}.txt").write_text(text)
    alone = dataclasses.replace(fresh, source=f"files:{tmp_path}/*.txt")
    result = prepare(alone)
    assert result.train.documents == result.validation.documents == copies
    cache = TokenCache(result.path)
    head, tail = (documents_of(cache, name)[0] for name in SPLITS)
    assert head + tail == text
    assert head.endswith("\n")
    assert len(tail) == pytest.approx(0.2 * len(text), abs=len("line 99\n"))
    assert prepare(dataclasses.replace(alone, validation_fraction=0.0)).validation.documents == 0


@pytest.mark.parametrize("content", range(6))
def test_a_large_document_is_not_held_apart_whole(
    fresh: DataConfig, tmp_path: pathlib.Path, content: int
) -> None:
    (tmp_path / "large.txt").write_text(f"{content}\n" * 5_000)
    (tmp_path / "small.txt").write_text("little\n" * 50)
    result = prepare(dataclasses.replace(fresh, source=f"files:{tmp_path}/*.txt"))
    total = result.train.bytes + result.validation.bytes
    assert 0.1 <= result.validation.bytes / total <= 0.4


def test_a_corpus_without_text_is_refused(fresh: DataConfig, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(
        ConfigError, match=r"holds no UTF-8 text \(.*/empty\.txt: empty\); name other"
    ):
        prepare(dataclasses.replace(fresh, source=f"files:{tmp_path}/*.txt"))
    assert all(name.endswith(".partial") for name in visible(fresh))


def test_a_cache_folder_must_be_a_local_folder(fresh: DataConfig, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"data\.cache_dir=.*file.* cannot be written"):
            prepare(dataclasses.replace(fresh, cache_dir=str(folder)))
    with pytest.raises(ConfigError, match=r"data\.cache_dir=gs://b/c is not a local folder"):
        prepare(dataclasses.replace(fresh, cache_dir="gs://b/c"))


def test_a_damaged_cache_is_refused_until_forced(fresh: DataConfig) -> None:
    path = prepare(fresh).path
    victim = path / "train-documents.npy"
    victim.write_bytes(victim.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"train-documents\.npy has .*prepare it again with for"):
        prepare(fresh)
    assert not prepare(fresh, force=True).reused
    assert prepare(fresh).reused


def test_of_two_at_once_the_first_wins(fresh: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 50_000)
    other: list[PrepareResult] = []

    def prepare_meanwhile(done: int, total: int) -> None:
        if not other:
            other.append(prepare(fresh))

    result = prepare(fresh, progress=prepare_meanwhile)
    assert not other[0].reused
    assert other[0].found_shards == 1
    assert result.path == other[0].path
    assert visible(fresh) == [result.path.name]


def test_the_default_folder_is_below_the_cache_root(
    fresh: DataConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path / "root"))
    result = prepare(dataclasses.replace(fresh, cache_dir=""))
    assert result.path.parent == tmp_path / "root" / "tokens"
