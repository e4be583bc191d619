"""One device == every mesh with every attention and remat, in pairs; bfloat16, within bounds.

The plain combinations stand in `test_equality.py`; these are slow for their number.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxscale.train.state import Assembly, in_layer_order
from jaxscale.train.step import loss_and_gradients
from tests.meshes import SCHEDULES, name_of
from tests.programs import (
    assemble_tiny,
    batch_on,
    check_first_gradients,
    first_gradients,
    first_state,
    relative_errors,
)

REMATS = ("none", "full", "dots", "names")
WINDOW = 5


class Case(NamedTuple):
    """A mesh with one of the ways to attend, to cross the sequence axis, and to remat."""

    mesh: dict[str, int]
    parts: int
    rounds: int
    attention: str
    crossing: str
    remat: str
    window: int

    def name(self) -> str:
        return " ".join([name_of(self.mesh), *map(str, self[1:])])

    @property
    def sections(self) -> dict[str, Any]:
        return {
            "mesh": self.mesh,
            "model": {
                "num_layers": 4 if "stage" in self.mesh else 2,
                "attention": self.attention,
                "sequence_attention": self.crossing,
                "attention_window": self.window,
                "remat": self.remat,
            },
            "train": {"accumulation_steps": self.parts, "pipeline_rounds": self.rounds},
        }


def ways_to_attend(mesh: dict[str, int]) -> list[tuple[str, str]]:
    if "sequence" not in mesh:
        return [("dense", "all_gather"), ("chunked", "all_gather")]
    crossings = ("all_gather", "all_to_all")
    # A ring goes by blocks, whatever the algorithm.
    pairs = [(kind, crossing) for kind in ("dense", "chunked") for crossing in crossings]
    return [*pairs, ("chunked", "ring")]


def cases() -> Iterator[Case]:
    """Pair each mesh with each way to attend and each remat, and these with each other."""
    for number, (mesh, *schedule) in enumerate(SCHEDULES):
        ways = ways_to_attend(mesh)
        for row in range(max(len(ways), len(REMATS))):
            attention, crossing = ways[row % len(ways)]
            if crossing == "all_to_all" and (8 // mesh.get("tensor", 1)) % mesh["sequence"]:
                continue
            # Shifted by the number of the mesh, so that no way meets the same remat everywhere.
            remat = REMATS[(row + number) % len(REMATS)]
            window = WINDOW * ((row + number) % 3 == 0)
            yield Case(mesh, *schedule, attention, crossing, remat, window)


CASES = list(cases())


def test_every_pair_of_mesh_attention_and_remat_is_there() -> None:
    ways = {(case.attention, case.crossing) for case in CASES}
    assert len({frozenset(mesh.items()) for mesh, *_ in SCHEDULES}) >= 24
    for mesh, *schedule in SCHEDULES:
        own = [case for case in CASES if [case.mesh, *case[1:3]] == [mesh, *schedule]]
        assert {case.remat for case in own} == set(REMATS), mesh
        assert {(case.attention, case.crossing) for case in own} == set(ways_to_attend(mesh))
    met = {(case.attention, case.crossing, case.remat) for case in CASES}
    assert met == {(*way, remat) for way in ways for remat in REMATS}
    axes = ("stage", "data", "fsdp", "sequence", "tensor")
    pairs = {(a, b) for a in axes for b in axes if a < b}
    found = {(a, b) for a, b in pairs for mesh, *_ in SCHEDULES if {a, b} <= set(mesh)}
    assert found == pairs


@functools.cache
def plain(num_layers: int, window: int) -> tuple[float, Any]:
    model = {"num_layers": num_layers, "attention_window": window, "remat": "none"}
    return first_gradients(assemble_tiny(model=model))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=Case.name)
def test_mesh_attention_and_remat_equal_one_device(case: Case) -> None:
    expected = plain(case.sections["model"]["num_layers"], case.window)
    check_first_gradients(first_gradients(assemble_tiny(**case.sections)), expected)


# bfloat16 keeps 8 bits, so one rounding errs by at most 2^-9 of a value; an activation or its
# gradient passes some 10 roundings in a layer, which add up like a random walk, and the largest of
# a leaf's errors counts: 4 deviations. The loss is a mean over tokens: one deviation.
ROUNDING_BF16, ROUNDINGS_PER_LAYER, DEVIATIONS = 2.0**-9, 10, 4
SHAPE_BF16 = {"num_kv_heads": 0, "biases": "all", "norm": "layernorm"}
QUICK = [{"fsdp": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2}, {"stage": 2, "data": 4}]


@functools.cache
def exact(num_layers: int) -> tuple[float, Any]:
    return skewed(assemble_tiny(model={**SHAPE_BF16, "num_layers": num_layers}))


@pytest.mark.parametrize(
    ("mesh", "parts", "rounds"),
    [
        pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow)
        for case in [({}, 1, 1), *SCHEDULES]
    ],
    ids=str,
)
def test_bfloat16_stays_close_to_float32(mesh: dict[str, int], parts: int, rounds: int) -> None:
    num_layers = 4 if "stage" in mesh else 2
    model = {**SHAPE_BF16, "num_layers": num_layers, "compute_dtype": "bfloat16"}
    train = {"accumulation_steps": parts, "pipeline_rounds": rounds}
    loss, gradients = skewed(assemble_tiny(mesh=mesh, model=model, train=train))
    exact_loss, exact_gradients = exact(num_layers)
    deviation = ROUNDING_BF16 * (ROUNDINGS_PER_LAYER * num_layers) ** 0.5
    assert loss == pytest.approx(exact_loss, rel=deviation)
    errors = relative_errors(gradients, exact_gradients)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= DEVIATIONS * deviation, worst
    # Nothing but the rounding of float32 would mean that the knob does nothing.
    assert errors[worst] > ROUNDING_BF16


def skewed(assembly: Assembly) -> tuple[float, Any]:
    """Return loss and gradients of a batch in which one token is nearly all there is."""
    batch = batch_on(assembly, 0)
    batch["tokens"] = jax.device_put(
        np.where(np.asarray(batch["tokens"]) < 60, 5, batch["tokens"]), assembly.batch_sharding
    )
    params = first_state(assembly).params
    with jax.set_mesh(assembly.mesh):
        compute = jax.jit(functools.partial(loss_and_gradients, assembly))
        loss, gradients = compute(params, batch)
    return float(loss), jax.device_get(in_layer_order(assembly, gradients))
