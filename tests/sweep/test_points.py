"""Which points a sweep has, without any device."""

from typing import Any

import pytest

from jaxscale.cli import make_parser
from jaxscale.config import Config, ConfigError
from jaxscale.resolve import resolve
from jaxscale.sweep.points import (
    PRESETS,
    SCALINGS,
    Machine,
    Options,
    Plan,
    make_options,
    make_plan,
    parse_bytes,
    training_config,
)
from jaxscale.sweep.techniques import BY_NAME, TECHNIQUES, chosen, settings_of
from tests.programs import tiny_config


def machine(num_devices: int = 1) -> Machine:
    environment = {"device_kind": "cpu", "num_devices": num_devices, "packages": {"jax": "1"}}
    environment["fake_devices"] = num_devices > 1
    return Machine(environment, "cpu", num_devices, None)


def plan(config: Config | None = None, devices: int = 1, **options: Any) -> Plan:
    return make_plan(config or Config(), Options(**options), machine(devices))


def values(found: Plan) -> list[Any]:
    return [point.settings[0][1] for point in found.points]


def test_presets_double_and_flags_override_them() -> None:
    assert values(plan(preset="length")) == [512, 1024, 2048, 4096, 8192, 16384, 32768]
    assert values(plan(preset="length", first=96, last=400)) == [96, 192, 384]
    assert values(plan(preset="length", last=128)) == [128]
    assert values(plan(preset="length", vary=("data.length=7,5",))) == [7, 5]
    assert values(plan(preset="batch"))[:3] == [1, 2, 4]
    assert len(plan(preset="mesh", devices=8).points) == 35
    assert len(plan(preset="precision").points) == 6
    assert len(plan(preset="precision", devices=2).points) == 12
    assert plan(preset="batch", vary=("data.length=1,2",)).axis == "train.global_batch_size"


def test_the_points_are_the_product() -> None:
    found = plan(vary=("data.length=64,128", "model.remat=none,full"), techniques=("chunked",))
    assert [point.technique for point in found.points] == ["baseline"] * 4 + ["chunked"] * 4
    assert found.points[1].settings == (("data.length", 64), ("model.remat", "full"))
    assert found.axis == "data.length"
    # What is varied counts, whatever a technique sets.
    config = found.points[7].config
    assert config is not None
    assert (config.model.attention, config.model.remat) == ("chunked", "full")
    assert len({point.key for point in found.points}) == 8


def test_what_does_not_apply_says_why() -> None:
    found = plan(resolve(tiny_config()), preset="length", last=512, techniques=("all",))
    reasons = {p.technique: p.reason for p in found.points if p.config is None}
    assert reasons["flash"] == "on a cpu it computes as chunked"
    assert reasons["offload-optimizer"] == "on a cpu host memory is the device's memory"
    assert reasons["sequence-ring"] == "it needs several devices, and here is one"
    assert "baseline" not in reasons
    batches = plan(preset="batch", last=4, techniques=("accumulation",))
    assert [p.config is None for p in batches.points] == [False] * 3 + [True, True, False]
    assert "train.accumulation_steps=4 does not divide" in batches.points[3].reason
    same = plan(vary=("model.attention=chunked",), techniques=("chunked",))
    assert same.points[1].reason == "it is the same as baseline here"


def test_one_model_has_all_lengths() -> None:
    config = Config(model=Config().model.__class__(positions="learned"))
    found = plan(config, preset="length", first=64, last=256)
    assert [p.config.model.max_length for p in found.points if p.config] == [256] * 3


def test_every_technique_can_be_had_alone_and_sets_knobs_that_exist() -> None:
    assert len(BY_NAME) == len(TECHNIQUES)
    for name in BY_NAME:
        assert chosen([name])[0] == "baseline"
        assert settings_of(name)
    assert chosen([]) == chosen(["none"]) == ("as configured",)
    found = plan(devices=8, vary=("data.length=512",), techniques=("all",))
    assert [p.technique for p in found.points if p.config is None] == [
        *("flash", "offload-activations", "offload-optimizer"),
    ]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "nothing varies; name one of length, batch, mesh, precision, or add --vary"),
        ({"vary": ("data.lenght=1",)}, "did you mean data.length?"),
        ({"vary": ("data.length=many",)}, "data.length='many' has a wrong type"),
        ({"vary": ("data.length=0",)}, "data.length=0 is too small"),
        ({"vary": ("model.remat=some",)}, "model.remat='some' is not one of none, full"),
        ({"vary": ("data.length",)}, "--vary=data.length has no values; write KNOB=a,b,c"),
        ({"vary": ("data.length=1", "data.length=2")}, "varies data.length a second time"),
        ({"preset": "length", "first": 64, "last": 32}, "--to=32 is below --from=64"),
        ({"preset": "mesh", "first": 64}, "--from and --to are for length and batch"),
        ({"preset": "length", "techniques": ("chunkd",)}, "did you mean chunked?"),
        ({"vary": ("model.remat_every=3,5",)}, "no point can be run: model.remat_every=3"),
    ],
)
def test_a_mistake_is_told_in_a_line(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**options)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_have_units() -> None:
    assert parse_bytes("2GiB") == 2**31
    assert parse_bytes("1.5 MB") == 1_500_000
    for text in ("2", "2 gigs", "GiB", "1.2.3GiB", "0GiB", "-1GiB"):
        with pytest.raises(ConfigError, match="write one like 2GiB"):
            parse_bytes(text)


def test_tokens_are_for_batch_sizes() -> None:
    assert make_options({"preset": "batch", "tokens": None}).tokens > 0
    assert make_options({"preset": "length", "tokens": None}).tokens == 0
    assert make_options({"preset": "batch", "tokens": None, "compile_only": True}).tokens == 0
    for wrong in ({"preset": "length", "tokens": 9}, {"preset": "batch", "tolerance": -1.0}):
        with pytest.raises(ConfigError):
            make_options(wrong)


def test_batch_sizes_train_on_equal_tokens_and_are_scored_on_equal_windows() -> None:
    config = tiny_config(train={"global_batch_size": 8, "eval_batches": 4})
    options = Options(preset="batch", tokens=4096, scale_learning_rate="sqrt")
    found = make_plan(config, options, machine())
    trained = [training_config(p.config, found) for p in found.points if p.config]
    assert {t.train.steps * t.train.global_batch_size for t in trained} == {4096 // 16}
    assert {t.train.eval_batches * t.train.global_batch_size for t in trained[:6]} == {32}
    rate = config.optimizer.learning_rate
    assert [t.optimizer.learning_rate for t in trained[3:6:2]] == [rate, rate * 2]
    assert all(t.optimizer.warmup_steps * 10 <= t.train.steps for t in trained)


def test_the_command_line_knows_all_presets_and_scalings() -> None:
    """It names them itself, since it must not import JAX."""
    verbs = next(action for action in make_parser()._actions if action.dest == "verb")
    assert isinstance(verbs.choices, dict)
    choices = {action.dest: action.choices for action in verbs.choices["sweep"]._actions}
    assert choices["preset"] == ("", *PRESETS)
    assert choices["scale_learning_rate"] == tuple(SCALINGS)
