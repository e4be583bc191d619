"""How fast the compiled training step of a config is here, measured over a few steps."""

import time
from typing import Any

import jax
import numpy as np
import psutil
from jax.sharding import Mesh

from jaxscale import runtime
from jaxscale.config import Config, ConfigError
from jaxscale.parallel.program import program_bytes
from jaxscale.train.memory import bytes_on_device, memory_of_device
from jaxscale.train.state import (
    Assembly,
    Batch,
    TrainState,
    abstract_batch,
    abstract_state,
    assemble,
    init_state,
)
from jaxscale.train.step import compile_step

REPEATS = 5
SECONDS_PER_REPEAT = 0.3
GIB = 2**30


def measure_step(config: Config) -> tuple[int, list[float]]:
    """Run the step of a resolved config on this machine's devices, on tokens that mean nothing.

    Returns:
      Tokens per step, and the seconds of a step in each of some repeats.

    Raises:
      ConfigError: it does not fit the devices.
    """
    assembly = assemble(config)
    check_room(bytes_on_device(abstract_state(assembly)), assembly.mesh)
    program = compile_step(assembly)
    check_room(program_bytes(program) or 0, assembly.mesh)
    batch = {
        name: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding)
        for name, leaf in abstract_batch(assembly).items()
    }
    seconds = time_steps(assembly, program, init_state(assembly), batch)
    return config.train.global_batch_size * config.data.length, seconds


def time_steps(assembly: Assembly, program: Any, state: TrainState, batch: Batch) -> list[float]:
    """Return the seconds of a compiled step in each of some repeats; the state is used up."""

    def run(steps: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(steps):
            state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - started) / steps

    with jax.set_mesh(assembly.mesh):
        run(1)
        steps = runtime.agreed(max(1, int(SECONDS_PER_REPEAT / run(1))))
        return [run(steps) for _ in range(REPEATS)]


def check_room(num_bytes: int, mesh: Mesh) -> None:
    """Raise ConfigError where a device has no room for so many bytes."""
    room = memory_of_device(mesh)
    if mesh.devices.flat[0].platform == "cpu":
        # What others use is not free, and taking it would end this process.
        room = min(room, psutil.virtual_memory().available // len(mesh.local_devices))
    if num_bytes > room:
        raise ConfigError(
            f"it needs {num_bytes / GIB:,.1f} GiB on each device, of {room / GIB:,.1f} GiB"
        )
