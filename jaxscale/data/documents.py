"""What a document is: a text, perhaps with a prompt before it, or the reason why there is none.

Every source hands out these; `prepare` reads them.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

from jaxscale.config import ConfigError

NOT_UTF8 = "not UTF-8"
EMPTY = "empty"
HASH_LIMIT = 2**64


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and the name it goes by inside its source.

    Attributes:
      key: Path, or path and line.
      text: What is learnt.
      prompt: What stands before it and is read without being learnt; none where it is empty.
    """

    key: str
    text: str
    prompt: str = ""

    def content_hash(self) -> int:
        """Return a number in [0, HASH_LIMIT) that depends on the content alone."""
        digest = hashlib.blake2b((self.prompt + self.text).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What stands in a document's place and is none, and why."""

    key: str
    reason: str


class Source(Protocol):
    """Random access over documents, in an order that never changes."""

    @property
    def fingerprint(self) -> str:
        """A short text that changes when the content does."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents, roughly; they decide how the work is divided."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document | Skipped: ...


def split_fields(spec: str, argument: str) -> tuple[str, tuple[str, ...]]:
    """Divide `NAME#FIELD` or `NAME#PROMPT,ANSWER` into the name and its fields, if any.

    Raises:
      ConfigError: more than two fields, or one without a name.
    """
    name, mark, rest = argument.rpartition("#")
    # A folder may have a # in its name.
    if not mark or "/" in rest:
        return argument, ()
    fields = tuple(field.strip() for field in rest.split(","))
    if len(fields) > 2 or not all(fields):
        raise ConfigError(
            f"data.source={spec!r} ends with #{rest}; write #FIELD, or #PROMPT,ANSWER"
        )
    return name, fields


def document_of(key: str, record: Mapping[str, Any], fields: tuple[str, ...]) -> Document | Skipped:
    """Make a document of the one field of a record, or of its prompt and its answer.

    A newline ends the prompt where it has none.
    """
    texts = []
    for field in fields:
        if field not in record:
            return Skipped(key, f"no field {field!r}")
        text = record[field]
        if not isinstance(text, str | bytes):
            return Skipped(key, f"field {field!r} is not a string")
        try:
            # JSON can spell half a surrogate pair, which no UTF-8 text holds.
            texts.append(text.decode() if isinstance(text, bytes) else text.encode().decode())
        except UnicodeError:
            return Skipped(key, NOT_UTF8)
    if len(texts) == 1:
        return Document(key, texts[0])
    prompt, answer = texts
    return Document(key, answer, prompt if prompt.endswith("\n") else prompt + "\n")
