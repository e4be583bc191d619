"""Prompts and answers: which targets have weight, against a walk over the texts token by token."""

import dataclasses
import itertools
import json
import pathlib
import random

import numpy as np
import pytest

from jaxscale.config import DataConfig
from jaxscale.data import ngram
from jaxscale.data.loader import Loader, Windows
from jaxscale.data.ngram import ngram_bits_per_byte
from jaxscale.data.prepare import prepare
from jaxscale.data.token_cache import TokenCache
from jaxscale.data.tokenizer import load_tokenizer
from tests.data.test_ngram import direct_bits_per_byte

EOS = 256
# One document as (prompt, answer); None is a document without a prompt.
Pair = tuple[str | None, str]


def write_pairs(folder: pathlib.Path) -> list[Pair]:
    """Write prompts and answers of 1 to 60 bytes, and a text without a prompt among them."""
    dice = random.Random(0)

    def words() -> str:
        return "".join(dice.choices("ab é?\n", k=dice.randrange(1, 60)))

    pairs: list[Pair] = [(words(), words()) for _ in range(80)]
    for name, some in (("a", pairs[:30]), ("c", pairs[30:])):
        rows = [json.dumps({"q": prompt, "a": answer}) for prompt, answer in some]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    text: Pair = (None, "no prompt here")
    (folder / "b.txt").write_text(text[1])
    return [*pairs[:30], text, *pairs[30:]]


@pytest.fixture(scope="module")
def pairs_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Pair], DataConfig]:
    folder = tmp_path_factory.mktemp("pairs")
    pairs = write_pairs(folder)
    source = f"files:{folder}/*.*#q,a"
    return pairs, DataConfig(
        source=source, validation_fraction=0.0, cache_dir=str(folder / "caches")
    )


def walk(pairs: list[Pair], mask: bool) -> tuple[list[int], list[float], list[int]]:
    """Return token, weight as a target and number of the document, position by position."""
    tokens: list[int] = []
    weights: list[float] = []
    numbers: list[int] = []
    for number, (prompt, answer) in enumerate(pairs):
        if prompt is not None and not prompt.endswith("\n"):
            prompt += "\n"
        asked, answered = (prompt or "").encode(), answer.encode()
        tokens += [*asked, *answered, EOS]
        learnt = [1.0] * (len(answered) + 1)
        if not asked and mask:
            learnt[0] = 0.0
        weights += [0.0] * len(asked) + learnt
        numbers += [number] * (len(asked) + len(answered) + 1)
    return tokens, weights, numbers


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("length", [1, 7, 64, 1_500])
def test_only_answers_have_weight(
    pairs_data: tuple[list[Pair], DataConfig], length: int, mask: bool
) -> None:
    pairs, data = pairs_data
    split = TokenCache(prepare(data).path).split("train")
    tokens, weights, numbers = walk(pairs, mask)
    assert split.read(0, split.num_tokens).tolist() == tokens
    windows = Windows(split, length, mask)
    num_bytes = 0
    for index in range(len(windows)):
        start = index * length
        stop = start + length
        found = windows[index]
        assert found["tokens"].tolist() == tokens[start:stop]
        assert found["targets"].tolist() == tokens[start + 1 : stop + 1]
        expected = weights[start + 1 : stop + 1]
        assert found["weights"].tolist() == expected
        documents = numbers[start:stop] if mask else [0] * length
        assert found["segments"].tolist() == [1 + n - documents[0] for n in documents]
        num_bytes += sum(
            w > 0 and t != EOS for w, t in zip(expected, found["targets"].tolist(), strict=True)
        )
        assert windows.text_bytes(index + 1) == num_bytes
    assert {0.0, 1.0} == set(weights)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("mask", [True, False])
def test_bytes_of_windows_that_overlap_are_those_of_their_answers(
    pairs_data: tuple[list[Pair], DataConfig], mask: bool, once: bool
) -> None:
    pairs, data = pairs_data
    split = TokenCache(prepare(data).path).split("train")
    tokens, weights, _ = walk(pairs, mask)
    windows = Windows(split, 20, mask, stride=7, once=once)
    num_bytes = 0
    for index in range(len(windows)):
        new = 20 if index == 0 or not once else 7
        stop = index * 7 + 21
        positions = range(stop - new, stop)
        found = windows[index]["weights"].tolist()
        assert found == [0.0] * (20 - new) + [weights[p] for p in positions]
        num_bytes += sum(weights[p] > 0 and tokens[p] != EOS for p in positions)
        assert windows.text_bytes(index + 1) == num_bytes


