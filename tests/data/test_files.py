"""Files: the lines of `.jsonl` files, at random, and why some are no documents."""

import json
import os
import pathlib
import pickle
import random
from typing import Any

import pytest

from jaxscale.config import ConfigError, DataConfig, Stopped
from jaxscale.data import files
from jaxscale.data.documents import Document, Skipped
from jaxscale.data.files import FilesSource
from jaxscale.data.prepare import prepare
from jaxscale.data.sources import open_source


def open_files(pattern: str) -> FilesSource:
    source = open_source(f"files:{pattern}", cache_dir="unused")
    assert isinstance(source, FilesSource)
    return source


@pytest.fixture
def lines(tmp_path: pathlib.Path) -> list[str]:
    """Write two files of lines around a text file; return all texts in order."""
    dice = random.Random(0)
    texts = [
        "".join(dice.choices("ab é\n\U0001f600", k=dice.randrange(1, 200))) for _ in range(300)
    ]

    def write(name: str, some: list[str]) -> None:
        rows = [
            json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 > 0) for i, t in enumerate(some)
        ]
        (tmp_path / name).write_text("\n".join(rows) + ("\n" if name == "a.jsonl" else ""))

    write("a.jsonl", texts[:120])
    (tmp_path / "b.txt").write_text(texts[120], newline="")
    write("c.jsonl", texts[121:])
    return texts


