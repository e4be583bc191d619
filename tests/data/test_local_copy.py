"""Local copies: equal to what they copy, never half, made once per host, and each fault named."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest

from jaxscale.config import ConfigError, DataConfig, Stopped
from jaxscale.data import local_copy
from jaxscale.data import prepare as prepare_module
from jaxscale.data.loader import Loader
from jaxscale.data.local_copy import copy_cache
from jaxscale.data.prepare import prepare
from jaxscale.data.token_cache import TokenCache
from jaxscale.data.workers import never
from tests.conftest import ROOT


@pytest.fixture
def source(
    fresh: DataConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
    """Return a cache of several shards."""
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 50_000)
    return prepare(fresh).path


@pytest.fixture
def local(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "local")


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def visible(local: str) -> list[str]:
    return [path.name for path in pathlib.Path(local).iterdir() if path.name[0] != "."]


def batch_hashes(cache: TokenCache, data: DataConfig) -> list[str]:
    loader = Loader(cache, data, global_batch_size=4, seed=0)
    with contextlib.closing(loader.batches()) as batches:
        every = [*itertools.islice(batches, 5), *loader.evaluation_batches()]
    return [
        hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
        for batch in every
    ]


def test_batches_are_those_of_the_source(
    source: pathlib.Path, fresh: DataConfig, local: str
) -> None:
    result = prepare(dataclasses.replace(fresh, local_cache_dir=local))
    assert result.path == pathlib.Path(local, source.name)
    assert files_of(result.path) == files_of(source)
    caches = [TokenCache(path) for path in (source, result.path)]
    assert caches[0].fingerprint == caches[1].fingerprint
    assert len(caches[0].index["splits"]["train"]["shards"]) > 2
    hashes = [batch_hashes(cache, fresh) for cache in caches]
    assert len(set(hashes[0])) > 5
    assert hashes[0] == hashes[1]
    assert visible(local) == [source.name]


def test_it_is_copied_once_and_the_speed_is_told(
    source: pathlib.Path, fresh: DataConfig, local: str
) -> None:
    first = copy_cache(source, local, stop=never)
    num_bytes = sum(file["bytes"] for file in TokenCache(source).index["files"].values())
    assert first.copied_bytes == num_bytes
    assert f"{num_bytes / 1e6:,.1f} MB in" in str(first)
    assert "MB/s" in str(first)
    second = prepare(dataclasses.replace(fresh, local_cache_dir=local))
    assert second.copied is not None
    assert second.copied.copied_bytes == 0
    assert second.notes == (f"token cache read from its copy {first.path}",)


def test_an_interrupted_copy_goes_on_file_by_file(
    source: pathlib.Path, local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_copy, "COPY_THREADS", 1)
    asked = itertools.chain([False] * 3, itertools.repeat(True))
    with pytest.raises(Stopped, match="is kept"):
        copy_cache(source, local, stop=lambda: next(asked))
    assert visible(local) == []
    (partial,) = pathlib.Path(local).glob(".*.copy")
    done = [path for path in partial.iterdir() if path.name[0] != "."]
    assert len(done) == 3
    # One of them is damaged meanwhile; it is copied again.
    done[0].write_bytes(b"x" * done[0].stat().st_size)
    expected = TokenCache(source).index["files"]
    kept = sum(expected[path.name]["bytes"] for path in done[1:])
    copied = copy_cache(source, local, stop=never)
    assert copied.copied_bytes == sum(file["bytes"] for file in expected.values()) - kept
    assert files_of(copied.path) == files_of(source)


def test_a_cache_that_was_written_anew_is_copied_anew(
    source: pathlib.Path, fresh: DataConfig, local: str
) -> None:
    here = dataclasses.replace(fresh, local_cache_dir=local)
    path = prepare(here).path
    index = json.loads((source / "index.json").read_text())
    (source / "index.json").write_text(json.dumps({**index, "created": "later"}))
    assert prepare(here).path == path
    assert files_of(path)["index.json"] != json.dumps(index).encode()
    assert TokenCache(path).index["created"] == "later"
    forced = prepare(here, force=True)
    assert TokenCache(path).index["created"] == TokenCache(source).index["created"]
    assert forced.copied is not None
    assert forced.copied.copied_bytes > 0


@pytest.mark.parametrize("damage", ["content", "size", "missing"])
def test_a_damaged_source_is_named(source: pathlib.Path, local: str, damage: str) -> None:
    victim = source / "train-00001.array_record"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "content" else content[:-1])
    what = {
        "content": "has another checksum",
        "size": r"has \d+ bytes instead of \d+",
        "missing": r"cannot be read \(No such file",
    }[damage]
    place = rf"token cache {source}: train-00001\.array_record {what}"
    with pytest.raises(ConfigError, match=place) as error:
        copy_cache(source, local, stop=never)
    assert "\n" not in str(error.value)
    assert visible(local) == []


def test_a_damaged_copy_is_named(source: pathlib.Path, fresh: DataConfig, local: str) -> None:
    here = dataclasses.replace(fresh, local_cache_dir=local)
    victim = prepare(here).path / "train-00001.array_record"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    place = rf"token cache {local}/{source.name}: train-00001\.array_record has another checksum"
    with pytest.raises(ConfigError, match=f"{place}.*; delete that folder"):
        prepare(here)
    shutil.rmtree(victim.parent)
    assert prepare(here).path == victim.parent


def test_too_little_room_is_said_before_the_copy(
    source: pathlib.Path, local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000))
    with pytest.raises(ConfigError, match=r"data\.local_cache_dir=.* has room for 0\.0 MB, and "):
        copy_cache(source, local, stop=never)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
def test_a_disk_that_fills_up_is_named(source: pathlib.Path, local: str) -> None:
    partial = pathlib.Path(local, f".{source.name}.copy")
    partial.mkdir(parents=True)
    (partial / ".train-00001.array_record.begun").symlink_to("/dev/full")
    with pytest.raises(
        ConfigError,
        match=r"data\.local_cache_dir=.*: train-00001\.array_record cannot be written \(No space",
    ):
        copy_cache(source, local, stop=never)


def test_a_folder_that_cannot_be_written_is_named(source: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.local_cache_dir=/proc/x cannot be written"):
        copy_cache(source, "/proc/x", stop=never)


COPY = """
import pathlib, sys, time
from jaxscale.data import local_copy
from jaxscale.data.workers import never

