"""The token cache: a corpus as one long stream of token ids per split, on disk.

    FOLDER/index.json                what it was made from, counts, size and SHA-256 of each file
           tokenizer.json            the tokenizer it was made with
           SPLIT-00000.array_record  records of CHUNK_TOKENS ids; the last of a shard is shorter
           SPLIT-documents.npy       where each document starts in the stream, int64
           SPLIT-prompts.npy         tokens of each document's prompt, int64, where there are any

It knows nothing of sequence lengths, so that any length reads it. `prepare` writes it.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module

from jaxscale import records
from jaxscale.config import ConfigError

FORMAT = 1
INDEX_FILE = "index.json"
TRAIN, VALIDATION = SPLITS = ("train", "validation")
# 32 KiB of 16-bit ids: little to read for one window, and enough to compress well.
CHUNK_TOKENS = 16 * 1024
WRITER_OPTIONS = "group_size:1,zstd:1"
# Below this size all checksums are verified whenever a cache is opened.
SMALL_CACHE_BYTES = 256 * 2**20
OTHER_CHECKSUM = "has another checksum than when it was written"


class TokenCache:
    """A token cache, opened and checked; it can be pickled and shared between threads.

    Attributes:
      path: Its folder.
      index: The content of index.json.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: str = "auto") -> None:
        """Open a cache.

        Args:
          path: The folder.
          verify: `sizes` of all files, `full` for their checksums too, or `auto`: full when small.

        Raises:
          ConfigError: a file is missing or is not what index.json says.
        """
        self.path = pathlib.Path(path)
        self.index = read_index(self.path)
        files: dict[str, dict[str, Any]] = self.index["files"]
        total = sum(file["bytes"] for file in files.values())
        full = verify == "full" or (verify == "auto" and total <= SMALL_CACHE_BYTES)
        for name, expected in files.items():
            _check_file(self.path, name, expected, full=full)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(TokenCache, verify="sizes"), (self.path,)

    def split(self, name: str) -> "TokenSplit":
        """Return the stream of `train` or `validation`."""
        return TokenSplit(self, name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of all files: equal for equal caches, wherever they are."""
        return hashlib.sha256(json.dumps(self.index["files"], sort_keys=True).encode()).hexdigest()


class TokenSplit:
    """The token stream of one split: documents one after the other, each followed by `eos`.

    Attributes:
      cache: What it is a split of.
      num_tokens: Length of the stream, with the `eos` of every document.
      num_bytes: Bytes of the text, in UTF-8.
      num_documents: Documents in it.
      document_starts: Position of the first token of each, int64, rising.
      prompt_tokens: How many of its first tokens are prompt, int64; None where none has a prompt.
      prompt_bytes: Bytes of all prompts, in UTF-8.
    """

    def __init__(self, cache: TokenCache, name: str) -> None:
        entry = cache.index["splits"][name]
        self.cache, self.name = cache, name
        self.num_tokens: int = entry["tokens"]
        self.num_bytes: int = entry["bytes"]
        self.num_documents: int = entry["documents"]
        self.document_starts: np.ndarray = np.load(cache.path / entry["document_starts"], "r")
        self.prompt_tokens: np.ndarray | None = None
        self.prompt_bytes = 0
        if "prompt_tokens" in entry:
            self.prompt_tokens = np.load(cache.path / entry["prompt_tokens"], "r")
            self.prompt_bytes = entry["prompt_bytes"]
        self._dtype = np.dtype(cache.index["dtype"])
        self._chunk: int = cache.index["chunk_tokens"]
        shards = [shard["tokens"] for shard in entry["shards"]]
        num_records = [-(-tokens // self._chunk) for tokens in shards]
        self._token_starts = list(itertools.accumulate(shards, initial=0))
        self._record_starts = list(itertools.accumulate(num_records, initial=0))
        # The range of records saves opening every shard at once; readers open on first use.
        paths = [
            f"{cache.path / shard['file']}[0:{count}]"
            for shard, count in zip(entry["shards"], num_records, strict=True)
        ]
        self._records = array_record_data_source.ArrayRecordDataSource(paths) if paths else []

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenSplit, (self.cache, self.name)

    @property
    def source(self) -> str:
        """What the cache was made from."""
        return str(self.cache.index["source"])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the stream, int32."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) is not within {self.num_tokens} tokens")
        ids = np.empty(stop - start, np.int32)
        done = 0
        while done < len(ids):
            record, offset = self._locate(start + done)
            chunk = np.frombuffer(self._records[record], self._dtype)[offset:]
            chunk = chunk[: len(ids) - done]
            ids[done : done + len(chunk)] = chunk
            done += len(chunk)
        return ids

    def has_weight(self, start: int, stop: int, *, document_mask: bool) -> np.ndarray:
        """Tell which tokens at [start, stop) are learnt, where they are targets.

        All but those of a prompt and, with `document_mask`, a document's first token, which nothing
        before it foretells.
        """
        first = max(0, int(np.searchsorted(self.document_starts, start, side="right")) - 1)
        last = int(np.searchsorted(self.document_starts, stop))
        begins = np.asarray(self.document_starts[first:last])
        ends = begins + self._without_weight(first, last, document_mask=document_mask)
        edges = np.zeros(stop - start + 1, np.int64)
        np.add.at(edges, np.clip(begins - start, 0, stop - start), 1)
        np.add.at(edges, np.clip(ends - start, 0, stop - start), -1)
        return np.cumsum(edges[:-1]) == 0

    def count_text(self, stops: np.ndarray, *, document_mask: bool) -> np.ndarray:
        """Return how many tokens at [0, stop) have weight and are not `eos`, for each stop."""
        starts = np.asarray(self.document_starts)
        lengths = self._without_weight(0, len(starts), document_mask=document_mask)
        last = np.searchsorted(starts, stops) - 1  # document that begins last before a stop
        skipped = (np.cumsum(lengths) - lengths)[last] + np.minimum(
            lengths[last], stops - starts[last]
        )
        num_eos = np.searchsorted(starts, stops, side="right") - 1 + (stops == self.num_tokens)
        return stops - skipped - num_eos

    def _without_weight(self, first: int, last: int, *, document_mask: bool) -> np.ndarray:
        """Return how many tokens at the beginning of documents [first, last) have no weight."""
        lengths = np.full(last - first, int(document_mask), np.int64)
        if self.prompt_tokens is not None:
            lengths = np.maximum(lengths, self.prompt_tokens[first:last])
        return lengths

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the record that holds a position of the stream, and the offset inside it."""
        shard = bisect.bisect_right(self._token_starts, position) - 1
        record, offset = divmod(position - self._token_starts[shard], self._chunk)
        return self._record_starts[shard] + record, offset


@dataclasses.dataclass(frozen=True)
class Shard:
    """One written file of a split, and what stands in it."""

    file: str
    tokens: int
    text_bytes: int
    document_starts: np.ndarray
    prompt_tokens: np.ndarray
    prompt_bytes: int
    file_bytes: int
    sha256: str


class ShardWriter:
    """Writes documents into one shard of one split, holding no more than a chunk in memory."""

    def __init__(self, path: pathlib.Path, eos_id: int, dtype: np.dtype) -> None:
        self._path, self._eos_id, self._dtype = path, eos_id, dtype
        self._writer: Any = None
        self._pending = np.empty(0, dtype)
        self._document_starts: list[int] = []
        self._prompt_tokens: list[int] = []
        self._num_tokens = self._text_bytes = self._prompt_bytes = 0

    def add(
        self, ids: np.ndarray, *, text_bytes: int, prompt_tokens: int = 0, prompt_bytes: int = 0
    ) -> None:
        """Append a document and its `eos`; ids and bytes begin with those of the prompt."""
        self._document_starts.append(self._num_tokens)
        self._prompt_tokens.append(prompt_tokens)
        self._prompt_bytes += prompt_bytes
        self._num_tokens += len(ids) + 1
        self._text_bytes += text_bytes
        document = np.append(ids, self._eos_id).astype(self._dtype)
        self._pending = np.concatenate([self._pending, document])
        whole = len(self._pending) - len(self._pending) % CHUNK_TOKENS
        self._write(self._pending[:whole])
        self._pending = self._pending[whole:]

    def close(self) -> Shard | None:
        """Finish the file; a shard without documents has none."""
        self._write(self._pending)
        if self._writer is None:
            return None
        with _os_errors():
            self._writer.close()
        return Shard(
            file=self._path.name,
            tokens=self._num_tokens,
            text_bytes=self._text_bytes,
            document_starts=np.array(self._document_starts, np.int64),
            prompt_tokens=np.array(self._prompt_tokens, np.int64),
            prompt_bytes=self._prompt_bytes,
            file_bytes=self._path.stat().st_size,
            sha256=_sha256(self._path),
        )

    def _write(self, ids: np.ndarray) -> None:
        with _os_errors():
            for start in range(0, len(ids), CHUNK_TOKENS):
                if self._writer is None:
                    self._writer = array_record_module.ArrayRecordWriter(
                        str(self._path), WRITER_OPTIONS
                    )
                self._writer.write(ids[start : start + CHUNK_TOKENS].tobytes())


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Raise OSError where the library of array_record says that a disk is full or broken."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).partition(";")[0]) from error


def token_dtype(num_ids: int) -> np.dtype:
    """Return the smallest unsigned integer that holds the ids of a tokenizer of this size."""
    return np.dtype("<u2" if num_ids <= 2**16 else "<u4")


def write_index(
    folder: pathlib.Path,
    splits: Mapping[str, Sequence[Shard]],
    *,
    header: Mapping[str, Any],
    tokenizer_json: str,
) -> None:
    """Complete a folder of shards, in stream order, to a token cache; `header` joins index.json."""
    (folder / records.TOKENIZER_FILE).write_text(tokenizer_json, encoding="utf-8")
    files = {records.TOKENIZER_FILE: _file_entry(folder / records.TOKENIZER_FILE)}
    entries = {}
    for name, shards in splits.items():
        offsets = itertools.accumulate((shard.tokens for shard in shards), initial=0)
        starts = [s.document_starts + offset for s, offset in zip(shards, offsets, strict=False)]
        starts_file = f"{name}-documents.npy"
        np.save(folder / starts_file, np.concatenate([np.empty(0, np.int64), *starts]))
        files[starts_file] = _file_entry(folder / starts_file)
        files |= {s.file: {"bytes": s.file_bytes, "sha256": s.sha256} for s in shards}
        entries[name] = {
            "documents": sum(len(s.document_starts) for s in shards),
            "tokens": sum(s.tokens for s in shards),
            "bytes": sum(s.text_bytes for s in shards),
            "document_starts": starts_file,
            "shards": [{"file": s.file, "tokens": s.tokens} for s in shards],
        }
        if any(s.prompt_tokens.any() for s in shards):
            prompts_file = f"{name}-prompts.npy"
            np.save(folder / prompts_file, np.concatenate([s.prompt_tokens for s in shards]))
            files[prompts_file] = _file_entry(folder / prompts_file)
            entries[name]["prompt_tokens"] = prompts_file
            entries[name]["prompt_bytes"] = sum(s.prompt_bytes for s in shards)
    index = {
        "format": FORMAT,
        "kind": "token_cache",
        "created": records.now(),
        **header,
        "chunk_tokens": CHUNK_TOKENS,
        "splits": entries,
        "files": files,
    }
    records.write_json(folder / INDEX_FILE, index)


@contextlib.contextmanager
def written_whole(path: pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """Yield a new folder beside `path` that takes its place at the end, or vanishes on an error.

    Where another process was first, its folder stays and this one is dropped, unless `replace`.
    """
    unique = uuid.uuid4().hex[:12]
    partial = path.with_name(f".{path.name}.{unique}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if replace and path.exists():
            path.rename(path.with_name(f".{path.name}.{unique}.old"))
        try:
            partial.rename(path)
        except OSError:
            if not (path / INDEX_FILE).exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(path.with_name(f".{path.name}.{unique}.old"), ignore_errors=True)


def read_index(path: pathlib.Path) -> dict[str, Any]:
    """Return the content of a cache's index.json; raise ConfigError for a damaged one."""
    try:
        index: dict[str, Any] = records.read_json(path / INDEX_FILE)
        found = index["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damage(path, INDEX_FILE, f"cannot be read ({type(error).__name__})") from error
    if found != FORMAT:
        raise damage(path, INDEX_FILE, f"is of format {found}, not {FORMAT}")
    return index


def _check_file(folder: pathlib.Path, name: str, expected: dict[str, Any], *, full: bool) -> None:
    fault = file_fault(folder / name, expected, full=full)
    if fault:
        raise damage(folder, name, fault)


def file_fault(path: pathlib.Path, expected: Mapping[str, Any], *, full: bool) -> str:
    """Return what is wrong with a file, or nothing.

    Args:
      path: Of the file.
      expected: Its `bytes` and `sha256`.
      full: Whether to read it for its checksum.
    """
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"has {size} bytes instead of {expected['bytes']}"
    if full and _sha256(path) != expected["sha256"]:
        return OTHER_CHECKSUM
    return ""


def damage(folder: pathlib.Path, name: str, what: str) -> ConfigError:
    """Return the error of a file that is not as it should be."""
    return ConfigError(
        f"token cache {folder}: {name} {what}; delete that folder, or prepare it again with force"
    )


def _file_entry(path: pathlib.Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
