"""Buckets: read from real servers on this machine, and what goes wrong there in one line."""

import os
import pathlib
import pickle
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

from jaxscale.config import ConfigError, DataConfig
from jaxscale.data import files, storage
from jaxscale.data import prepare as prepare_module
from jaxscale.data.documents import Document
from jaxscale.data.prepare import prepare
from jaxscale.data.sources import open_source
from jaxscale.data.token_cache import TokenCache
from tests import emulators

OBJECTS = {
    "a.txt": b"hello",
    "deep/er/b.txt": "caf\u00e9".encode(),
    "deep/latin.txt": b"\xe9",
    "lines.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
}


@pytest.fixture(scope="module")
def gs() -> Iterator[str]:
    """Return the address of a bucket of Google Cloud Storage that holds OBJECTS."""
    with emulators.gs_server("bucket") as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.filesystem("gs").pipe({f"bucket/{key}": value for key, value in OBJECTS.items()})
        yield "gs://bucket"


@pytest.fixture(scope="module")
def s3(s3_bucket: str) -> str:
    """Return the address of a folder of S3 that holds OBJECTS."""
    folder = f"{s3_bucket}/storage"
    fsspec.filesystem("s3").pipe({f"{folder}/{key}": value for key, value in OBJECTS.items()})
    return folder


@pytest.fixture(params=["s3", "gs"])
def bucket(request: Any) -> str:
    return str(request.getfixturevalue(request.param))


def test_a_bucket_reads_like_a_folder(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SCAN_BYTES", 20)
    monkeypatch.setattr(files, "BLOCK_BYTES", 1)
    source = open_source(f"files:{bucket}/**/*", cache_dir="unused")
    assert source.num_bytes == sum(map(len, OBJECTS.values()))
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    found = [again[index] for index in range(len(again))]
    texts = {document.key: getattr(document, "text", None) for document in found}
    assert texts == {
        f"{bucket}/a.txt": "hello",
        f"{bucket}/deep/er/b.txt": "caf\u00e9",
        f"{bucket}/deep/latin.txt": None,
        f"{bucket}/lines.jsonl:1": "one",
        f"{bucket}/lines.jsonl:2": "two",
    }
    assert list(texts) == sorted(texts)
    assert len(open_source(f"files:{bucket}/*.txt", cache_dir="unused")) == 1


def test_another_content_is_another_fingerprint(bucket: str) -> None:
    scheme = bucket.partition(":")[0]
    seen = set()
    for content in (b"one", b"two", b"three"):
        fsspec.filesystem(scheme).pipe(f"{bucket}/new/a.txt", content)
        source = open_source(f"files:{bucket}/new/*", cache_dir="unused")
        seen.add(source.fingerprint)
        document = source[0]
        assert isinstance(document, Document)
        assert document.text == content.decode()
        assert open_source(f"files:{bucket}/new/*", cache_dir="unused").fingerprint in seen
    assert len(seen) == 3
    fsspec.filesystem(scheme).rm(f"{bucket}/new", recursive=True)


def test_workers_read_the_bucket_themselves(
    bucket: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 10)
    fingerprints = set()
    for workers in (1, 2):
        data = DataConfig(
            source=f"files:{bucket}/**/*",
            validation_fraction=0.0,
            cache_dir=str(tmp_path / str(workers)),
        )
        result = prepare(data, workers=workers)
        assert result.train.bytes == len(b"hello") + len("caf\u00e9".encode()) + 6
        assert result.skipped["not UTF-8"].names == (f"{bucket}/deep/latin.txt",)
        cache = TokenCache(result.path)
        assert len(cache.index["splits"]["train"]["shards"]) > 1
        fingerprints.add(cache.fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.parametrize("path", ["none/*.txt", "../no-such-bucket/*.txt"])
def test_what_is_not_there_is_named(path: str, bucket: str) -> None:
    pattern = f"{bucket}/{path}"
    if path.startswith("../"):
        pattern = pattern[: pattern.index("://") + 3] + path.removeprefix("../")
    with pytest.raises(ConfigError, match=r"matches no file; check bucket and pattern"):
        open_source(f"files:{pattern}", cache_dir="unused")


def test_an_object_that_has_gone_is_named(bucket: str) -> None:
    filesystem = fsspec.filesystem(bucket.partition(":")[0])
    filesystem.pipe(f"{bucket}/gone/a.txt", b"x")
    source = open_source(f"files:{bucket}/gone/*", cache_dir="unused")
    filesystem.rm(f"{bucket}/gone/a.txt")
    with pytest.raises(ConfigError, match=r"/gone/a\.txt cannot be read \(") as error:
        source[0]
    assert "\n" not in str(error.value)


def test_without_permission_it_is_one_line(s3: str) -> None:
    address = os.environ["AWS_ENDPOINT_URL"] + "/moto-api/reset-auth"

    def reset(count: str) -> None:
        request = urllib.request.Request(address, count.encode(), {"Content-Type": "text/plain"})
        urllib.request.urlopen(request).close()

    reset("0")
    try:
        with pytest.raises(
            ConfigError, match=r"cannot be listed \(.*; check network, perm"
        ) as error:
            open_source(f"files:{s3}/*", cache_dir="unused")
    finally:
        reset("inf")
    assert "\n" not in str(error.value)


def test_without_a_network_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://127.0.0.1:{emulators.free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(ConfigError, match=r"\(EndpointConnectionError: .*check network") as error:
        open_source("files:s3://bucket/*", cache_dir="unused")
    assert "\n" not in str(error.value)
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_missing_package_names_the_extra(scheme: str) -> None:
    code = f"""
import sys
sys.modules["s3fs"] = sys.modules["gcsfs"] = None
from jaxscale.data.sources import open_source
open_source("files:{scheme}://bucket/*", cache_dir="unused")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = run.stderr.splitlines()[-1]
    assert last.startswith("jaxscale.config.ConfigError: data.source='files:")
    assert last.endswith("pip install 'jaxscale[cloud]'")


def test_local_files_need_no_package(corpus: pathlib.Path) -> None:
    code = f"""
import sys
from jaxscale.data.sources import open_source
open_source("files:{corpus}/*.txt", cache_dir="unused")[0]
assert "fsspec" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert storage.REMOTE == ("gs://", "s3://")


def test_an_empty_object_is_an_empty_document(bucket: str) -> None:
    filesystem = fsspec.filesystem(bucket.partition(":")[0])
    filesystem.pipe({f"{bucket}/empty/{name}": b"" for name in ("a.txt", "b.jsonl")})
    source = open_source(f"files:{bucket}/empty/*", cache_dir="unused")
    assert [source[index] for index in range(len(source))] == [
        Document(f"{bucket}/empty/a.txt", "")
    ]
    filesystem.rm(f"{bucket}/empty", recursive=True)
