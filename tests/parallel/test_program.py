"""The reader of compiled programs, on programs whose costs are known by hand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxscale.config import MeshConfig
from jaxscale.model.cost import num_matmul_parameters, num_parameters, train_flops_per_token
from jaxscale.parallel.hlo import Instruction, num_bytes, parse, shape_of
from jaxscale.parallel.mesh import make_mesh
from jaxscale.parallel.pipeline import bubble_share
from jaxscale.parallel.program import Program, _device_groups, _Reader, read_program
from jaxscale.train.state import abstract_state, assemble
from jaxscale.train.step import compile_step
from tests.programs import BATCH, LENGTH, assemble_tiny, tiny_config

M, K, N = 16, 64, 48


def compiled(function: Any, *shapes: tuple[int, ...]) -> Any:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile()


def test_a_matmul_in_loops_counts_as_often_as_it_runs() -> None:
    def once(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ x), None

    def many(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.scan(once, x + x @ x, length=5)[0], None

    program = read_program(compiled(lambda x: jax.lax.scan(many, x, length=3)[0], (K, K)))
    assert program.flops == 3 * (5 + 1) * 2 * K**3
    assert not program.collectives
    assert not program.opaque_calls


def test_batched_dots_count_all_that_is_summed() -> None:
    program = read_program(
        compiled(lambda a, b: jnp.einsum("gmk,gkn->gmn", a, b), (4, M, K), (4, K, N))
    )
    assert program.flops == 2 * 4 * M * K * N


def test_of_alternatives_the_dearest_counts() -> None:
    def choose(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert read_program(compiled(choose, (K, K))).flops == 2 * 2 * K**3


def test_convolutions_count_too() -> None:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv(x, kernel, (1, 1), "VALID")

    program = read_program(compiled(convolve, (2, 3, 32, 32), (5, 3, 7, 7)))
    assert program.flops == 2 * (2 * 5 * 26 * 26) * (3 * 7 * 7)


def test_what_a_convolution_finds_in_padding_does_not_count() -> None:
    """A product of (M, K) and (K, N), written as a TPU's compiler writes it: out of 7 taps, one."""

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), ((6, 6),), dimension_numbers=("NCH", "IOH", "NCH")
        )

    program = read_program(compiled(convolve, (M, K, 1), (K, N, 7)))
    assert program.flops == 2 * M * K * N * 7
    strided = compiled(lambda x, k: jax.lax.conv(x, k, (2,), "SAME"), (M, K, 9), (N, K, 3))
    # Five places of three taps, of which the first and the last have one outside.
    assert read_program(strided).flops == 2 * M * K * N * (5 * 3 - 2)


def test_a_call_that_nobody_knows_is_named() -> None:
    program = read_program(compiled(jnp.linalg.cholesky, (K, K)))
    assert list(program.opaque_calls.values()) == [1]


def test_bytes_are_the_compilers() -> None:
    memory = compiled(lambda a, b: a @ b, (M, K), (K, N)).memory_analysis()
    program = read_program(compiled(lambda a, b: a @ b, (M, K), (K, N)))
    assert program.argument_bytes == 4 * (M * K + K * N)
    assert program.peak_bytes == 4 * (M * K + K * N + M * N) + memory.temp_size_in_bytes


@pytest.fixture(scope="module")
def mesh(devices: list[jax.Device]) -> Mesh:
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)


def _gather(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, ("fsdp", "tensor"), tiled=True)


def _exchange(x: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True)


def _pass_on(x: jax.Array) -> jax.Array:
    return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])


def _sum(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, ("data", "tensor"))


@pytest.mark.parametrize(
    ("function", "kind", "axes", "group_size", "whole"),
    [
        (_gather, "all-gather", ("fsdp", "tensor"), 4, 4),
        (_exchange, "all-to-all", ("fsdp",), 2, 1),
        (_pass_on, "collective-permute", ("data",), 2, 1),
        (_sum, "all-reduce", ("data", "tensor"), 4, 1),
    ],
)
def test_a_collective_has_its_axes_and_bytes(
    mesh: Mesh, function: Any, kind: str, axes: tuple[str, ...], group_size: int, whole: int
) -> None:
    """Seven times in a loop, on (M, K) of each device."""

    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.cos(x) + function(x).sum(), None

    def run(x: jax.Array) -> jax.Array:
        return jax.lax.scan(body, x, length=7)[0]

    split = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    x = jax.ShapeDtypeStruct((2 * M, K), jnp.float32, sharding=jax.NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        program = read_program(jax.jit(split).lower(x).compile(), mesh)
    [(collective, times)] = program.collectives.items()
    assert (collective.kind, collective.axes, times) == (kind, axes, 7)
    assert collective.group_size == group_size
    assert collective.payload_bytes == whole * 4 * M * K
    assert program.by_kind() == {(kind, axes): (7, 7 * whole * 4 * M * K)}
    assert "scan" in collective.source or "while" in collective.source


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", [[0, 1], [2, 3]]),
        ("channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, use=true", [[0, 1, 2, 3]]),
        (
            "replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}, use=true",
            [[0, 1], [2, 3]],
        ),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{2,3},{1,2}}", [[0, 1, 2, 3]]),
    ],
)
def test_all_ways_to_write_groups_are_read(attributes: str, groups: list[list[int]]) -> None:
    assert _device_groups(Instruction("x", "all-reduce", "", (), attributes)) == groups


