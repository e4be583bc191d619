"""Checkpoints come back bit for bit, on any mesh and process count, or are not listed at all."""

import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxscale import checkpoint, manifest
from jaxscale.checkpoint import Checkpointer, Newest, read_params
from jaxscale.config import CheckpointConfig, ConfigError

SHAPES = {"embed": (64, 32), "layers": {"query": (4, 32, 16), "scale": (4, 32)}}
TRANSFORM = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 10))
)


def make_mesh(**sizes: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: math.prod(sizes.values())]
    kinds = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def sharding(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Shard the last dims over `fsdp` and `tensor` where the mesh has them."""
    axes = [name for name in ("fsdp", "tensor") if name in mesh.shape and shape]
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - len(axes)), *axes))


def make_state(mesh: jax.sharding.Mesh, seed: int = 0) -> tuple[Any, Any]:
    """Make parameters and an optimizer state in which no array is all zeros."""
    rng = np.random.default_rng(seed)

    def make(shape: tuple[int, ...]) -> jax.Array:
        values = rng.standard_normal(shape).astype(np.float32)
        return jax.device_put(values, sharding(mesh, shape))

    params = jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    with jax.set_mesh(mesh):
        optimizer = jax.jit(TRANSFORM.init)(params)
        optimizer = jax.jit(lambda g, s: TRANSFORM.update(g, s, g)[1])(params, optimizer)
    return params, optimizer


def abstract(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding(mesh, a.shape)), tree
    )


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def save(checkpointer: Checkpointer, *steps: int, mesh: jax.sharding.Mesh | None = None) -> Any:
    params, optimizer = make_state(mesh or make_mesh(fsdp=8))
    for step in steps:
        checkpointer.save(step, params=params, optimizer=optimizer, meta={"step": step})
    checkpointer.wait()
    return params, optimizer


MESHES = (
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 4},
    {"fsdp": 8},
    {"fsdp": 2},
    {"data": 1},
)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_restores_bitwise_on_another_mesh(tmp_path: pathlib.Path, sizes: dict[str, int]) -> None:
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        params, optimizer = save(checkpointer, 3, mesh=make_mesh(data=2, fsdp=2, tensor=2))
        wanted = abstract((params, optimizer), make_mesh(**sizes))
        restored = checkpointer.restore(3, params=wanted[0], optimizer=wanted[1])
        assert_same(restored.params, params)
        assert_same(restored.optimizer, optimizer)
        assert restored.step == 3 and restored.meta == {"step": 3}
        for got, want in zip(
            jax.tree.leaves(restored.params), jax.tree.leaves(wanted[0]), strict=True
        ):
            assert got.sharding == want.sharding
        assert_same(checkpointer.restore_params(3, wanted[0]), params)


def test_read_params_needs_no_shapes(tmp_path: pathlib.Path) -> None:
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        params, _ = save(checkpointer, 3)
    got = read_params(tmp_path / "checkpoints" / "3")
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(got))
    assert_same(got, params)
    with pytest.raises(ConfigError, match="no checkpoint at"):
        read_params(tmp_path)


def test_layout_on_disk(tmp_path: pathlib.Path) -> None:
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        save(checkpointer, 7)
    found = {path.name for path in (tmp_path / "checkpoints" / "7").iterdir() if path.is_dir()}
    assert found == {"params", "optimizer", "meta"}


def test_a_caller_may_donate_at_once(tmp_path: pathlib.Path) -> None:
    mesh = make_mesh(fsdp=8)
    params, optimizer = make_state(mesh)
    before = jax.tree.map(np.array, params)
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, params=params, optimizer=optimizer, meta={})
        with jax.set_mesh(mesh):
            for _ in range(10):
                params = overwrite(params)
        checkpointer.wait()
        assert_same(checkpointer.restore_params(1, abstract(params, mesh)), before)


def test_saving_a_step_twice_keeps_the_first(tmp_path: pathlib.Path) -> None:
    mesh = make_mesh(fsdp=8)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        first, _ = save(checkpointer, 5)
    other, optimizer = make_state(mesh, seed=1)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(5, params=other, optimizer=optimizer, meta={"step": "again"})
        checkpointer.wait()
        assert checkpointer.all_steps() == [5]
        assert checkpointer.read_meta(5) == {"step": 5}
        assert_same(checkpointer.restore_params(5, abstract(first, mesh)), first)


def test_a_step_below_the_newest_is_saved(tmp_path: pathlib.Path) -> None:
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        save(checkpointer, 5, 3)
        assert checkpointer.all_steps() == [3, 5]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [6]), (2, 0, [5, 6]), (1, 2, [2, 4, 6]), (2, 3, [3, 5, 6])],
)
def test_keep(tmp_path: pathlib.Path, keep_last: int, keep_every: int, kept: list[int]) -> None:
    config = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
    with Checkpointer(tmp_path, config) as checkpointer:
        save(checkpointer, 1, 2, 3, 4, 5, 6)
        assert checkpointer.all_steps() == kept
        assert checkpointer.newest() == Newest(6, {})


def test_a_failed_save_is_raised_and_not_listed(tmp_path: pathlib.Path) -> None:
    params, optimizer = make_state(make_mesh(fsdp=8))
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, params=params, optimizer=optimizer, meta={"no JSON": object()})
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpointer.wait()
        assert checkpointer.all_steps() == []
        checkpointer.save(2, params=params, optimizer=optimizer, meta={})
        checkpointer.wait()
        assert checkpointer.all_steps() == [2]


def test_an_empty_workdir_has_no_steps(tmp_path: pathlib.Path) -> None:
    reader = Checkpointer(tmp_path / "nowhere", CheckpointConfig(), read_only=True)
    assert reader.all_steps() == [] and reader.newest() is None
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ConfigError, match="no checkpoint of step 4 in .*; found: none"):
        reader.read_meta(4)


def test_mismatches_name_the_first_array(tmp_path: pathlib.Path) -> None:
    mesh = make_mesh(fsdp=8)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        params, optimizer = save(checkpointer, 1)
        wanted, wanted_optimizer = abstract((params, optimizer), mesh)

        wider = {**wanted, "embed": jax.ShapeDtypeStruct((64, 48), jnp.float32)}
        with pytest.raises(ConfigError, match=r"embed is \(64, 32\) there and \(64, 48\) in this"):
            checkpointer.restore_params(1, wider)
        with pytest.raises(ConfigError, match=r"head is missing there and \(64, 32\) in this"):
            checkpointer.restore_params(1, {**wanted, "head": wanted["embed"]})
        with pytest.raises(ConfigError, match=r"layers/query is \(4, 32, 16\) there and unknown"):
            checkpointer.restore_params(1, {"embed": wanted["embed"]})
        with pytest.raises(ConfigError, match=r"optimizer: 1/0/count is \(\) there and unknown"):
            checkpointer.restore(1, params=wanted, optimizer=wanted_optimizer[:1])


def test_a_small_save_blocks_briefly(tmp_path: pathlib.Path) -> None:
    """6M parameters replicated over `data`, and as many moments: nothing is compiled for them."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    values = np.zeros((2, 512, 256), np.float32)
    arrays = {str(i): jax.device_put(values, sharding(mesh, values.shape)) for i in range(24)}
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        compiled.extend([event] if "backend_compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
            blocked = checkpointer.save(1, params=arrays, optimizer=arrays, meta={})
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    assert 0 < blocked < 1


INTERRUPTED = """
import os, signal, sys
import jax.numpy as jnp, numpy as np
from jaxscale.checkpoint import Checkpointer
from jaxscale.config import CheckpointConfig

array = jnp.asarray(np.random.default_rng(0).standard_normal(2**24, dtype=np.float32))
with Checkpointer(sys.argv[1], CheckpointConfig()) as checkpointer:
    checkpointer.save(1, params={"w": array[:8]}, optimizer={"m": array[:8]}, meta={})
    checkpointer.wait()
    checkpointer.save(2, params={"w": array}, optimizer={"m": array}, meta={})
    assert checkpointer.all_steps() == [1]
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_interrupted_save_is_not_listed(tmp_path: pathlib.Path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", INTERRUPTED, tmp_path], env=environment)
    assert run.returncode == -signal.SIGKILL
    leftovers = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name != "1"]
    assert leftovers and "2" not in leftovers

    reader = Checkpointer(tmp_path, CheckpointConfig(), read_only=True)
    assert reader.all_steps() == [1]
    assert set(leftovers) <= {path.name for path in (tmp_path / "checkpoints").iterdir()}
    with Checkpointer(tmp_path, CheckpointConfig()) as writer:
        save(writer, 3)
        assert writer.all_steps() == [1, 3]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}


WORKER = """
import sys
import jax, numpy as np
workdir, address, rank = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(rank), initialization_timeout=60)
from jaxscale.checkpoint import Checkpointer, set_aside
from jaxscale.config import CheckpointConfig

newest = Checkpointer(workdir, CheckpointConfig(), read_only=True).newest()
assert newest.step == 1 and "params/_METADATA has 0 bytes" in newest.damaged[2], newest
assert len(set_aside(workdir, newest.damaged)) == 1
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,))
spread = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
abstract = {"w": jax.ShapeDtypeStruct((64, 32), np.float32, sharding=spread)}
with Checkpointer(workdir, CheckpointConfig()) as checkpointer:
    restored = checkpointer.restore(1, params=abstract, optimizer=abstract)
    doubled = jax.tree.map(lambda a: a * 2, restored.params)
    checkpointer.save(2, params=doubled, optimizer=restored.optimizer, meta={"processes": 2})
    checkpointer.save(2, params=doubled, optimizer=restored.optimizer, meta={"processes": "again"})
    checkpointer.wait()
    assert checkpointer.all_steps() == [1, 2]
