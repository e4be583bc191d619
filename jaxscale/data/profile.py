"""How fast the input pipeline is alone, on this machine now: from documents to batches on devices.

Each stage is measured by itself, several times, on a token cache of a sample of the corpus that
lies where the real one would. `prepare --profile` shows this beside what a training step takes.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxscale import records
from jaxscale.config import ConfigError, DataConfig
from jaxscale.data import token_cache
from jaxscale.data.corpus import with_trained_tokenizer
from jaxscale.data.documents import Document, Skipped, Source
from jaxscale.data.loader import READ_THREADS, Loader, Windows
from jaxscale.data.mixture import parse_mixture
from jaxscale.data.prepare import Running, cache_root, write_cache, writing_to
from jaxscale.data.shards import Work, write_shard
from jaxscale.data.sources import open_source
from jaxscale.data.token_cache import TRAIN, ShardWriter, TokenCache, TokenSplit
from jaxscale.data.tokenizer import Tokenizer, load_tokenizer
from jaxscale.data.workers import Stop, never, run_in_processes

REPEATS = 5
SAMPLE_BYTES = 2 * 2**20
SAMPLE_SECONDS = 0.5
# A repeat reads batches of about so many tokens together, at least one and at most so many.
MEASURED_TOKENS, MEASURED_BATCHES = 2**18, 32
# More workers than this adds less than measuring can tell.
WORTHWHILE_GAIN = 1.1

TOKENIZE, TOKENIZE_STAGE = "tokenize", "tokenize: stage"
LOAD, LOAD_STAGE = "load", "load: stage"
STEP = "training step"


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast something went.

    Attributes:
      part: What it belongs to: TOKENIZE, LOAD, a stage of them, or STEP.
      what: What was measured.
      tokens_per_second: The median of the repeats.
      lowest: The slowest of them.
      highest: The fastest of them.
      bytes_per_second: Of text, or of files; None where neither is handled.
    """

    part: str
    what: str
    tokens_per_second: float
    lowest: float
    highest: float
    bytes_per_second: float | None = None


def rate(part: str, what: str, tokens: float, seconds: Sequence[float], *, size: float = 0) -> Rate:
    """Return the rate of `tokens`, and of `size` bytes, in each of some times."""
    middle = statistics.median(seconds)
    speeds = [tokens / s for s in seconds]
    per_second = size / middle if size else None
    return Rate(part, what, tokens / middle, min(speeds), max(speeds), per_second)


def slowest(rates: Sequence[Rate], part: str) -> Rate:
    """Return the slowest of a part."""
    return min((r for r in rates if r.part == part), key=lambda r: r.tokens_per_second)


def profile_pipeline(
    data: DataConfig,
    *,
    global_batch_size: int,
    sharding: jax.sharding.Sharding | None = None,
) -> list[Rate]:
    """Measure tokenizing and loading.

    Args:
      data: The section of the config.
      global_batch_size: Rows of a batch.
      sharding: Of a batch's arrays, (rows, length); None places nothing.

    Raises:
      ConfigError: the corpus, the tokenizer or the cache folder cannot be used.
    """
    knob = "local_cache_dir" if data.local_cache_dir else "cache_dir"
    root = cache_root(dataclasses.replace(data, cache_dir=getattr(data, knob)))
    records.check_writable(root, f"data.{knob}={root}")
    if len(parse_mixture(data.source)[0]) > 1:
        raise ConfigError(
            f"data.source={data.source!r} is a mixture, and --profile measures one source; name one"
        )
    data = with_trained_tokenizer(data)
    source = open_source(data.source, cache_dir=cache_root(data) / "sources")
    tokenizer = load_tokenizer(data.tokenizer)
    # Should this process be killed, the next prepare removes it.
    with writing_to(root), tempfile.TemporaryDirectory(".partial", ".profile.", root) as folder:
        scratch = pathlib.Path(folder)
        sample = Sample.take(source, tokenizer, min_tokens=data.length + 1)
        work = Work(sample, tokenizer, scratch / "shards", validation_below=0)
        path = scratch / "cache"
        write_cache(dataclasses.replace(data, validation_fraction=0.0), work, path, Running(1))
        cache = TokenCache(path)
        loader = Loader(cache, data, global_batch_size=global_batch_size, seed=0, sharding=sharding)
        return [
            *_tokenizing_stages(sample, tokenizer, scratch),
            *_tokenizing(work, cache),
            *_loading_stages(loader),
            *_loading(loader),
        ]


