"""Closed-form seconds: matmuls by hand, orders that must hold, and the time that it all takes."""

import time
from typing import Any

import pytest

from jaxscale import config_source
from jaxscale.config import Config
from jaxscale.model.cost import forward_flops_per_token, train_flops_per_token
from jaxscale.parallel.mesh import AXES, device_grid
from jaxscale.parallel.pipeline import bubble_share
from jaxscale.plan.memory import closed_bytes
from jaxscale.plan.roofline import Roofline, closed_seconds, recomputed_flops
from jaxscale.plan.shares import Shares
from jaxscale.plan.space import candidate, candidates
from jaxscale.plan.torus import Network, described_devices, parse_topology
from jaxscale.resolve import resolve

PEAK = Shares(matmul=1.0, vector=1.0, hbm=1.0, ici=1.0, dcn=1.0)
STAGE, DATA, FSDP, SEQUENCE, TENSOR = (f"mesh__{axis}" for axis in AXES)
MOST_SECONDS = 5.0


def config(preset: str = "8b", **knobs: Any) -> Config:
    settings = {"model.attention": "flash", "train__global_batch_size": 256, **knobs}
    pairs = [(name.replace("__", "."), str(value)) for name, value in settings.items()]
    return resolve(config_source.load(f"configs/lm.py:{preset}", pairs))


def seconds(
    topology: str = "v6e:16x16", shares: Shares = PEAK, num_slices: int = 1, **knobs: Any
) -> Roofline:
    slice_ = parse_topology(topology, num_slices)
    knobs = {"train__gradient_reduce_dtype": "float32", **knobs}
    found = candidate(config(**knobs, mesh__num_slices=num_slices), slice_)
    grid = device_grid(found.config.mesh, described_devices(slice_))
    return closed_seconds(found, slice_.chip, Network(slice_, grid), shares)


def flops_of(function: Any, found: Config) -> float:
    return float(function(found.model, found.data.length)) * found.data.length


def test_compute_is_the_models_flops_where_nothing_is_computed_twice() -> None:
    """Without attention, one sequence of 8192 on each chip, and the loss in one piece."""
    knobs = {"model__remat": "none", "train__loss_chunk_tokens": 0, "data__length": 128}
    found = config(**knobs)
    flops = flops_of(train_flops_per_token, found) * 256 / 256
    # At 128 tokens the kernel is all but nothing.
    assert seconds(**knobs).compute == pytest.approx(flops / 918e12, rel=0.02)


def test_flops_that_are_done_twice_are_counted_by_hand() -> None:
    """2048 tokens of 8 layers; a layer of 128 x 128 four times and 128 x 384 three times."""
    knobs = {"model.attention": "dense", "train__global_batch_size": 8}

    def again(topology: str = "v5e:1x1", **more: Any) -> float:
        found = config("tiny", **knobs, **more)
        return recomputed_flops(candidate(found, parse_topology(topology)))

    assert again(model__remat="none") == again(model__remat="dots") - again_of_scores() == 0
    matmuls = 2 * 2048 * 8 * (4 * 128 * 128 + 2 * 128 * 384)
    assert again(model__remat="full") == matmuls + again_of_scores()
    names = "query,key,value,context"
    kept = again(model__remat="names", model__remat_names=names)
    assert kept == 2 * 2048 * 8 * (128 * 128 + 2 * 128 * 384)
    # Each microbatch has its share of the tokens, and each device.
    assert again(model__remat="full", train__accumulation_steps=2) == matmuls + again_of_scores()
    assert again("v5e:2x4", model__remat="full") == (matmuls + again_of_scores()) / 8
    # A loss in chunks computes its logits, of 384 words, again.
    chunked = again(model__remat="none", train__loss_chunk_tokens=512)
    assert chunked == 2 * 2048 * 128 * 384


def again_of_scores() -> int:
    """Two matmuls over 256 keys of 8 heads with 16 features, in 8 layers."""
    return 2 * 2 * 2048 * 256 * 8 * 16 * 8


