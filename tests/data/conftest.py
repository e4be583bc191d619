"""A small corpus of files, and the token cache of it, shared by the tests of the data package."""

import contextlib
import dataclasses
import pathlib
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import tokenizers

from jaxscale.config import DataConfig
from jaxscale.data.prepare import prepare
from jaxscale.data.token_cache import TokenCache
from tests import emulators

NUM_DOCUMENTS = 40
WORDS = "def return if else for in while import class self None True x y z ( ) : = + é\n".split(" ")

# Lets a process write so many bytes to a file.
SmallFiles = Callable[[int], AbstractContextManager[None]]


def write_corpus(folder: pathlib.Path) -> None:
    """Write documents of 1 to 4,000 words, some in folders, one not UTF-8 and one empty."""
    dice = random.Random(0)
    for number in range(NUM_DOCUMENTS):
        place = folder / ("deep/er" if number % 4 == 0 else "")
        place.mkdir(parents=True, exist_ok=True)
        words = dice.choices(WORDS, k=1 if number == 7 else dice.randrange(2, 4_000))
        (place / f"{number:02d}.txt").write_text(" ".join(words), encoding="utf-8")
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def data(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        source=f"files:{corpus}/**/*.txt",
        length=100,
        validation_fraction=0.2,
        cache_dir=str(tmp_path_factory.mktemp("caches")),
    )


@pytest.fixture(scope="session")
def cache(data: DataConfig) -> TokenCache:
    return TokenCache(prepare(data).path)


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """Return the address of a bucket of an S3 on this machine, which the environment leads to."""
    import fsspec

    with emulators.s3_server() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("corpora")
        yield "s3://corpora"


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return a data folder of TFDS that holds a small dataset."""
    from tests.data import tfds_words

    folder = tmp_path_factory.mktemp("tfds")
    tfds_words.write(str(folder))
    return folder


@pytest.fixture
def fresh(data: DataConfig, tmp_path: pathlib.Path) -> DataConfig:
    """The same corpus, with no cache yet."""
    return dataclasses.replace(data, cache_dir=str(tmp_path / "caches"))


@pytest.fixture
def train_tokenizer(tmp_path: pathlib.Path) -> Callable[[list[str]], str]:
    """Write a small byte-pair tokenizer with some special tokens; return its path."""

    def train(specials: list[str]) -> str:
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.pre_tokenizer = byte_level
        library.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator(["return self.value for value in values"] * 9, trainer)
        path = str(tmp_path / "trained.json")
        library.save(path)
        return path

    return train


@pytest.fixture
def small_files() -> SmallFiles:
    """Return what lets this process, and those it starts, write so many bytes to a file."""

    @contextlib.contextmanager
    def limit(num_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