read = local_copy.Copying._read

def slow_read(self, reader, name):
    time.sleep(0.05)
    return read(self, reader, name)

local_copy.Copying._read = slow_read
print(local_copy.copy_cache(pathlib.Path(sys.argv[1]), sys.argv[2], stop=never).copied_bytes)
"""


def test_of_several_processes_one_copies(source: pathlib.Path, local: str) -> None:
    command = [sys.executable, "-c", COPY, str(source), local]
    runs = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        for _ in range(3)
    ]
    copied = sorted(int(run.communicate(timeout=60)[0]) for run in runs)
    assert copied[:2] == [0, 0]
    assert copied[2] > 0
    assert files_of(pathlib.Path(local, source.name)) == files_of(source)


def test_a_lock_ends_with_its_owner(source: pathlib.Path, local: str) -> None:
    command = [sys.executable, "-c", COPY.replace("0.05", "60"), str(source), local]
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        while not list(pathlib.Path(local).glob(".*.copy/.*")):
            assert run.poll() is None
        asked = itertools.chain([False], itertools.repeat(True))
        with pytest.raises(Stopped, match="waiting for the copy"):
            copy_cache(source, local, stop=lambda: next(asked))
    finally:
        run.kill()
        run.wait()
    assert files_of(copy_cache(source, local, stop=never).path) == files_of(source)


def test_a_copy_that_cannot_take_its_place_is_one_line(source: pathlib.Path, local: str) -> None:
    """As where the disk is full at the very end."""
    (pathlib.Path(local) / f".{source.name}.copy" / "folder").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"local: index\.json cannot be written \("):
        copy_cache(source, local, stop=never)
    assert visible(local) == []
