"""A device works off events: what hides behind what, and where the seconds go, counted by hand."""

import dataclasses

import pytest

from jaxscale.config import MeshConfig
from jaxscale.hardware import CHIPS
from jaxscale.parallel.mesh import device_grid
from jaxscale.parallel.program import Collective
from jaxscale.plan.kernels import Attention
from jaxscale.plan.schedule import Event, Loop, Operation, Send, Wait
from jaxscale.plan.shares import Shares
from jaxscale.plan.timeline import (
    COMPUTE,
    DCN,
    HBM,
    HOP_SECONDS,
    ICI,
    LINK_HOST,
    Prices,
    Timeline,
    part_of,
    pass_of,
    predict,
)
from jaxscale.plan.torus import Network, described_devices, parse_topology

WHOLE = Shares(matmul=1, vector=1, hbm=1, ici=1, dcn=1)
CHIP = CHIPS["v5e"]


def prices(num_slices: int = 1, shares: Shares = WHOLE) -> Prices:
    """Return the prices of 16 chips that one mesh axis spans."""
    slice_ = parse_topology("v5e:4x4", num_slices)
    mesh = MeshConfig(data=num_slices, fsdp=16, num_slices=num_slices)
    network = Network(slice_, device_grid(mesh, described_devices(slice_)))
    return Prices(CHIP, shares, network, Attention(2048))


def compute(seconds: float) -> Operation:
    """Return an operation whose cycles take so long."""
    cycles, flops = round(seconds * CHIP.clock_hertz), 0.6 * seconds * CHIP.bf16_flops_per_second
    return Operation(cycles, flops, 0, "jit(step)/jvp()/while/body/mlp/dot_general")


def gather(key: str, seconds: float) -> Send:
    """Return an all-gather over all 16 chips, whose links it takes so long."""
    payload = (seconds - HOP_SECONDS) * 16 / 15 * 2 * CHIP.ici_link_bytes_per_second
    return Send(key, Collective("all-gather", ("fsdp",), 16, round(payload), ""))


def run(*events: Event, num_slices: int = 1) -> Timeline:
    """Predict these events at the peak of everything."""
    return predict(events, prices(num_slices))


def test_operations_follow_each_other_and_memory_may_be_slower_than_cycles() -> None:
    slow = Operation(1, 0.0, round(0.5 * CHIP.hbm_bytes_per_second), "jit(step)/mul")
    found = run(compute(2.0), slow)
    assert found.seconds == pytest.approx(2.5)
    assert found.by_resource == pytest.approx({COMPUTE: 2, HBM: 0.5, ICI: 0, DCN: 0, LINK_HOST: 0})
    assert found.bound == COMPUTE


@pytest.mark.parametrize(("beside", "waited"), [(3.0, 0.0), (0.5, 0.5), (0.0, 1.0)])
def test_a_transfer_costs_what_computation_does_not_hide(beside: float, waited: float) -> None:
    found = run(gather("a", 1.0), compute(beside), Wait("a"))
    assert found.seconds == pytest.approx(beside + waited, rel=1e-6)
    assert found.by_resource[ICI] == pytest.approx(waited, abs=1e-6)
    (traffic,) = found.traffic
    assert traffic.busy_seconds == pytest.approx(1.0, rel=1e-6)
    assert traffic.waited_seconds == pytest.approx(waited, abs=1e-6)


def test_transfers_over_the_same_links_queue() -> None:
    found = run(gather("a", 1.0), gather("b", 1.0), compute(1.5), Wait("a"), Wait("b"))
    assert found.seconds == pytest.approx(2.0, rel=1e-6)


def test_the_host_s_link_is_another_one() -> None:
    copied = Send("h", None, host_bytes=round(CHIP.host_bytes_per_second))
    found = run(gather("a", 1.0), copied, Wait("a"), Wait("h"))
    assert found.seconds == pytest.approx(1.0, rel=1e-6)


def test_between_slices_each_host_s_chips_share_its_link() -> None:
    payload = 10**8
    sent = Send("s", Collective("slices all-reduce", (), 0, payload, ""))
    found = run(sent, Wait("s"), num_slices=4)
    per_chip = CHIP.dcn_bytes_per_second_per_host / CHIP.chips_per_host
    assert found.seconds == pytest.approx(2 * 3 / 4 * payload / per_chip)
    assert found.bound == DCN


def test_a_loop_counts_as_often_as_it_goes_round() -> None:
    body = (gather("a", 1.0), compute(0.25), Wait("a"))
    found = run(compute(1.0), Loop(7, (*body, Loop(3, (compute(0.5),)))))
    assert found.seconds == pytest.approx(1 + 7 * (1.0 + 1.5), rel=1e-6)
    assert sum(found.by_resource.values()) == pytest.approx(found.seconds)
    (traffic,) = found.traffic
    assert traffic.number == 7
    assert traffic.waited_seconds == pytest.approx(7 * 0.75, rel=1e-5)
    assert sum(found.by_part.values()) == pytest.approx(1 + 7 * (0.25 + 1.5))
    assert set(found.by_part) == {("mlp", "forward")}


def test_shares_slow_down_what_they_are_shares_of() -> None:
    halves = {
        "matmul": (Operation(None, CHIP.bf16_flops_per_second, 0, ""), 2.0),
        "hbm": (Operation(1, 0.0, round(CHIP.hbm_bytes_per_second), ""), 2.0),
        "ici": (gather("a", 1.0), 2.0),
    }
    for name, (event, expected) in halves.items():
        shares = dataclasses.replace(WHOLE, **{name: 0.5})
        found = predict((event, Wait("a")), prices(shares=shares))
        assert found.seconds == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("share", "seconds"), [(0.8, 0.75), (0.5, 1.0)])
def test_small_tiles_make_a_matmul_no_slower_than_its_share(share: float, seconds: float) -> None:
    """Its cycles are at 60% of peak."""
    shares = dataclasses.replace(WHOLE, matmul=share)
    small = dataclasses.replace(prices(shares=shares), has_small_tiles=True)
    assert predict((compute(1.0),), prices(shares=shares)).seconds == pytest.approx(1.0)
    assert predict((compute(1.0),), small).seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("source", "part", "direction"),
    [
        ("jit(step)/jvp()/while/body/closed_call/mlp/bld,df->blf/dot_general", "mlp", "forward"),
        (
            "jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/attention/mul",
            "attention",
            "recompute",
        ),
        ("jit(step)/transpose(jvp(head))/dot_general", "head", "backward"),
        ("jit(step)/optimizer/mul", "optimizer", "update"),
        ("", "other", "update"),
    ],
)
def test_names_of_operations_tell_their_part_and_pass(
    source: str, part: str, direction: str
) -> None:
    assert (part_of(source), pass_of(source)) == (part, direction)
