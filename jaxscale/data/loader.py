"""Windows and batches: from the token stream to what a step reads.

A window is `length` tokens and their successors. One begins `stride` tokens after the other, which
is the length unless they are to overlap. The rows of a step are a function of the seed and the step
alone; of them a process reads those that its devices hold, as the sharding says. Grain shuffles,
and reads ahead in threads.

B rows of a batch, L tokens of a row.
"""

import contextlib
import dataclasses
import functools
import resource
import sys
from collections.abc import Callable, Generator
from typing import Any

import grain
import jax
import numpy as np

from jaxscale.config import ConfigError, DataConfig
from jaxscale.data import token_cache
from jaxscale.data.mixture import Mixture, drawn, place
from jaxscale.data.token_cache import VALIDATION, TokenCache, TokenSplit

# `tokens`, `targets`, `segments`: int32; `weights`: float32; each (B, L).
HostBatch = dict[str, np.ndarray]
Batch = dict[str, Any]

READ_THREADS = 4
# Batches held ready.
PREFETCH_BATCHES = 2
# Files that a process opens beside those of token caches, at most: JAX's, checkpoints, logs.
OTHER_FILES = 512


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a split, by number: a random-access source of rows for Grain.

    Attributes:
      length: Tokens of a window.
      document_mask: Number the documents in `segments`, and give no weight to a document's first
        token, which nothing before it foretells.
      stride: Tokens from one window's start to the next, in 1..length; 0 is the length.
      once: Give no weight to a target that the window before has, so that each is scored once.
    """

    split: TokenSplit
    length: int
    document_mask: bool
    stride: int = 0
    once: bool = False

    @property
    def step(self) -> int:
        """Tokens from one window's start to the next."""
        return self.stride or self.length

    def __len__(self) -> int:
        return max(0, (self.split.num_tokens - 1 - self.length) // self.step + 1)

    def num_targets(self, num_windows: int) -> int:
        """Return how many tokens of the stream are targets of the first windows."""
        return (num_windows - 1) * self.step + self.length if num_windows else 0

    def __getitem__(self, index: int) -> HostBatch:
        start = index * self.step
        tokens = self.split.read(start, start + self.length + 1)
        first_of_document = np.zeros(self.length, np.int32)
        if self.document_mask:
            offsets = self._document_offsets(start)
            first_of_document[offsets] = 1
        has_weight = self.split.has_weight(
            start + 1, start + self.length + 1, document_mask=self.document_mask
        )
        if self.once and index:
            has_weight[: self.length - self.step] = False
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segments": 1 + np.cumsum(first_of_document, dtype=np.int32),
            "weights": has_weight.astype(np.float32),
        }

    def check_not_empty(self) -> None:
        """Raise ConfigError for a split that is shorter than one window."""
        if len(self):
            return
        remedy = "lower it or give more text"
        if self.split.name == VALIDATION:
            remedy = "lower it, give more text, or raise data.validation_fraction"
        raise ConfigError(
            f"data.length={self.length} needs {self.length + 1} tokens, and the {self.split.name} "
            f"split of {self.split.source} holds {self.split.num_tokens}; {remedy}"
        )

    def _document_offsets(self, start: int) -> np.ndarray:
        """Return the offsets, in [1, length), at which documents begin in the window at `start`."""
        starts = self.split.document_starts
        first, last = np.searchsorted(starts, [start + 1, start + self.length])
        return np.asarray(starts[first:last]) - start

    def text_bytes(self, num_windows: int) -> float:
        """Return the UTF-8 bytes of the weighted targets of the first windows: for bits per byte.

        bytes = (targets with weight that are not `eos`) x (bytes of the split) / (tokens of the
        split that are not `eos`), both without prompts; with the byte tokenizer the ratio is 1 and
        the count exact.
        """
        starts = np.arange(num_windows) * self.step
        stops = starts + self.length
        if self.once:
            starts[1:] = stops[:-1]
        split = self.split
        after, before = (
            split.count_text(edges + 1, document_mask=self.document_mask)
            for edges in (stops, starts)
        )
        tokens = split.num_tokens - split.num_documents
        if split.prompt_tokens is not None:
            tokens -= int(split.prompt_tokens.sum())
        text_bytes = split.num_bytes - split.prompt_bytes
        return float(np.sum(after - before) * text_bytes / tokens)


