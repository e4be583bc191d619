"""What a step keeps, where, and in how many bytes: rematerialisation, offload, sharding."""

import functools
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from jaxscale import config_source, records
from jaxscale.config import ConfigError
from jaxscale.parallel import host_memory
from jaxscale.parallel.host_memory import HOST
from jaxscale.resolve import resolve
from jaxscale.train.loop import train
from jaxscale.train.memory import bytes_on_device, bytes_on_host, sharding_warning
from jaxscale.train.state import TrainState, abstract_state, assemble
from jaxscale.train.step import compile_step, loss_and_gradients
from tests.programs import (
    RUN_STEPS,
    assemble_tiny,
    batch_on,
    final_params,
    first_state,
    last_lines,
)
from tests.train.test_equality import check_first_gradients, first_gradients

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYERS = 4
NAMES = {"remat": "names", "remat_names": ("offload:query", "offload:up", "context")}
WRITTEN_OUT = {"scan_unroll": LAYERS}
REMATS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "one in 2": ({}, {"remat": "full", "remat_every": 2}),
    "one in 2, written out": ({"fsdp": 2}, {"remat": "full", "remat_every": 2, **WRITTEN_OUT}),
    "one in 4": ({"fsdp": 2, "tensor": 2}, {"remat": "dots", "remat_every": 4}),
    "one in 4, written out": ({}, {"remat": "full", "remat_every": 4, **WRITTEN_OUT}),
    "offload": ({"fsdp": 2, "tensor": 2}, NAMES),
    "offload, written out": ({}, {**NAMES, **WRITTEN_OUT}),
    "offload, one in 2": ({"data": 2, "sequence": 2}, {**NAMES, "remat_every": 2}),
    "offload, stages": ({"stage": 2, "data": 2}, NAMES),
}


@functools.cache
def plain() -> tuple[float, Any]:
    return first_gradients(assemble_tiny(model={"num_layers": LAYERS, "remat": "none"}))


@pytest.mark.parametrize("name", REMATS)
def test_what_the_backward_pass_keeps_changes_no_gradient(name: str) -> None:
    mesh, model = REMATS[name]
    assembly = assemble_tiny(mesh=mesh, model={"num_layers": LAYERS, **model})
    check_first_gradients(first_gradients(assembly), plain())


def program(mesh: dict[str, int] | None = None, **model: Any) -> Any:
    """Return the step's gradients as a jaxpr."""
    assembly = assemble_tiny(mesh=mesh, model={"num_layers": LAYERS, **model})
    params, batch = abstract_state(assembly).params, batch_on(assembly, 0)
    with jax.set_mesh(assembly.mesh):
        return jax.make_jaxpr(functools.partial(loss_and_gradients, assembly))(params, batch)


def kept_shapes(**model: Any) -> list[tuple[int, ...]]:
    """Return the shapes that the forward pass over the blocks stacks for the backward pass."""
    scans = [eqn for eqn in program(**model).eqns if eqn.primitive.name == "scan"]
    forward = next(eqn for eqn in scans if eqn.params["length"] == LAYERS)
    stacked = [out.aval.shape for out in forward.outvars[forward.params["num_carry"] :]]
    assert all(layers == LAYERS for layers, *_ in stacked)
    return sorted(tuple(shape[1:]) for shape in stacked)


# The arrays of a block that there are, at 8 rows of 16 tokens.
STREAM, HIDDEN, QUERY, PAIR = (8, 16, 32), (8, 16, 64), (8, 16, 8, 4), (8, 16, 4, 4)
CONTEXT, LOG_TOTAL = (8, 4, 2, 16, 4), (8, 4, 2, 16, 1)
# By name, heads are kept before tokens, as kernels read them.
NAMED_QUERY, NAMED_PAIR = (8, 8, 16, 4), (8, 4, 16, 4)
NAMED = ("key", "value", "attention_out", "gate")
MATMULS = [QUERY, PAIR, PAIR, STREAM, HIDDEN, HIDDEN]


