"""Closed-form bytes: by hand, and against the TPU compiler's."""

import dataclasses
from typing import Any

import pytest

from jaxscale import config_source
from jaxscale.config import Config
from jaxscale.parallel.mesh import AXES
from jaxscale.plan.memory import Bytes, Phases, closed_bytes
from jaxscale.plan.part import device_part, tile_bytes
from jaxscale.plan.space import candidate
from jaxscale.plan.torus import parse_topology
from jaxscale.resolve import resolve
from jaxscale.train.memory import bytes_on_device
from jaxscale.train.state import abstract_state, assemble
from tests.scripts import check_script

# The sharding of arrays alone; the closed form counts tiles, which are never smaller.
MOST_PADDING = 1.6


def config(preset: str = "8b", **knobs: Any) -> Config:
    settings = {"model.attention": "flash", "model.compute_dtype": "bfloat16", **knobs}
    pairs = [(name.replace("__", "."), str(value)) for name, value in settings.items()]
    return resolve(config_source.load(f"configs/lm.py:{preset}", pairs))


def bytes_of(topology: str = "v6e:8x8", **knobs: Any) -> Bytes:
    found = config(**{"train__global_batch_size": 64, **knobs})
    return closed_bytes(candidate(found, parse_topology(topology)))


def test_tiles_are_padded_where_it_costs_least() -> None:
    assert tile_bytes((4096, 1024), 2) == 4096 * 1024 * 2
    assert tile_bytes((256, 100), 4) == 256 * 104 * 4
    assert tile_bytes((12, 192, 12, 64), 4) == 12 * 256 * 12 * 64 * 4
    assert tile_bytes((64,), 4) == 128 * 4
    assert tile_bytes((2, 64), 4) == 2 * 128 * 4
    assert tile_bytes((), 4) == 128 * 4


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "muon", "sgd"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_state_is_what_training_would_hold(
    devices: list[Any], optimizer: str, moments: str
) -> None:
    knobs = {"optimizer__name": optimizer, "optimizer__moment_dtype": moments}
    found = config("125m", mesh__fsdp=4, mesh__tensor=2, train__global_batch_size=8, **knobs)
    part = device_part(candidate(found, parse_topology("v5e:2x4")))
    state = abstract_state(assemble(found, devices))
    for ours, arrays in (
        (part.state.params, state.params),
        (part.state.optimizer, state.optimizer),
    ):
        held = bytes_on_device(arrays)
        assert held <= ours <= MOST_PADDING * held


def test_full_remat_keeps_the_stream_alone() -> None:
    found = bytes_of(model__remat="full", data__length=8192)
    assert found.activations == 32 * 8192 * 4096 * 2
    half = bytes_of(model__remat="full", data__length=8192, model__remat_every=2)
    assert half.activations > 8 * found.activations


def test_what_is_kept_is_ordered_as_the_remats_are() -> None:
    def kept(**knobs: Any) -> float:
        return bytes_of(data__length=8192, **knobs).activations

    kinds = [kept(model__remat=kind) for kind in ("full", "dots", "names", "none")]
    assert kinds == sorted(kinds)
    assert len(set(kinds)) == len(kinds)
    per_token = {"gate": 14336, "up": 14336}
    named = kept(model__remat="names", model__remat_names="gate,up")
    assert named == 32 * 8192 * 2 * (4096 + sum(per_token.values()))
    on_host = kept(model__remat="names", model__remat_names="gate,offload:up")
    assert on_host == 32 * 8192 * 2 * (4096 + per_token["gate"])


def test_a_head_of_64_features_is_kept_as_128() -> None:
    found = config("1b", model__remat="names", model__remat_names="query", data__length=2048)
    part = device_part(candidate(found, parse_topology("v6e:16x16")))
    assert part.kept_bytes == 16 * 2048 * 2 * (2048 + 32 * 128)


def test_each_way_to_save_memory_saves_it() -> None:
    base = bytes_of(data__length=8192)
    assert bytes_of(data__length=8192, train__offload="optimizer").optimizer == 0
    assert (
        bytes_of(data__length=8192, model__remat="full").total
        < bytes_of(data__length=8192, model__remat="dots").total
    )
    longer = bytes_of(data__length=16384)
    assert longer.total > base.total
    fewer = bytes_of("v6e:16x16", data__length=8192, train__global_batch_size=256)
    assert fewer.params == pytest.approx(base.params / 4, rel=0.01)


def test_chunks_of_the_loss_bound_its_logits() -> None:
    def at_the_loss(**knobs: Any) -> float:
        found = config(train__global_batch_size=64, model__remat="full", **knobs)
        return Phases(candidate(found, parse_topology("v6e:8x8"))).loss().logits

    whole = at_the_loss(train__loss_chunk_tokens=0)
    table = 128256 * 4096
    assert whole == 8192 * 128256 * 4 + table * 2
    # The head's sum in float32, and what a chunk adds to it.
    assert at_the_loss(train__loss_chunk_tokens=2048) == table * (2 + 4 + 4)


def test_dense_attention_needs_its_scores() -> None:
    scores = 8192**2 * 32 * 4
    dense, flash = (
        Phases(
            candidate(
                config(train__global_batch_size=64, model__attention=kind),
                parse_topology("v6e:8x8"),
            )
        )
        .backward()
        .workspace
        for kind in ("dense", "flash")
    )
    assert dense - flash == 3 * scores


def test_microbatches_trade_activations_for_sums() -> None:
    one = Phases(candidate(config(train__global_batch_size=128), parse_topology("v6e:8x8")))
    found = config(train__global_batch_size=128, train__accumulation_steps=2)
    two = Phases(candidate(found, parse_topology("v6e:8x8")))
    assert two.backward().activations == one.backward().activations / 2
    assert two.backward().gradients == pytest.approx(2 * one.backward().gradients, rel=0.2)


def test_a_pipeline_keeps_every_tick_and_gathers_its_stage() -> None:
    knobs = {f"mesh__{AXES[0]}": 4, f"mesh__{AXES[2]}": 16, "data__length": 2048}
    found = config(
        train__global_batch_size=128, train__accumulation_steps=8, model__remat="full", **knobs
    )
    step = Phases(candidate(found, parse_topology("v5p:4x4x4")))
    stream = 2048 * 4096 * 2
    assert step.forward().activations == (11 * 8 + 2 * 8) * stream
    assert step.forward().workspace > 8 * step.part.state.whole_block * 2
    assert step.part.loss_tokens == 8 * step.part.tokens
    # The gradients of a tick, and their sum.
    assert step.backward().gradients == 2 * step.part.state.blocks * 4


def test_the_parts_add_up() -> None:
    found = bytes_of(data__length=8192)
    fields = [getattr(found, field.name) for field in dataclasses.fields(found)]
    assert found.live == sum(fields)
    assert found.total == found.live + found.holes


@pytest.mark.slow
def test_bytes_are_near_the_compilers() -> None:
    """Of the twenty configurations of the script, as many as there is time for."""
    pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")
    check_script("closed_bytes.py", "--count=6")
