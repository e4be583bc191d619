"""Sources: what is a document, in which order, and what a missing corpus says."""

import os
import pathlib
import pickle

import pytest

from jaxscale.config import ConfigError
from jaxscale.data.documents import Document, Skipped, Source
from jaxscale.data.sources import open_source


def test_synthetic_is_always_the_same_and_never_repeats(tmp_path: pathlib.Path) -> None:
    source = open_source("synthetic", cache_dir=tmp_path)
    again: Source = pickle.loads(pickle.dumps(source))
    documents = [source[i] for i in range(len(source))]
    assert documents == [again[i] for i in range(len(again))]
    texts = {document.text for document in documents if isinstance(document, Document)}
    assert len(texts) == len(source)
    assert 1_000_000 < sum(map(len, texts)) < 2_000_000
    assert abs(sum(map(len, texts)) - source.num_bytes) < 0.2 * source.num_bytes
    assert list(tmp_path.iterdir()) == []


def test_synthetic_ends(tmp_path: pathlib.Path) -> None:
    source = open_source("synthetic", cache_dir=tmp_path)
    with pytest.raises(IndexError):
        source[len(source)]


def test_files_are_documents_in_the_order_of_their_paths(
    corpus: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = open_source(f"files:{corpus}/**/*.txt", cache_dir=tmp_path)
    assert len(source) == len(list(corpus.rglob("*.txt")))
    documents = [source[i] for i in range(len(source))]
    keys = [document.key for document in documents]
    assert keys == sorted(keys)
    assert documents.count(Skipped(f"{corpus}/latin.txt", "not UTF-8")) == 1
    for document in documents:
        if isinstance(document, Document):
            assert document.text == pathlib.Path(document.key).read_bytes().decode()
    assert source.num_bytes == sum(p.stat().st_size for p in corpus.rglob("*.txt"))


def test_files_change_their_fingerprint(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    spec = f"files:{tmp_path}/*.txt"
    seen = {open_source(spec, cache_dir=tmp_path).fingerprint}
    assert open_source(spec, cache_dir=tmp_path).fingerprint in seen
    os.utime(path, (1, 1))
    seen.add(open_source(spec, cache_dir=tmp_path).fingerprint)
    path.write_text("three")
    os.utime(path, (1, 1))
    seen.add(open_source(spec, cache_dir=tmp_path).fingerprint)
    (tmp_path / "b.txt").write_text("two")
    seen.add(open_source(spec, cache_dir=tmp_path).fingerprint)
    assert len(seen) == 4


def test_files_are_found_from_another_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    source = open_source("files:*.txt", cache_dir=tmp_path)
    monkeypatch.chdir("/")
    document = source[0]
    assert isinstance(document, Document)
    assert document.text == "one"


def test_a_file_that_has_gone_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = open_source(f"files:{path}", cache_dir=tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"data\.source=.*a\.txt cannot be read"):
        source[0]


@pytest.mark.parametrize("pattern", ["none/*.txt", ""])
def test_a_missing_corpus_names_knob_and_remedy(pattern: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.source='files:.* no local file.*check the pat"):
        open_source(f"files:{pattern}", cache_dir=tmp_path)


@pytest.mark.parametrize("spec", ["wikipedia", "python_stdlib:3", "hdfs:c4"])
def test_an_unknown_kind_lists_the_kinds(spec: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=rf"{spec}.*synthetic, files:GLOB, tfds:NAME"):
        open_source(spec, cache_dir=tmp_path)
