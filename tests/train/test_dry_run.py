"""The dry run against the arrays that training would make."""

import dataclasses
import io
import pathlib

import jax
import pytest
from rich.console import Console

from jaxscale import records
from jaxscale.cli import main
from jaxscale.train.dry_run import DryRun, dry_run, render
from jaxscale.train.state import TrainState, assemble
from tests.programs import first_state, tiny_config

CONFIG = tiny_config(mesh={"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture(scope="module")
def result() -> DryRun:
    return dry_run(CONFIG)


@pytest.fixture(scope="module")
def state() -> TrainState:
    return first_state(assemble(CONFIG))


def held(tree: object, device: jax.Device) -> int:
    """Return the bytes of a pytree that really lie on a device."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def test_bytes_per_device_are_those_of_the_real_state(result: DryRun, state: TrainState) -> None:
    device = jax.devices()[0]
    assert result.params_bytes == held(state.params, device)
    assert result.optimizer_bytes == held(state.optimizer, device)
    # Four int32 or float32 arrays of 8 rows and 16 tokens, a quarter of the rows on each device.
    assert result.batch_bytes == 4 * 4 * 8 * 16 // 4
    assert result.step_bytes is not None
    at_least = result.params_bytes + result.optimizer_bytes + result.batch_bytes
    assert at_least < result.step_bytes < 100 * at_least


def test_a_row_is_a_real_array(result: DryRun, state: TrainState) -> None:
    rows = {row.name: row for row in result.parameters}
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    assert len(rows) == len(leaves)
    for path, leaf in leaves:
        row = rows[jax.tree_util.keystr(path, simple=True, separator="/")]
        shard = leaf.addressable_shards[0].data
        assert (row.shape, row.device_shape, row.device_bytes) == (
            leaf.shape,
            shard.shape,
            shard.nbytes,
        )
    query = rows["blocks/attention/query"]
    assert query.axes == ("layers", "embed", "heads", "head_dim")
    assert query.sharding == ("", "fsdp", "tensor", "")
    assert query.device_shape == (2, 16, 4, 4)


def test_parameters_and_flops_by_hand(result: DryRun) -> None:
    block = 32 * 4 * (2 * 8 + 2 * 4) + 3 * 32 * 64
    assert result.num_parameters == 2 * (block + 2 * 32) + 2 * 64 * 32 + 32
    assert result.tokens_per_step == 8 * 16
    per_token = 6 * (2 * block + 64 * 32) + 6 * 16 * 8 * 4 * 2
    assert result.model_flops_per_step == 8 * 16 * per_token


def test_it_tells_what_travels_and_what_is_computed_in_vain(result: DryRun) -> None:
    assert result.collectives
    assert result.compiled_flops
    found = {(row.kind, row.axes): row for row in result.collectives}
    weights = 2 * (32 * 4 * (2 * 8 + 2 * 4) + 3 * 32 * 64)
    # Both passes gather the blocks in float32, one of them embedding and head; half of it on a
    # device, since tensor=2.
    assert found["all-gather", "fsdp"].payload_bytes == 4 * (2 * weights + 2 * 64 * 32) / 2
    computed = 8 * result.compiled_flops
    assert 0.5 * computed < result.model_flops_per_step < computed
    assert f"{result.model_flops_per_step / computed:.0%} of them useful" in text_of(result)
    unknown = dataclasses.replace(result, compiled_flops=None, collectives=None)
    assert "useful" not in text_of(unknown)


def text_of(result: DryRun) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(render(result))
    return stream.getvalue().replace("\u00a0", " ")


def test_the_table_names_every_parameter_and_its_mesh_axes(result: DryRun) -> None:
    text = text_of(result)
    assert all(row.name in text for row in result.parameters)
    assert "2 layers, 32 embed/fsdp, 8 heads/tensor, 4 head_dim" in text
    assert "data=2 fsdp=2 tensor=2" in text


def test_a_step_that_does_not_fit_is_told(result: DryRun) -> None:
    assert result.fits
    assert not dataclasses.replace(result, device_bytes=1000).fits


def test_the_verb_needs_no_workdir_and_reads_no_data(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pathlib.Path(__file__).resolve().parents[2] / "configs" / "lm.py"
    file = tmp_path / "result.json"
    arguments = ["--config.model.num_layers=1", "--config.data.source=files:/nowhere/*.txt"]
    verb = ["train", "--dry-run", f"--config={config}:tiny", "--devices=cpu:8", *arguments]
    assert main([*verb, f"--json={file}"]) == 0
    assert "blocks/attention/query" in capsys.readouterr().out
    written = records.read_json(file)
    assert written["kind"] == "dry_run"
    assert written["rows"][0]["mesh"]["data"] == 8
