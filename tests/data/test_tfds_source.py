"""Datasets of TFDS: read by their files alone, at random, and without TensorFlow."""

import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import pytest

from jaxscale.config import ConfigError, DataConfig
from jaxscale.data.documents import Document
from jaxscale.data.prepare import prepare
from jaxscale.data.sources import open_source
from tests.data import tfds_words

ROOT = pathlib.Path(__file__).parents[2]
NAME = "tfds:jaxscale_words"

# A process that has not imported the dataset's code.
READ = """
import sys
from jaxscale.data.sources import open_source
source = open_source(sys.argv[1], cache_dir="unused")
print(len(source), source[3].key, source[3].text)
assert "tensorflow" not in sys.modules
assert not any("tfds_words" in name for name in sys.modules)
"""


@pytest.fixture
def folder(
    tfds_folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
    """Return a copy of TFDS' data folder that is the one in use."""
    copy = shutil.copytree(tfds_folder, tmp_path / "tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", str(copy))
    return pathlib.Path(copy)


def version_folder(folder: pathlib.Path, config: str = "short") -> pathlib.Path:
    return folder / "jaxscale_words" / config / "1.0.0"


@pytest.mark.parametrize("name", [f"{NAME}/short", f"{NAME}/short:1.0.0", f"{NAME}/short#text"])
def test_a_prepared_dataset_needs_neither_code_nor_tensorflow(
    name: str, folder: pathlib.Path
) -> None:
    command = [sys.executable, "-W", "error", "-c", READ, name]
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"60 jaxscale_words/short/1.0.0:3 {'3 and ' * 4}\n"


def test_documents_are_the_examples_in_order(folder: pathlib.Path) -> None:
    source = open_source(f"{NAME}/short#question,text", cache_dir=folder)
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    for number in (59, 0, 17):
        document = again[number]
        assert isinstance(document, Document)
        assert (document.prompt, document.text) == (
            f"{number}?\n",
            f"{number} and " * (number % 7 + 1),
        )
    assert "tensorflow" not in sys.modules


def test_other_features_are_not_decoded(folder: pathlib.Path) -> None:
    """They may be images, which need TensorFlow."""
    path = version_folder(folder) / "features.json"
    value = json.loads(path.read_text())
    features = value["featuresDict"]["features"]
    features["number"] = {
        "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
        "image": {"dtype": "uint8", "shape": {"dimensions": ["4", "4", "3"]}},
    }
    path.write_text(json.dumps(value))
    document = open_source(f"{NAME}/short#text", cache_dir=folder)[2]
    assert isinstance(document, Document)
    assert document.text == "2 and " * 3


def test_a_dataset_that_tfds_knows_is_prepared(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = open_source(f"{NAME}/long", cache_dir=tmp_path)
    assert len(source) == tfds_words.NUM_EXAMPLES
    assert version_folder(tmp_path, "long").is_dir()
    assert capfd.readouterr() == ("", "")


def test_the_fingerprint_is_of_the_content(folder: pathlib.Path) -> None:
    def fingerprint(name: str = "short") -> str:
        return open_source(f"{NAME}/{name}", cache_dir=folder).fingerprint

    seen = {fingerprint()}
    assert fingerprint() in seen
    tfds_words.write(str(folder), "long")
    seen.add(fingerprint("long"))
    seen.add(fingerprint("short#question"))
    (shard,) = version_folder(folder).glob("*train*")
    os.utime(shard, (1, 1))
    seen.add(fingerprint())
    index = version_folder(folder) / "dataset_info.json"
    index.write_text(index.read_text().replace('"60"', '"59"'))
    seen.add(fingerprint())
    assert len(seen) == 5


def test_tfrecords_are_refused_with_the_remedy(folder: pathlib.Path) -> None:
    index = version_folder(folder) / "dataset_info.json"
    index.write_text(index.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ConfigError, match=r"tfrecord.*at random; tfds build .*=array_record"):
        open_source(f"{NAME}/short", cache_dir=folder)


def test_a_dataset_without_a_train_split_is_refused(folder: pathlib.Path) -> None:
    index = version_folder(folder) / "dataset_info.json"
    info = json.loads(index.read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] != "train"]
    index.write_text(json.dumps(info))
    with pytest.raises(ConfigError, match=r"no split 'train' but test;"):
        open_source(f"{NAME}/short", cache_dir=folder)


@pytest.mark.parametrize("field", ["number", "none", "text,number"])
def test_a_field_that_is_no_text_lists_the_texts(field: str, folder: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"has no text '\w+'; .*#: question, text"):
        open_source(f"{NAME}/short#{field}", cache_dir=folder)


def test_the_default_is_the_only_text(folder: pathlib.Path) -> None:
    path = version_folder(folder) / "features.json"
    value = json.loads(path.read_text())
    features = value["featuresDict"]["features"]
    features["words"] = features.pop("text")
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=r"has no text 'text'; .*#: question, words"):
        open_source(f"{NAME}/short", cache_dir=folder)
    del features["words"]
    path.write_text(json.dumps(value))
    document = open_source(f"{NAME}/short", cache_dir=folder)[5]
    assert isinstance(document, Document)
    assert document.text == "5?"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_set", r"neither prepared in .*TFDS_DATA_DIR.* nor known to TFDS; check the name"),
        ("??", r"cannot be used \(ValueError.*; check the name"),
        ("jaxscale_words/none", r"cannot be used .*; prepare it where TFDS can: tfds build"),
    ],
)
def test_what_tfds_does_not_have_is_one_line(name: str, message: str, folder: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        open_source(f"tfds:{name}", cache_dir=folder)
    assert "\n" not in str(error.value)


def test_it_is_prepared_like_any_source(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = DataConfig(source=f"{NAME}/short", cache_dir=str(tmp_path / "caches"))
    result = prepare(data, workers=1)
    assert result.train.documents + result.validation.documents == tfds_words.NUM_EXAMPLES
    assert prepare(data).reused
    assert result.path.name.startswith("tfds-")
