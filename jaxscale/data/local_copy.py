"""Copies of token caches on a disk of this host, read in place of a slow or shared one.

Every file is checked against index.json while it is copied, and index.json comes last, so that a
half copy is never read; a copy that was interrupted goes on file by file. One process of a host
copies, and the others wait: a local folder is one host's own, where a lock ends with its owner.
`prepare` calls this.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from jaxscale import records
from jaxscale.config import ConfigError, Stopped
from jaxscale.data import kept_shards, token_cache
from jaxscale.data.workers import POLL_SECONDS, Stop

BLOCK_BYTES = 4 * 2**20
COPY_THREADS = 4
MB = 1e6


@dataclasses.dataclass(frozen=True)
class Copied:
    """A token cache on this host's disk.

    Attributes:
      path: Its folder.
      copied_bytes: Bytes that this call copied; 0 where it was there already.
      seconds: Time that took.
    """

    path: pathlib.Path
    copied_bytes: int
    seconds: float

    def __str__(self) -> str:
        if not self.copied_bytes:
            return f"token cache read from its copy {self.path}"
        size = self.copied_bytes / MB
        speed = size / self.seconds
        took = f"{size:,.1f} MB in {self.seconds:.1f} s, {speed:,.0f} MB/s"
        return f"token cache copied to {self.path}: {took}"


def copy_cache(source: pathlib.Path, folder: str, *, stop: Stop) -> Copied:
    """Copy a token cache into a folder of this host, or find it there.

    Args:
      source: The folder of the cache.
      folder: `data.local_cache_dir`.
      stop: Asked now and then whether to stop; the next call goes on with the files that miss.

    Raises:
      ConfigError: the source is damaged, or the folder cannot take it.
      Stopped: `stop` said so.
    """
    started = time.perf_counter()
    root = pathlib.Path(folder).expanduser().absolute()
    setting = f"data.local_cache_dir={folder}"
    records.check_writable(root, setting)
    kept_shards.sweep(root)
    index = token_cache.read_index(source)
    target = root / source.name
    with _locked(root / f".{source.name}.lock", setting, stop):
        if _is_copy(target, index):
            return Copied(target, 0, 0.0)
        partial = root / f".{source.name}.copy"
        copying = Copying(source, partial, setting, stop)
        num_bytes = copying.copy(index["files"])
        with copying.writing(token_cache.INDEX_FILE):
            _put_in_place(partial, target, index)
    return Copied(target, num_bytes, time.perf_counter() - started)


@dataclasses.dataclass(frozen=True)
class Copying:
    """The files of a token cache on their way.

    Attributes:
      source: Where they are.
      partial: Where they go; it becomes the copy when all are there.
      setting: The knob and its value, for messages.
      stop: Asked between blocks whether to stop.
    """

    source: pathlib.Path
    partial: pathlib.Path
    setting: str
    stop: Stop

    def copy(self, files: Mapping[str, Mapping[str, Any]]) -> int:
        """Copy the files that are not there yet; return their bytes."""
        with self.writing(""):
            self.partial.mkdir(exist_ok=True)
        missing = {
            name: expected
            for name, expected in files.items()
            if token_cache.file_fault(self.partial / name, expected, full=True)
        }
        needed = sum(expected["bytes"] for expected in missing.values())
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            raise ConfigError(
                f"{self.setting} has room for {free / MB:,.1f} MB, and the token cache needs "
                f"{needed / MB:,.1f} MB more; free some, or name a folder on a larger disk"
            )
        with concurrent.futures.ThreadPoolExecutor(COPY_THREADS) as pool:
            try:
                list(pool.map(self._copy_file, missing, missing.values()))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return int(needed)

    def _copy_file(self, name: str, expected: Mapping[str, Any]) -> None:
        digest, size = hashlib.sha256(), 0
        begun = self.partial / f".{name}.begun"
        with contextlib.ExitStack() as stack:
            with self._reading(name):
                reader = stack.enter_context((self.source / name).open("rb"))
            with self.writing(name):
                writer = stack.enter_context(begun.open("wb"))
            for block in iter(functools.partial(self._read, reader, name), b""):
                if self.stop():
                    raise Stopped(f"what is copied to {self.setting} is kept")
                digest.update(block)
                size += len(block)
                with self.writing(name):
                    writer.write(block)
            with self.writing(name):
                writer.flush()
        if size != expected["bytes"]:
            what = f"has {size} bytes instead of {expected['bytes']}"
            raise token_cache.damage(self.source, name, what)
        if digest.hexdigest() != expected["sha256"]:
            raise token_cache.damage(self.source, name, token_cache.OTHER_CHECKSUM)
        begun.rename(self.partial / name)

    def _read(self, reader: Any, name: str) -> bytes:
        with self._reading(name):
            block: bytes = reader.read(BLOCK_BYTES)
        return block

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
            raise token_cache.damage(self.source, name, what) from error

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Turn an error of writing a file into a ConfigError that names the setting."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self.setting}: {name or self.partial.name} cannot be written "
                f"({error.strerror}); free some room, or name another folder"
            ) from error


def _is_copy(target: pathlib.Path, index: Mapping[str, Any]) -> bool:
    try:
        return bool(records.read_json(target / token_cache.INDEX_FILE) == index)
    except (OSError, ValueError):
        return False


def _put_in_place(partial: pathlib.Path, target: pathlib.Path, index: Mapping[str, Any]) -> None:
    """Complete the copy, and let it take the place of one of another cache, if there is any."""
    # Files of a cache that this one has replaced may be among them.
    for path in partial.iterdir():
        if path.name not in index["files"]:
            path.unlink()
    records.write_json(partial / token_cache.INDEX_FILE, index)
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.old")
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: pathlib.Path, setting: str, stop: Stop) -> Iterator[None]:
    """Hold a lock that ends with its owner, however that ends."""
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop():
                    raise Stopped(f"waiting for the copy in {setting}") from None
                time.sleep(POLL_SECONDS)
            except OSError as error:
                raise ConfigError(
                    f"{setting} cannot be locked ({error.strerror}); name a folder on a local disk"
                ) from error
        yield