"""


@pytest.mark.multiprocess
def test_two_processes_continue_what_one_began(tmp_path: pathlib.Path) -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    values = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    arrays = {"w": jax.device_put(values, sharding(mesh, values.shape))}
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, params=arrays, optimizer=arrays, meta={})
    (tmp_path / "checkpoints" / "2" / "params" / "_METADATA").write_text("")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, tmp_path, address, str(rank)],
            env=environment,
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]

    reader = Checkpointer(tmp_path, CheckpointConfig(), read_only=True)
    wanted = abstract(arrays, mesh)
    restored = reader.restore(2, params=wanted, optimizer=wanted)
    np.testing.assert_array_equal(np.asarray(restored.params["w"]), values * 2)
    np.testing.assert_array_equal(np.asarray(restored.optimizer["w"]), values)
    assert restored.meta == {"processes": 2}
    assert (tmp_path / "checkpoints" / "2.damaged-1").exists()


def test_steps_that_a_running_writer_removes_are_not_called_damaged(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer saves two steps, and removes those before, while the reader verifies the first."""
    find_damage = manifest.find_damage
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=1, keep_every=2)) as writer:
        save(writer, 2, 3)
        later = [4, 5]

        def at_that_moment(*arguments: Any) -> str | None:
            while later:
                save(writer, later.pop(0))
            return find_damage(*arguments)

        monkeypatch.setattr(manifest, "find_damage", at_that_moment)
        reader = Checkpointer(tmp_path, CheckpointConfig(), read_only=True)
        assert reader.newest() == Newest(5, {})
        assert reader.all_steps() == [2, 4, 5]


def test_a_step_that_is_removed_while_it_is_read_is_told_in_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = make_mesh(fsdp=8)
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=1)) as writer:
        params, _ = save(writer, 1, mesh=mesh)

        def at_that_moment(*_: Any) -> None:
            save(writer, 2)

        monkeypatch.setattr(checkpoint, "_check_shapes", at_that_moment)
        reader = Checkpointer(tmp_path, CheckpointConfig(), read_only=True)
        with pytest.raises(ConfigError, match=r"/1 was removed .* while it was read .it is gone"):
            reader.restore_params(1, abstract(params, mesh))