def test_full_remat_computes_the_blocks_again() -> None:
    """All of a block but the last matmul, whose result nobody asks for again; the head is kept."""
    knobs = {"train__loss_chunk_tokens": 0, "data__length": 128}
    none = seconds(model__remat="none", **knobs)
    full = seconds(model__remat="full", **knobs)
    found = config(**knobs)
    forward = flops_of(forward_flops_per_token, found)
    head, down = (2.0 * 128 * n for n in (4096 * 128256, 32 * 4096 * 14336))
    expected = (forward - head - down) / 918e12
    assert full.compute - none.compute == pytest.approx(expected, rel=0.02)
    names = seconds(model__remat="names", **knobs)
    assert none.compute <= names.compute < full.compute


def test_a_kernel_is_bound_by_the_slower_of_its_units() -> None:
    """Twelve layers of twelve heads pass four times over L^2/2 scores: forward, again, dq, dkv."""
    scores = 12 * 12 * 8192 * 8192 / 2

    def compute(vector: float) -> float:
        shares = Shares(matmul=1.0, vector=vector, hbm=1.0, ici=1.0, dcn=1.0)
        knobs = {"data__length": 8192, "train__global_batch_size": 4}
        return seconds("v5e:2x2", shares, preset="125m", **knobs).compute

    # v5e has 4 x 1024 lanes at 1.5 GHz; ten operations a score.
    vectors = 10 * 4 * scores / (4096 * 197e12 / (4 * 128**2 * 2))
    assert compute(0.125) - compute(0.25) == pytest.approx((8 - 4) * vectors)
    # Eleven matmuls of 64 features in matrix units of 128.
    matmuls = 11 * 2 * 64 * scores / (197e12 / 2)
    assert compute(0.25) - compute(1.0) == pytest.approx(4 * vectors - matmuls)


def test_gathers_and_gradients_are_the_parameters() -> None:
    """FSDP over a pod: bf16 gathered twice, f32 all-reduced, for it spans two dimensions."""
    found = seconds(model__remat="full", train__loss_chunk_tokens=0)
    layers = 32 * (4096 * 128 * 2 * (32 + 8) + 3 * 4096 * 14336)
    tables = 2 * 4096 * 128256
    sent = 2 * 2 * layers + 2 * tables + 2 * 4 * (layers + tables)
    expected = sent * 255 / 256 / (4 * 90e9)
    assert found.ici == pytest.approx(expected, rel=0.02)
    assert found.dcn == 0.0
    half = seconds(
        model__remat="full", train__loss_chunk_tokens=0, train__gradient_reduce_dtype="bfloat16"
    )
    assert half.ici < found.ici


def test_an_axis_on_one_dimension_is_reduced_and_scattered() -> None:
    knobs = {"model__remat": "full", "train__loss_chunk_tokens": 0, "data__length": 128}
    layers = 32 * (4096 * 128 * 2 * (32 + 8) + 3 * 4096 * 14336)
    tables = 2 * 4096 * 128256
    alone = seconds(**{STAGE: 16, DATA: 1, FSDP: 16, "train__accumulation_steps": 16}, **knobs)
    # A stage's layers are gathered once, and summed once; with both tables, cut by the stages.
    sent = (2 + 4) * layers / 16 + (2 + 4) * tables / 16
    assert alone.ici - alone.exposed == pytest.approx(sent * 15 / 16 / (2 * 90e9), rel=0.1)
    with_replicas = seconds(**{DATA: 16, FSDP: 16}, **knobs)
    sent = 2 * 2 * layers + 2 * tables
    summed = 2 * 4 * (layers + tables) * 255 / 256 / (4 * 90e9)
    expected = sent * 15 / 16 / (2 * 90e9) + summed
    assert with_replicas.ici == pytest.approx(expected, rel=0.02)