@pytest.mark.parametrize(
    ("attention", "remat", "names", "expected"),
    [
        ("dense", "full", (), []),
        ("dense", "names", ("query",), [NAMED_QUERY]),
        ("dense", "names", ("context",), [CONTEXT]),
        # With the logarithms of the sums no score is computed anew.
        ("chunked", "names", ("context",), [CONTEXT, LOG_TOTAL]),
        ("dense", "names", NAMED, [NAMED_PAIR, NAMED_PAIR, STREAM, HIDDEN]),
        # Attention's scores, 16 x 16 for each head, are none of them.
        ("dense", "dots", (), MATMULS),
        ("chunked", "dots", (), MATMULS),
    ],
)
def test_a_block_keeps_its_input_and_what_remat_says(
    attention: str, remat: str, names: tuple[str, ...], expected: list[Any]
) -> None:
    found = kept_shapes(attention=attention, remat=remat, remat_names=names)
    assert found == sorted([STREAM, *expected])


@pytest.mark.parametrize(("mesh", "rows"), [({}, "8"), ({"stage": 2}, "2@stage,8")], ids=str)
def test_only_offloaded_activations_go_to_the_host(mesh: dict[str, int], rows: str) -> None:
    shape = f"f32<host>[{rows},8,16,4]"
    assert shape in str(program(mesh, **NAMES))
    assert "<host>" not in str(
        program(mesh, **{**NAMES, "remat_names": ("query", "up", "context")})
    )


@pytest.mark.parametrize("every", [1, 2])
def test_no_gathered_weight_is_kept(every: int) -> None:
    """Whole along FSDP there are single layers' weights, and nothing that the scan has stacked."""
    remat = {"remat": "none" if every == 1 else "full", "remat_every": every}
    shapes = re.findall(r"f32\[([^\]]*)\]\{R:fsdp\}", str(program({"fsdp": 4}, **remat)))
    assert "32,64" in shapes
    assert not [shape for shape in shapes if shape.startswith((f"{LAYERS},", f"{LAYERS // 2},"))]


@functools.cache
def temporary_bytes(**model: Any) -> int:
    """Return the temporary bytes of a step whose activations outweigh its parameters."""
    assembly = assemble_tiny(model={"num_layers": 8, **model})
    return int(compile_step(assembly).memory_analysis().temp_size_in_bytes)


def test_bytes_fall_with_the_share_of_blocks_that_recompute() -> None:
    full, half, quarter, none = (
        temporary_bytes(remat="full"),
        temporary_bytes(remat="full", remat_every=2),
        temporary_bytes(remat="full", remat_every=4),
        temporary_bytes(remat="none"),
    )
    assert full < half < quarter < none
    assert full < 0.5 * half
    assert half < 0.8 * quarter


@pytest.mark.slow
def test_full_remat_cuts_activation_bytes_of_small_to_a_quarter() -> None:
    def activation_bytes(remat: str) -> int:
        source = f"{ROOT / 'configs' / 'lm.py'}:small"
        config = config_source.load(source, [("model.remat", remat), ("mesh.data", "1")])
        assembly = assemble(resolve(config), jax.devices()[:1])
        memory = compile_step(assembly).memory_analysis()
        return int(memory.temp_size_in_bytes)

    # Parameters and optimizer state are arguments; gradients count as temporaries here.
    assert 4 * activation_bytes("full") <= activation_bytes("none")


def test_kept_matmul_outputs_take_bytes() -> None:
    assert temporary_bytes(remat="full") < 0.7 * temporary_bytes(remat="dots")


def steps(assembly: Any, count: int = 4) -> tuple[list[Any], TrainState]:
    """Return the metrics of some steps and the last state, all on the host."""
    state, step, metrics = first_state(assembly), compile_step(assembly), []
    with jax.set_mesh(assembly.mesh):
        for number in range(count):
            old = state
            state, found = step(state, batch_on(assembly, number))
            metrics.append(jax.device_get(found))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old)), "not donated"
    return metrics, state


