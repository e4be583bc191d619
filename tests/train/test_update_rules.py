"""Every update rule on every kind of mesh, against plain numpy and one device; and its state."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.checkpoint import Checkpointer
from jaxscale.config import CheckpointConfig
from jaxscale.muon import orthogonal
from jaxscale.train.restore import optimizer_item, restore_state
from jaxscale.train.state import Assembly, TrainState, optimizer_axes
from jaxscale.train.step import updated
from tests import rules_by_hand
from tests.programs import assemble_tiny, first_state, relative_errors
from tests.rules_by_hand import KNOBS, RULES

# name: (mesh, rules)
PLACES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "one device": ({}, {}),
    "data": ({"data": 8}, {}),
    "fsdp": ({"fsdp": 8}, {}),
    "fsdp tensor": ({"fsdp": 2, "tensor": 4}, {}),
    "data fsdp tensor": ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
    "data sequence tensor": ({"data": 2, "sequence": 2, "tensor": 2}, {}),
    "stage fsdp": ({"stage": 3, "fsdp": 2}, {"vocab": None}),
    "ZeRO-1": ({"fsdp": 8}, {"embed": None}),
}
# Every kind of parameter: also learned positions, and biases with more than one dim. Three layers
# do not divide among the devices.
MODEL = {"num_layers": 3, "biases": "qkv", "mlp": "plain", "positions": "learned"}
RATE, STEPS = 0.1, 3
# Parameters of size 1 round at 2^-24 in each of three steps, and move by some RATE = 0.1; a rule
# rounds about ten times: (3 / 0.1 + 10) x 2^-24, and twice that for the largest of many.
TOLERANCE = 5e-6
# The polynomial that Muon applies to singular values is 484 steep at 0, and so much larger are the
# roundings of the gradients' sum that it acts on, of which there are about four.
MUON_TOLERANCE = 484 * 4 * 2.0**-24


def tolerance(rule: str) -> float:
    return MUON_TOLERANCE if rule == "muon" else TOLERANCE


@dataclasses.dataclass(frozen=True)
class Program:
    """A rule at a place: the assembly, and its jitted `(state, gradients) -> state`."""

    assembly: Assembly
    start: TrainState
    update: Any

    def run(self, state: TrainState, numbers: range) -> TrainState:
        """Return the state after updates with the given gradients of these numbers."""
        shardings = self.assembly.definition.shardings(self.assembly.mesh)
        with jax.set_mesh(self.assembly.mesh):
            for number in numbers:
                state = self.update(state, jax.device_put(given_gradients(number), shardings))
        return state


@functools.cache
def program(rule: str, place: str = "one device", moment_dtype: str = "float32") -> Program:
    mesh, rules = PLACES[place]
    optimizer = {"name": rule, "moment_dtype": moment_dtype, **KNOBS}
    assembly = assemble_tiny(mesh=mesh, rules=rules, model=MODEL, optimizer=optimizer)

    def update(state: TrainState, gradients: Any) -> TrainState:
        params, optimizer = updated(assembly, state, gradients, jnp.float32(RATE))
        return dataclasses.replace(state, params=params, optimizer=optimizer)

    return Program(assembly, first_state(assembly), jax.jit(update))


@functools.cache
def given_gradients(number: int) -> Any:
    """Return gradients whose rows and columns differ in size, and so do parameters."""
    random = np.random.default_rng(number)

    def draw(shape: Any) -> np.ndarray:
        sizes = [np.exp(random.standard_normal(n)) for n in shape.shape]
        values = random.standard_normal(shape.shape)
        for dim, size in enumerate(sizes):
            values = values * np.expand_dims(size, [d for d in range(values.ndim) if d != dim])
        return values.astype(np.float32)

    return jax.tree.map(draw, program("sgd").assembly.definition.shapes)


@functools.cache
def moved(rule: str, place: str = "one device", moment_dtype: str = "float32") -> Any:
    here = program(rule, place, moment_dtype)
    end = here.run(here.start, range(STEPS))
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), end.params, here.start.params)


@functools.cache
def moved_by_hand(rule: str) -> Any:
    start = jax.device_get(program(rule).start.params)
    gradients = [given_gradients(number) for number in range(STEPS)]
    leaves = rules_by_hand.moved(rule, start, gradients, RATE)
    return jax.tree.unflatten(jax.tree.structure(start), leaves)


# The rest takes a minute of compiling.
FAST = [
    *((rule, place) for rule in RULES for place in ("one device", "data fsdp tensor")),
    *((rule, "ZeRO-1") for rule in ("adafactor", "muon")),
]
CASES = [
    pytest.param(rule, place, marks=[] if (rule, place) in FAST else pytest.mark.slow)
    for rule in RULES
    for place in PLACES
]


@pytest.mark.parametrize(("rule", "place"), CASES)
def test_updates_equal_numpy_and_one_device(rule: str, place: str) -> None:
    found = moved(rule, place)
    for expected in (moved_by_hand(rule), moved(rule)):
        errors = relative_errors(found, expected)
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= tolerance(rule), (worst, errors[worst])


def test_matrices_are_orthogonalised_whatever_their_size() -> None:
    """A gradient of zeros moves nothing, and one of tiny numbers moves as much as any other."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((8, 24)).astype(np.float32)
    for found in (orthogonal(matrix * 1e-6, 1e-12), orthogonal(matrix.T, 1e-12).T):
        np.testing.assert_allclose(found, orthogonal(matrix, 1e-12), atol=MUON_TOLERANCE)
    values = np.linalg.svd(orthogonal(matrix, 1e-12), compute_uv=False)
    assert 0.65 < values.min() <= values.max() < 1.25
    assert not np.asarray(orthogonal(jnp.zeros((4, 6)), 1e-12)).any()


