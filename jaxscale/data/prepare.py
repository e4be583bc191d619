"""Tokenize a corpus, once, into a token cache.

The cache's folder is named by what goes into it, so that the same words find it again and other
words never do. The corpus is cut into shards; each is the work of one process and depends on its
documents alone. An interrupted prepare goes on with the shards that are missing. The verb `prepare`
and `train` call this.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from jaxscale import records
from jaxscale.config import ConfigError, DataConfig, Stopped
from jaxscale.data import kept_shards, token_cache
from jaxscale.data.documents import HASH_LIMIT, Source
from jaxscale.data.local_copy import Copied, copy_cache
from jaxscale.data.shards import (
    DoneShard,
    SkippedCounts,
    Work,
    merge_skipped,
    skipped_from_json,
    write_shard,
)
from jaxscale.data.sources import open_source
from jaxscale.data.token_cache import TRAIN, VALIDATION, TokenCache
from jaxscale.data.tokenizer import Tokenizer, load_tokenizer
from jaxscale.data.workers import Stop, never, run_in_line, run_in_processes

SHARD_BYTES = 2 * 2**20
MAX_SHARDS = 1024
# Below so much text, starting processes takes longer than they save.
IN_LINE_BYTES = 8 * 2**20
IN_LINE_BYTES_OF_BYTES = 256 * 2**20

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """What a split holds: `bytes` are of text, `tokens` include one `eos` per document."""

    documents: int
    tokens: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class PrepareResult:
    """A token cache that is ready.

    Attributes:
      source: What it was made from.
      path: Its folder.
      reused: Whether it was there already.
      skipped_documents: Documents left out.
      skipped: The same by reason.
      seconds: Time this call took.
      found_shards: Shards that others, or an interrupted prepare, had done.
      shards: Shards in all; 0 where the cache was there already.
      copied: The copy in data.local_cache_dir, if that is set; `path` is its folder then.
    """

    source: str
    path: pathlib.Path
    reused: bool
    train: SplitCounts
    validation: SplitCounts
    skipped_documents: int
    skipped: dict[str, SkippedCounts]
    seconds: float
    found_shards: int = 0
    shards: int = 0
    copied: Copied | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know: work that was found done, and how fast it was copied."""
        found = f"found done: {self.found_shards} of {self.shards} shards of the token cache"
        return (
            *([found] if self.found_shards else []),
            *([str(self.copied)] if self.copied else []),
        )


@dataclasses.dataclass(frozen=True)
class Running:
    """How the work is done.

    Attributes:
      workers: Processes; 0 takes as many as pay.
      progress: Told of the documents done and the documents in all.
      stop: Asked now and then whether to stop.
    """

    workers: int = 0
    progress: Progress | None = None
    stop: Stop = never


def prepare(
    data: DataConfig,
    *,
    workers: int = 0,
    progress: Progress | None = None,
    force: bool = False,
    stop: Stop = never,
) -> PrepareResult:
    """Make the token cache of `data.source` and `data.tokenizer`, or find it.

    Several processes may prepare the same cache at once, on one machine or on a shared file
    system: each takes the shards that are not done, in an order of its own.

    Args:
      data: Of it, source, tokenizer, validation_fraction, cache_dir and local_cache_dir count.
      workers: Processes; 0 takes as many as pay, 1 works in this one.
      progress: Called with the documents done and the documents in all.
      force: Write the cache anew where it, or some of it, exists.
      stop: Asked now and then whether to stop; what is done is found by the next call.

    Raises:
      ConfigError: the corpus, the tokenizer or the cache cannot be used.
      Stopped: `stop` said so.
    """
    started = time.perf_counter()
    root = cache_root(data)
    tokenizer = load_tokenizer(data.tokenizer)
    source = open_source(data.source, cache_dir=root / "sources", stop=stop)
    path = root / _folder_name(data, source, tokenizer)
    reused = path.exists() and not force
    done: list[DoneShard] = []
    if not reused:
        records.check_writable(root, f"data.cache_dir={data.cache_dir or root}")
        kept_shards.sweep(root)
        below = int(data.validation_fraction * HASH_LIMIT)
        with _partial_folder(path, anew=force) as partial:
            work = Work(source, tokenizer, partial / "whole", validation_below=below)
            done = write_cache(data, work, path, Running(workers, progress, stop), force=force)
    copied = None
    if data.local_cache_dir:
        copied = copy_cache(path, data.local_cache_dir, stop=stop)
        path = copied.path
    index = TokenCache(path).index
    counts = {
        name: SplitCounts(entry["documents"], entry["tokens"], entry["bytes"])
        for name, entry in index["splits"].items()
    }
    return PrepareResult(
        source=data.source,
        path=path,
        reused=reused,
        **counts,
        skipped_documents=index["skipped_documents"],
        skipped=skipped_from_json(index.get("skipped", {})),  # older caches lack it
        seconds=time.perf_counter() - started,
        found_shards=sum(shard.found for shard in done),
        shards=len(done),
        copied=copied,
    )


@contextlib.contextmanager
def _partial_folder(path: pathlib.Path, *, anew: bool) -> Iterator[pathlib.Path]:
    """Yield the folder of the shards of a cache; it goes when the cache is there.

    Args:
      path: Of the cache.
      anew: Take a folder of this call's own, which goes in any case.
    """
    shared = path.with_name(f".{path.name}.partial")
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield own if anew else shared
    except Exception:
        # Who finishes first removes the folder, which the others then miss.
        if anew or not (path / token_cache.INDEX_FILE).exists():
            raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    shutil.rmtree(shared, ignore_errors=True)