def test_shapes_of_all_types_and_tuples() -> None:
    assert num_bytes("bf16[2,3]{1,0:T(8,128)(2,1)}") == 12
    assert num_bytes("(f32[], (s4[4]{0}, pred[3]), f8e4m3fn[2], token[])") == 4 + 2 + 3 + 2
    assert shape_of("(f32[4,5]{1,0}, s32[2])") == (4, 5)


LOOP = """
%body (arg: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %arg = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %moved = s32[] copy(%i)
  %two = s32[] constant(2)
  %next = s32[] add(%moved, %two)
  %x = f32[4,4]{1,0} get-tuple-element(%arg), index=1
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={
}}, frontend_attributes={kernel="several lines"}
  ROOT %out = (s32[], f32[4,4]{1,0}) tuple(%next, %y)
}

%condition (arg.1: (s32[], f32[4,4])) -> pred[] {
  %end = s32[] constant(9)
  %arg.1 = (s32[], f32[4,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (x.1: f32[4,4]) -> f32[4,4] {
  %x.1 = f32[4,4]{1,0} parameter(0)
  %one = s32[] constant(1)
  %first = s32[] copy(%one)
  %begin = (s32[], f32[4,4]{1,0}) tuple(%first, %x.1)
  %loop = (s32[], f32[4,4]{1,0}) while(%begin), condition=%condition, body=%body
  ROOT %result = f32[4,4]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(("start", "step", "times"), [(1, 2, 4), (0, 2, 5), (0, 1, 9), (8, 3, 1)])
def test_a_loop_is_counted_by_its_counter(start: int, step: int, times: int) -> None:
    text = LOOP.replace("constant(1)", f"constant({start})").replace("(2)", f"({step})")
    assert _Reader(text, None).cost().flops == times * 2 * 4**3


@pytest.mark.parametrize(
    ("old", "new"), [("direction=LT", "direction=NE"), ("add(", "multiply("), ("(9)", "(-9)")]
)
def test_a_counter_that_is_not_understood_is_an_error(old: str, new: str) -> None:
    with pytest.raises(ValueError, match="how often the loop loop runs"):
        _Reader(LOOP.replace(old, new), None).cost()


def test_what_is_sent_while_it_computes_counts_once() -> None:
    """It begins in one fusion, goes on in the next and ends in a third."""
    gather = (
        "all-gather(%p), channel_id=5, replica_groups={{0,1}}, dimensions={0}, "
        'frontend_attributes={chain_id="7"}'
    )
    fused = [
        f"%f{n} (p: f32[4]) -> f32[8] {{\n  %p = f32[4] parameter(0)\n  ROOT %g = f32[8] {gather}"
        for n in range(3)
    ]
    calls = [f"  %c{n} = f32[8] fusion(%x), kind=kCustom, calls=%f{n}" for n in range(3)]
    entry = ["ENTRY %main (x: f32[4]) -> f32[8] {", "  %x = f32[4] parameter(0)", *calls, "}"]
    cost = _Reader("\n".join([*(f"{text}\n}}" for text in fused), *entry]), None).cost()
    assert [(c.payload_bytes, times) for c, times in cost.collectives.items()] == [(32, 1)]


@pytest.mark.slow
def test_the_program_of_a_tpu_is_read_alike(tpu_devices: list[Any]) -> None:
    # Rotary positions are computed otherwise on TPUs.
    model = {"remat": "full", "compute_dtype": "bfloat16", "positions": "learned"}
    config = tiny_config(mesh={"fsdp": 4}, model=model)
    there = assemble(config, tpu_devices)
    here = assemble(config, jax.devices()[:4])
    on_tpu, on_cpu = (read_program(compile_step(on), on.mesh) for on in (there, here))
    assert on_tpu.flops == on_cpu.flops
    number, payload = on_tpu.by_kind()["all-gather", ("fsdp",)]
    # The compiler for CPUs widens bfloat16 to float32 before it travels.
    assert on_cpu.by_kind()["all-gather", ("fsdp",)] == (number, 2 * payload)
    assert not on_tpu.opaque_calls


def test_a_loop_that_nobody_counted_is_an_error() -> None:
    def run(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="how often the loop while"):
        read_program(compiled(run, (K, K)))


def test_operands_of_a_long_tuple_are_all_found() -> None:
    text = "\n".join(
        [
            "ENTRY %main (a: f32[2], b: f32[3]) -> (f32[2], f32[3]) {",
            "  %a = f32[2]{0} parameter(0)",
            "  %b = f32[3]{0} parameter(1)",
            "  ROOT %r = (f32[2]{0}, /*index=1*/f32[3]{0}) all-reduce(%a, /*index=1*/%b), "
            "replica_groups={{0,1}}, to_apply=%add",
            "}",
        ]
    )
    computations, entry = parse(text)
    assert computations[entry]["r"].operands == ("a", "b")
    [collective] = _Reader(text, None).cost().collectives
    assert (collective.payload_bytes, collective.axes) == (20, ())


# The training step: what the formulas say is in it, and no more.


def step_program(**sections: Any) -> Program:
    assembly = assemble_tiny(**sections)
    return read_program(compile_step(assembly), assembly.mesh)


def test_the_step_does_the_model_flops_and_remat_those_it_repeats() -> None:
    model = tiny_config().model
    blocks = num_matmul_parameters(model) - model.width * model.vocab_size
    scores = 4 * LENGTH * model.num_heads * model.head_dim * model.num_layers
    # All scores are computed; the formula leaves out the half that the causal mask hides.
    whole = train_flops_per_token(model, LENGTH) + 3 * scores / 2
    assert step_program(model={"remat": "none"}).flops == BATCH * LENGTH * whole
    # No gradient needs the last product of a block, so that it is not repeated.
    again = 2 * (blocks - model.num_layers * model.width * model.hidden) + scores
    assert step_program(model={"remat": "full"}).flops == BATCH * LENGTH * (whole + again)


# Loss, weights and the hash of the batch are summed too.
FEW_BYTES = 100


def test_data_parallelism_sums_each_gradient_once() -> None:
    program = step_program(mesh={"data": 8})
    [(key, (_, payload))] = program.by_kind().items()
    assert key == ("all-reduce", ("data",))
    gradients = 4 * num_parameters(abstract_state(assemble_tiny()).params)
    assert gradients <= payload < gradients + FEW_BYTES


def test_accumulation_sums_over_replicas_once() -> None:
    """But for what a norm has, which is small."""
    train = {"accumulation_steps": 2}
    gradients = 4 * num_parameters(abstract_state(assemble_tiny()).params)
    scales = 4 * 5 * tiny_config().model.width
    replicas = step_program(mesh={"data": 4}, train=train).by_kind()["all-reduce", ("data",)]
    assert gradients <= replicas[1] < gradients + scales + FEW_BYTES
    both = step_program(mesh={"data": 2, "fsdp": 2}, train=train).by_kind()
    assert both["all-reduce", ("data",)][1] == (gradients - scales) / 2


def test_fsdp_gathers_each_weight_for_each_pass() -> None:
    """Blocks forward and backward, embedding and head once; gradients are summed once."""
    model = tiny_config().model
    by_kind = step_program(mesh={"data": 2, "fsdp": 4}).by_kind()
    table = model.width * model.vocab_size
    matmuls = num_matmul_parameters(model) - table
    assert by_kind["all-gather", ("fsdp",)][1] == 4 * (2 * matmuls + 2 * table)
    gradients = 4 * num_parameters(abstract_state(assemble_tiny()).params)
    assert gradients <= by_kind["all-reduce", ("data", "fsdp")][1] < gradients + FEW_BYTES


@pytest.mark.parametrize(
    ("mesh", "parts", "rounds"),
    [
        pytest.param({"stage": 2}, 4, 2, marks=pytest.mark.slow),
        pytest.param({"stage": 4}, 4, 1, marks=pytest.mark.slow),
        pytest.param({"stage": 2, "sequence": 2, "tensor": 2}, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_idle_stages_compute_what_the_bubble_says(
    mesh: dict[str, int], parts: int, rounds: int
) -> None:
    """Ticks x FLOPs of the compiled step; embedding, head and loss are on no stage twice."""
    stages, devices = mesh["stage"], math.prod(mesh.values())
    train = {"accumulation_steps": parts, "pipeline_rounds": rounds}

    def layers_and_rest(**sections: Any) -> tuple[float, float]:
        few, many = stages * rounds, 2 * stages * rounds
        small = step_program(model={"num_layers": few}, **sections).flops
        large = step_program(model={"num_layers": many}, **sections).flops
        return large - small, 2 * small - large

    layers, rest = layers_and_rest()
    staged_layers, staged_rest = layers_and_rest(mesh=mesh, train=train)
    useful = 1 - bubble_share(stages, parts, rounds)
    assert staged_layers * devices * useful == pytest.approx(layers, rel=1e-12)
    assert staged_rest * devices == pytest.approx(rest, rel=1e-12)


@pytest.mark.parametrize("across", ["all_gather", "ring", "all_to_all"])
def test_a_stage_hands_on_activations_and_nothing_else(across: str) -> None:
    sections: dict[str, Any] = {"model": {"sequence_attention": across}}
    program = step_program(mesh={"data": 2, "sequence": 2, "stage": 2}, **sections)
    over_stages = {kind for kind, axes in program.by_kind() if axes == ("stage",)}
    assert over_stages == {"collective-permute", "all-reduce"}
