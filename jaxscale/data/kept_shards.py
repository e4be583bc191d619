"""The shards of a token cache that is being written: what is done outlives the process.

    ROOT/.NAME.partial/PASS/00003/    shard 3: its files, and shard.json with sizes and SHA-256
                       PASS/.00003.*  a shard that somebody writes

What stands in a shard follows from its number, the corpus and the tokenizer alone. So nothing is
locked, which would be brittle on shared file systems: processes may share the folder, whoever
finishes a shard first renames it into place, and the others find it there. `prepare` calls this.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxscale import records
from jaxscale.data.shards import DoneShard, skipped_from_json
from jaxscale.data.token_cache import Shard, file_fault

SHARD_FILE = "shard.json"
# A living process touches what it writes more often than this.
BEGUN_SECONDS = 3600.0
# So long an interrupted prepare can be resumed.
KEPT_SECONDS = 7 * 24 * 3600.0


def find(folder: pathlib.Path, number: int) -> DoneShard | None:
    """Return a shard that is done; one whose files are not as they were written is removed."""
    place = _place(folder, number)
    try:
        entry = records.read_json(place / SHARD_FILE)
        splits = {name: _from_json(values) for name, values in entry["splits"].items()}
        done = DoneShard(splits, skipped_from_json(entry["skipped"]), place, found=True)
    except (OSError, ValueError, KeyError, TypeError):
        done = None
    if done is None or any(_fault(place, shard) for shard in done.splits.values()):
        shutil.rmtree(place, ignore_errors=True)
        return None
    return done


@contextlib.contextmanager
def begun(folder: pathlib.Path, number: int) -> Iterator[pathlib.Path]:
    """Yield a folder for the files of a shard; what is not given to `keep` vanishes."""
    place = _place(folder, number)
    own = place.with_name(f".{place.name}.{uuid.uuid4().hex[:12]}")
    own.mkdir(parents=True)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def keep(folder: pathlib.Path, number: int, shard: DoneShard) -> DoneShard:
    """Put a written shard in its place; return it, or that of a process that was first."""
    place = _place(folder, number)
    splits = {name: _to_json(written) for name, written in shard.splits.items()}
    skipped = {reason: dataclasses.asdict(counts) for reason, counts in shard.skipped.items()}
    entry = {"splits": splits, "skipped": skipped}
    records.write_json(shard.folder / SHARD_FILE, entry)
    try:
        shard.folder.rename(place)
    except OSError:
        other = find(folder, number)
        if other is None:
            raise
        return other
    return dataclasses.replace(shard, folder=place)


def count(folder: pathlib.Path) -> int:
    """Return how many shards are in their places."""
    return sum(1 for _ in folder.glob(f"[0-9]*/{SHARD_FILE}"))


def link_files(shard: DoneShard, target: pathlib.Path) -> None:
    """Give the files of a shard a second name in a folder, or a copy where there are no links."""
    for written in shard.splits.values():
        try:
            os.link(shard.folder / written.file, target / written.file)
        except OSError:
            shutil.copyfile(shard.folder / written.file, target / written.file)


def sweep(root: pathlib.Path) -> None:
    """Remove what dead processes left in a folder of token caches, some time after they died."""
    patterns = (".*.partial", ".*.copy", ".*.old")
    for left in itertools.chain.from_iterable(map(root.glob, patterns)):
        for shard in left.glob("*/.*"):
            _remove_after(shard, BEGUN_SECONDS)
        _remove_after(left, KEPT_SECONDS)


def _remove_after(folder: pathlib.Path, seconds: float) -> None:
    # Another process may be removing it, too.
    with contextlib.suppress(OSError):
        newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        if time.time() - newest > seconds:
            shutil.rmtree(folder, ignore_errors=True)


def _place(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{number:05d}"


def _fault(place: pathlib.Path, shard: Shard) -> str:
    expected = {"bytes": shard.file_bytes, "sha256": shard.sha256}
    return file_fault(place / shard.file, expected, full=True)


def _to_json(shard: Shard) -> dict[str, Any]:
    values = dataclasses.asdict(shard)
    return {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in values.items()}


def _from_json(values: dict[str, Any]) -> Shard:
    arrays = {n: np.array(v, np.int64) for n, v in values.items() if isinstance(v, list)}
    return Shard(**{**values, **arrays})
