"""The equality that defines the system: one device == every mesh, in every number."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from jaxscale.train.state import init_state, jit_init_params
from tests.meshes import MESHES, STAGES, name_of
from tests.programs import (
    GRADIENT_TOLERANCE_F32,
    VARIANTS,
    assemble_tiny,
    check_first_gradients,
    first_gradients,
    relative_errors,
    train_steps,
)

PROGRAMS: dict[str, dict[str, Any]] = {
    "residual region along sequence and tensor": {
        "mesh": {"sequence": 2, "tensor": 4},
        "rules": {"residual_length": "sequence,tensor"},
    },
    "kv heads not sharded": {"mesh": {"tensor": 8}, "rules": {"kv_heads": None}},
    "optimizer sharded, parameters not (ZeRO-1)": {"mesh": {"fsdp": 8}, "rules": {"embed": None}},
    "loss in chunks": {
        "mesh": {"data": 2, "sequence": 2, "tensor": 2},
        "train": {"loss_chunk_tokens": 8},
    },
    "accumulation": {"mesh": {"data": 2, "fsdp": 2}, "train": {"accumulation_steps": 2}},
    "remat none": {"mesh": {"fsdp": 2, "tensor": 2}, "model": {"remat": "none"}},
    "remat dots": {"mesh": {"fsdp": 2, "tensor": 2}, "model": {"remat": "dots"}},
    "remat names": {"mesh": {"fsdp": 2, "tensor": 2}, "model": {"remat": "names"}},
    "two slices": {"mesh": {"data": 4, "fsdp": 2, "num_slices": 2}},
    "layers unrolled": {
        "mesh": {"data": 2, "fsdp": 2},
        "model": {"remat": "none", "scan_unroll": 2},
    },
    "pipeline, remat none, layers unrolled": {
        "mesh": {"stage": 2, "fsdp": 2},
        "model": {"remat": "none", "scan_unroll": 4, "num_layers": 4},
        "train": {"accumulation_steps": 2},
    },
    "pipeline, remat names, ring": {
        "mesh": {"stage": 2, "sequence": 2, "tensor": 2},
        "model": {"remat": "names", "sequence_attention": "ring"},
        "train": {"accumulation_steps": 4},
    },
    "pipeline, all_to_all": {
        "mesh": {"stage": 2, "data": 2, "sequence": 2},
        "model": {"sequence_attention": "all_to_all", "attention": "chunked"},
        "train": {"accumulation_steps": 2},
    },
    "pipeline, remat dots, chunked, loss in chunks": {
        "mesh": {"stage": 2, "data": 2, "tensor": 2},
        "model": {"remat": "dots", "attention": "chunked"},
        "train": {"accumulation_steps": 4, "loss_chunk_tokens": 8},
    },
    "pipeline, vocabulary on every stage": {
        "mesh": {"stage": 2, "tensor": 2},
        "rules": {"vocab": "tensor"},
        "train": {"accumulation_steps": 2},
    },
    "layers unrolled in parts": {
        "mesh": {"data": 2, "fsdp": 2},
        "model": {"remat": "full", "scan_unroll": 2, "num_layers": 4},
    },
}


# Attention algorithm, way across the sequence axis, mesh, remat, window.
ATTENTIONS = [
    ("chunked", "all_gather", {"data": 8}, "none", 0),
    ("chunked", "all_gather", {"fsdp": 2, "tensor": 4}, "names", 5),
    ("chunked", "all_gather", {"data": 2, "sequence": 4}, "full", 0),
    ("chunked", "all_gather", {"sequence": 2, "tensor": 4}, "dots", 5),
    ("dense", "all_to_all", {"sequence": 8}, "full", 0),
    ("dense", "all_to_all", {"fsdp": 2, "sequence": 2, "tensor": 2}, "names", 0),
    ("chunked", "all_to_all", {"data": 2, "sequence": 4}, "none", 5),
    ("chunked", "all_to_all", {"sequence": 4, "tensor": 2}, "dots", 0),
    ("dense", "ring", {"sequence": 8}, "none", 0),
    ("dense", "ring", {"fsdp": 4, "sequence": 2}, "dots", 5),
    ("chunked", "ring", {"data": 2, "sequence": 4}, "names", 0),
    ("chunked", "ring", {"sequence": 2, "tensor": 4}, "full", 5),
    ("chunked", "ring", {"data": 2, "sequence": 2, "tensor": 2}, "none", 0),
    ("flash", "all_gather", {"data": 2, "sequence": 2, "tensor": 2}, "names", 5),
    ("flash", "all_to_all", {"fsdp": 2, "sequence": 2, "tensor": 2}, "none", 0),
    ("flash", "ring", {"fsdp": 2, "sequence": 2}, "full", 5),
]


@functools.cache
def reference(variant: str = "llama") -> tuple[float, Any]:
    return first_gradients(assemble_tiny(model=VARIANTS[variant]))


@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
def test_loss_and_every_gradient_equal_one_device(mesh: dict[str, int]) -> None:
    check_first_gradients(first_gradients(assemble_tiny(mesh=mesh)), reference())


@pytest.mark.parametrize(("mesh", "parts", "rounds"), STAGES, ids=str)
def test_a_pipeline_equals_one_device(mesh: dict[str, int], parts: int, rounds: int) -> None:
    model = {"num_layers": 4}
    train = {"accumulation_steps": parts, "pipeline_rounds": rounds}
    found = first_gradients(assemble_tiny(mesh=mesh, model=model, train=train))
    check_first_gradients(found, four_layers_reference())


@functools.cache
def four_layers_reference() -> tuple[float, Any]:
    return first_gradients(assemble_tiny(model={"num_layers": 4}))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_way_to_run_it_equals_the_plain_one(name: str) -> None:
    program = PROGRAMS[name]
    plain = {"num_layers": program.get("model", {}).get("num_layers", 2)}
    expected = (
        first_gradients(assemble_tiny(model=plain)) if plain["num_layers"] > 2 else reference()
    )
    check_first_gradients(first_gradients(assemble_tiny(**program)), expected)


@pytest.mark.filterwarnings("ignore:model.attention=flash computes as chunked")
@pytest.mark.parametrize(("kind", "crossing", "mesh", "remat", "window"), ATTENTIONS, ids=str)
def test_every_attention_equals_the_dense_one(
    kind: str, crossing: str, mesh: dict[str, int], remat: str, window: int
) -> None:
    model = {"attention": kind, "sequence_attention": crossing, "remat": remat}
    assembly = assemble_tiny(mesh=mesh, model={**model, "attention_window": window})
    check_first_gradients(first_gradients(assembly), windowed_reference(window))


@functools.cache
def windowed_reference(window: int) -> tuple[float, Any]:
    return first_gradients(assemble_tiny(model={"attention_window": window}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_block_variants_equal_one_device(variant: str) -> None:
    assembly = assemble_tiny(mesh={"fsdp": 2, "sequence": 2, "tensor": 2}, model=VARIANTS[variant])
    found, expected = first_gradients(assembly), reference(variant)
    if variant == "gpt":
        found, expected = without_key_bias(found), without_key_bias(expected)
    check_first_gradients(found, expected)


def without_key_bias(result: tuple[float, Any]) -> tuple[float, Any]:
    """Drop a gradient that is 0 but for rounding, and so has no relative error.

    Without rotary positions a bias of the keys adds the same to all scores of a query.
    """
    loss, gradients = result
    attention = dict(gradients["blocks"]["attention"])
    assert np.abs(attention.pop("key_bias")).max() < 1e-6 * np.abs(attention["value_bias"]).max()
    return loss, {**gradients, "blocks": {**gradients["blocks"], "attention": attention}}


@functools.cache
def trained_reference() -> tuple[list[float], list[int]]:
    return train_steps(assemble_tiny())


@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
def test_20_training_steps_equal_one_device(mesh: dict[str, int]) -> None:
    losses, hashes = train_steps(assemble_tiny(mesh=mesh))
    expected, expected_hashes = trained_reference()
    assert expected[-1] < 0.8 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=GRADIENT_TOLERANCE_F32)
    assert hashes == expected_hashes
    assert len(set(hashes)) == 5


def test_zero_1_trains_like_one_device() -> None:
    assembly = assemble_tiny(mesh={"fsdp": 8}, rules={"embed": None})
    moments = jax.tree.leaves(init_state(assembly).optimizer)
    assert any("fsdp" in str(leaf.sharding.spec) for leaf in moments)
    losses, _ = train_steps(assembly)
    np.testing.assert_allclose(losses, trained_reference()[0], rtol=GRADIENT_TOLERANCE_F32)


def test_accumulation_of_4_times_2_equals_1_times_8() -> None:
    parts = train_steps(assemble_tiny(train={"accumulation_steps": 4}))
    np.testing.assert_allclose(parts[0], trained_reference()[0], rtol=GRADIENT_TOLERANCE_F32)


def test_initial_parameters_are_the_same_on_every_mesh_and_born_sharded(
    devices: list[jax.Device],
) -> None:
    shape = {"width": 64, "hidden": 256, "num_layers": 4}
    expected = jax.device_get(init_state(assemble_tiny(model=shape)).params)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(expected))
    for mesh in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        params = init_state(assemble_tiny(model=shape, mesh=mesh)).params
        assert max(relative_errors(jax.device_get(params), expected).values()) == 0
        held = [0] * len(devices)
        for leaf in jax.tree.leaves(params):
            for shard in leaf.addressable_shards:
                held[shard.device.id] += shard.data.nbytes
        shards = 8 // mesh.get("data", 1)
        # Norms are replicated: 2 x width per layer, one in 150 parameters.
        assert max(held) < 1.1 * total / shards


def test_no_device_makes_the_whole_model_on_the_way(devices: list[jax.Device]) -> None:
    assembly = assemble_tiny(mesh={"fsdp": 8}, model={"width": 256, "hidden": 1024})
    total = sum(4 * leaf.size for leaf in jax.tree.leaves(assembly.definition.shapes))
    memory = jit_init_params(assembly).lower(jax.random.key(0)).compile().memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < total / 2