@dataclasses.dataclass(frozen=True)
class Sample:
    """The first documents of a source."""

    source: Source
    count: int
    num_bytes: int
    fingerprint: str = "sample"

    @staticmethod
    def take(source: Source, tokenizer: Tokenizer, *, min_tokens: int) -> "Sample":
        """Take documents until they are enough bytes, or take long enough to tokenize.

        They are `min_tokens` at least, unless the source has fewer.
        """
        started, num_bytes, num_tokens, count = time.perf_counter(), 0, 0, 0
        while count < len(source):
            took_long = time.perf_counter() - started > SAMPLE_SECONDS
            if num_tokens >= min_tokens and (num_bytes >= SAMPLE_BYTES or took_long):
                break
            document = source[count]
            count += 1
            if isinstance(document, Document):
                text = document.prompt + document.text
                num_bytes += len(text.encode())
                num_tokens += len(tokenizer.encode(text))
        return Sample(source, count, num_bytes)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Document | Skipped:
        return self.source[index]


def _seconds(
    function: Callable[[], Any], *, before: Callable[[], None] | None = None
) -> list[float]:
    """Return the seconds of each repeat, after one that does not count."""
    times = []
    for _ in range(REPEATS + 1):
        if before:
            before()
        started = time.perf_counter()
        function()
        times.append(max(time.perf_counter() - started, 1e-9))
    return times[1:]


