"""The process of one point: reads a request, compiles, runs if it may, and reports as it goes.

`python -m jaxscale.sweep.measure` takes the request as a line of JSON on stdin, and ends when that
is closed, however its parent died. What is known when a point dies stays in the report.
"""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxscale import config_source, records, runtime
from jaxscale.child import read_request
from jaxscale.config import Config, ConfigError
from jaxscale.parallel.program import read_program
from jaxscale.sweep.rows import FAILED, NO_ROOM, NOT_APPLICABLE, OK, OUT_OF_MEMORY
from jaxscale.train.memory import bytes_on_device
from jaxscale.train.smoke import random_batch
from jaxscale.train.state import Assembly, abstract_state, assemble, init_state
from jaxscale.train.step import compile_step
from jaxscale.train.step_speed import check_room, time_steps

Report = Callable[..., None]
# What JAX says when a device, or the host that a CPU device is, has no memory left.
EXHAUSTED = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "bad_alloc")


def look(config: Config, request: dict[str, Any], report: Report) -> None:
    """Report the devices, and whether the config can be put together on them."""
    if request["check"]:
        try:
            assemble(config)
        except ConfigError as error:
            report(error=str(error))
            return
    devices = jax.local_devices()
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    report(
        environment=runtime.describe(),
        platform=devices[0].platform,
        num_devices=len(devices),
        memory_bytes=min(limits) or None,
    )


def point(config: Config, request: dict[str, Any], report: Report) -> None:
    """Report what a step takes; a limit in the request refuses what would pass it."""
    try:
        assembly = assemble(config)
    except ConfigError as error:
        report(verdict=NOT_APPLICABLE, note=str(error))
        return
    compiled = _compiled(assembly, report, timed=not request["compile_only"])
    needed, limit = compiled[1], request["limit"]
    if limit and needed > limit:
        report(
            verdict=OUT_OF_MEMORY,
            note=f"needs {needed:,} bytes of {limit:,}, says the compiler",
        )
        return
    if request["compile_only"]:
        report(verdict=OK)
        return
    try:
        check_room(needed, assembly.mesh)
    except ConfigError as error:
        report(verdict=NO_ROOM, note=str(error))
        return
    _run(assembly, compiled[0], request["steps"], report)
    if request["training"]:
        _train(config_source.from_saved(request["training"]), request["folder"], report)
    report(verdict=OK)


def _compiled(assembly: Assembly, report: Report, *, timed: bool) -> tuple[Any, int]:
    """Compile the step, report what that tells, and return it with the bytes it needs."""
    started = time.perf_counter()
    compiled = compile_step(assembly)
    seconds = time.perf_counter() - started
    program = read_program(compiled)
    train, unknown = assembly.config.train, ", ".join(program.opaque_calls)
    report(
        peak_bytes=program.peak_bytes,
        peak_bytes_source="compiler",
        needed_bytes=program.peak_bytes,
        temporary_bytes=program.temporary_bytes,
        state_bytes=bytes_on_device(abstract_state(assembly)),
        host_bytes=program.host_bytes,
        flops=program.flops,
        tokens_per_step=train.global_batch_size * assembly.config.data.length,
        compile_seconds=seconds if timed else None,
        note=f"without the FLOPs of {unknown}" if unknown else "",
    )
    return compiled, program.peak_bytes


def _run(assembly: Assembly, compiled: Any, steps: int, report: Report) -> None:
    """Report the loss after some steps on one random batch, then the time of a step."""
    state, batch = init_state(assembly), random_batch(assembly)
    with jax.set_mesh(assembly.mesh):
        for _ in range(steps):
            state, metrics = compiled(state, batch)
    loss = float(metrics[records.LOSS])
    # No JSON has a number that is not one.
    report(loss=loss if math.isfinite(loss) else None, loss_step=steps)
    seconds = time_steps(assembly, compiled, state, batch)
    train, median = assembly.config.train, statistics.median(seconds)
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    counted = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    report(
        step_seconds=median,
        step_seconds_least=min(seconds),
        step_seconds_most=max(seconds),
        tokens_per_second=train.global_batch_size * assembly.config.data.length / median,
        **({"peak_bytes": max(counted), "peak_bytes_source": "device"} if counted else {}),
    )


def _train(config: Config, folder: str, report: Report) -> None:
    """Train as the verb would, in a folder that goes away, and report the validation loss."""
    from jaxscale.train.loop import DONE, train

    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        result = train(config, workdir)
    report(learning_rate=config.optimizer.learning_rate, trained_steps=result.step)
    if result.ending != DONE:
        report(note=f"training ended {result.ending} after step {result.step}")
    elif result.evaluation is None:
        report(note="no validation documents; raise data.validation_fraction")
    else:
        report(validation_loss=result.evaluation.loss, validation_windows=result.evaluation.windows)


TASKS: dict[str, Callable[[Config, dict[str, Any], Report], None]] = {"look": look, "point": point}


def main() -> int:
    """Read the request, run its task, and write the report at each step of it."""
    request = read_request()
    known: dict[str, Any] = {}

    def report(**fields: Any) -> None:
        known.update(fields)
        records.write_json(request["report"], known)

    config = config_source.from_saved(request["config"])
    runtime.start(config.runtime, devices=request["devices"])
    # A compile is to take the time that it takes.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        TASKS[request["task"]](config, request, report)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        text = f"{type(error).__name__}: {error}".strip()
        memory = isinstance(error, MemoryError) or any(word in text for word in EXHAUSTED)
        report(verdict=OUT_OF_MEMORY if memory else FAILED, note=text.splitlines()[0])
    except Exception as error:
        report(verdict=FAILED, note=f"{type(error).__name__}: {error}".splitlines()[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
