"""An evaluation against its definition: every held-out target once, in nats and bits per byte."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from jaxscale.config import DataConfig
from jaxscale.data.loader import Loader
from jaxscale.data.prepare import prepare
from jaxscale.data.token_cache import TokenCache
from jaxscale.train.evaluate import evaluate
from jaxscale.train.state import assemble
from jaxscale.train.step import batch_loss
from tests.programs import BATCH, LENGTH, LOSS_TOLERANCE_F32, first_state, tiny_config

EOS = 256


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """Return a cache of short documents, some of them with characters of several bytes."""
    folder = tmp_path_factory.mktemp("held out")
    for number in range(42):
        (folder / f"{number}.txt").write_text(f"text {number} \u00e9\u4e2d " * (1 + number % 3))
    data = DataConfig(
        source=f"files:{folder}/*.txt", validation_fraction=0.4, cache_dir=str(folder)
    )
    return TokenCache(prepare(data).path)


@pytest.mark.parametrize("num_batches", [0, 1])
@pytest.mark.parametrize("parts", [1, 2])
def test_an_evaluation_equals_its_definition(
    cache: TokenCache, num_batches: int, parts: int
) -> None:
    config = tiny_config(
        mesh={"data": 2, "sequence": 2},
        model={"vocab_size": 264},
        train={"accumulation_steps": parts},
    )
    config = dataclasses.replace(config, data=DataConfig(length=LENGTH))
    assembly = assemble(config, jax.devices()[:4])
    params = first_state(assembly).params
    loader = Loader(
        cache, config.data, global_batch_size=BATCH, seed=0, sharding=assembly.batch_sharding
    )
    found = evaluate(assembly, params, loader, num_batches=num_batches)

    count = BATCH * num_batches or len(loader.validation_windows)
    assert len(loader.validation_windows) > BATCH
    assert len(loader.validation_windows) % BATCH, "the last batch is filled up"
    host = jax.device_get(params)
    nats = jax.jit(lambda row: batch_loss(assembly.definition, host, row, chunk_tokens=0))
    total = tokens = num_bytes = 0.0
    for number in range(count):
        window = loader.validation_windows[number]
        total += float(nats({name: array[None] for name, array in window.items()}))
        tokens += float(window["weights"].sum())
        num_bytes += float((window["weights"] * (window["targets"] != EOS)).sum())
    assert tokens < count * LENGTH, "some targets have no weight"
    assert (found.windows, found.tokens) == (count, tokens)
    assert found.loss == pytest.approx(total / tokens, rel=10 * LOSS_TOLERANCE_F32)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(
        found.loss * tokens / np.log(2) / num_bytes, rel=1e-9
    )
