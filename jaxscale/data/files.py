"""Files as documents: a text file is one, and so is each line of a `.jsonl` file.

Only names, sizes and stamps are read when a source is opened. Lines are found by one scan, when a
document is first asked for.
"""

import functools
import hashlib
import json
from typing import Any

import numpy as np

from jaxscale.config import ConfigError, Stopped
from jaxscale.data import storage
from jaxscale.data.documents import EMPTY, NOT_UTF8, Document, Skipped, document_of, split_fields
from jaxscale.data.storage import File
from jaxscale.data.workers import Stop, never

LINES_SUFFIX = ".jsonl"
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip")
DEFAULT_FIELD = "text"
NOT_JSON = "not a JSON object"
SCAN_BYTES = 16 * 2**20
BLOCK_BYTES = 4 * 2**20


def open_files(spec: str, argument: str, *, stop: Stop = never) -> "FilesSource":
    """Open `files:GLOB`, `files:GLOB#FIELD` or `files:GLOB#PROMPT,ANSWER`.

    Told to stop, the scan for lines raises Stopped.

    Raises:
      ConfigError: no file matches, one is compressed, or fields are named and no file has any.
    """
    pattern, fields = split_fields(spec, argument)
    files = storage.find_files(spec, pattern)
    for file in files:
        if file.path.endswith(COMPRESSED_SUFFIXES):
            raise ConfigError(
                f"data.source={spec!r} matches {file.path}, which is compressed; "
                "unpack it or narrow the pattern"
            )
    if fields and not any(file.path.endswith(LINES_SUFFIX) for file in files):
        raise ConfigError(
            f"data.source={spec!r} names fields, which {LINES_SUFFIX} files have, and matches "
            f"none of them; leave out #{','.join(fields)} or match such files"
        )
    return FilesSource(spec, tuple(files), fields or (DEFAULT_FIELD,), stop)


class FilesSource:
    """The documents of some files, in the order of paths and lines."""

    def __init__(
        self, spec: str, files: tuple[File, ...], fields: tuple[str, ...], stop: Stop
    ) -> None:
        self._spec, self._files, self._fields, self._stop = spec, files, fields, stop
        words = [[file.path, file.size, file.stamp] for file in files]
        digest = hashlib.sha256(json.dumps([words, fields]).encode()).hexdigest()
        self.fingerprint = f"files {digest}"
        self.num_bytes = sum(file.size for file in files)
        self._block = (-1, 0, b"")  # number of the file, offset in it, content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_block": (-1, 0, b""), "_stop": never}

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, index: int) -> Document | Skipped:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._edges, index, side="right")) - 1
        file = self._files[number]
        path = file.path
        if number not in self._line_starts:
            try:
                return Document(path, storage.read(self._spec, file).decode())
            except UnicodeDecodeError:
                return Skipped(path, NOT_UTF8)
        line = index - int(self._edges[number])
        start, stop = self._line_starts[number][line : line + 2].tolist()
        return _line_document(f"{path}:{line + 1}", self._read(number, start, stop), self._fields)

    @functools.cached_property
    def _line_starts(self) -> dict[int, np.ndarray]:
        """Where each line starts and the last one ends, int64, by number of the file."""
        return {
            number: _find_lines(self._spec, file, self._stop)
            for number, file in enumerate(self._files)
            if file.path.endswith(LINES_SUFFIX)
        }

    @functools.cached_property
    def _edges(self) -> np.ndarray:
        """Number of the first document of each file, and of all documents."""
        lines = self._line_starts
        counts = [len(lines[n]) - 1 if n in lines else 1 for n in range(len(self._files))]
        return np.cumsum([0, *counts])

    def _read(self, number: int, start: int, stop: int) -> bytes:
        """Return bytes of a file out of the block that was read last, or else of a new one."""
        held, offset, content = self._block
        if held != number or not offset <= start <= stop <= offset + len(content):
            file = self._files[number]
            # Reading ahead pays for lines in order, not for a few out of a huge file.
            is_next = (held, offset + len(content)) == (number, start)
            end = min(max(stop, start + BLOCK_BYTES), file.size) if is_next else stop
            offset, content = start, storage.read(self._spec, file, start, end)
            self._block = (number, offset, content)
        return content[start - offset : stop - offset]


def _find_lines(spec: str, file: File, stop: Stop) -> np.ndarray:
    starts = [np.zeros(1, np.int64)]
    for offset in range(0, file.size, SCAN_BYTES):
        if stop():
            raise Stopped(f"while the lines of {file.path} were counted")
        content = storage.read(spec, file, offset, min(offset + SCAN_BYTES, file.size))
        newlines = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n"))
        starts.append(newlines + (offset + 1))
    edges = np.concatenate(starts)
    return edges if edges[-1] == file.size else np.append(edges, file.size)


def _line_document(key: str, line: bytes, fields: tuple[str, ...]) -> Document | Skipped:
    if not line.strip():
        return Skipped(key, EMPTY)
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Skipped(key, NOT_UTF8)
    except (ValueError, RecursionError):
        return Skipped(key, NOT_JSON)
    if not isinstance(record, dict):
        return Skipped(key, NOT_JSON)
    return document_of(key, record, fields)
