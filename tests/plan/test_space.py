"""What there is to choose from: all of it valid, none of it twice."""

import dataclasses
from typing import Any

import jax
import pytest

from jaxscale import config_source
from jaxscale.config import Config, ConfigError, MeshConfig
from jaxscale.parallel.mesh import AXES
from jaxscale.plan.space import REMATS, Remat, candidate, candidates
from jaxscale.plan.torus import parse_topology
from jaxscale.resolve import resolve
from jaxscale.train.state import assemble


def config(preset: str = "tiny", **train: int) -> Config:
    found = resolve(config_source.load(f"configs/lm.py:{preset}", []))
    return dataclasses.replace(found, train=dataclasses.replace(found.train, **train))


SLICE = parse_topology("v5e:2x4")


def test_every_candidate_is_one_that_training_takes(devices: list[Any]) -> None:
    found = list(candidates(config(), SLICE, remat=[Remat("full")]))
    assert len({(c.mesh, c.config.train.accumulation_steps) for c in found}) == len(found)
    for one in found[::7]:
        assembly = assemble(resolve(one.config), devices)
        assert dict(assembly.mesh.shape) == dict(one.mesh.shape)
        assert assembly.rules == one.rules


def test_no_mesh_that_training_takes_is_left_out(devices: list[Any]) -> None:
    wide = config(global_batch_size=64)
    found = {tuple(c.mesh.shape.values()) for c in candidates(wide, SLICE)}
    assert len(found) == 35
    # Sixteen heads' shards are more than the eight that there are.
    deep = {c.mesh.shape[AXES[4]] for c in candidates(wide, parse_topology("v5e:4x4"))}
    assert deep == {1, 2, 4, 8}
    sixteen = dataclasses.replace(wide, mesh=MeshConfig(data=1, tensor=16))
    with pytest.raises(ConfigError, match="does not divide model.num_heads=8"):
        candidate(sixteen, parse_topology("v5e:4x4"))
    assert len(devices) == SLICE.num_devices


def test_each_mesh_comes_with_every_remat_and_its_microbatches() -> None:
    mesh = MeshConfig(data=2, fsdp=4)
    found = list(candidates(config(), SLICE, meshes=[mesh], batch=32))
    remats = [c.remat_words for c in found if c.config.train.accumulation_steps == 1]
    assert len(remats) == len(set(remats)) == len(REMATS)
    assert remats[0] == "none"
    assert remats[-1] == "full"
    # 32 rows over 8 devices: 4 each, and no less than one.
    assert sorted({c.config.train.accumulation_steps for c in found}) == [1, 2, 4]
    assert found[0].mesh_words == "data=2 fsdp=4"
    stages = MeshConfig(stage=2, data=1, fsdp=4)
    turns = {
        c.config.train.accumulation_steps for c in candidates(config(), SLICE, meshes=[stages])
    }
    assert turns == {2}
    longer = next(candidates(config(), SLICE, meshes=[mesh], length=512))
    assert longer.config.data.length == 512


def test_a_mesh_given_that_fits_nothing_yields_nothing() -> None:
    assert not list(candidates(config(), SLICE, meshes=[MeshConfig(data=3)]))


def test_slices_are_spanned_by_what_may_span_them() -> None:
    two = parse_topology("v5e:2x2", num_slices=2)
    found = {tuple(c.mesh.shape.values()) for c in candidates(config(), two)}
    assert found
    assert all(sizes[0] % 2 == 0 or sizes[1] % 2 == 0 for sizes in found)


def test_one_device_is_a_mesh_too() -> None:
    found = list(candidates(config(), parse_topology("v5e:1x1"), remat=[Remat("none")]))
    assert {c.mesh_words for c in found} == {"one device"}


def test_nothing_asks_for_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(jax, "devices", refuse)
    assert next(candidates(config(), SLICE))
