"""What every test stands on: eight CPU devices, strict JAX, caches below the repository.

Environment variables are set before anything imports JAX, and reach the processes that tests start;
JAX flags are set here for this process alone.
"""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_DEVICES = 8

os.environ.update(
    # Test programs run for milliseconds: compile them quickly rather than well.
    XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    # An installed libtpu or CUDA plugin would be probed first.
    JAX_PLATFORMS="cpu",
    # Nothing is read from, or left in, the home folder.
    JAXSCALE_CACHE=str(ROOT / ".cache" / "jax-tests"),
    TF_CPP_MIN_LOG_LEVEL="3",
    GRPC_VERBOSITY="ERROR",
    # Two xdist workers share two cores; a pool per worker and library would only get in the way.
    OMP_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from jaxscale import runtime  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure() -> None:
    runtime.set_jax_flags()
    runtime.fake_devices(f"cpu:{NUM_DEVICES}")
    flags = {
        "jax_numpy_rank_promotion": "raise",
        "jax_default_matmul_precision": "highest",
        "jax_compilation_cache_dir": str(runtime.cache_root() / "xla"),
        # Test programs are small: keep them all.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in flags.items():
        jax.config.update(name, value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """Return the eight fake CPU devices."""
    found = jax.devices()
    assert len(found) == NUM_DEVICES
    return found


@pytest.fixture
def tpu_devices() -> Iterator[list[Any]]:
    """Return the devices of a described TPU v5e; its compiler runs on a CPU."""
    pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")
    # No question to a metadata server, and no lock against other processes.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    # A compiler without a device cannot read back what it left in the cache.
    flag = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, flag)
    jax.config.update(flag, float("inf"))
    # What the other tests ask of float32, Mosaic does not take for bfloat16.
    with jax.default_matmul_precision("default"):
        yield list(topology.devices)
    jax.config.update(flag, before)
