"""One shard of a token cache: a range of documents, tokenized and divided between the splits.

A shard depends on its documents alone, and on no other shard. `prepare` hands them out.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxscale.data import token_cache
from jaxscale.data.documents import EMPTY, Document, Skipped, Source
from jaxscale.data.token_cache import TRAIN, VALIDATION, Shard, ShardWriter
from jaxscale.data.tokenizer import Tokenizer
from jaxscale.data.workers import Stop, never

# Names that are kept of the documents skipped for one reason.
MAX_SKIPPED_NAMES = 5


@dataclasses.dataclass(frozen=True)
class SkippedCounts:
    """The documents left out for one reason, and the names of the first of them."""

    documents: int
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """What the shards of one corpus have in common.

    Attributes:
      folder: Where their files go.
      validation_below: Documents whose hash is less are held apart.
      validation_tail: Instead, such a share at the end of every document is, or of all documents
        where they have prompts; 0 is off.
    """

    source: Source
    tokenizer: Tokenizer
    folder: pathlib.Path
    validation_below: int
    validation_tail: float = 0.0


@dataclasses.dataclass(frozen=True)
class DoneShard:
    """What became of one range of documents.

    Attributes:
      splits: What was written, by split; a split without documents has nothing.
      skipped: Documents left out, by reason.
      folder: Where the files are.
      found: Whether it was there already.
    """

    splits: dict[str, Shard]
    skipped: dict[str, SkippedCounts]
    folder: pathlib.Path
    found: bool = False


def write_shard(
    work: Work, number: int, documents: range, *, stop: Stop = never
) -> DoneShard | None:
    """Tokenize a range of documents into the files of shard `number`, one per split.

    It depends on nothing but its arguments. Told to stop, it returns None.
    """
    dtype = token_cache.token_dtype(work.tokenizer.size)
    writers = {
        name: ShardWriter(
            work.folder / f"{name}-{number:05d}.array_record", work.tokenizer.eos_id, dtype
        )
        for name in token_cache.SPLITS
    }
    skipped: list[dict[str, SkippedCounts]] = []
    for index in documents:
        if stop():
            return None
        document = work.source[index]
        reason = _write_document(work, writers, index, document)
        if reason:
            skipped.append({reason: SkippedCounts(1, (document.key,))})
    shards = {name: writer.close() for name, writer in writers.items()}
    return DoneShard(
        splits={name: shard for name, shard in shards.items() if shard is not None},
        skipped=merge_skipped(skipped),
        folder=work.folder,
    )


def _write_document(
    work: Work, writers: dict[str, ShardWriter], index: int, document: Document | Skipped
) -> str:
    """Write a document to the split or splits it belongs to, or return why there is none."""
    if isinstance(document, Skipped):
        return document.reason
    prompt = work.tokenizer.encode(document.prompt)
    num_written = 0
    for name, part in _divide(document, index, work).items():
        ids = work.tokenizer.encode(part)
        if not len(ids):
            continue
        prompt_bytes = len(document.prompt.encode())
        writers[name].add(
            np.concatenate([prompt, ids]) if len(prompt) else ids,
            text_bytes=prompt_bytes + len(part.encode()),
            prompt_tokens=len(prompt),
            prompt_bytes=prompt_bytes,
        )
        num_written += 1
    return "" if num_written else EMPTY


def _divide(document: Document, index: int, work: Work) -> dict[str, str]:
    """Return which part of a document's text goes to which split: all of it, or the end apart."""
    text = document.text
    if not work.validation_tail:
        # By content, so that copies of a document are never on both sides.
        is_held = document.content_hash() < work.validation_below
        return {VALIDATION if is_held else TRAIN: text}
    if document.prompt:
        # An answer stays whole: the last documents are held apart, and one at least is not.
        kept = max(1, min(int(len(work.source) * (1 - work.validation_tail)), len(work.source) - 1))
        return {TRAIN if index < kept else VALIDATION: text}
    around = min(max(int(len(text) * (1 - work.validation_tail)), 1), len(text) - 1)
    # At a line's end, where there is one.
    cut = text.rfind("\n", 0, around) + 1 or around
    return {TRAIN: text[:cut], VALIDATION: text[cut:]}


def merge_skipped(parts: Sequence[dict[str, SkippedCounts]]) -> dict[str, SkippedCounts]:
    """Add up what consecutive ranges of documents skipped, by reason."""
    merged: dict[str, SkippedCounts] = {}
    for reason, counts in itertools.chain.from_iterable(part.items() for part in parts):
        before = merged.get(reason, SkippedCounts(0, ()))
        names = (before.names + counts.names)[:MAX_SKIPPED_NAMES]
        merged[reason] = SkippedCounts(before.documents + counts.documents, names)
    return merged


def skipped_from_json(values: Mapping[str, Any]) -> dict[str, SkippedCounts]:
    """Return the counts whose `dataclasses.asdict` stands in a file, by reason."""
    return {
        reason: SkippedCounts(counts["documents"], tuple(counts["names"]))
        for reason, counts in values.items()
    }
