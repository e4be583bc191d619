"""A byte-level BPE tokenizer trained on the corpus itself, for `data.tokenizer=bpe:SIZE`.

The same texts give the same tokenizer. `corpus.py` trains it once and keeps it.
"""

from collections.abc import Iterator, Sequence

import tokenizers

from jaxscale.config import ConfigError, Stopped
from jaxscale.data.documents import Skipped, Source
from jaxscale.data.tokenizer import END_OF_TEXT_NAMES, load_tokenizer
from jaxscale.data.workers import Stop, never

PREFIX = "bpe:"
# The bytes, and the token that ends a document.
MIN_SIZE = 257
MAX_SIZE = 2**24
# More text hardly changes which pairs are frequent.
MAX_TEXT_BYTES = 64 * 2**20
# Of a corpus of fewer documents, each is read in part; of a larger one, some are read.
MIN_DOCUMENTS = 1024
PIECE_CHARACTERS = 4096


def bpe_size(spec: str) -> int | None:
    """Return SIZE of `bpe:SIZE`, None for another tokenizer.

    Raises:
      ConfigError: SIZE is no number, less than the bytes need, or beyond all reason.
    """
    if not spec.startswith(PREFIX):
        return None
    size = spec.removeprefix(PREFIX)
    if not size.isascii() or not size.isdecimal() or not MIN_SIZE <= int(size) <= MAX_SIZE:
        raise ConfigError(
            f"data.tokenizer={spec} needs a number of ids from {MIN_SIZE} to {MAX_SIZE}; "
            "try bpe:4096"
        )
    return int(size)


def vocabulary_size(spec: str) -> int:
    """Return how many ids the tokenizer that `data.tokenizer` names has, at most."""
    return bpe_size(spec) or load_tokenizer(spec).size


def train_bpe(texts: Sequence[str], size: int) -> str:
    """Train on texts and return the tokenizer.json; little text may need fewer ids than `size`."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer = byte_level
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT_NAMES[0]],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return str(library.to_str())


def sample_texts(
    sources: Sequence[Source], *, held_below: int = 0, stop: Stop = never
) -> list[str]:
    """Return texts, or pieces of them, spread evenly over some corpora: at most 64 MiB.

    Args:
      sources: The corpora, each as large as its bytes.
      held_below: Documents whose hash is less are left out.
      stop: Asked before each text whether to stop.

    Raises:
      Stopped: `stop` said so.
    """
    stride = -(-sum(source.num_bytes for source in sources) // MAX_TEXT_BYTES) or 1
    texts: list[str] = []
    room = MAX_TEXT_BYTES
    for source in sources:
        for piece in _pieces(source, stride, held_below):
            if stop():
                raise Stopped("while text for the tokenizer was read")
            room -= len(piece.encode())
            if room < 0:
                return texts
            texts.append(piece)
    return texts


def _pieces(source: Source, stride: int, held_below: int) -> Iterator[str]:
    """Yield one part in `stride` of a corpus: of its documents, and of the pieces of those."""
    document_stride = max(1, min(stride, len(source) // MIN_DOCUMENTS))
    piece_stride = -(-stride // document_stride)
    number = 0
    for index in range(0, len(source), document_stride):
        document = source[index]
        if isinstance(document, Skipped) or document.content_hash() < held_below:
            continue
        text = document.prompt + document.text
        if piece_stride == 1:
            yield text
            continue
        for start in range(0, len(text), PIECE_CHARACTERS):
            if number % piece_stride == 0:
                yield text[start : start + PIECE_CHARACTERS]
            number += 1
