"""Config files, overrides, JSON and differences."""

import json
import pathlib

import pytest

from jaxscale import config_source
from jaxscale.config import Config, ConfigError
from jaxscale.model.cost import num_parameters
from jaxscale.model.decoder import define
from jaxscale.parallel.sharding import Rules
from jaxscale.resolve import resolve

LM = str(pathlib.Path(__file__).parent.parent / "configs" / "lm.py")

# Parameters as published, in millions; 125m with GPT-2's vocabulary padded from 50257 to 50304.
PUBLISHED_MILLIONS = {
    "125m": 124.48,
    "1b": 1235.81,
    "llama2-7b": 6738.42,
    "llama2-70b": 68976.65,
    "llama3-8b": 8030.26,
    "llama3-70b": 70553.71,
}


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    config = resolve(config_source.load(f"{LM}:{name}"))
    shapes = define(config.model, Rules.make(config.rules)).shapes
    assert num_parameters(shapes) / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], abs=0.01)


def test_presets_take_arguments() -> None:
    config = config_source.load(f"{LM}:8b,length=32768,batch=64")
    assert (config.data.length, config.train.global_batch_size) == (32768, 64)
    assert config.model == config_source.load(f"{LM}:llama3-8b").model
    tiny = resolve(config_source.load(f"{LM}:tiny"))
    assert (tiny.model.num_layers, tiny.model.width, tiny.model.head_dim) == (8, 128, 16)
    assert (tiny.model.hidden, tiny.data.length, tiny.data.tokenizer) == (384, 256, "bytes")


@pytest.mark.parametrize("argument", ["9b", "tiny,depth=3", "tiny,length=x"])
def test_a_wrong_preset_says_what_there_is(argument: str) -> None:
    with pytest.raises(ConfigError, match="tiny|length=TOKENS"):
        config_source.load(f"{LM}:{argument}")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("mesh.tensor", "2", 2),
        ("optimizer.learning_rate", "1e-3", 0.001),
        ("optimizer.clip_norm", "1", 1.0),
        ("data.document_mask", "false", False),
        ("runtime.profile_steps", "10,12", [10, 12]),
        ("runtime.profile_steps", "(10, 12)", [10, 12]),
        ("model.remat_names", "query,key", ["query", "key"]),
        ("rules.kv_heads", "None", None),
        ("rules.batch", "data,fsdp", "data,fsdp"),
        ("data.source", "files:/a/*.txt", "files:/a/*.txt"),
    ],
)
def test_overrides(key: str, text: str, value: object) -> None:
    assert config_source.flatten(config_source.override(Config(), key, text))[key] == value


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("model.widht", "3", "unknown knob model.widht; did you mean model.width?"),
        ("width", "3", "did you mean model.width?"),
        ("optimiser.name", "adamw", "did you mean optimizer.name?"),
        ("nothing.like_it", "3", "sections are model, mesh"),
        ("model.width", "a", "model.width='a' has a wrong type; it takes int"),
        ("model.width", "1.5", "it takes int"),
        ("model.width", "True", "it takes int"),
        ("data.document_mask", "1", "it takes bool"),
        ("runtime.profile_steps", "10,b", "it takes int"),
        ("optimizer.learning_rate", "fast", "it takes float"),
    ],
)
def test_a_wrong_override_is_named(key: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_source.override(Config(), key, text)
    assert message in str(caught.value)


def test_a_config_survives_json() -> None:
    config = config_source.override(Config(), "runtime.profile_steps", "3,4")
    text = json.dumps(config_source.to_mapping(config))
    assert config_source.from_saved(json.loads(text)) == config


def test_a_saved_config_may_hold_knobs_that_are_gone_and_none_that_never_were() -> None:
    saved = config_source.to_mapping(Config())
    saved["data"]["prefetch_batches"] = 4
    saved["rules"]["layers"] = None
    assert config_source.from_saved(saved) == Config()
    with pytest.raises(ConfigError, match="unknown knob rules.layers"):
        config_source.from_mapping({"rules": {"layers": "stage"}})
    with pytest.raises(ConfigError, match="unknown knob data.prefetched"):
        config_source.from_saved({"data": {"prefetched": 4}})


def test_differences_tell_what_defines_the_run_from_what_does_not() -> None:
    new = config_source.override(Config(), "model.width", "256")
    new = config_source.override(new, "mesh.tensor", "2")
    found = config_source.changes(Config(), new)
    assert sorted(map(str, found)) == ["mesh.tensor: 1 -> 2", "model.width: 128 -> 256"]
    assert [c.key for c in config_source.changes(Config(), new, only_fixed=True)] == ["model.width"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no function get_config"),
        ("import nothing_like_it", "fails to load"),
        ("def get_config(): return {'a': 1}", "returns dict, not a ConfigDict"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path: pathlib.Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config_source.load(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        config_source.load(str(tmp_path / "missing.py"))