def _num_batches(tokens_per_batch: int) -> int:
    return min(max(MEASURED_TOKENS // tokens_per_batch, 1), MEASURED_BATCHES)


def _tokenizing_stages(sample: Sample, tokenizer: Tokenizer, scratch: pathlib.Path) -> list[Rate]:
    """Measure reading documents, encoding them, and writing tokens, in this process."""
    documents = map(sample.__getitem__, range(len(sample)))
    texts = [d.prompt + d.text for d in documents if isinstance(d, Document)]
    encoded = [tokenizer.encode(text) for text in texts]
    tokens, size = sum(map(len, encoded)) + len(encoded), sample.num_bytes

    def write() -> None:
        dtype = token_cache.token_dtype(tokenizer.size)
        writer = ShardWriter(scratch / "written.array_record", tokenizer.eos_id, dtype)
        for ids in encoded:
            writer.add(ids, text_bytes=0)
        writer.close()

    stages = {
        "read documents": lambda: [sample[index] for index in range(len(sample))],
        "encode": lambda: [tokenizer.encode(text) for text in texts],
        "write": write,
    }
    return [
        rate(TOKENIZE_STAGE, name, tokens, _seconds(stage), size=size)
        for name, stage in stages.items()
    ]


def _tokenizing(work: Work, cache: TokenCache) -> list[Rate]:
    """Measure whole shards by 1, 2, 4, ... workers, as long as more of them pay."""
    split = cache.split(TRAIN)
    function = functools.partial(_timed_shard, work)
    rates: list[Rate] = []
    cpus = os.cpu_count() or 1
    for workers in sorted({cpus, *(2**n for n in range(cpus.bit_length()) if 2**n <= cpus)}):
        tasks = [(n, range(len(work.source))) for n in range(workers * (REPEATS + 1))]
        seconds: dict[int, list[float]] = {}
        for _, (process, took) in run_in_processes(function, tasks, workers=workers, stop=never):
            seconds.setdefault(process, []).append(took)
        # The first of each process loads what the others find loaded.
        times = [took for of_one in seconds.values() for took in of_one[1:] or of_one]
        together = [took / len(seconds) for took in times]
        name = f"{workers} worker{'s' if workers > 1 else ''}"
        rates.append(rate(TOKENIZE, name, split.num_tokens, together, size=split.num_bytes))
        if len(rates) > 1:
            gain = rates[-1].tokens_per_second / rates[-2].tokens_per_second
            if gain < WORTHWHILE_GAIN:
                break
    return rates


def _timed_shard(work: Work, number: int, documents: range, stop: Stop) -> tuple[int, float]:
    """Write a shard of the sample; return the process and the seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        write_shard(
            dataclasses.replace(work, folder=pathlib.Path(folder)), number, documents, stop=stop
        )
    return os.getpid(), time.perf_counter() - started


def _loading_stages(loader: Loader) -> list[Rate]:
    """Measure what becomes of a window, one stage after the other, in one thread."""
    (windows,) = loader.windows.parts
    length, rows = windows.length, len(loader.local_rows)
    count = _num_batches(rows * length) * rows
    chosen = np.random.default_rng(0).integers(0, len(windows), count)
    starts = [int(number) * windows.step for number in chosen]
    in_memory = dataclasses.replace(windows, split=InMemory(windows.split))
    host_batch = loader.host_batch(0)

    def assemble() -> None:
        for begin in range(0, count, rows):
            some = [in_memory[int(number)] for number in chosen[begin : begin + rows]]
            _ = {name: np.stack([row[name] for row in some]) for name in some[0]}

    tokens = count * length
    with contextlib.closing(Files(windows)) as files:
        size = sum(stop - start for _, start, stop in map(files.locate, starts))
        seconds = _seconds(lambda: [files.read(start) for start in starts], before=files.forget)
        rates = [rate(LOAD_STAGE, "read from disk", tokens, seconds, size=size)]
    seconds = _seconds(lambda: [windows.split.read(s, s + length + 1) for s in starts])
    rates.append(rate(LOAD_STAGE, "decode", tokens, seconds))
    rates.append(rate(LOAD_STAGE, "assemble rows", tokens, _seconds(assemble)))
    seconds = _seconds(lambda: jax.block_until_ready(loader.place(host_batch)))
    rates.append(rate(LOAD_STAGE, "place on devices", rows * length, seconds))
    return rates


class InMemory(TokenSplit):
    """A split whose tokens are read and decoded already."""

    def __init__(self, split: TokenSplit) -> None:
        self.__dict__.update(split.__dict__)
        self._ids = split.read(0, split.num_tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the stream, int32."""
        return self._ids[start:stop]


class Files:
    """The files of a split as bytes, and about which of them a window needs."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        cache = windows.split.cache
        shards = cache.index["splits"][windows.split.name]["shards"]
        self._files = [os.open(cache.path / shard["file"], os.O_RDONLY) for shard in shards]
        self._ends = list(itertools.accumulate(shard["tokens"] for shard in shards))
        self._sizes = [os.fstat(file).st_size for file in self._files]
        self._record = cache.index["chunk_tokens"]

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)

    def forget(self) -> None:
        """Let the system forget what it holds of the files in memory, where it can."""
        for file in self._files:
            os.fsync(file)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def locate(self, start: int) -> tuple[int, int, int]:
        """Return the file of the window at `start`, and the range of bytes that holds it."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        tokens = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
        offset = start - (self._ends[shard] - tokens)
        first = offset // self._record * self._record
        last = -(-(offset + self._windows.length + 1) // self._record) * self._record
        scale = self._sizes[shard] / tokens
        return self._files[shard], int(first * scale), int(min(last, tokens) * scale)

    def read(self, start: int) -> bytes:
        """Return the bytes that hold the window at `start`."""
        file, begin, end = self.locate(start)
        return os.pread(file, end - begin, begin)


def _loading(loader: Loader) -> list[Rate]:
    """Measure batches on the devices, one after the other, by the number of reading threads."""
    rates = []
    tokens_per_batch = len(loader.local_rows) * loader.windows.parts[0].length
    count = _num_batches(tokens_per_batch)
    for threads in sorted({1, 2, READ_THREADS}):
        with contextlib.closing(loader.batches(prefetch=threads)) as batches:

            def load(batches: Any = batches, count: int = count) -> None:
                for batch in itertools.islice(batches, count):
                    jax.block_until_ready(batch)

            seconds = _seconds(load)
        name = f"{threads} thread{'s' if threads > 1 else ''}"
        rates.append(rate(LOAD, name, count * tokens_per_batch, seconds))
    return rates
