"""The profile of the input pipeline: its rows are sane, and the stage it names is the slowest."""

import dataclasses
import io
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import pytest
import rich.console
from jax.sharding import SingleDeviceSharding

from jaxscale.config import ConfigError, DataConfig
from jaxscale.data import loader as loader_module
from jaxscale.data import profile
from jaxscale.data.files import FilesSource
from jaxscale.data.loader import Windows
from jaxscale.data.profile import (
    LOAD,
    LOAD_STAGE,
    STEP,
    TOKENIZE,
    TOKENIZE_STAGE,
    Rate,
    profile_pipeline,
    rate,
    slowest,
)
from jaxscale.data.profile_table import render, short, step_ratio, to_rows, verdicts
from jaxscale.data.token_cache import ShardWriter, TokenSplit
from jaxscale.data.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "REPEATS", 2)
    monkeypatch.setattr(profile, "SAMPLE_BYTES", 50_000)
    monkeypatch.setattr(profile, "MEASURED_TOKENS", 2_000)


def measure(data: DataConfig) -> list[Rate]:
    sharding = SingleDeviceSharding(jax.devices()[0])
    return profile_pipeline(data, global_batch_size=4, sharding=sharding)


def test_rows_are_sane(fresh: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile.os, "cpu_count", lambda: 2)
    rates = measure(fresh)
    assert [(r.part, r.what) for r in rates] == [
        (TOKENIZE_STAGE, "read documents"),
        (TOKENIZE_STAGE, "encode"),
        (TOKENIZE_STAGE, "write"),
        (TOKENIZE, "1 worker"),
        (TOKENIZE, "2 workers"),
        (LOAD_STAGE, "read from disk"),
        (LOAD_STAGE, "decode"),
        (LOAD_STAGE, "assemble rows"),
        (LOAD_STAGE, "place on devices"),
        (LOAD, "1 thread"),
        (LOAD, "2 threads"),
        (LOAD, "4 threads"),
    ]
    for r in rates:
        assert 0 < r.lowest <= r.tokens_per_second <= r.highest
    # Of the byte tokenizer a byte of text is a token, and a document has one more.
    for r in rates[:5]:
        assert r.bytes_per_second == pytest.approx(r.tokens_per_second, rel=0.01)
    # Nothing stays.
    assert [p.name for p in pathlib.Path(fresh.cache_dir).iterdir()] == []


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes 10 ms longer."""

    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.01)
        return function(*args, **kwargs)

    return slowed


@pytest.mark.parametrize(
    ("owner", "name", "part", "stage"),
    [
        (FilesSource, "__getitem__", TOKENIZE_STAGE, "read documents"),
        (Tokenizer, "encode", TOKENIZE_STAGE, "encode"),
        (ShardWriter, "add", TOKENIZE_STAGE, "write"),
        (profile.os, "pread", LOAD_STAGE, "read from disk"),
        (TokenSplit, "read", LOAD_STAGE, "decode"),
        (Windows, "_document_offsets", LOAD_STAGE, "assemble rows"),
        (loader_module.jax, "make_array_from_callback", LOAD_STAGE, "place on devices"),
    ],
)
def test_a_slow_stage_is_named(
    fresh: DataConfig,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    part: str,
    stage: str,
) -> None:
    monkeypatch.setattr(profile, "_tokenizing", lambda *_: [])
    monkeypatch.setattr(profile, "_loading", lambda *_: [])
    monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    rates = measure(fresh)
    assert slowest(rates, part).what == stage
    (marked,) = (r for r in to_rows(rates, None) if r["is_slowest_stage"] and r["part"] == part)
    assert marked["what"] == stage


def test_slow_reading_shows_in_the_batches(
    fresh: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window waits 10 ms: 1,000 tokens of 100 a window take 0.1 s in one thread."""
    monkeypatch.setattr(profile, "_tokenizing", lambda *_: [])
    monkeypatch.setattr(TokenSplit, "read", slow(TokenSplit.read))
    rates = measure(fresh)
    one = next(r for r in rates if r.what == "1 thread")
    assert 1_000 < one.highest < 2 * 100 / 0.01
    decode = next(r for r in rates if r.what == "decode")
    assert 1_000 < decode.tokens_per_second < 100 / 0.01


