"""Model FLOPs against numbers worked out by hand from the published shapes."""

import pytest

from jaxscale import config_source
from jaxscale.model.cost import num_matmul_parameters, train_flops_per_token
from jaxscale.resolve import resolve
from tests.conftest import ROOT

# Per layer 4 x width^2 for attention and 3 (gated) or 2 x width x hidden; then width x vocabulary.
# FLOPs per token: 6 x these + 6 x length x width x layers.
BY_HAND = {
    "llama2-7b": (6_607_077_376, 4096, 42_863_689_728),
    "125m": (123_568_128, 1024, 798_031_872),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_flops_follow_the_formula(name: str) -> None:
    parameters, length, flops = BY_HAND[name]
    model = resolve(config_source.load(f"{ROOT}/configs/lm.py:{name}")).model
    assert num_matmul_parameters(model) == parameters
    assert train_flops_per_token(model, length) == flops
