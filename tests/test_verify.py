"""`jaxscale verify` passes a program that is right, and names what a planted fault breaks.

Each fault is put into the real code; the reference on one device, which a fault on a mesh does not
reach, is what gives it away.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxscale import records
from jaxscale.cli import main
from jaxscale.config import ConfigError, ModelConfig
from jaxscale.model import layers
from jaxscale.model.attention import attend, ring
from jaxscale.model.attention.dense import Operands, Span
from jaxscale.train import step
from jaxscale.verify import cases, compare
from jaxscale.verify import run as verify_run
from jaxscale.verify.cases import variants
from jaxscale.verify.compare import make_batches
from tests.conftest import ROOT
from tests.programs import tiny_config

SHAPE = {
    "num_layers": 2,
    "width": 32,
    "num_heads": 8,
    "num_kv_heads": 4,
    "hidden": 64,
    "vocab_size": 64,
}
VERB = [
    "verify",
    f"--config={ROOT / 'configs' / 'lm.py'}:tiny,length=16,batch=8",
    "--devices=cpu:8",
    "--config.runtime.compile_cache_dir=none",
    *(f"--config.model.{name}={value}" for name, value in SHAPE.items()),
]
Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the verb and gives exit code, rows of its result and text."""

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
        file = tmp_path / "result.json"
        code = main([*VERB, *arguments, f"--json={file}"])
        result = records.read_json(file)
        assert result["kind"] == "verify"
        return code, result["rows"], capsys.readouterr().out

    return run


def wrong(row: dict[str, Any]) -> dict[str, str]:
    """Return where each quantity of a row is out of its tolerance."""
    return {
        d["quantity"]: d["where"]
        for d in row["deviations"]
        if d["relative_error"] is None or d["relative_error"] > d["tolerance"]
    }


def test_a_right_program_is_equal_on_every_mesh(run: Run) -> None:
    meshes = ("--meshes=fsdp=2,sequence=2,tensor=2", "--meshes=data=2,fsdp=2")
    code, rows, text = run(*meshes, "--only=meshes", "--steps=2")
    assert code == 0
    assert {row["case"]: row["verdict"] for row in rows} == {
        "one device": "equal",
        "fsdp=2 sequence=2 tensor=2": "equal",
        "data=2 fsdp=2": "equal",
    }
    assert rows[1]["mesh"]["tensor"] == 2
    assert {d["quantity"] for d in rows[1]["deviations"]} == {
        "batch",
        "loss",
        "gradient norm",
        "initial parameter",
        "gradient",
        "parameter",
    }
    assert "3 equal; tolerance" in text
    assert "fake devices: mechanics, not speed" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:model.attention=flash computes as chunked")
def test_a_right_program_is_equal_in_every_variant(run: Run) -> None:
    code, rows, text = run("--meshes=fsdp=2,sequence=2,tensor=2", "--steps=2")
    assert code == 0
    assert {row["verdict"] for row in rows} == {"equal"}
    assert [row["case"] for row in rows[:2]] == ["one device", "fsdp=2 sequence=2 tensor=2"]
    on_mesh = " on fsdp=2 sequence=2 tensor=2"
    names = [row["case"].removesuffix(on_mesh) for row in rows[2:]]
    assert all(row["case"].endswith(on_mesh) for row in rows[2:])
    # What is the config's own way is not run twice.
    for expected in (
        "attention=dense sequence_attention=ring",
        "attention=chunked sequence_attention=all_gather",
        "remat=names",
        "accumulation_steps=2",
        "loss_chunk_tokens=4",
        "scan_unroll=2",
        "rules.embed=None",
        "rules.residual_length=sequence,tensor",
    ):
        assert names.count(expected) == 1
    assert "remat=none" not in names
    assert all(text.count(name) >= 1 for name in names)
    assert "not checked: attention=dense: no mesh suits it" in text
    assert f"{len(rows)} equal; tolerance" in text


def on_mesh_only(right: Any, faulty: Any) -> Any:
    """Return a function that is right on one device and faulty on several."""

    def either(*args: Any, **kwargs: Any) -> Any:
        alone = jax.sharding.get_abstract_mesh().size == 1
        return (right if alone else faulty)(*args, **kwargs)

    return either


