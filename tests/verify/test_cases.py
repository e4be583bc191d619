"""Which meshes and variants `verify` checks, in which order and in which size."""

import jax
import pytest

from jaxscale.config import ConfigError
from jaxscale.verify import cases
from jaxscale.verify.cases import Options, fit_variant, make_plan, variants
from jaxscale.verify.compare import SGD
from tests.programs import assemble_tiny, tiny_config


def test_the_configs_own_mesh_comes_first_and_the_limit_is_kept() -> None:
    config = tiny_config(mesh={"data": 2, "tensor": 4})
    plan = make_plan(config, Options(limit=3, only="meshes"))
    assert [case.mesh for case in plan.cases][:2] == ["one device", "data=2 tensor=4"]
    assert len(plan.cases) == 4
    # tensor=8 does not divide the 4 key/value heads.
    assert plan.num_meshes + plan.num_refused == 35
    assert plan.num_refused >= 1


def test_what_is_run_is_float32_sgd_and_small_unless_more_is_asked_for() -> None:
    config = tiny_config(
        model={"compute_dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "names"},
        train={
            "global_batch_size": 512,
            "gradient_reduce_dtype": "bfloat16",
            "accumulation_steps": 4,
        },
    )
    plan = make_plan(config, Options(only="meshes", limit=1))
    model, train = plan.config.model, plan.config.train
    assert (model.compute_dtype, model.param_dtype) == ("float32", "float32")
    assert (train.global_batch_size, train.accumulation_steps) == (8, 1)
    assert train.gradient_reduce_dtype == "float32"
    assert plan.config.optimizer.name == SGD.name
    assert plan.cases[1].assembly.config.model.remat == "names"
    assert plan.reference.config.model.remat == "none"
    asked = Options(only="meshes", limit=1, batch=24, length=64, layers=4)
    config = make_plan(config, asked).config
    sizes = (config.train.global_batch_size, config.data.length, config.model.num_layers)
    assert sizes == (24, 64, 4)


def test_a_new_choice_is_checked_without_a_change_here(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {variant.name for variant in variants(tiny_config(), 8)}
    assert "attention=new" not in names
    found = {**cases.free_choices(), "model.attention": ("dense", "new"), "model.x": (False, True)}
    monkeypatch.setattr(cases, "free_choices", lambda: dict(found))
    names = {variant.name for variant in variants(tiny_config(), 8)}
    assert {"attention=new sequence_attention=ring", "attention=new", "x=True"} <= names


def test_a_variant_that_fits_no_mesh_says_why() -> None:
    config = tiny_config(model={"num_heads": 6, "num_kv_heads": 6, "head_dim": 4})
    plan = make_plan(config, Options(meshes=("sequence=4,data=2",)))
    reason = next(text for text in plan.left_out if "dense sequence_attention=all_to_all" in text)
    assert "does not divide the 6 heads" in reason
    unsuited = cases.Variant((), whole=("length",))
    assert fit_variant(unsuited, [plan.cases[1].assembly]) == "no mesh suits it"


def test_a_variant_runs_on_the_mesh_that_cuts_most() -> None:
    replicas, many = (
        assemble_tiny(mesh=mesh) for mesh in ({"data": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2})
    )
    chunked = cases.Variant((("model.attention", "chunked"),), cut=("length",))
    assert fit_variant(chunked, [replicas]) == "no mesh cuts length"
    found = fit_variant(chunked, [replicas, many])
    assert isinstance(found, cases.Case)
    assert found.name == "attention=chunked on fsdp=2 sequence=2 tensor=2"
    assert found.assembly.config.model.attention == "chunked"
    whole = cases.Variant((), whole=("length",))
    alone = fit_variant(whole, [many, replicas])
    assert isinstance(alone, cases.Case) and alone.mesh == "data=8"


def test_one_device_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    with pytest.raises(ConfigError, match="here is one device; add --devices=cpu:8"):
        make_plan(tiny_config(), Options())
