"""Where text comes from: one document at a time, by random access.

A source is named in `data.source`: the interpreter's standard library, generated text, files or a
dataset of TFDS. Sources are picklable; worker processes reopen what they read. `prepare` and
`corpus` call this.
"""

import functools
import hashlib
import os
import pathlib
import random
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from jaxscale.config import ConfigError
from jaxscale.data.documents import Document, Source
from jaxscale.data.files import open_files
from jaxscale.data.workers import Stop, never

T = TypeVar("T")


KINDS = ("python_stdlib", "synthetic", "files:GLOB", "tfds:NAME")


def open_source(spec: str, *, cache_dir: str | os.PathLike[str], stop: Stop = never) -> Source:
    """Open the source that `data.source` names.

    Args:
      spec: `python_stdlib`, `synthetic`, `files:GLOB` or `tfds:NAME`, perhaps with `#FIELD` or
        `#PROMPT,ANSWER`; docs/sources.md says more.
      cache_dir: Folder below which `python_stdlib` keeps its files.
      stop: Asked now and then whether to stop, while the lines of files are counted.

    Raises:
      ConfigError: an unknown kind, or a corpus that cannot be found or read.
    """
    kind, _, argument = spec.partition(":")
    if spec == "python_stdlib":
        return StdlibSource(os.fspath(cache_dir))
    if spec == "synthetic":
        return SyntheticSource()
    if kind == "files":
        return open_files(spec, argument, stop=stop)
    if kind == "tfds":
        from jaxscale.data import tfds_source

        return tfds_source.open_tfds(spec, argument)
    raise ConfigError(f"data.source={spec!r} is of no known kind; use one of {', '.join(KINDS)}")


class StdlibSource:
    """The source files of the running interpreter's standard library, through TFDS."""

    # The version text names the build of the interpreter, and so its library; the number before
    # it is ours, and rises when other files are taken.
    fingerprint = f"python_stdlib 1 {sys.version}"

    def __init__(self, cache_dir: str) -> None:
        build = hashlib.sha256(self.fingerprint.encode()).hexdigest()[:12]
        self._cache_dir = cache_dir
        self._folder = pathlib.Path(cache_dir, build)

    def __reduce__(self) -> tuple[Any, ...]:
        return StdlibSource, (self._cache_dir,)

    @functools.cached_property
    def _examples(self) -> Any:
        from jaxscale.data import python_stdlib

        return python_stdlib.open_examples(self._folder)

    @property
    def num_bytes(self) -> int:
        """Bytes of all examples."""
        return int(self._examples.dataset_info.dataset_size)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Document:
        example = self._examples[index]
        return Document(key=example["path"].decode(), text=example["text"].decode())


class SyntheticSource:
    """Little inventories and questions about them: text with something to learn near and far.

    Words and grammar are learnt in minutes; the answers need what stands lines before.
    """

    fingerprint = "synthetic 1"
    num_documents = 2_000
    num_bytes = 1_700_000

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < self.num_documents:
            raise IndexError(index)
        return Document(key=f"story-{index}", text=_story(random.Random(index)))


NAMES, COLOURS, THINGS, PLACES = map(
    str.split,
    (
        "Ada Alan Barbara Claude Donald Edsger Frances Grace John Katherine Leslie Niklaus",
        "amber black blue brown green grey orange pink red white violet yellow",
        "apples bells books boxes candles coins cups keys lamps maps pens stones",
        "attic barn cellar garden harbour kitchen library market office tower",
    ),
)


def _story(dice: random.Random) -> str:
    """Tell who keeps what and where, then ask about it in another order."""
    facts = [
        (name, 2 + int(98 * dice.random()), _pick(dice, COLOURS), _pick(dice, THINGS))
        for name in _shuffled(dice, NAMES)[:6]
    ]
    places = _shuffled(dice, PLACES)
    lines = [
        f"{name} keeps {count} {colour} {thing} in the {place}."
        for (name, count, colour, thing), place in zip(facts, places, strict=False)
    ]
    for fact, place in _shuffled(dice, list(zip(facts, places, strict=False))):
        name, count, colour, thing = fact
        lines.append(f"How many {thing} does {name} keep? {name} keeps {count} {thing}.")
        lines.append(f"Where are the {colour} {thing} of {name}? They are in the {place}.")
    return "\n".join(lines) + "\n"


# Of all of `random`, random() alone is promised to give the same numbers in every Python.
def _pick(dice: random.Random, words: Sequence[str]) -> str:
    return words[int(len(words) * dice.random())]


def _shuffled(dice: random.Random, items: Sequence[T]) -> list[T]:
    return sorted(items, key=lambda _: dice.random())