@dataclasses.dataclass(frozen=True)
class MixedWindows:
    """The windows of every part of a mixture, each once, interleaved evenly."""

    parts: tuple[Windows, ...]

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, index: int) -> HostBatch:
        part, number = place(index, self._counts)
        return self.parts[part][number]

    @functools.cached_property
    def _counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.parts))

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts."""
        return sum(part.split.num_tokens for part in self.parts)

    def check_not_empty(self) -> None:
        """Raise ConfigError where no part holds a window."""
        if not len(self):
            self.parts[0].check_not_empty()

    def first(self, num_windows: int) -> list[int]:
        """Return how many windows of each part are among the first ones."""
        return drawn(num_windows, self._counts)

    def text_bytes(self, num_windows: int) -> float:
        """Return the UTF-8 bytes of the weighted targets of the first windows."""
        counts = self.first(num_windows)
        return sum(p.text_bytes(n) for p, n in zip(self.parts, counts, strict=True) if n)


def mixed_windows(mixture: Mixture, split: str, data: DataConfig) -> MixedWindows:
    """Return the windows of one split of every part; of validation each target is scored once."""
    once = split == VALIDATION
    return MixedWindows(
        tuple(
            Windows(cache.split(split), data.length, data.document_mask, data.window_stride, once)
            for cache in mixture.caches
        )
    )


class Loader:
    """Batches of a token cache, or of a mixture of several, for one run.

    Attributes:
      cache: The tokens.
      windows: The training windows.
      validation_windows: The windows held apart; none where nothing is held apart.
      local_rows: Rows of each global batch that this process reads, rising.
    """

    def __init__(
        self,
        cache: TokenCache | Mixture,
        data: DataConfig,
        *,
        global_batch_size: int,
        seed: int,
        sharding: jax.sharding.Sharding | None = None,
    ) -> None:
        """Open the splits.

        Args:
          cache: The tokens.
          data: Of it, length, window_stride and document_mask count.
          global_batch_size: Rows of a batch over all processes, B.
          seed: Decides the order of the training windows.
          sharding: Of a (B, L) array, over the devices of all processes; None gives numpy arrays.

        Raises:
          ConfigError: a part's training split is shorter than a window; this process may not
            open as many files as the caches have.
        """
        mixture = cache if isinstance(cache, Mixture) else Mixture((cache,))
        self.cache, self._sharding = mixture, sharding
        self._shape = (global_batch_size, data.length)
        self.windows, self.validation_windows = (
            mixed_windows(mixture, name, data) for name in token_cache.SPLITS
        )
        for part in self.windows.parts:
            part.check_not_empty()
        _allow_open_files(mixture)
        self._weights = mixture.weights
        self._examples = [
            grain.MapDataset.source(part).seed(seed).shuffle().repeat()
            for part in self.windows.parts
        ]
        self.local_rows = _local_rows(sharding, self._shape)

    def batches(self, start_step: int = 0, *, prefetch: int = PREFETCH_BATCHES) -> Generator[Batch]:
        """Yield the training batches from `start_step` on, without end, `prefetch` held ready.

        Closing the iterator, or dropping it, ends its threads.
        """
        steps = range(start_step, sys.maxsize)
        return self._read_ahead(self._training_row, steps, prefetch)

    def evaluation_batches(self, num_batches: int = 0) -> Generator[Batch]:
        """Yield the validation windows in order, each once; 0 batches are all of them.

        The last batch is filled up with rows of weight 0.

        Raises:
          ConfigError: the validation split is shorter than a window.
        """
        self.validation_windows.check_not_empty()
        steps = range(-(-self.num_evaluation_windows(num_batches) // self._shape[0]))
        return self._read_ahead(self._validation_row, steps, PREFETCH_BATCHES)

    def num_evaluation_windows(self, num_batches: int = 0) -> int:
        """Return how many windows `evaluation_batches(num_batches)` covers."""
        total = len(self.validation_windows)
        return min(total, num_batches * self._shape[0]) if num_batches else total

    def host_batch(self, step: int) -> HostBatch:
        """Return this host's rows of the training batch of a step, read in this thread."""
        return _HostBatches(self._training_row, self.local_rows, *self._shape)[step]

    def _training_row(self, index: int) -> HostBatch:
        part, number = place(index, self._weights)
        row: HostBatch = self._examples[part][number]
        return row

    def _validation_row(self, index: int) -> HostBatch:
        if index < len(self.validation_windows):
            return self.validation_windows[index]
        empty = {name: np.zeros(self._shape[1], np.int32) for name in ("tokens", "targets")}
        return {
            **empty,
            "segments": np.ones(self._shape[1], np.int32),
            "weights": np.zeros(self._shape[1], np.float32),
        }

    def _read_ahead(
        self, row_at: Callable[[int], HostBatch], steps: range, prefetch: int
    ) -> Generator[Batch]:
        """Read batches in threads and place each on the devices while the one before is used."""
        source = _HostBatches(row_at, self.local_rows, *self._shape)
        options = grain.ReadOptions(
            num_threads=min(READ_THREADS, prefetch), prefetch_buffer_size=prefetch
        )
        reader = iter(
            grain.MapDataset.source(source)[steps.start : steps.stop].to_iter_dataset(options)
        )
        with contextlib.closing(reader):
            placed = self.place(next(reader))
            for host_batch in reader:
                following = self.place(host_batch)
                yield placed
                placed = following
            yield placed

    def place(self, host_batch: HostBatch) -> Batch:
        """Return this host's rows of a batch as arrays on the devices of all hosts."""
        sharding, rows = self._sharding, self.local_rows
        if sharding is None:
            return dict(host_batch)

        def place(array: np.ndarray) -> jax.Array:
            def shard(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                wanted = np.arange(self._shape[0])[index[0]]
                return array[np.searchsorted(rows, wanted)][:, index[1]]

            return jax.make_array_from_callback(self._shape, sharding, shard)

        return {name: place(array) for name, array in host_batch.items()}


@dataclasses.dataclass(frozen=True)
class _HostBatches:
    """This host's rows of each batch, by number of the batch: a source for Grain."""

    row_at: Callable[[int], HostBatch]
    local_rows: np.ndarray
    batch_size: int
    length: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, batch: int) -> HostBatch:
        rows = [self.row_at(batch * self.batch_size + int(row)) for row in self.local_rows]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _allow_open_files(mixture: Mixture) -> None:
    """Raise the limit of open files of this process: once read, a shard stays open."""
    wanted = OTHER_FILES + sum(len(cache.index["files"]) for cache in mixture.caches)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in range(wanted):  # without a limit it is negative
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"the token caches of data.source need {wanted} open files, and this process may "
                f"have {hard}; raise the limit with ulimit -Hn {wanted}"
            ) from error


def _local_rows(sharding: jax.sharding.Sharding | None, shape: tuple[int, int]) -> np.ndarray:
    """Return the rows of the global batch that this process's devices hold, rising."""
    every = np.arange(shape[0])
    if sharding is None:
        return every
    indices = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([every[index[0]] for index in indices if index is not None]))