def kinds(tree: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_a_state_in_host_memory_trains_bitwise_the_same(mesh: dict[str, int]) -> None:
    expected, state = steps(assemble_tiny(mesh=mesh))
    assert HOST not in kinds(state)
    for offload in ("optimizer", "all"):
        assembly = assemble_tiny(mesh=mesh, train={"offload": offload})
        metrics, state_there = steps(assembly)
        jax.tree.map(np.testing.assert_array_equal, metrics, expected)
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b)),
            state_there,
            state,
        )
        assert kinds(state_there.optimizer) == {HOST}
        assert (kinds(state_there.params) == {HOST}) == (offload == "all")


def test_bytes_in_host_memory_count_apart() -> None:
    here, there = (
        abstract_state(assemble_tiny(mesh={"fsdp": 4}, train={"offload": kind}))
        for kind in ("none", "all")
    )
    assert bytes_on_host(here) == 0
    assert bytes_on_device(there) + bytes_on_host(there) == bytes_on_device(here)
    # Counters stay.
    assert bytes_on_device(there) < 40


def test_a_run_goes_on_with_another_offload(
    make_config: Any, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for count, offload in ((2, "optimizer"), (4, "all"), (RUN_STEPS, "none")):
        config = make_config(
            train__steps=count, optimizer__schedule_steps=RUN_STEPS, train__offload=offload
        )
        train(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path), final_params(whole))
    losses = [[x[records.LOSS] for x in last_lines(run).values()] for run in (tmp_path, whole)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"offload": "optimizer"}},
            "train.offload=optimizer needs a_place memory, and cpu has device, pinned_host",
        ),
        ({"model": NAMES}, "model.remat_names=offload:query,offload:up needs a_place memory"),
    ],
)
def test_a_platform_without_host_memory_is_refused(
    sections: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "HOST", "a_place")
    with pytest.raises(ConfigError, match=message):
        assemble_tiny(**sections)
    assemble_tiny(model={**NAMES, "remat": "full"})


WIDE = {"width": 256, "hidden": 512}


@pytest.mark.parametrize(
    ("sections", "remedy", "before", "after"),
    [
        ({"mesh": {"data": 8}}, "mesh.fsdp=8 instead of mesh.data=8", {"data": 8}, {"fsdp": 8}),
        (
            {"mesh": {"fsdp": 4}, "rules": {"embed": None}},
            "rules.embed=fsdp",
            None,
            {"fsdp": 4},
        ),
        (
            {"mesh": {"tensor": 4}, "rules": {"hidden": None}},
            "rules.hidden=tensor",
            None,
            {"tensor": 4},
        ),
    ],
)
def test_a_better_sharding_is_named_with_its_bytes(
    sections: Any, remedy: str, before: Any, after: Any
) -> None:
    assembly = assemble_tiny(model=WIDE, **sections)
    now = bytes_on_device(abstract_state(assembly))
    then = bytes_on_device(abstract_state(assemble_tiny(model=WIDE, mesh=after)))
    warning = sharding_warning(assembly, device_bytes=now)
    assert warning is not None
    assert f"take {now:,} bytes" in warning
    assert f"{remedy} would shard them further and save {now - then:,} of" in warning
    assert sharding_warning(assembly, device_bytes=100 * now) is None


@pytest.mark.parametrize(
    "mesh", [{}, {"fsdp": 8}, {"sequence": 8}, {"data": 2, "fsdp": 4}], ids=str
)
def test_a_sharding_that_is_as_fine_as_it_gets_is_not_named(mesh: dict[str, int]) -> None:
    assert sharding_warning(assemble_tiny(mesh=mesh), device_bytes=1) is None
