"""Windows and batches: right against a direct computation, and the same on every mesh."""

import contextlib
import dataclasses
import hashlib
import itertools
import pathlib
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

import jax
import numpy as np
import psutil
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.config import ConfigError, DataConfig
from jaxscale.data import loader as loader_module
from jaxscale.data import prepare as prepare_module
from jaxscale.data.loader import HostBatch, Loader, Windows
from jaxscale.data.prepare import prepare
from jaxscale.data.token_cache import TokenCache

BATCH = 8
EOS = 256


def make_loader(cache: TokenCache, data: DataConfig, **changes: object) -> Loader:
    arguments = {"global_batch_size": BATCH, "seed": 3, **changes}
    return Loader(cache, data, **arguments)  # type: ignore[arg-type]


def read_stream(cache: TokenCache, split: str = "train") -> np.ndarray:
    tokens = cache.split(split)
    return tokens.read(0, tokens.num_tokens)


def expected_window(stream: np.ndarray, index: int, length: int, mask: bool) -> HostBatch:
    """Cut a window by walking its tokens one by one."""
    tokens = stream[index * length : index * length + length + 1].tolist()
    segments, weights, segment = [], [], 1
    for token in tokens[:-1]:
        segments.append(segment)
        weights.append(0.0 if mask and token == EOS else 1.0)
        segment += mask and token == EOS
    return {
        "tokens": np.array(tokens[:-1], np.int32),
        "targets": np.array(tokens[1:], np.int32),
        "segments": np.array(segments, np.int32),
        "weights": np.array(weights, np.float32),
    }


def assert_same(found: HostBatch, expected: HostBatch) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array, err_msg=name)
        assert found[name].dtype == array.dtype, name


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("length", [1, 7, 100, 3_000])
def test_every_window_is_as_computed_directly(cache: TokenCache, length: int, mask: bool) -> None:
    stream = read_stream(cache)
    windows = Windows(cache.split("train"), length, mask)
    assert len(windows) == (len(stream) - 1) // length
    some = range(0, len(windows), max(1, 997 // length))
    for index in some:
        assert_same(windows[index], expected_window(stream, index, length, mask))


@pytest.mark.parametrize("mask", [True, False])
def test_windows_around_each_boundary(cache: TokenCache, mask: bool) -> None:
    """A window may begin with `eos`, end with it, or end just before or after it."""
    stream = read_stream(cache)
    split = cache.split("train")
    positions = np.flatnonzero(stream == EOS)[:8].tolist()
    for position, shift in itertools.product(positions, (-1, 0, 1, 2, 3)):
        length = position + shift
        windows = Windows(split, length, mask)
        num_bytes = 0.0
        for index in range(min(2, len(windows))):
            window = expected_window(stream, index, length, mask)
            assert_same(windows[index], window)
            num_bytes += (window["weights"] * (window["targets"] != EOS)).sum()
            assert windows.text_bytes(index + 1) == num_bytes


def rows(loader: Loader, step: int) -> HostBatch:
    """Return the batch of one step, from a stream that begins there."""
    with contextlib.closing(loader.batches(step)) as batches:
        return next(batches)


def batch_hash(batch: HostBatch) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(batch.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def test_rows_are_a_function_of_seed_and_step(cache: TokenCache, data: DataConfig) -> None:
    first = [batch_hash(rows(make_loader(cache, data), step)) for step in range(30)]
    loader = make_loader(cache, data)
    assert [batch_hash(rows(loader, step)) for step in reversed(range(30))] == first[::-1]
    for start, prefetch in ((0, 2), (5, 7), (29, 1)):
        streamed = itertools.islice(loader.batches(start, prefetch=prefetch), 30 - start)
        assert [batch_hash(batch) for batch in streamed] == first[start:]
    other = make_loader(cache, data, seed=4)
    assert batch_hash(rows(other, 0)) != first[0]
    assert len(set(first)) == 30


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(
    cache: TokenCache, data: DataConfig
) -> None:
    loader = make_loader(cache, dataclasses.replace(data, length=500), global_batch_size=1)
    total = len(loader.windows)
    every = sorted(loader.windows[i]["tokens"].tobytes() for i in range(total))
    read = [batch["tokens"].tobytes() for batch in itertools.islice(loader.batches(), 2 * total)]
    orders = [read[:total], read[total:]]
    assert sorted(orders[0]) == sorted(orders[1]) == every
    assert orders[0] != orders[1]


def test_a_batch_does_not_depend_on_how_it_is_cut(cache: TokenCache, data: DataConfig) -> None:
    large = rows(make_loader(cache, data, global_batch_size=12), 1)
    small = make_loader(cache, data, global_batch_size=4)
    assert_same(
        {name: np.concatenate([rows(small, s)[name] for s in (3, 4, 5)]) for name in large}, large
    )


SHARDINGS = [
    ((1, 1), ("a", "b")),
    ((2, 1), ("a", "b")),
    ((4, 1), ("a", "b")),
    ((8, 1), ("a", "b")),
    ((2, 4), ("a", "b")),
    ((4, 2), (("a", "b"), None)),
    ((4, 2), (None, "b")),
    ((2, 4), (None, None)),
]


@pytest.mark.parametrize(("shape", "spec"), SHARDINGS)
def test_batches_are_equal_on_every_mesh(
    shape: tuple[int, int], spec: tuple[object, ...], cache: TokenCache, data: DataConfig
) -> None:
    used = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    sharding = NamedSharding(jax.sharding.Mesh(used, ("a", "b")), PartitionSpec(*spec))
    loader = make_loader(cache, data, sharding=sharding)
    plain = make_loader(cache, data)
    for step, batch in enumerate(itertools.islice(loader.batches(), 3)):
        for array in batch.values():
            assert isinstance(array, jax.Array)
            assert array.sharding == sharding
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, np.asarray(array)[shard.index])
        assert_same({name: np.asarray(array) for name, array in batch.items()}, rows(plain, step))
        gathered = {name: np.asarray(array) for name, array in batch.items()}
        assert batch_hash(gathered) == batch_hash(rows(plain, step))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 10_000])