def test_muon_leaves_embeddings_head_and_vectors_to_adamw() -> None:
    muon, adamw = moved("muon"), moved("adamw")
    for name in ("embedding", "positions", "head", "norm"):
        jax.tree.map(np.testing.assert_array_equal, muon[name], adamw[name])
    query, plain = muon["blocks"]["attention"], adamw["blocks"]["attention"]
    np.testing.assert_array_equal(query["query_bias"], plain["query_bias"])
    assert np.abs(query["query"] - plain["query"]).max() > 0.1


@pytest.mark.parametrize("place", ["data fsdp tensor", "ZeRO-1"])
@pytest.mark.parametrize("rule", RULES)
def test_moments_lie_where_their_parameter_does(rule: str, place: str) -> None:
    """A factored moment keeps the mesh axes of the dims that it keeps."""
    here = program(rule, place)
    assembly = here.assembly
    axes = jax.tree_util.tree_leaves_with_path(
        optimizer_axes(assembly.definition), is_leaf=lambda value: isinstance(value, tuple)
    )
    num_sharded = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(here.start.optimizer):
        # The last keys of the path are those of the parameter, and then perhaps which moment.
        text = jax.tree_util.keystr(path)
        found = [names for own, names in axes if jax.tree_util.keystr(own) in text]
        if not leaf.ndim:
            assert not found
            continue
        names = found[0]
        if rule == "adafactor" and "optimizer_embed" in names:
            rows = [name for name in names if name in ("layers", "optimizer_embed")]
            columns = [name for name in names if name != "optimizer_embed"]
            names = rows if text.endswith("[0]") else columns
        expected = assembly.rules.sharding(assembly.mesh, *names)
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), text
        num_sharded += not leaf.sharding.is_fully_replicated
    # Matrices: those of six blocks' weights, two tables and the head.
    assert num_sharded >= 9


@pytest.mark.parametrize(
    ("rule", "dtype"), [*((rule, "float32") for rule in RULES), ("lion", "bfloat16")]
)
def test_a_restored_state_goes_on_bitwise(rule: str, dtype: str, tmp_path: pathlib.Path) -> None:
    here = program(rule, "data fsdp tensor", dtype)
    saved = here.run(here.start, range(2))
    item = optimizer_item(saved)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(2, params=saved.params, optimizer=item, meta={})
        checkpointer.wait()
        restored = restore_state(here.assembly, checkpointer, 2)
        elsewhere = restore_state(program(rule, "fsdp tensor", dtype).assembly, checkpointer, 2)
    last = range(2, STEPS)
    uninterrupted, resumed = here.run(saved, last), here.run(restored, last)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, uninterrupted.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.optimizer, uninterrupted.optimizer)
    jax.tree.map(np.testing.assert_array_equal, elsewhere.optimizer, saved.optimizer)


@pytest.mark.parametrize("rule", ["adamw", "lion", "muon", "sgd"])
def test_first_moments_alone_are_stored_in_bfloat16(rule: str) -> None:
    """Second moments would stand still where a step changes them by less than 2^-9."""
    state = program(rule, moment_dtype="bfloat16").start.optimizer
    dtypes: dict[bool, set[Any]] = {True: set(), False: set()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.ndim:
            dtypes[".nu" in jax.tree_util.keystr(path)].add(str(leaf.dtype))
    assert dtypes[False] == {"bfloat16"}
    assert dtypes[True] == ({"float32"} if rule in ("adamw", "muon") else set())


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_moments_in_bfloat16_err_by_their_rounding(rule: str) -> None:
    errors = relative_errors(moved(rule, moment_dtype="bfloat16"), moved(rule))
    # A moment is rounded as it is stored and as it decays, by 2^-9 of itself, and what it was
    # rounded by decays like itself.
    assert 1e-4 < max(errors.values()) < 2 * 2.0**-9 / (1 - KNOBS["beta1"])
