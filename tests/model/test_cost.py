"""Model FLOPs against numbers worked out by hand from the published shapes."""

import dataclasses

import pytest

from jaxscale import config_source
from jaxscale.config import ModelConfig
from jaxscale.model.cost import (
    forward_flops_per_token,
    num_matmul_parameters,
    train_flops_per_token,
)
from jaxscale.resolve import resolve
from tests.conftest import ROOT

# Per layer 4 x width^2 for attention where every head has keys of its own, and 3 (gated) or 2 x
# width x hidden; then width x vocabulary.
# FLOPs per token: 6 x these + 6 x length x width x layers.
BY_HAND = {
    "llama2-7b": (6_607_077_376, 4096, 42_863_689_728),
    # 8 key/value heads for 32 query heads.
    "llama3-8b": (7_504_658_432, 8192, 51_470_401_536),
    "125m": (123_568_128, 1024, 798_031_872),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_flops_follow_the_formula(name: str) -> None:
    parameters, length, flops = BY_HAND[name]
    model = resolve(config_source.load(f"{ROOT}/configs/lm.py:{name}")).model
    assert num_matmul_parameters(model) == parameters
    assert train_flops_per_token(model, length) == flops


def test_a_window_cuts_the_keys_that_are_seen() -> None:
    model = ModelConfig(num_kv_heads=8, head_dim=16, vocab_size=256)

    def attention(window: int, length: int) -> float:
        windowed = dataclasses.replace(model, attention_window=window)
        rest = 2 * num_matmul_parameters(model)
        return (forward_flops_per_token(windowed, length) - rest) / (4 * 8 * 16 * 8)

    # Tokens 0 to 7 see 1, 2, 3, 3, ... keys; the formula has half a key less on the diagonal.
    assert attention(3, 8) == pytest.approx(3 - 9 / 16)
    assert attention(8, 8) == attention(0, 8) == attention(100, 8) == 4.0
