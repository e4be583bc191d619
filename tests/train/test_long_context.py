"""What long sequences cost each device, by the compiler's own count."""

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest

from jaxscale.model.attention.ring import zigzag_order
from jaxscale.train.state import abstract_batch, assemble
from jaxscale.train.step import loss_and_gradients
from tests.programs import tiny_config

LONG = 32_768
# Beside its own part of the sequence a device holds one more of the keys and values, on its way.
LEAST_SAVING = 6
UNEVEN = 0.05
# Wide enough that features outweigh a block of scores, 512 x 512 for each head.
WIDE = {"width": 512, "num_heads": 8, "num_kv_heads": 0, "hidden": 1024, "num_layers": 4}


def long_program(length: int, sequence: int, model: dict[str, Any]) -> Any:
    """Compile loss and gradients of one sequence on so many devices; nothing runs."""
    model = {**WIDE, **model}
    config = tiny_config(mesh={"sequence": sequence}, model=model, train={"global_batch_size": 1})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, length=length))
    assembly = assemble(config, jax.devices()[:sequence])
    with jax.set_mesh(assembly.mesh):
        compute = jax.jit(functools.partial(loss_and_gradients, assembly))
        params = assembly.definition.abstract(assembly.mesh)
        return compute.lower(params, abstract_batch(assembly)).compile()


def whole_features(program: Any) -> set[str]:
    """Return the shapes of floats in a program with a number for more than each token."""
    shapes = set(re.findall(r"\bf32\[([\d,]+)\]", program.as_text()))
    sizes = {shape: [int(size) for size in shape.split(",")] for shape in shapes}
    return {shape for shape, dims in sizes.items() if LONG in dims and np.prod(dims) > LONG}


def test_ring_attention_divides_the_activations_of_32k_tokens() -> None:
    alone = long_program(LONG, 1, {"attention": "chunked"})
    ring = long_program(LONG, 8, {"attention": "chunked", "sequence_attention": "ring"})
    whole, part = (x.memory_analysis().temp_size_in_bytes for x in (alone, ring))
    print(f"temporaries: {whole} bytes on one device, {part} on each of 8")
    assert part * LEAST_SAVING <= whole
    assert whole_features(alone)
    assert not whole_features(ring)


@pytest.mark.parametrize("parts", [2, 8])
def test_each_device_has_the_same_causal_work(parts: int) -> None:
    seen_by_part = (zigzag_order(LONG, parts) + 1).reshape(parts, -1).sum(axis=1)
    np.testing.assert_allclose(seen_by_part, seen_by_part.mean(), rtol=UNEVEN)
    contiguous = (np.arange(LONG) + 1).reshape(parts, -1).sum(axis=1)
    assert contiguous.max() > 1.4 * contiguous.mean()