def test_one_shards_gradient_scaled_by_a_thousandth(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = step.loss_and_gradients

    def faulty(*args: Any) -> Any:
        loss, gradients = right(*args)
        spec = jax.typeof(gradients["blocks"]["mlp"]["up"]).sharding.spec

        @functools.partial(jax.shard_map, in_specs=(spec,), out_specs=spec)
        def scaled(part: jax.Array) -> jax.Array:
            return jnp.where(jax.lax.axis_index("fsdp") == 1, 1.001 * part, part)

        gradients["blocks"]["mlp"]["up"] = scaled(gradients["blocks"]["mlp"]["up"])
        return loss, gradients

    monkeypatch.setattr(step, "loss_and_gradients", on_mesh_only(right, faulty))
    code, rows, text = run("--meshes=fsdp=4,tensor=2", "--only=meshes", "--steps=1")
    assert code == 1
    assert [row["verdict"] for row in rows] == ["equal", "MISMATCH"]
    assert wrong(rows[1])["gradient"] == "blocks/mlp/up"
    line = next(x for x in text.splitlines() if x.startswith("fsdp=4 tensor=2"))
    assert "MISMATCH" in line
    assert "e-04  gradient blocks/mlp/up" in line
    assert "MISMATCH: fsdp=4 tensor=2" in text


def shifted(spans: Span) -> Span:
    return Span(spans.positions_BL + 1, spans.segments_BL)


def test_a_mask_off_by_one_on_the_gathered_sequence(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attend.dense_attention

    def faulty(x: Operands, window: int) -> jax.Array:
        return right(x._replace(queries=shifted(x.queries)), window)

    # The table of algorithms keeps the right one, for where a device has the whole length.
    monkeypatch.setattr(attend, "dense_attention", faulty)
    arguments = ["--meshes=data=4,sequence=2", "--meshes=data=8", "--only=meshes", "--steps=1"]
    code, rows, _ = run(*arguments)
    assert code == 1
    assert [row["verdict"] for row in rows] == ["equal", "MISMATCH", "equal"]
    assert "loss" in wrong(rows[1])
    assert wrong(rows[1])["gradient"].startswith("blocks/attention/")


@pytest.mark.slow
def test_a_mask_off_by_one_in_a_variant_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ring._work

    def faulty(queries: Span, keys: Span, number: Any, **kwargs: Any) -> Any:
        return right(shifted(queries), keys, number, **kwargs)

    def few(*args: Any) -> list[cases.Variant]:
        return [v for v in variants(*args) if "dense sequence_attention=" in v.name][1:]

    monkeypatch.setattr(ring, "_work", faulty)
    monkeypatch.setattr(cases, "variants", few)
    # Long enough for blocks of more than one token, inside of which the mask counts.
    arguments = ["--meshes=data=2,sequence=4", "--only=variants", "--steps=1"]
    code, rows, text = run(*arguments, "--length=64")
    assert code == 1
    verdicts = {row["case"]: row["verdict"] for row in rows}
    assert verdicts == {
        "attention=dense sequence_attention=all_to_all on data=2 sequence=4": "equal",
        "attention=dense sequence_attention=ring on data=2 sequence=4": "MISMATCH",
    }
    assert "MISMATCH: attention=dense sequence_attention=ring on data=2 sequence=4" in text


def test_a_circular_pipeline_is_equal_layer_by_layer(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounds(*args: Any) -> list[cases.Variant]:
        return [v for v in variants(*args) if "pipeline_rounds" in v.name]

    monkeypatch.setattr(cases, "variants", rounds)
    own = ["--config.train.pipeline_rounds=2", "--config.train.accumulation_steps=2"]
    code, rows, _ = run("--meshes=stage=2", "--only=variants", "--steps=1", "--layers=4", *own)
    assert code == 0
    name = "accumulation_steps=4 pipeline_rounds=2 on stage=2"
    assert [(row["case"], row["verdict"]) for row in rows] == [(name, "equal")]


@pytest.mark.slow
def test_a_missing_all_reduce_over_one_axis(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = step.loss_and_gradients

    def faulty(assembly: Any, params: Any, batch: Any, *rest: Any) -> Any:
        """Let each replica keep the gradient of its own rows of the batch."""
        loss, gradients = right(assembly, params, batch, *rest)
        parts = assembly.mesh.shape["data"]
        own = []
        for part in range(parts):
            rows = batch["weights"].shape[0] // parts
            row_BL = jax.lax.broadcasted_iota(
                jnp.int32,
                batch["weights"].shape,
                0,
                out_sharding=jax.typeof(batch["weights"]).sharding,
            )
            weights_BL = jnp.where(row_BL // rows == part, batch["weights"], 0.0)
            share = jnp.sum(weights_BL) / jnp.sum(batch["weights"])
            _, partial = right(assembly, params, {**batch, "weights": weights_BL}, *rest)
            own.append(partial["norm"]["scale"] * share)

        @functools.partial(
            jax.shard_map, in_specs=(PartitionSpec(),), out_specs=PartitionSpec(), check_vma=False
        )
        def kept(parts_PD: jax.Array) -> jax.Array:
            return parts_PD[jax.lax.axis_index("data")]

        gradients["norm"]["scale"] = kept(jnp.stack(own))
        return loss, gradients

    monkeypatch.setattr(step, "loss_and_gradients", on_mesh_only(right, faulty))
    code, rows, _ = run("--meshes=data=2,tensor=4", "--only=meshes", "--steps=1")
    assert code == 1
    assert wrong(rows[1])["gradient"] == "norm/scale"
    assert set(wrong(rows[0])) == set()


@pytest.mark.slow
def test_rotary_positions_that_start_anew_on_each_shard(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layers.rotary

    def faulty(
        x_BLNH: jax.Array, positions_BL: jax.Array, model: ModelConfig, **scale: float
    ) -> jax.Array:
        own = x_BLNH.shape[1] // jax.sharding.get_abstract_mesh().shape["sequence"]
        return right(x_BLNH, positions_BL % own, model, **scale)

    monkeypatch.setattr(layers, "rotary", on_mesh_only(right, faulty))
    code, rows, _ = run("--meshes=sequence=8", "--only=meshes", "--steps=1")
    assert code == 1
    assert [row["verdict"] for row in rows] == ["equal", "MISMATCH"]
    assert wrong(rows[1])["gradient"].startswith("blocks/attention/")


def test_the_weight_of_one_token_dropped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = step.loss_sum

    def faulty(decoder: Any, x: Any, targets: Any, weights_BL: Any, **kwargs: Any) -> Any:
        at = functools.partial(
            jax.lax.broadcasted_iota,
            jnp.int32,
            weights_BL.shape,
            out_sharding=jax.typeof(weights_BL).sharding,
        )
        # A token whose weight is not 0 anyway.
        dropped_BL = (at(0) == 3) & (at(1) == np.flatnonzero(first["weights"][3])[0])
        return right(decoder, x, targets, jnp.where(dropped_BL, 0.0, weights_BL), **kwargs)

    config = tiny_config(model={"vocab_size": 64})
    first = make_batches(config, 1)[0]
    monkeypatch.setattr(step, "loss_sum", on_mesh_only(right, faulty))
    code, rows, _ = run("--meshes=data=8", "--only=meshes", "--steps=1")
    assert code == 1
    assert {"loss", "gradient", "gradient norm"} <= set(wrong(rows[1]))


def test_ctrl_c_leaves_the_rows_so_far(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = verify_run.compare, itertools.count()

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(verify_run, "compare", interrupted)
    code, rows, text = run("--only=meshes", "--limit=3", "--steps=1")
    assert code == 130
    assert [row["verdict"] for row in rows] == ["equal"]
    assert "\n1 equal" in text


@pytest.mark.parametrize("too_small", ["mesh", "one device"])
def test_what_has_no_room_is_told(
    too_small: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_room(num_bytes: int, mesh: jax.sharding.Mesh) -> None:
        if (mesh.size == 1) == (too_small == "one device"):
            raise ConfigError(f"it needs {num_bytes} bytes")

    monkeypatch.setattr(compare, "check_room", check_room)
    code = main([*VERB, "--meshes=data=8", "--only=meshes", "--steps=1"])
    text = capsys.readouterr()
    if too_small == "mesh":
        assert code == 0
        assert "data=8      no room" in text.out
        assert "1 equal, 1 no room; tolerance" in text.out
    else:
        assert code == 2
        assert "one device cannot run it: it needs" in text.err
        assert "lower --layers, --length or --batch" in text.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--meshes=fsdp=3,tensor=4"], "--meshes=fsdp=3,tensor=4 has more devices than the 8"),
        (["--meshes=fsdp=2,fsdp=4"], "--meshes=fsdp=2,fsdp=4 names fsdp twice"),
        (["--meshes=width=2"], "width=2 is not AXIS=SIZE with an axis of stage, data"),
        (["--meshes=tensor=8"], "mesh.tensor=8 does not divide model.num_kv_heads=4"),
        (["--batch=3", "--length=15", "--layers=3"], "no mesh of 8 devices fits"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*VERB, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
