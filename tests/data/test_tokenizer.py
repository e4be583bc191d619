"""Tokenizers: the byte tokenizer is a real tokenizer.json, and others are taken or refused."""

import pathlib
import pickle
import time
from collections.abc import Callable

import numpy as np
import pytest
import tokenizers

from jaxscale.config import ConfigError
from jaxscale.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

TrainTokenizer = Callable[[list[str]], str]
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "",
    "  \t\r\n\n\0\x7f",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f600 e\u0301",
    "text with <|endoftext|> inside",
    "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)])),
]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_their_values(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    np.testing.assert_array_equal(tokenizer.encode_by_library(text), ids)
    assert tokenizer.decode(ids) == text


def test_byte_tokenizer_is_a_file_that_the_library_loads(tmp_path: pathlib.Path) -> None:
    tokenizer = load_tokenizer("bytes")
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    library = tokenizers.Tokenizer.from_file(str(path))
    assert library.get_vocab_size() == tokenizer.size == 257
    assert library.token_to_id("<|endoftext|>") == tokenizer.eos_id == 256
    assert library.encode("h\u00e9<|endoftext|>").ids == [*"h\u00e9".encode(), 256]
    loaded = load_tokenizer(str(path))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("abc").tolist() == [97, 98, 99]


def test_byte_tokenizer_is_fast() -> None:
    text = "x = 1\n" * 200_000
    tokenizer = load_tokenizer("bytes")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        tokenizer.encode(text)
        seconds.append(time.perf_counter() - start)
    # A loop in Python, or the library, would be slower by a factor of ten and more.
    assert len(text) / min(seconds) > 5e6


def test_decoding_never_fails() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode([65, 0xC3, 66, 256, 300]) == "A\ufffdB"
    assert tokenizer.decode(np.array([0x80], np.int32)) == "\ufffd"


def test_pickling_keeps_the_tokenizer(train_tokenizer: TrainTokenizer) -> None:
    for spec in ("bytes", train_tokenizer(["</s>"])):
        tokenizer = load_tokenizer(spec)
        again: Tokenizer = pickle.loads(pickle.dumps(tokenizer))
        assert again.fingerprint == tokenizer.fingerprint
        text = "values </s><|endoftext|>"
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_a_trained_tokenizer_round_trips_and_ends_documents(
    train_tokenizer: TrainTokenizer,
) -> None:
    tokenizer = load_tokenizer(train_tokenizer(["<unk>", "</s>"]))
    assert tokenizer.eos_id == 1
    text = "return </s> values"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text)
    assert tokenizer.eos_id not in ids, "text never turns into special tokens"


def test_size_covers_gaps_between_ids(tmp_path: pathlib.Path) -> None:
    text = load_tokenizer("bytes").to_json().replace('": 255', '": 300')
    (tmp_path / "t.json").write_text(text, encoding="utf-8")
    assert load_tokenizer(str(tmp_path / "t.json")).size == 301


def test_bad_files_are_named(tmp_path: pathlib.Path, train_tokenizer: TrainTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*none\.json: No such file"):
        load_tokenizer(str(tmp_path / "none.json"))
    for content in (b"{}", b"{", b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"data\.tokenizer=.*bad\.json .*try another file"):
            load_tokenizer(str(tmp_path / "bad.json"))
    endless = train_tokenizer(["<unk>"])
    with pytest.raises(ConfigError, match=r"no end-of-text token; one of <\|endoftext\|> .*</s>"):
        load_tokenizer(endless)


def test_vocabulary_must_hold_the_tokenizer() -> None:
    tokenizer = load_tokenizer("bytes")
    check_vocabulary(tokenizer.size, 257)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256 .*data\.tokenizer.*least 257"):
        check_vocabulary(tokenizer.size, 256)


def test_a_continuation_keeps_the_space_before_it(tmp_path: pathlib.Path) -> None:
    """As in SentencePiece, a word carries its space, which a decoder drops at the beginning."""
    words = {"\u2581def": 0, "\u2581world": 1, "</s>": 2}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = tokenizers.decoders.Metaspace()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("def")
    assert "def" + tokenizer.continuation(ids, [1, 1]) == "def world world"
    assert load_tokenizer("bytes").continuation([100], [101, 102]) == "ef"
