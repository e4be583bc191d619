"""What the TPU compiler says of a config's step, kept by the content of its program."""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

from jaxscale import runtime
from jaxscale.config import Config
from jaxscale.parallel.program import program_bytes
from jaxscale.plan.torus import Slice
from jaxscale.train.state import abstract_batch, abstract_state, assemble
from jaxscale.train.step import train_step

CACHE = "compiled-bytes"
# At a time, for each takes a core and some gigabytes.
COMPILERS = 2


def lowered_step(config: Config, slice_: Slice) -> Any:
    """Return the training step of a resolved config, lowered for a described slice."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    options: dict[str, Any] = dict(slice_.chip.description)
    if slice_.num_chips == 1:
        # The compiler would otherwise look for the other chips of a host.
        options["chips_per_host_bounds"] = (1, 1, 1)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=slice_.name, **options)
    assembly = assemble(config, topology.devices)
    state, batch = abstract_state(assembly), abstract_batch(assembly)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        lambda state, batch: train_step(assembly, state, batch),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    with jax.set_mesh(assembly.mesh):
        return step.lower(state, batch)


def content_key(lowered: Any, slice_: Slice) -> str:
    """Return a hash of all that a compiled program depends on."""
    versions = [metadata.version(name) for name in ("jaxlib", "libtpu")]
    text = "\n".join([slice_.name, *versions, lowered.as_text()])
    return hashlib.sha256(text.encode()).hexdigest()


def compiled_bytes(cases: Iterable[tuple[Config, Slice]]) -> list[tuple[int, int]]:
    """Return each step's bytes on a device: as `program_bytes` has them, and alive at the peak."""
    # Only the compiler runs beside itself: tracing is Python's.
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        waiting = [
            pool.submit(_compiled, lowered_step(config, slice_), slice_) for config, slice_ in cases
        ]
        return [future.result() for future in waiting]


def _compiled(lowered: Any, slice_: Slice) -> tuple[int, int]:
    path = runtime.cache_root() / CACHE / content_key(lowered, slice_)
    if not path.exists():
        compiled = lowered.compile()
        whole = program_bytes(compiled)
        assert whole is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([whole, compiled.memory_analysis().peak_memory_in_bytes]))
    whole, peak = json.loads(path.read_text())
    return whole, peak