def test_tensor_shards_expose_their_sums() -> None:
    """Seven all-reduces of the stream in a layer, over a line of four: 6/4 of it on one link.

    Forward after attention and MLP; backward before query, key, value, gate and up.
    """
    knobs = {"model__remat": "none", "train__global_batch_size": 64, "train__loss_chunk_tokens": 0}
    tensor = seconds(**{FSDP: 64, TENSOR: 4}, **knobs)
    one = 2 * 8192 * 4096 * 2 * 3 / 4 / 90e9
    ends = seconds(**{FSDP: 64, TENSOR: 4}, **knobs, model__num_layers=16)
    assert tensor.exposed - ends.exposed == pytest.approx(16 * 7 * one)
    again = seconds(**{FSDP: 64, TENSOR: 4}, **{**knobs, "model__remat": "full"})
    assert again.exposed - tensor.exposed == pytest.approx(32 * one)


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("full", 1), ("dots", 1), ("names", 0)])
def test_sequence_shards_pass_their_keys_on(remat: str, again: int) -> None:
    """Eight kv heads of 128, of 8192 tokens, over a line of four."""
    knobs = {FSDP: 64, SEQUENCE: 4, "model__remat": remat, "train__global_batch_size": 64}

    def of_a_layer(kind: str) -> float:
        deep, flat = (
            seconds(**knobs, model__sequence_attention=kind, model__num_layers=layers)
            for layers in (32, 16)
        )
        return (deep.exposed - flat.exposed) / 16

    whole = 2 * 8192 * 8 * 128 * 2
    gathered = whole * 3 / 4 / 90e9
    assert of_a_layer("all_gather") == pytest.approx((1 + again + 2) * gathered)
    assert of_a_layer("ring") == pytest.approx((1 + again + 2) * 3 * whole / 4 / 90e9)
    # Queries and results too, a fourth of each device's part on each way across the middle.
    exchanged = 2 * 2048 * (32 + 8) * 128 * 2 * (4 / 4) / 90e9
    assert of_a_layer("all_to_all") == pytest.approx((2 + again) * exchanged)


def test_a_pipeline_has_its_bubble() -> None:
    knobs = {STAGE: 4, FSDP: 16, "train__accumulation_steps": 8, "train__global_batch_size": 128}
    found = seconds("v5p:4x4x4", **knobs)
    assert found.bubble / found.total == pytest.approx(bubble_share(4, 8, 1))
    assert seconds("v5p:4x4x4", **{FSDP: 64}).bubble == 0.0


def test_slices_pay_for_the_slow_network() -> None:
    one = seconds(**{DATA: 1, FSDP: 256}, train__global_batch_size=512)
    two = seconds(num_slices=2, **{DATA: 2, FSDP: 256}, train__global_batch_size=512)
    assert one.dcn == 0.0
    # Each device's own 1/256 of the gradients in float32, there and back, at 12.5 GB/s a chip.
    parameters = 32 * (4096 * 128 * 2 * (32 + 8) + 3 * 4096 * 14336) + 2 * 4096 * 128256
    expected = 2 * parameters / 256 * 4 * (1 / 2) / 12.5e9
    assert two.dcn == pytest.approx(expected, rel=0.02)


def test_host_memory_is_paid_for() -> None:
    assert seconds().host == 0.0
    found = seconds(train__offload="optimizer")
    assert found.host == pytest.approx(2 * 8.03e9 * 4 / 256 / 32e9, rel=0.02)
    names = seconds(model__remat="names", model__remat_names="offload:gate")
    assert names.host == pytest.approx(32 * 8192 * 14336 * 2 / 32e9)


def test_the_longest_wait_is_named() -> None:
    assert seconds().bound == "compute"
    fields = {"compute": 0.1, "hbm": 0.1, "ici": 0.5, "dcn": 0.1, "host": 0.2}
    found = Roofline(**fields, bubble=0.05, exposed=0.2)
    assert found.bound == "ICI"
    assert found.total == pytest.approx(max(0.1, 0.5 + 0.1 - 0.2) + 0.2 + 0.05)


def test_all_candidates_of_a_pod_take_seconds() -> None:
    """Processor time, for the tests share their cores."""
    slice_ = parse_topology("v6e:16x16")
    devices, networks = described_devices(slice_), dict[Any, Network]()
    start = time.process_time()
    count = 0
    for found in candidates(config(), slice_, batch=512, length=8192):
        if found.mesh not in networks:
            networks[found.mesh] = Network(slice_, device_grid(found.config.mesh, devices))
        network = networks[found.mesh]
        total = closed_bytes(found).total
        assert total > 0
        assert closed_seconds(found, slice_.chip, network).total > 0
        count += 1
    assert count > 5000
    assert time.process_time() - start < MOST_SECONDS