def test_evaluation_covers_each_window_once_in_order(
    batch_size: int, cache: TokenCache, data: DataConfig
) -> None:
    loader = make_loader(cache, data, global_batch_size=batch_size)
    batches = list(loader.evaluation_batches())
    total = len(loader.validation_windows)
    assert len(batches) == -(-total // batch_size)
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    stream = read_stream(cache, "validation")
    for index in range(total):
        row = {name: array[index] for name, array in rows.items()}
        assert_same(row, expected_window(stream, index, data.length, True))
    assert rows["weights"].shape == (len(batches) * batch_size, data.length)
    assert not rows["weights"][total:].any()
    limited = list(loader.evaluation_batches(2))
    assert len(limited) == min(2, len(batches))
    for found, expected in zip(limited, batches, strict=False):
        assert_same(found, expected)
    assert loader.num_evaluation_windows(2) == min(total, 2 * batch_size)
    assert loader.num_evaluation_windows() == total


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("length", [1, 7, 100, 1_001])
def test_text_bytes_count_the_weighted_targets(cache: TokenCache, length: int, mask: bool) -> None:
    for name in ("train", "validation"):
        split = cache.split(name)
        windows = Windows(split, length, mask)
        stop = min(300, len(windows))
        running = 0.0
        for index in range(stop):
            window = windows[index]
            running += (window["weights"] * (window["targets"] != EOS)).sum()
            assert windows.text_bytes(index + 1) == running
    last = Windows(split, split.num_tokens - 1, mask)
    starts = split.num_documents - 1
    assert last.text_bytes(1) == split.num_bytes - 1 - (starts if mask else 0)


def test_batches_repeat_a_corpus_smaller_than_one(cache: TokenCache, data: DataConfig) -> None:
    long = dataclasses.replace(data, length=cache.split("train").num_tokens - 1)
    loader = make_loader(cache, long)
    assert len(loader.windows) == 1
    tokens = rows(loader, 0)["tokens"]
    assert (tokens == tokens[0]).all()


def test_too_little_text_names_length_and_tokens(cache: TokenCache, data: DataConfig) -> None:
    train, validation = cache.split("train"), cache.split("validation")
    long = dataclasses.replace(data, length=train.num_tokens)
    with pytest.raises(ConfigError, match=rf"data\.length={long.length} .*holds {long.length};"):
        make_loader(cache, long)
    loader = make_loader(cache, dataclasses.replace(data, length=validation.num_tokens))
    with pytest.raises(ConfigError, match=r"the validation split .*raise data\.validation_fract"):
        loader.evaluation_batches()


def test_nothing_held_apart_still_trains(fresh: DataConfig) -> None:
    result = prepare(dataclasses.replace(fresh, validation_fraction=0.0))
    loader = make_loader(TokenCache(result.path), fresh)
    next(loader.batches())
    assert len(loader.validation_windows) == 0


def reading_threads() -> int:
    return sum(thread.name.startswith("grain-prefetch") for thread in threading.enumerate())


def assert_threads_end() -> None:
    deadline = time.monotonic() + 30
    while reading_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reading_threads() == 0


def test_closing_ends_the_threads(cache: TokenCache, data: DataConfig) -> None:
    assert_threads_end()  # those of other tests
    loader = make_loader(cache, data)
    batches = loader.batches()
    next(batches)
    assert reading_threads() > 0
    batches.close()
    assert_threads_end()
    for _ in loader.batches(5):
        assert reading_threads() > 0
        break
    assert_threads_end()


def interrupted(batches: Iterable[object]) -> None:
    for _ in batches:
        raise KeyboardInterrupt


def test_ctrl_c_ends_the_threads(cache: TokenCache, data: DataConfig) -> None:
    loader = make_loader(cache, data)
    for batches in (loader.batches(), loader.evaluation_batches()):
        with pytest.raises(KeyboardInterrupt), contextlib.closing(batches):
            interrupted(batches)
        assert_threads_end()


def test_errors_of_reading_reach_the_caller(cache: TokenCache, fresh: DataConfig) -> None:
    opened = TokenCache(prepare(fresh).path)
    loader = make_loader(opened, fresh)
    for path in opened.path.glob("train-*.array_record"):
        path.unlink()
    with pytest.raises(Exception, match=r"train-0000\d\.array_record") as error:
        next(loader.batches())
    assert_threads_end()
    assert error.tb is not None  # which would keep what is not closed alive


ONE_PROCESS = """
import itertools, sys
import jax, numpy as np
from jaxscale import runtime
from jaxscale.config import DataConfig
from jaxscale.data.loader import Loader
from jaxscale.data.token_cache import TokenCache

port, count, number, cache, out = sys.argv[1:]
runtime.fake_devices(f"cpu:{8 // int(count)}")
group = runtime.ProcessGroup(f"127.0.0.1:{port}", int(count), int(number), "test")
runtime.join(group, timeout_seconds=60)
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
data = DataConfig(length=100)
loader = Loader(TokenCache(cache), data, global_batch_size=8, seed=3, sharding=sharding)
assert len(loader.local_rows) == 8 // int(count), loader.local_rows
batches = loader.batches(start_step=1)
batch = list(itertools.islice(batches, 3))[-1]
shards = batch["tokens"].addressable_shards
index = [[s.index[0].start or 0, s.index[1].start or 0] for s in shards]
np.savez(out, *[s.data for s in shards], index=index)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("count", [2, 4])
def test_processes_read_their_rows_of_the_same_batch(
    count: int, cache: TokenCache, data: DataConfig, tmp_path: pathlib.Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = [
        [str(port), str(count), str(n), str(cache.path), str(tmp_path / f"{n}.npz")]
        for n in range(count)
    ]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_PROCESS, *more], stderr=subprocess.PIPE, text=True
        )
        for more in arguments
    ]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * count, errors
    expected = rows(make_loader(cache, data), 3)["tokens"]
    seen = np.zeros(expected.shape, int)
    for n in range(count):
        saved = np.load(tmp_path / f"{n}.npz")
        for place, (row, column) in enumerate(saved["index"]):
            part = saved[f"arr_{place}"]
            where = np.s_[row : row + part.shape[0], column : column + part.shape[1]]
            np.testing.assert_array_equal(part, expected[where])
            seen[where] += 1
    assert (seen == 1).all()


def test_a_cache_of_more_shards_than_files_may_be_open_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that was read stays open, and many systems allow 1,024 files unless asked."""
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 10_000)
    data = DataConfig(source="synthetic", length=100, cache_dir=str(tmp_path))
    cache = TokenCache(prepare(data).path)
    assert len(cache.index["splits"]["train"]["shards"]) > 100
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 50, before[1]))
    try:
        loader = make_loader(cache, data)
        (windows,) = loader.windows.parts
        assert all(len(windows[i]["tokens"]) for i in range(0, len(windows), 50))
        monkeypatch.setattr(loader_module, "OTHER_FILES", 2**40)
        with pytest.raises(ConfigError, match=r"need \d+ open files, and .* with ulimit -Hn \d+"):
            make_loader(cache, data)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