def cache_root(data: DataConfig) -> pathlib.Path:
    """Return the folder of token caches; raise ConfigError for one that is not local."""
    if "://" in data.cache_dir:
        raise ConfigError(
            f"data.cache_dir={data.cache_dir} is not a local folder; token caches are read at "
            "random, so mount the bucket or name a local disk"
        )
    root = pathlib.Path(data.cache_dir).expanduser().absolute()
    if not data.cache_dir:
        from jaxscale import runtime  # brings JAX, which worker processes do without

        root = runtime.cache_root() / "tokens"
    return root


def _folder_name(data: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    words = [
        token_cache.FORMAT,
        data.source,
        source.fingerprint,
        tokenizer.fingerprint,
        data.validation_fraction,
    ]
    kind = data.source.partition(":")[0]
    return f"{kind}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]}"


def write_cache(
    data: DataConfig, work: Work, path: pathlib.Path, running: Running, *, force: bool = False
) -> list[DoneShard]:
    """Write all shards, and the cache of them at `path`; return the shards."""
    done = _write_shards(data, work, running)
    if not _is_divided(data, done):
        tails = work.folder.with_name("tails")
        work = dataclasses.replace(work, folder=tails, validation_tail=data.validation_fraction)
        done = _write_shards(data, work, running)
    with writing_to(path.parent), token_cache.written_whole(path, replace=force) as folder:
        for shard in done:
            kept_shards.link_files(shard, folder)
        _write_index(data, work, folder, done)
    return done


@contextlib.contextmanager
def writing_to(root: pathlib.Path) -> Iterator[None]:
    """Turn an error of the disk, such as a full one, into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{root} cannot be written ({error.strerror or error}); free some room there, or set "
            "data.cache_dir to another folder"
        ) from error


def _write_index(
    data: DataConfig, work: Work, folder: pathlib.Path, done: Sequence[DoneShard]
) -> None:
    skipped = merge_skipped([d.skipped for d in done])
    token_cache.write_index(
        folder,
        {name: [d.splits[name] for d in done if name in d.splits] for name in token_cache.SPLITS},
        header={
            "source": data.source,
            "source_fingerprint": work.source.fingerprint,
            "tokenizer": data.tokenizer,
            "tokenizer_fingerprint": work.tokenizer.fingerprint,
            "vocab_size": work.tokenizer.size,
            "eos_id": work.tokenizer.eos_id,
            "dtype": token_cache.token_dtype(work.tokenizer.size).str,
            "validation_fraction": data.validation_fraction,
            "skipped_documents": sum(counts.documents for counts in skipped.values()),
            "skipped": {reason: dataclasses.asdict(c) for reason, c in skipped.items()},
        },
        tokenizer_json=work.tokenizer.to_json(),
    )


def _is_divided(data: DataConfig, done: Sequence[DoneShard]) -> bool:
    """Tell whether about the share of text that was asked for is held apart.

    Whole documents, chosen by their hashes, come close to it unless they are few or some are large.
    """
    held, kept = (
        sum(shard.splits[name].text_bytes for shard in done if name in shard.splits)
        for name in (VALIDATION, TRAIN)
    )
    if not held + kept:
        raise ConfigError(
            f"data.source={data.source!r} holds no UTF-8 text{_first_reason(done)}; "
            "name other files, or use data.source=python_stdlib"
        )
    share, wanted = held / (held + kept), data.validation_fraction
    return wanted / 2 <= share <= 2 * wanted and (1 - wanted) / 2 <= 1 - share


def _first_reason(done: Sequence[DoneShard]) -> str:
    for reason, counts in merge_skipped([d.skipped for d in done]).items():
        return f" ({counts.names[0]}: {reason})"
    return ""


def _write_shards(data: DataConfig, work: Work, running: Running) -> list[DoneShard]:
    """Write or find all shards and return them in the order of their documents."""
    ranges = shard_ranges(work.source)
    workers = running.workers
    if not workers:
        limit = IN_LINE_BYTES_OF_BYTES if data.tokenizer == "bytes" else IN_LINE_BYTES
        workers = 1 if work.source.num_bytes <= limit else os.cpu_count() or 1
    workers = min(workers, len(ranges))
    # Processes that work at the same cache meet at few shards, each having an order of its own.
    order = random.sample(list(enumerate(ranges)), len(ranges))
    function = functools.partial(make_shard, work)
    if workers == 1:
        run = run_in_line(function, order, stop=running.stop)
    else:
        run = run_in_processes(function, order, workers=workers, stop=running.stop)
    done: dict[int, DoneShard] = {}
    num_documents = 0
    with contextlib.closing(run):
        for number, shard in run:
            done[number] = shard
            num_documents += len(ranges[number])
            if running.progress is not None:
                running.progress(num_documents, len(work.source))
    if len(done) < len(ranges):
        found = kept_shards.count(work.folder)
        raise Stopped(f"{found} of {len(ranges)} shards of the token cache are done and kept")
    return [done[number] for number in sorted(done)]


def shard_ranges(source: Source) -> list[range]:
    """Divide the documents into consecutive ranges, by the corpus alone and not by the workers."""
    total = len(source)
    num_shards = max(1, min(total, MAX_SHARDS, source.num_bytes // SHARD_BYTES))
    edges = [total * i // num_shards for i in range(num_shards + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def make_shard(work: Work, number: int, documents: range, stop: Stop) -> DoneShard | None:
    """Find shard `number` of `work.folder`, or write and keep it; None when told to stop."""
    found = kept_shards.find(work.folder, number)
    if found is not None:
        return found
    root = work.folder.parent.parent
    with writing_to(root), kept_shards.begun(work.folder, number) as folder:
        work_here = dataclasses.replace(work, folder=folder)
        shard = write_shard(work_here, number, documents, stop=stop)
        return shard and kept_shards.keep(work.folder, number, shard)
