"""Published runs are rebuilt as they were: shapes, meshes, what is kept; what we lack is named."""

import csv
import dataclasses
import pathlib
from typing import Any

import jax
import pytest

from jaxscale.config import ConfigError, RulesConfig
from jaxscale.model.cost import num_matmul_parameters, num_parameters
from jaxscale.model.decoder import define
from jaxscale.parallel.mesh import AXES
from jaxscale.parallel.sharding import Rules
from jaxscale.plan.published import Run, Skipped, to_run
from jaxscale.plan.rows import Row, read_rows
from tests.conftest import ROOT

FILE = ROOT / "docs" / "published_tpu_runs.csv"
ROWS = {row.id: row for row in read_rows(FILE)}
# Published and derived figures have three or four digits.
TOLERANCE = 0.01

CARRY = "offload:block_input"
OFFLOADED_QKV = ("offload:query", "offload:key", "offload:value")
CARRY_QKV = (CARRY, *OFFLOADED_QKV)
OFFLOADED = (*CARRY_QKV, "offload:attention_out")
KEPT = ("query", "key", "value", "context")
# Of each row: topology, slices, mesh, remat, names, sequences per step.
EXPECTED: dict[str, tuple[Any, ...]] = {
    "v6e-llama3.1-8b-8": ("2x4", 1, {"fsdp": 8}, "names", OFFLOADED, 24),
    "v6e-llama3.1-8b-32": ("4x8", 1, {"fsdp": 32}, "names", OFFLOADED, 96),
    "v6e-llama3.1-8b-256": ("16x16", 1, {"fsdp": 256}, "names", OFFLOADED, 1024),
    "v6e-llama3.1-70b-64": ("8x8", 1, {"fsdp": 64}, "names", CARRY_QKV, 128),
    "v6e-gpt3-175b-256-bf16": ("16x16", 1, {"fsdp": 256}, "full", None, 768),
    "v6e-mistral-7b-8": ("2x4", 1, {"fsdp": 8}, "names", OFFLOADED, 48),
    "v6e-llama3.1-70b-256-bs4": ("16x16", 1, {"fsdp": 256}, "names", CARRY_QKV, 1024),
    "v5e-maxtext-16b-1x256": ("16x16", 1, {"fsdp": 256}, "full", None, 1536),
    "v5e-maxtext-16b-4x256": ("16x16", 4, {"data": 4, "fsdp": 256}, "full", None, 6144),
    "v5e-maxtext-64b-1x256": ("16x16", 1, {"fsdp": 256}, "full", None, 512),
    "v5e-maxtext-64b-8x256": ("16x16", 8, {"data": 8, "fsdp": 256}, "full", None, 4096),
    "v5e-maxtext-128b-1x256": ("16x16", 1, {"fsdp": 16, "tensor": 16}, "full", None, 256),
    "v5p-maxtext-32b-1x64": ("4x4x4", 1, {"fsdp": 16, "tensor": 4}, "dots", None, 512),
    "v5p-maxtext-128b-1x128": ("4x4x8", 1, {"fsdp": 16, "tensor": 8}, "dots", None, 256),
    "v5p-maxtext-256b-1x512": ("8x8x8", 1, {"fsdp": 64, "tensor": 8}, "dots", None, 1024),
    "v5p-maxtext-1024b-2x1024": (
        *("8x8x16", 2, {"data": 2, "fsdp": 64, "tensor": 16}, "full", None, 4096),
    ),
    "tpu7x-llama3.1-70b-64-bf16": ("4x4x4", 1, {"fsdp": 128}, "names", KEPT, 256),
    "tpu7x-llama3.1-405b-256-bf16": (
        *("4x8x8", 1, {"fsdp": 512}, "names", (CARRY, "key", "value"), 1536),
    ),
    "tpu7x-llama3.1-70b-256-128k-bf16": (
        *("4x8x8", 1, {"fsdp": 64, "sequence": 8}, "names", KEPT, 64),
    ),
    "v5p-marin-llama-300m-16": ("2x2x4", 1, {"fsdp": 16}, "full", None, 128),
    "v5p-marin-llama-1_2b-16": ("2x2x4", 1, {"fsdp": 16}, "full", None, 256),
}


def rebuilt(row: Row) -> Run:
    run = to_run(row)
    assert isinstance(run, Run), run
    return run


def changed(id: str, **cells: Any) -> Run | Skipped:
    return to_run(dataclasses.replace(ROWS[id], **cells))


def test_the_table_has_the_facts_and_their_sources() -> None:
    assert list(ROWS) == list(EXPECTED)
    with FILE.open() as file:
        for cells in csv.DictReader(file):
            assert all(cells[f"source_{part}"] for part in ("repo", "path", "commit"))
            assert all(cells[f"config_{part}"] for part in ("repo", "path", "commit"))