def test_the_cache_says_what_is_prompt(pairs_data: tuple[list[Pair], DataConfig]) -> None:
    pairs, data = pairs_data
    result = prepare(data)
    index = json.loads((result.path / "index.json").read_text())
    entry = index["splits"]["train"]
    lengths = np.load(result.path / entry["prompt_tokens"])
    expected = [len(f"{p.removesuffix(chr(10))}\n".encode()) if p else 0 for p, _ in pairs]
    assert lengths.tolist() == expected
    assert entry["prompt_bytes"] == sum(expected)
    assert "train-prompts.npy" in index["files"]
    assert "prompt_tokens" not in index["splits"]["validation"]


def test_without_prompts_there_is_no_file_of_them(cache: TokenCache) -> None:
    assert not list(cache.path.glob("*prompts*"))
    assert cache.split("train").prompt_tokens is None


def test_prompt_and_answer_are_encoded_apart(
    pairs_data: tuple[list[Pair], DataConfig], tmp_path: pathlib.Path
) -> None:
    from jaxscale.data.bpe import train_bpe

    pairs, data = pairs_data
    (tmp_path / "bpe.json").write_text(train_bpe(["\n\n a?a?\nb\nb ab ab"] * 9, 300))
    tokenizer = load_tokenizer(str(tmp_path / "bpe.json"))
    data = dataclasses.replace(data, tokenizer=str(tmp_path / "bpe.json"))
    split = TokenCache(prepare(data).path).split("train")
    expected: list[int] = []
    for prompt, answer in pairs:
        asked = "" if prompt is None else prompt.removesuffix("\n") + "\n"
        parts = [tokenizer.encode(part).tolist() for part in (asked, answer)]
        expected += [*parts[0], *parts[1], tokenizer.eos_id]
    assert split.read(0, split.num_tokens).tolist() == expected
    windows = Windows(split, split.num_tokens - 1, document_mask=True)
    answers = sum(len(answer.encode()) for _, answer in pairs)
    # All answers; of the text without a prompt, the first token has no weight.
    assert windows.text_bytes(1) == pytest.approx(answers, abs=6)


@pytest.mark.parametrize("num_documents", [1, 2, 10])
def test_no_answer_is_cut_where_hashes_do_not_divide(
    num_documents: int, tmp_path: pathlib.Path
) -> None:
    rows = [{"q": "Same?", "a": "yes " * 50} for _ in range(num_documents)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(
        source=f"files:{tmp_path}/a.jsonl#q,a",
        validation_fraction=0.2,
        cache_dir=str(tmp_path / "caches"),
    )
    result = prepare(data)
    held = {1: 0, 2: 1, 10: 2}[num_documents]
    assert (result.train.documents, result.validation.documents) == (num_documents - held, held)
    assert result.train.bytes == (num_documents - held) * len("Same?\n" + "yes " * 50)
    split = TokenCache(result.path).split("validation")
    if held:
        assert split.prompt_tokens is not None
        assert split.prompt_tokens.tolist() == [6] * held


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("mask", [True, False])
def test_baselines_score_the_answers(
    pairs_data: tuple[list[Pair], DataConfig],
    order: int,
    mask: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ngram, "STRENGTHS", (3.0,))
    monkeypatch.setattr(ngram, "BLOCK_TOKENS", 100)
    data = dataclasses.replace(
        pairs_data[1], validation_fraction=0.3, length=20, document_mask=mask
    )
    cache = TokenCache(prepare(data).path)
    train = Windows(cache.split("train"), cache.split("train").num_tokens - 1, mask)[0]
    counted = weighted_pairs([train])
    loader = Loader(cache, data, global_batch_size=4, seed=0)
    scored = weighted_pairs(list(loader.evaluation_batches()))
    expected = direct_bits_per_byte(counted, scored, (3.0,) * order)
    assert ngram_bits_per_byte(cache, data, order) == pytest.approx(expected, rel=1e-9)


def weighted_pairs(batches: list[dict[str, np.ndarray]]) -> list[tuple[int, int]]:
    return list(
        itertools.chain.from_iterable(
            zip(b["tokens"][w].tolist(), b["targets"][w].tolist(), strict=True)
            for b in batches
            for w in [b["weights"] > 0]
        )
    )
