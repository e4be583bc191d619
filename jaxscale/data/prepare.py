"""Tokenize a corpus, once, into a token cache.

The cache's folder is named by what goes into it, so that the same words find it again and other
words never do. The corpus is cut into shards; each is the work of one process and depends on its
documents alone. The verb `prepare` and `train` call this.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Callable, Generator, Sequence
from multiprocessing.synchronize import Event

from jaxscale import records
from jaxscale.config import ConfigError, DataConfig
from jaxscale.data import token_cache
from jaxscale.data.sources import Source, open_source
from jaxscale.data.token_cache import TRAIN, VALIDATION, Shard, ShardWriter, TokenCache
from jaxscale.data.tokenizer import Tokenizer, load_tokenizer

SHARD_BYTES = 2 * 2**20
MAX_SHARDS = 1024
# Below so much text, starting processes takes longer than they save.
IN_LINE_BYTES = 8 * 2**20
IN_LINE_BYTES_OF_BYTES = 256 * 2**20
# Documents whose hash is below validation_fraction of this are held apart.
HASH_LIMIT = 2**64

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
      path: Its folder.
      reused: Whether it was there already.
      skipped_documents: Documents left out, being empty or not UTF-8.
      seconds: Time this call took.
    """

    path: pathlib.Path
    reused: bool
    train: SplitCounts
    validation: SplitCounts
    skipped_documents: int
    seconds: float


def prepare(
    data: DataConfig,
    *,
    workers: int = 0,
    progress: Progress | None = None,
    force: bool = False,
) -> PrepareResult:
    """Make the token cache of `data.source` and `data.tokenizer`, or find it.

    Several processes may prepare the same cache at once: the first to finish wins.

    Args:
      data: Of it, source, tokenizer, validation_fraction and cache_dir count.
      workers: Processes; 0 takes as many as pay, 1 works in this one.
      progress: Called with the documents done and the documents in all.
      force: Write the cache again where it exists.

    Raises:
      ConfigError: the corpus, the tokenizer or the cache cannot be used.
    """
    started = time.perf_counter()
    root = _cache_root(data)
    tokenizer = load_tokenizer(data.tokenizer)
    source = open_source(data.source, cache_dir=root / "sources")
    path = root / _folder_name(data, source, tokenizer)
    reused = path.exists() and not force
    if not reused:
        records.check_writable(root, f"data.cache_dir={data.cache_dir or root}")
        with token_cache.written_whole(path, replace=force) as folder:
            below = int(data.validation_fraction * HASH_LIMIT)
            work = Work(source, tokenizer, folder, validation_below=below)
            _write_cache(data, work, workers=workers, progress=progress)
    index = TokenCache(path).index
    counts = {
        name: SplitCounts(entry["documents"], entry["tokens"], entry["bytes"])
        for name, entry in index["splits"].items()
    }
    return PrepareResult(
        path=path,
        reused=reused,
        **counts,
        skipped_documents=index["skipped_documents"],
        seconds=time.perf_counter() - started,
    )


def _cache_root(data: DataConfig) -> pathlib.Path:
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


@dataclasses.dataclass(frozen=True)
class Work:
    """What the shards of one corpus have in common.

    Attributes:
      folder: Where their files go.
      validation_below: Documents whose hash is less are held apart.
      validation_tail: Instead, such a share at the end of every document is; 0 is off.
    """

    source: Source
    tokenizer: Tokenizer
    folder: pathlib.Path
    validation_below: int
    validation_tail: float = 0.0


@dataclasses.dataclass(frozen=True)
class DoneShard:
    """What became of one range of documents."""

    splits: dict[str, Shard]
    num_skipped: int


def _write_cache(data: DataConfig, work: Work, *, workers: int, progress: Progress | None) -> None:
    done = _write_shards(data, work, workers=workers, progress=progress)
    if not _is_divided(data, done):
        shutil.rmtree(work.folder)
        work.folder.mkdir()
        work = dataclasses.replace(work, validation_tail=data.validation_fraction)
        done = _write_shards(data, work, workers=workers, progress=progress)
    token_cache.write_index(
        work.folder,
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
            "skipped_documents": sum(d.num_skipped for d in done),
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
            f"data.source={data.source!r} holds no UTF-8 text; name other files, "
            "or use data.source=python_stdlib"
        )
    share, wanted = held / (held + kept), data.validation_fraction
    return wanted / 2 <= share <= 2 * wanted and (1 - wanted) / 2 <= 1 - share