@pytest.mark.parametrize("id", EXPECTED)
def test_row_is_rebuilt(id: str) -> None:
    run = rebuilt(ROWS[id])
    topology, slices, axes, remat, names, batch = EXPECTED[id]
    config = run.config
    assert run.topology == f"{run.chip.name}:{topology}"
    assert run.num_slices == slices
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    assert {axis: size for axis, size in sizes.items() if size > 1} == axes
    assert config.model.remat == remat
    assert names is None or config.model.remat_names == names
    assert config.train.global_batch_size == batch


@pytest.mark.parametrize("id", EXPECTED)
def test_parameters_are_those_published(id: str) -> None:
    shapes = define(rebuilt(ROWS[id]).config.model, Rules.make(RulesConfig())).shapes
    published = ROWS[id].billion_parameters
    assert published
    assert num_parameters(shapes) / 1e9 == pytest.approx(published, rel=TOLERANCE)


@pytest.mark.parametrize("id", EXPECTED)
def test_model_flops_are_those_published(id: str) -> None:
    """Under the row's own convention, so that shape, batch and chips must all be right."""
    row, run = ROWS[id], rebuilt(ROWS[id])
    model, length = run.config.model, run.config.data.length
    shapes = define(model, Rules.make(RulesConfig())).shapes
    every = num_parameters(shapes) if "all" in row.flop_convention else None
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * length
    attention /= 2 if "halved" in row.flop_convention else 1
    flops = 6 * (every or num_matmul_parameters(model)) + attention
    assert row.num_chips
    tokens = run.config.train.global_batch_size * length / row.num_chips
    assert flops * tokens / 1e12 == pytest.approx(row.model_teraflops, rel=TOLERANCE)


def test_blocks_are_those_of_their_frameworks() -> None:
    gpt3 = rebuilt(ROWS["v6e-gpt3-175b-256-bf16"]).config.model
    assert (gpt3.norm, gpt3.biases, gpt3.positions) == ("layernorm", "all", "learned")
    assert (gpt3.max_length, gpt3.mlp, gpt3.activation) == (16384, "plain", "gelu_tanh")
    assert (gpt3.block, gpt3.tie_embeddings, gpt3.qk_norm) == ("serial", True, False)
    maxtext = rebuilt(ROWS["v5e-maxtext-16b-1x256"]).config.model
    assert (maxtext.block, maxtext.mlp, maxtext.activation) == ("parallel", "plain", "relu")
    assert (maxtext.qk_norm, maxtext.tie_embeddings, maxtext.positions) == (True, True, "rotary")
    llama = rebuilt(ROWS["v6e-llama3.1-8b-8"]).config.model
    assert (llama.norm, llama.mlp, llama.activation) == ("rmsnorm", "gated", "silu")
    assert (llama.block, llama.biases, llama.num_kv_heads) == ("serial", "none", 8)


def test_attention_is_as_stated() -> None:
    full = rebuilt(ROWS["v5e-maxtext-16b-1x256"])
    assert full.full_square_attention
    assert not full.config.data.document_mask
    causal = rebuilt(ROWS["v6e-llama3.1-8b-8"])
    assert not causal.full_square_attention
    assert causal.config.data.document_mask
    assert causal.kernel.blocks == (("all", 2048),)


def test_training_is_as_stated() -> None:
    run = rebuilt(ROWS["tpu7x-llama3.1-405b-256-bf16"])
    assert run.config.optimizer.moment_dtype == "bfloat16"
    assert run.config.train.gradient_reduce_dtype == "bfloat16"
    # 3 sequences of 8192 tokens per device, in four tiles.
    assert run.config.train.loss_chunk_tokens == 3 * 8192 // 4
    assert rebuilt(ROWS["v6e-llama3.1-8b-8"]).config.train.loss_chunk_tokens == 0
    assert dict(run.options)["xla_tpu_scoped_vmem_limit_kib"] == "65536"


def test_what_only_the_published_program_offloads_is_counted() -> None:
    """126 blocks x 24576 tokens x 16384 features x 2 bytes: the outputs of MLPs."""
    run = rebuilt(ROWS["tpu7x-llama3.1-405b-256-bf16"])
    assert run.extra_host_bytes == 126 * 24576 * 16384 * 2
    assert rebuilt(ROWS["tpu7x-llama3.1-70b-64-bf16"]).extra_host_bytes == 0


def test_length_and_residual_are_cut_as_published() -> None:
    balanced = rebuilt(ROWS["tpu7x-llama3.1-70b-256-128k-bf16"])
    assert balanced.config.model.sequence_attention == "all_to_all"
    assert any("balanced" in said for said in balanced.approximations)
    rules = balanced.config.rules
    assert (rules.embed, rules.optimizer_embed) == ("fsdp,sequence", "fsdp,sequence")
    tensor = rebuilt(ROWS["v5p-maxtext-128b-1x128"])
    assert tensor.config.rules.residual_length == "sequence,tensor"
    assert any("residual stream" in said for said in tensor.approximations)
    plain = rebuilt(ROWS["v6e-llama3.1-8b-8"])
    assert plain.config.rules == RulesConfig()
    assert not any("residual stream" in said for said in plain.approximations)


