"""Files by pattern and bytes by range, on local disks and in buckets.

Buckets are read through fsspec, whose packages are imported when a path needs them. What goes wrong
is a ConfigError of one line. `files.py` reads through this.
"""

import contextlib
import dataclasses
import glob
import logging
import os
from collections.abc import Iterator
from typing import Any

from jaxscale.config import ConfigError

REMOTE = ("gs://", "s3://")
# Longer than a slow network needs, and shorter than the minutes that clients wait by default.
CONNECT_SECONDS = 10
MESSAGE_CHARACTERS = 200


@dataclasses.dataclass(frozen=True)
class File:
    """A file, its size in bytes, and a stamp that changes when it is written anew."""

    path: str
    size: int
    stamp: str


def find_files(spec: str, pattern: str) -> list[File]:
    """Return the files that a pattern matches, by path; `**` goes into folders.

    Args:
      spec: `data.source`, for messages.
      pattern: Of local paths, or of `gs://` or `s3://` and a bucket's.

    Raises:
      ConfigError: none matches, or the bucket cannot be listed.
    """
    if pattern.startswith(REMOTE):
        files = _find_remote(spec, pattern)
        place, check = "no file", "check bucket and pattern, where ** goes into folders"
    else:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        paths = {os.path.abspath(path) for path in matches if os.path.isfile(path)}
        files = [File(p, s.st_size, _local_stamp(s)) for p in paths for s in [os.stat(p)]]
        place = f"no local file in {os.getcwd()}"
        check = "check the pattern, where ** goes into folders, or use data.source=python_stdlib"
    if not files:
        raise ConfigError(f"data.source={spec!r} matches {place}; {check}")
    return sorted(files, key=lambda file: file.path)


def read(spec: str, file: File, start: int = 0, stop: int | None = None) -> bytes:
    """Return the bytes [start, stop) of a file; all from `start` on without `stop`.

    Raises:
      ConfigError: it cannot be read, or a local one is no longer what was found.
    """
    stop = file.size if stop is None else stop
    # S3 refuses to read an empty range.
    if start == stop and file.path.startswith(REMOTE):
        return b""
    with _one_line(spec, f"{file.path} cannot be read"):
        if file.path.startswith(REMOTE):
            return bytes(_filesystem(file.path).cat_file(file.path, start=start, end=stop))
        with open(file.path, "rb") as local:
            local.seek(start)
            content = local.read(stop - start)
            status = os.fstat(local.fileno())
    if (status.st_size, _local_stamp(status)) != (file.size, file.stamp):
        raise ConfigError(
            f"data.source={spec!r}: {file.path} has changed while it was read; run again when "
            "nothing writes it"
        )
    return content


def _local_stamp(status: os.stat_result) -> str:
    return str(status.st_mtime_ns)


def _find_remote(spec: str, pattern: str) -> list[File]:
    scheme = pattern[: pattern.index("://") + 3]
    with _one_line(spec, f"{pattern} cannot be listed"):
        filesystem = _filesystem(pattern)
        # Another process may have written since this one last looked.
        filesystem.invalidate_cache()
        try:
            found = filesystem.glob(pattern, detail=True)
        except FileNotFoundError:  # the bucket
            return []
    return [
        File(scheme + name, info["size"], _stamp(info))
        for name, info in found.items()
        if info["type"] == "file" and not name.endswith("/")
    ]


def _stamp(info: dict[str, Any]) -> str:
    """Return a checksum of an object, or else its time: each service has its own names."""
    names = ("ETag", "etag", "mtime", "LastModified")
    return next((str(info[name]) for name in names if info.get(name)), "")


def _filesystem(path: str) -> Any:
    import fsspec

    if path.startswith("s3://"):
        return fsspec.filesystem("s3", config_kwargs={"connect_timeout": CONNECT_SECONDS})
    # It logs what it raises as well, over many lines.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem("gs")


@contextlib.contextmanager
def _one_line(spec: str, what: str) -> Iterator[None]:
    """Turn an error into a ConfigError; clients of buckets raise no common class."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"data.source={spec!r} needs a package that is missing ({error}); "
            "pip install 'jaxscale[cloud]'"
        ) from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = " ".join(reason.split())[:MESSAGE_CHARACTERS]
        raise ConfigError(
            f"data.source={spec!r}: {what} ({reason}); check network, permission and pattern"
        ) from error
