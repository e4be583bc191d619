"""The token cache: what is read is what was written, and what was altered is refused."""

import concurrent.futures
import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from jaxscale.config import ConfigError
from jaxscale.data import token_cache
from jaxscale.data.token_cache import Shard, ShardWriter, TokenCache, TokenSplit, write_index

EOS = 999
CHUNK = token_cache.CHUNK_TOKENS
# Lengths of documents, by shard: shorter and longer than a record, and ending with one.
LENGTHS = ((5, 3 * CHUNK + 17, 1), (CHUNK - 1, 40), (2,))
NUM_TOKENS = sum(length + 1 for shard in LENGTHS for length in shard)


def write_shards(folder: pathlib.Path) -> tuple[list[Shard], np.ndarray]:
    """Write three shards; return them and the stream that they should make."""
    dice = np.random.default_rng(0)
    shards: list[Shard] = []
    stream: list[np.ndarray] = []
    for number, lengths in enumerate(LENGTHS):
        path = folder / f"train-{number:05d}.array_record"
        writer = ShardWriter(path, EOS, token_cache.token_dtype(1000))
        for length in lengths:
            ids = dice.integers(0, EOS, length)
            stream += [ids, np.array([EOS])]
            writer.add(ids, text_bytes=3 * length)
        shard = writer.close()
        assert shard is not None
        shards.append(shard)
    return shards, np.concatenate(stream)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, np.ndarray]:
    path = tmp_path_factory.mktemp("token_cache") / "made"
    with token_cache.written_whole(path) as folder:
        shards, stream = write_shards(folder)
        write_index(
            folder,
            {"train": shards, "validation": []},
            header={"dtype": token_cache.token_dtype(1000).str},
            tokenizer_json="{}",
        )
    return path, stream


@pytest.fixture
def copy(written: tuple[pathlib.Path, np.ndarray], tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(written[0], tmp_path / "copy"))


@pytest.fixture
def split(written: tuple[pathlib.Path, np.ndarray]) -> TokenSplit:
    return TokenCache(written[0]).split("train")


def test_any_range_reads_as_written(
    split: TokenSplit, written: tuple[pathlib.Path, np.ndarray]
) -> None:
    stream = written[1]
    edges = {0, 1, 6, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 24, 4 * CHUNK + 25, NUM_TOKENS}
    dice = np.random.default_rng(1)
    edges |= set(dice.integers(0, NUM_TOKENS, 20).tolist())
    for start in edges:
        for stop in edges:
            if start <= stop:
                ids = split.read(start, stop)
                np.testing.assert_array_equal(ids, stream[start:stop])
                assert ids.dtype == np.int32


def test_counts_and_boundaries(split: TokenSplit, written: tuple[pathlib.Path, np.ndarray]) -> None:
    stream = written[1]
    assert split.num_tokens == len(stream) == NUM_TOKENS
    assert split.num_documents == sum(map(len, LENGTHS))
    assert split.num_bytes == 3 * (NUM_TOKENS - split.num_documents)
    ends = np.flatnonzero(stream == EOS)
    np.testing.assert_array_equal(split.document_starts, [0, *(ends[:-1] + 1)])
    assert split.document_starts.dtype == np.int64


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, NUM_TOKENS + 1)])
def test_no_range_outside_the_stream(split: TokenSplit, start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        split.read(start, stop)


def test_an_empty_split_is_a_split(written: tuple[pathlib.Path, np.ndarray]) -> None:
    split = TokenCache(written[0]).split("validation")
    assert split.num_tokens == split.num_bytes == len(split.document_starts) == 0
    assert len(split.read(0, 0)) == 0


def test_threads_and_pickles_read_the_same(
    split: TokenSplit, written: tuple[pathlib.Path, np.ndarray]
) -> None:
    stream = written[1]
    again: TokenSplit = pickle.loads(pickle.dumps(split))
    starts = np.random.default_rng(2).integers(0, NUM_TOKENS - 500, 400)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for reader in (split, again):
            for start, ids in zip(
                starts, pool.map(lambda s, r=reader: r.read(s, s + 500), starts), strict=True
            ):
                np.testing.assert_array_equal(ids, stream[start : start + 500])


def test_ids_take_the_room_they_need() -> None:
    assert token_cache.token_dtype(2**16).itemsize == 2
    assert token_cache.token_dtype(2**16 + 1).itemsize == 4


def test_fingerprint_is_of_the_content(
    written: tuple[pathlib.Path, np.ndarray], copy: pathlib.Path
) -> None:
    assert TokenCache(written[0]).fingerprint == TokenCache(copy).fingerprint
    index = json.loads((copy / "index.json").read_text())
    index["files"].popitem()
    (copy / "index.json").write_text(json.dumps(index))
    assert TokenCache(written[0]).fingerprint != TokenCache(copy).fingerprint


REMEDY = "delete that folder, or prepare it again with force"


@pytest.mark.parametrize("name", ["train-00001.array_record", "train-documents.npy"])
def test_damage_is_named_with_its_remedy(copy: pathlib.Path, name: str) -> None:
    path = copy / name
    content = path.read_bytes()

    path.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=rf"{name} has \d+ bytes instead of \d+; {REMEDY}"):
        TokenCache(copy, verify="sizes")

    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    TokenCache(copy, verify="sizes")
    for verify in ("full", "auto"):
        with pytest.raises(ConfigError, match=rf"{name} has another checksum .*{REMEDY}"):
            TokenCache(copy, verify=verify)

    path.unlink()
    with pytest.raises(ConfigError, match=rf"{name} is missing; {REMEDY}"):
        TokenCache(copy, verify="sizes")


def test_large_caches_are_hashed_only_when_asked(
    copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy / "tokenizer.json"
    path.write_text("[]")
    monkeypatch.setattr(token_cache, "SMALL_CACHE_BYTES", 10)
    TokenCache(copy)
    with pytest.raises(ConfigError, match=r"tokenizer\.json has another checksum"):
        TokenCache(copy, verify="full")


@pytest.mark.parametrize(
    ("content", "what"),
    [("", "cannot be read"), ("[1]", "cannot be read"), ('{"format": 99}', "of format 99, not 1")],
)
def test_a_broken_index_is_named(copy: pathlib.Path, content: str, what: str) -> None:
    (copy / "index.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"index\.json .*{what}.*{REMEDY}"):
        TokenCache(copy)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cache"

    def interrupted() -> None:
        with token_cache.written_whole(path) as folder:
            (folder / "index.json").write_text("half")
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replace", [False, True])
def test_of_two_writers_one_stays(tmp_path: pathlib.Path, replace: bool) -> None:
    path = tmp_path / "cache"
    with token_cache.written_whole(path, replace=replace) as slower:
        (slower / "index.json").write_text("slower")
        with token_cache.written_whole(path) as faster:
            (faster / "index.json").write_text("faster")
    assert (path / "index.json").read_text() == ("slower" if replace else "faster")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