def test_accumulation_is_kept() -> None:
    run = changed("tpu7x-llama3.1-405b-256-bf16", accumulation=3)
    assert isinstance(run, Run)
    train = run.config.train
    assert (train.global_batch_size, train.accumulation_steps) == (1536, 3)
    whole = rebuilt(ROWS["tpu7x-llama3.1-405b-256-bf16"])
    assert run.extra_host_bytes == whole.extra_host_bytes


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"chip": "H100", "topology": "NVLink"}, "chip H100 is no TPU"),
        ({"model": "Mixtral-8x7B"}, "mixture of experts"),
        ({"arch_notes": "MoE, 64 experts, top 6"}, "mixture of experts"),
        ({"billion_parameters": 46.7}, "its 46.7B parameters are 8.03B as rebuilt"),
        ({"quantization": "int8 (AQT)"}, "quantized training (int8 (AQT))"),
        ({"compute_dtype": "float8_e4m3"}, "dtype float8_e4m3"),
        ({"arch_notes": "RMSNorm; logit softcap 30"}, "soft-capped logits"),
        ({"arch_notes": "local/global attention 5:1"}, "local and global layers"),
        ({"arch_notes": "sliding window"}, "whose size it does not state"),
        ({"mesh_ici": "fsdp=4,expert=2"}, "mesh axis expert=2"),
        ({"mesh_ici": ""}, "states no mesh"),
        ({"mesh_ici": "fsdp=4"}, "does not multiply out to 8 devices"),
        (
            {"mesh_dcn": "fsdp=2", "num_slices": 2, "num_chips": 16, "num_devices": 16},
            "its fsdp=2 spans slices",
        ),
        ({"remat_policy": "op", "remat_meaning": ""}, "remat policy op"),
        ({"remat_policy": "custom", "remat_meaning": "as usual"}, "remat policy custom"),
        ({"optimizer": "shampoo"}, "optimizer shampoo"),
        ({"step_seconds": None, "tokens_per_second": None}, "no step time"),
        ({"hidden": None}, "does not state d_ff"),
        ({"topology": "3x3", "num_chips": 9}, "v6e has no slice 3x3"),
    ],
)
def test_what_cannot_be_rebuilt_is_skipped_by_name(cells: dict[str, Any], reason: str) -> None:
    skipped = changed("v6e-llama3.1-8b-8", **{"remat_meaning": "q saved", **cells})
    assert isinstance(skipped, Skipped), skipped
    assert skipped.id == "v6e-llama3.1-8b-8"
    assert reason in skipped.reason


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"arch_notes": "no sliding window"}, {"attention_window": 0}),
        ({"arch_notes": "sliding window of 4096"}, {"attention_window": 4096}),
        ({"arch_notes": "RMSNorm, GeGLU"}, {"activation": "gelu_tanh", "mlp": "gated"}),
        ({"arch_notes": "Qwen, QKV bias"}, {"biases": "qkv"}),
        ({"arch_notes": "Qwen, qk-norm, no biases"}, {"biases": "none", "qk_norm": True}),
        ({"attention_kernel": "XLA dot_product attention"}, {"attention": "dense"}),
        ({"scan_layers": "no"}, {"scan_unroll": 32}),
        ({"remat_policy": "minimal"}, {"remat": "dots"}),
        ({"remat_policy": "qkv_proj_offloaded"}, {"remat_names": OFFLOADED_QKV}),
    ],
)
def test_other_rows_are_understood(cells: dict[str, Any], expected: dict[str, Any]) -> None:
    run = changed("v6e-llama3.1-8b-8", **cells)
    assert isinstance(run, Run), run
    assert {name: getattr(run.config.model, name) for name in expected} == expected


def test_other_meshes_are_understood() -> None:
    run = changed("v6e-llama3.1-8b-8", mesh_ici="data=-1,fsdp=2,model=2 (AXLearn)", mesh_dcn="")
    assert isinstance(run, Run), run
    mesh = run.config.mesh
    assert (mesh.data, mesh.fsdp, mesh.tensor, mesh.num_slices) == (2, 2, 2, 1)
    two = {"num_slices": 2, "num_chips": 16, "num_devices": 16, "mesh_dcn": ""}
    run = changed("v6e-llama3.1-8b-8", **two)
    assert isinstance(run, Run), run
    assert (run.config.mesh.data, run.num_slices, run.topology) == (2, 2, "v6e:2x4")


def test_seconds_follow_from_tokens() -> None:
    run = changed("v6e-llama3.1-8b-8", step_seconds=None)
    assert isinstance(run, Run)
    assert run.published_seconds == pytest.approx(3.443, rel=TOLERANCE)


def test_a_table_without_a_column_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(FILE.read_text().replace("seq_len", "tokens", 1))
    with pytest.raises(ConfigError, match="has no column seq_len"):
        read_rows(path)


def test_nothing_is_compiled_or_placed() -> None:
    before = len(jax.live_arrays())
    rebuilt(ROWS["tpu7x-llama3.1-405b-256-bf16"])
    assert len(jax.live_arrays()) == before
