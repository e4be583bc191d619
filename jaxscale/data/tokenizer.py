"""Text to token ids and back, by a Hugging Face `tokenizer.json`.

The built-in byte tokenizer is such a file too, made here: the id of a byte is its value, and one
more id ends a document. Text is data: encoding never turns it into special tokens.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from jaxscale.config import ConfigError

# Names of the token that ends a document, in the order they are looked for.
END_OF_TEXT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
)


class Tokenizer:
    """A tokenizer made from the text of its JSON.

    Attributes:
      size: Ids lie in [0, size).
      eos_id: The id that follows every document.
      fingerprint: SHA-256 of the JSON.
    """

    def __init__(self, text: str) -> None:
        """Raise ValueError unless `text` is the JSON of a tokenizer that can end a document."""
        self._text = text
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        names = [name for name in END_OF_TEXT_NAMES if name in vocabulary]
        if not names:
            raise ValueError(f"has no end-of-text token; one of {' '.join(END_OF_TEXT_NAMES)}")
        self.size = max(vocabulary.values()) + 1
        self.eos_id: int = vocabulary[names[0]]
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._is_bytes = text == byte_tokenizer_json()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._text,)

    @functools.cached_property
    def _library(self) -> tokenizers.Tokenizer:
        try:
            library = tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"is not a tokenizer.json ({error})") from error
        library.encode_special_tokens = True
        library.no_padding()
        library.no_truncation()
        return library

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text as a 1-D integer array, without any special token."""
        if self._is_bytes:
            return np.frombuffer(text.encode(), np.uint8)
        return self.encode_by_library(text)

    def encode_by_library(self, text: str) -> np.ndarray:
        """Encode as the library does: the reference of the byte tokenizer's short cut."""
        return np.asarray(self._library.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids: broken UTF-8 as U+FFFD, special and unknown ids as nothing."""
        return str(self._library.decode([int(i) for i in ids], skip_special_tokens=True))

    def continuation(self, ids: Sequence[int] | np.ndarray, more: Sequence[int]) -> str:
        """Return the text that `more` adds to the text of `ids`, with the space between them."""
        before = self.decode(ids)
        return self.decode([*ids, *more]).removeprefix(before)

    def to_json(self) -> str:
        """Return the text of a tokenizer.json file."""
        return self._text


def load_tokenizer(spec: str) -> Tokenizer:
    """Load the tokenizer that `data.tokenizer` names: `bytes`, or the path of a tokenizer.json.

    `bpe:SIZE` has a path once `corpus.py` has trained it.

    Raises:
      ConfigError: no such file, not a tokenizer, or one without an end-of-text token.
    """
    if spec == "bytes":
        return Tokenizer(byte_tokenizer_json())
    path = pathlib.Path(spec).expanduser()
    try:
        return Tokenizer(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer={spec}: {error.strerror}; give the path of a tokenizer.json, or bytes"
        ) from error
    except ValueError as error:
        raise ConfigError(f"data.tokenizer={spec} {error}; try another file, or bytes") from error


def check_vocabulary(size: int, vocab_size: int) -> None:
    """Raise ConfigError for a tokenizer larger than the model's vocabulary, `model.vocab_size`."""
    if size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than data.tokenizer, which has "
            f"{size} tokens; set model.vocab_size to at least {size}"
        )


@functools.cache
def byte_tokenizer_json() -> str:
    """Return the JSON of the byte tokenizer: ids 0 to 255 are bytes, 256 is `<|endoftext|>`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end_of_text = {
        "id": 256,
        "content": END_OF_TEXT_NAMES[0],
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    value = {
        "version": "1.0",
        "added_tokens": [end_of_text],
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return json.dumps(value, ensure_ascii=False)


def _byte_symbols() -> list[str]:
    """Return the printable character that stands for each byte in byte-level tokenizers (GPT-2).

    Printable bytes stand for themselves, and the others for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(0x100 + others.index(b)) for b in range(256)]