def _write_shards(
    data: DataConfig, work: Work, *, workers: int, progress: Progress | None
) -> list[DoneShard]:
    """Write all shards and return them in the order of their documents."""
    ranges = shard_ranges(work.source)
    if not workers:
        limit = IN_LINE_BYTES_OF_BYTES if data.tokenizer == "bytes" else IN_LINE_BYTES
        workers = 1 if work.source.num_bytes <= limit else os.cpu_count() or 1
    workers = min(workers, len(ranges))
    run = _run_in_line(work, ranges) if workers == 1 else _run_in_processes(work, ranges, workers)
    done: dict[int, DoneShard] = {}
    num_documents = 0
    with contextlib.closing(run):
        for number, shard in run:
            done[number] = shard
            num_documents += len(ranges[number])
            if progress is not None:
                progress(num_documents, len(work.source))
    return [done[number] for number in sorted(done)]


def shard_ranges(source: Source) -> list[range]:
    """Divide the documents into consecutive ranges, by the corpus alone and not by the workers."""
    total = len(source)
    num_shards = max(1, min(total, MAX_SHARDS, source.num_bytes // SHARD_BYTES))
    edges = [total * i // num_shards for i in range(num_shards + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def write_shard(
    work: Work, number: int, documents: range, *, stop: Event | None = None
) -> DoneShard:
    """Tokenize a range of documents into the files of shard `number`, one per split.

    It depends on nothing but its arguments: a prepare that resumes would skip the shards it has.
    """
    dtype = token_cache.token_dtype(work.tokenizer.size)
    writers = {
        name: ShardWriter(
            work.folder / f"{name}-{number:05d}.array_record", work.tokenizer.eos_id, dtype
        )
        for name in token_cache.SPLITS
    }
    num_skipped = 0
    for index in documents:
        if stop is not None and stop.is_set():
            break
        document = work.source[index]
        parts = _divide(document.text, work) if document is not None else {}
        tokens = {name: work.tokenizer.encode(part) for name, part in parts.items()}
        num_skipped += not any(map(len, tokens.values()))
        for name, ids in tokens.items():
            if len(ids):
                writers[name].add(ids, text_bytes=len(parts[name].encode()))
    shards = {name: writer.close() for name, writer in writers.items()}
    return DoneShard(
        splits={name: shard for name, shard in shards.items() if shard is not None},
        num_skipped=num_skipped,
    )


def _divide(text: str, work: Work) -> dict[str, str]:
    """Return which part of a document goes to which split: all of it, or the end apart."""
    if not work.validation_tail:
        # By content, so that copies of a document are never on both sides.
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        is_held = int.from_bytes(digest, "big") < work.validation_below
        return {VALIDATION if is_held else TRAIN: text}
    around = min(max(int(len(text) * (1 - work.validation_tail)), 1), len(text) - 1)
    # At a line's end, where there is one.
    cut = text.rfind("\n", 0, around) + 1 or around
    return {TRAIN: text[:cut], VALIDATION: text[cut:]}


def _run_in_line(work: Work, ranges: Sequence[range]) -> Generator[tuple[int, DoneShard]]:
    for number, documents in enumerate(ranges):
        yield number, write_shard(work, number, documents)


def _run_in_processes(
    work: Work, ranges: Sequence[range], workers: int
) -> Generator[tuple[int, DoneShard]]:
    """Yield shards as they are done. When the caller stops early, the workers stop too."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(work, stop)
    ) as pool:
        try:
            futures = {
                pool.submit(_write_shard_in_worker, number, documents): number
                for number, documents in enumerate(ranges)
            }
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


# In a worker process: what its shards have in common, sent once instead of with each shard.
_in_worker: tuple[Work, Event]


def _start_worker(work: Work, stop: Event) -> None:
    global _in_worker
    _in_worker = work, stop
    # Ctrl-C reaches the whole group; the parent alone answers, through `stop`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_shard_in_worker(number: int, documents: range) -> DoneShard:
    work, stop = _in_worker
    return write_shard(work, number, documents, stop=stop)
