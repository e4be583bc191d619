"""What a saved step consists of, so that one that is cut short or altered is never taken for whole.

`manifest.json` in the folder of a step names every file with its size and SHA-256. It is written
before the folder gets its final name, so a step without one was not saved by us or has lost it.
Checksums are those of the bytes on disk after the write: they show what changed since, not what
went wrong on the way there.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

FORMAT = 1
MANIFEST_FILE = "manifest.json"
# Orbax writes these two after the manifest: when it saved, and the mark that it came to the end.
METADATA_FILE = "_CHECKPOINT_METADATA"
COMMIT_FILE = "commit_success.txt"
LATE_FILES = (METADATA_FILE, COMMIT_FILE)
# Below this size `auto` verifies the checksums of all files.
SMALL_CHECKPOINT_BYTES = 2**30
# Files up to this size are always hashed: they say what the large ones mean.
SMALL_FILE_BYTES = 64 * 2**10
READ_BYTES = 2**20


def write_manifest(folder: epath.Path, step: int, verify: str) -> None:
    """Write the manifest of a step whose files are all there.

    Args:
      folder: of the step, still under its temporary name.
      step: the step.
      verify: `checkpoint.verify`; it decides which files are hashed.
    """
    sizes = {name: (folder / name).stat().length for name in _files(folder)}
    full = _is_full(verify, sizes)
    files = {
        name: {
            "bytes": size,
            "sha256": _sha256(folder / name) if full or size <= SMALL_FILE_BYTES else None,
        }
        for name, size in sizes.items()
    }
    content = {"format": FORMAT, "step": step, "files": files}
    with (folder / MANIFEST_FILE).open("w") as file:
        file.write(json.dumps({**content, "sha256": _sha256_of(content)}, indent=1) + "\n")
        file.flush()
        if "://" not in os.fspath(folder):
            os.fsync(file.fileno())


def find_damage(folder: epath.Path, step: int, verify: str) -> str | None:
    """Return the first thing that is wrong with a saved step, in words that name the file, or None.

    Args:
      folder: of the step.
      step: the step that the folder's name claims.
      verify: `sizes`, or `full` for the checksums of all files, or `auto`: full when small.
    """
    try:
        return next(_problems(folder, step, verify), None)
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"


def _problems(folder: epath.Path, step: int, verify: str) -> Iterator[str]:
    if not folder.is_dir():
        yield "it is a file and no folder" if folder.exists() else "it is gone"
        return
    manifest = _read(folder)
    if isinstance(manifest, str):
        yield manifest
        return
    if manifest["step"] != step:
        yield f"{MANIFEST_FILE} is that of step {manifest['step']}"
    if not (folder / COMMIT_FILE).exists():
        yield f"{COMMIT_FILE} is missing"
    if not _is_json(folder / METADATA_FILE):
        yield f"{METADATA_FILE} is missing or cut short"
    files: dict[str, dict[str, Any]] = manifest["files"]
    found = set(_files(folder))
    for name in sorted(found - files.keys()):
        yield f"{name} was not saved with it"
    full = _is_full(verify, {name: file["bytes"] for name, file in files.items()})
    for name, file in files.items():
        if name not in found:
            yield f"{name} is missing"
            continue
        size = (folder / name).stat().length
        if size != file["bytes"]:
            yield f"{name} has {size} bytes instead of {file['bytes']}"
        hashed = file["sha256"] is not None and (full or size <= SMALL_FILE_BYTES)
        if hashed and _sha256(folder / name) != file["sha256"]:
            yield f"{name} has another checksum than when it was saved"


def _read(folder: epath.Path) -> dict[str, Any] | str:
    """Return the manifest, or what is wrong with it."""
    path = folder / MANIFEST_FILE
    if not path.exists():
        return f"{MANIFEST_FILE} is missing"
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError):
        return f"{MANIFEST_FILE} is cut short or altered"
    if checksum != _sha256_of(content):
        return f"{MANIFEST_FILE} has been altered"
    if content["format"] != FORMAT:
        return f"{MANIFEST_FILE} has format {content['format']}; this version reads {FORMAT}"
    return dict(content)


def _is_full(verify: str, sizes: Mapping[str, int]) -> bool:
    return verify == "full" or (verify == "auto" and sum(sizes.values()) <= SMALL_CHECKPOINT_BYTES)


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Yield the names of all files below a step, but for late ones and what other programs hide."""
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        if path.name.startswith(".") or name in (*LATE_FILES, MANIFEST_FILE):
            continue
        if path.is_dir():
            yield from _files(path, f"{name}/")
        else:
            yield name


def _is_json(path: epath.Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (FileNotFoundError, ValueError):
        return False


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sha256_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