def test_the_sample_is_bounded(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    source = profile.open_source(data.source, cache_dir=data.cache_dir)
    tokenizer = profile.load_tokenizer("bytes")
    sample = profile.Sample.take(source, tokenizer, min_tokens=1)
    assert 50_000 <= sample.num_bytes < 100_000
    monkeypatch.setattr(profile, "SAMPLE_SECONDS", 0.0)
    first = profile.Sample.take(source, tokenizer, min_tokens=1)
    assert len(first) < len(sample) < len(source)
    for more in (2 * sample.num_bytes, sample.num_bytes // 2):
        window = profile.Sample.take(source, tokenizer, min_tokens=more)
        assert more <= window.num_bytes < more + 50_000, "it holds a window"
    every = profile.Sample.take(source, tokenizer, min_tokens=10**9)
    assert len(every) == len(source)


def test_a_mixture_is_refused(fresh: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"is a mixture, and --profile measures one source"):
        measure(dataclasses.replace(fresh, source=f"1 {fresh.source}; 1 synthetic"))


def test_a_sample_that_holds_no_window_is_refused(fresh: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.length=1000000 needs 1000001 tokens"):
        measure(dataclasses.replace(fresh, length=1_000_000))


RATES = [
    rate(TOKENIZE_STAGE, "encode", 100, [1.0]),
    rate(TOKENIZE, "1 worker", 100, [1.0]),
    rate(LOAD_STAGE, "decode", 900, [1.0]),
    rate(LOAD_STAGE, "place on devices", 400, [1.0], size=8e6),
    rate(LOAD, "1 thread", 600, [2.0, 3.0, 1.0]),
]


def test_a_rate_is_the_median_with_its_range() -> None:
    found = RATES[-1]
    assert (found.lowest, found.tokens_per_second, found.highest) == (200, 300, 600)
    assert RATES[-2].bytes_per_second == 8e6


def test_the_ratio_comes_with_its_spread() -> None:
    step = rate(STEP, "measured here", 100, [1.0, 2.0, 0.5])
    assert step_ratio(RATES[-1], step) == (3.0, 1.0, 12.0)
    rows = to_rows(RATES, step)
    assert [row["what"] for row in rows if row["is_slowest_stage"]] == [
        "encode",
        "place on devices",
    ]
    assert rows[-1]["step_ratio"] == 1
    assert to_rows(RATES, None)[0]["step_ratio"] is None


@pytest.mark.parametrize(
    ("tokens", "words"),
    [(100, "3 (3 to 3) x what a training step takes: the step limits"), (1_000, "loading limits")],
)
def test_what_limits_is_said(tokens: float, words: str) -> None:
    rates = [*RATES[:-1], rate(LOAD, "2 threads", 300, [1.0])]
    step = rate(STEP, "as given", tokens, [1.0])
    lines = verdicts(rates, step)
    assert "the slowest stage is place on devices; 2 threads did most" in lines[1]
    assert words in lines[2]
    assert len(verdicts(rates, None)) == 2


def test_the_table_fits_a_terminal() -> None:
    stream = io.StringIO()
    step = rate(STEP, "measured here", 123_456, [1.0])
    console = rich.console.Console(file=stream, width=100)
    console.print(render(RATES, step))
    text = stream.getvalue()
    assert "123 k (123 k to 123 k)" in text
    assert "on this machine now" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (12.34, "12.3"), (9_999, "9,999"), (12_345, "12.3 k"), (3e10, "30 G")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_prompts_are_measured_too(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_loading", lambda *_: [])
    monkeypatch.setattr(profile.os, "cpu_count", lambda: 1)
    rows = [json.dumps({"q": "q" * 999, "a": "a"})] * 50
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    data = DataConfig(
        source=f"files:{tmp_path}/a.jsonl#q,a", length=100, cache_dir=str(tmp_path / "caches")
    )
    for r in measure(data)[:4]:
        # 1,001 bytes and an end for each document.
        assert r.bytes_per_second == pytest.approx(r.tokens_per_second, rel=0.01)


def test_the_folder_that_cannot_be_written_is_named(data: DataConfig, corpus: pathlib.Path) -> None:
    local = dataclasses.replace(data, local_cache_dir=str(corpus / "empty.txt"))
    with pytest.raises(ConfigError, match=r"data\.local_cache_dir=.*empty\.txt cannot be written"):
        measure(local)
