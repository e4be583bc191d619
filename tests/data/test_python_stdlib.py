"""The standard library as a corpus: made without TensorFlow, once, and by several processes."""

import dataclasses
import pathlib
import pickle
import subprocess
import sys

import pytest

from jaxscale.config import ConfigError, DataConfig
from jaxscale.data.documents import Document
from jaxscale.data.prepare import PrepareResult, prepare
from jaxscale.data.sources import open_source
from tests.data.conftest import SmallFiles

OPEN = """
import sys
from jaxscale.data.python_stdlib import open_examples
examples = open_examples(sys.argv[1])
assert any(b"def " in examples[i]["text"] for i in range(9))
assert "tensorflow" not in sys.modules
print(len(examples))
"""


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, PrepareResult]:
    data = DataConfig(cache_dir=str(tmp_path_factory.mktemp("stdlib")))
    return data, prepare(data)


def test_documents_are_the_files_of_the_library(
    stdlib: tuple[DataConfig, PrepareResult],
) -> None:
    source = open_source("python_stdlib", cache_dir=pathlib.Path(stdlib[0].cache_dir, "sources"))
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    keys = [again[i].key for i in range(len(again))]
    assert keys == sorted(keys, key=lambda key: pathlib.PurePath(key).parts)
    document = source[keys.index("dataclasses.py")]
    assert isinstance(document, Document)
    assert document.text == pathlib.Path(str(dataclasses.__file__)).read_text("utf-8")
    assert not any("site-packages" in key or key.startswith("test/") for key in keys)


def test_size_and_time_suit_a_first_run(stdlib: tuple[DataConfig, PrepareResult]) -> None:
    data, result = stdlib
    assert 5e6 < result.train.bytes + result.validation.bytes < 20e6
    assert 0.02 < result.validation.bytes / result.train.bytes < 0.12
    assert result.train.tokens == result.train.bytes + result.train.documents
    assert result.seconds < 20
    again = prepare(data)
    assert again.reused
    assert again.seconds < 2


def test_two_processes_make_it_at_once_without_tensorflow(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-W", "error", "-c", OPEN, str(tmp_path)]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0], "the number of documents, and not a line more"
    left = [path.name for path in tmp_path.rglob("*incomplete*")]
    assert left == []


def test_a_full_disk_is_named(tmp_path: pathlib.Path, small_files: SmallFiles) -> None:
    with small_files(100_000), pytest.raises(ConfigError, match=r"cannot be written \(.*too large"):
        prepare(DataConfig(cache_dir=str(tmp_path)))
