"""All the sources of a run: their tokenizer, and a token cache for each.

One source or a weighted mixture, it is the same here. The verb `prepare` and `train` call this.
"""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Sequence

from jaxscale import records
from jaxscale.config import DataConfig
from jaxscale.data.bpe import bpe_size, sample_texts, train_bpe
from jaxscale.data.documents import HASH_LIMIT
from jaxscale.data.mixture import Mixture, parse_mixture
from jaxscale.data.prepare import PrepareResult, Progress, cache_root, prepare, writing_to
from jaxscale.data.sources import open_source
from jaxscale.data.token_cache import TokenCache
from jaxscale.data.workers import Stop, never

# Rises when the same texts and size would give another tokenizer.
BPE_FORMAT = 1


def open_corpus(data: DataConfig, prepared: Sequence[PrepareResult] | None = None) -> Mixture:
    """Open the token caches of all parts, which `prepare_corpus(data)` made or makes now.

    Raises:
      ConfigError: a source, the tokenizer or a cache cannot be used.
    """
    prepared = prepared or prepare_corpus(data)
    _, weights = parse_mixture(data.source)
    return Mixture(tuple(TokenCache(result.path) for result in prepared), weights)


def prepare_corpus(
    data: DataConfig,
    *,
    workers: int = 0,
    progress: Progress | None = None,
    force: bool = False,
    stop: Stop = never,
) -> list[PrepareResult]:
    """Make the token cache of every part of `data.source`, or find it.

    Arguments and errors are those of `prepare`, which does each part.
    """
    data = with_trained_tokenizer(data, stop=stop)
    sources, _ = parse_mixture(data.source)
    if len(sources) > 1:
        # A mistake in the last one is told before the first one is prepared.
        for source in sources:
            open_source(source, cache_dir=cache_root(data) / "sources")
    return [
        prepare(
            dataclasses.replace(data, source=source),
            workers=workers,
            progress=progress,
            force=force,
            stop=stop,
        )
        for source in sources
    ]


def with_trained_tokenizer(data: DataConfig, *, stop: Stop = never) -> DataConfig:
    """Return the config with the path of its tokenizer in place of `bpe:SIZE`.

    The tokenizer is trained on the first call; while its text is read, `stop` is asked.
    """
    size = bpe_size(data.tokenizer)
    if size is None:
        return data
    root = cache_root(data)
    specs, _ = parse_mixture(data.source)
    sources = [open_source(spec, cache_dir=root / "sources", stop=stop) for spec in specs]
    held_below = int(data.validation_fraction * HASH_LIMIT)
    words = [BPE_FORMAT, [source.fingerprint for source in sources], held_below]
    name = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
    path = root / "tokenizers" / f"bpe-{size}-{name}.json"
    if not path.exists():
        records.check_writable(path.parent, f"data.cache_dir={data.cache_dir or root}")
        # Of a corpus that is one large document, that one has to do.
        texts = sample_texts(sources, held_below=held_below, stop=stop)
        texts = texts or sample_texts(sources, stop=stop)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
        trained = train_bpe(texts, size)
        with writing_to(path.parent):
            try:
                partial.write_text(trained, encoding="utf-8")
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    return dataclasses.replace(data, tokenizer=str(path))