@pytest.mark.parametrize(("scan", "block"), [(2**24, 2**22), (64, 100), (1, 1)])
def test_each_line_is_a_document(
    lines: list[str],
    tmp_path: pathlib.Path,
    scan: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if scan == 1:
        (tmp_path / "c.jsonl").unlink()
        lines = lines[:121]
    monkeypatch.setattr(files, "SCAN_BYTES", scan)
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    source = open_files(f"{tmp_path}/*")
    assert len(source) == len(lines)
    again = pickle.loads(pickle.dumps(source))
    dice = random.Random(1)
    for index in [*range(len(lines)), *dice.choices(range(len(lines)), k=99)]:
        for reader in (source, again):
            document = reader[index]
            assert isinstance(document, Document)
            assert document.text == lines[index]
    assert source[0].key == f"{tmp_path}/a.jsonl:1"
    assert source[119].key == f"{tmp_path}/a.jsonl:120"
    assert source[120].key == f"{tmp_path}/b.txt"
    with pytest.raises(IndexError):
        source[len(lines)]


def test_lines_are_found_when_they_are_needed_and_sent_to_workers(
    lines: list[str], tmp_path: pathlib.Path
) -> None:
    source = open_files(f"{tmp_path}/*.jsonl")
    assert len(pickle.dumps(source)) < 1_000, "nothing is read when a source is opened"
    assert len(source) == len(lines) - 1
    source[5]
    sent = pickle.loads(pickle.dumps(source))
    (tmp_path / "a.jsonl").write_text("")
    assert len(sent) == len(lines) - 1
    assert len(pickle.dumps(source)) < 1_000 + 8 * (len(lines) + 4), "eight bytes a line"


def test_fields_are_chosen(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "Why?", "a": "So.", "text": "t"}')
    documents = {
        fields: open_files(f"{tmp_path}/a.jsonl{fields}")[0] for fields in ("", "#a", "#q,a")
    }
    key = f"{tmp_path}/a.jsonl:1"
    assert documents == {
        "": Document(key, "t"),
        "#a": Document(key, "So."),
        "#q,a": Document(key, "So.", "Why?\n"),
    }


BAD = [
    (b"not json", "not a JSON object"),
    (b'["text"]', "not a JSON object"),
    (b"[" * 100_000, "not a JSON object"),
    (b" ", "empty"),
    (b'{"text": "caf\xe9"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "not UTF-8"),
    (b'{"other": "x"}', "no field 'text'"),
    (b'{"text": 3}', "field 'text' is not a string"),
    (b'{"text": ""}', "empty"),
]


def test_lines_that_are_no_documents_are_counted_by_reason(tmp_path: pathlib.Path) -> None:
    good = b'{"text": "good"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(b"".join(line + b"\n" + good for line, _ in BAD))
    for number in range(7):
        (tmp_path / f"{number}.txt").write_bytes(b"\xe9")
    source = open_files(f"{tmp_path}/*")
    for number, (_, reason) in enumerate(BAD[:-1]):
        assert source[7 + 2 * number] == Skipped(f"{tmp_path}/a.jsonl:{2 * number + 1}", reason)
    data = DataConfig(
        source=f"files:{tmp_path}/*", cache_dir=str(tmp_path / "caches"), validation_fraction=0.0
    )
    result = prepare(data)
    assert result.train.documents == len(BAD)
    assert result.skipped_documents == len(BAD) + 7
    assert {reason: counts.documents for reason, counts in result.skipped.items()} == {
        "not a JSON object": 3,
        "not UTF-8": 9,
        "no field 'text'": 1,
        "field 'text' is not a string": 1,
        "empty": 2,
    }
    assert result.skipped["not UTF-8"].names == tuple(f"{tmp_path}/{n}.txt" for n in range(5))
    empty = [f"{tmp_path}/a.jsonl:7", f"{tmp_path}/a.jsonl:17"]
    assert result.skipped["empty"].names == tuple(empty)
    index = json.loads((result.path / "index.json").read_text())
    assert index["skipped_documents"] == len(BAD) + 7
    assert index["skipped"]["empty"] == {"documents": 2, "names": empty}
    assert prepare(data).skipped == result.skipped, "also where the cache is found"


def test_lines_without_any_document_are_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    data = DataConfig(source=f"files:{tmp_path}/a.jsonl", cache_dir=str(tmp_path / "caches"))
    with pytest.raises(ConfigError, match=r"holds no UTF-8 text \(.*a\.jsonl:1: no field 'text'\)"):
        prepare(data)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.txt.zst"])
def test_compressed_files_are_refused(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=rf"matches .*{name}, which is compressed; unpack it"):
        open_files(f"{tmp_path}/*")


def test_fields_of_text_files_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"names fields, which \.jsonl .*leave out #q,a"):
        open_files(f"{tmp_path}/*#q,a")


def test_other_fields_and_other_lines_change_the_fingerprint(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "body": "y"}')
    seen = [open_files(f"{path}{fields}").fingerprint for fields in ("", "#body", "#text,body")]
    os.utime(path, (1, 1))
    seen.append(open_files(str(path)).fingerprint)
    assert len(set(seen)) == 4


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", '{"text": "b"}\n', '{"text": "a"}\n{"text": "b"}\n'])
def test_a_file_that_changes_while_it_is_read_is_named(
    name: str, content: str, tmp_path: pathlib.Path
) -> None:
    """Else a cache would hold another text than its name says, or half a line less."""
    path = tmp_path / name
    path.write_text('{"text": "a"}\n')
    source = open_files(str(path))
    assert len(source) == 1
    path.write_text(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ConfigError, match=rf"{name} has changed while it was read; run again when"):
        source[0]


def test_a_few_lines_are_read_without_those_around_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 1_000)
    source = open_files(f"{tmp_path}/a.jsonl")
    assert len(source) == 1_000
    sizes: list[int] = []
    read = files.storage.read

    def counted(*arguments: Any) -> bytes:
        content = read(*arguments)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(files.storage, "read", counted)
    for index in range(0, 1_000, 100):
        source[index]
    assert sizes == [16] * 10
    sizes.clear()
    for index in range(1_000):
        source[index]
    assert sizes == [16, 16 * 999], "in order they are read in blocks"


def test_counting_lines_stops_when_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 10)
    monkeypatch.setattr(files, "SCAN_BYTES", 16)
    answers = iter([False] * 5 + [True])
    data = DataConfig(source=f"files:{tmp_path}/a.jsonl", cache_dir=str(tmp_path / "caches"))
    with pytest.raises(Stopped, match=r"while the lines of .*a\.jsonl were counted"):
        prepare(data, stop=lambda: next(answers))
    assert list(answers) == []
