"""The parent's side of a point: starts its process, waits, and says how it ended.

A death is an outcome like any other. A stop request ends the process first; one whose parent dies
sees its stdin closed and ends itself.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from jaxscale import config_source, records
from jaxscale.config import Config, ConfigError, Stopped
from jaxscale.data.workers import Stop
from jaxscale.sweep.points import Machine, Options, Plan, Point, training_config
from jaxscale.sweep.rows import FAILED, NOT_APPLICABLE, OUT_OF_MEMORY, Row

COMMAND = (sys.executable, "-m", "jaxscale.sweep.measure")
# Between looks at the process and at the stop request.
POLL_SECONDS = 0.05


def look(config: Config, options: Options, *, stop: Stop) -> Machine:
    """Return the devices, after a check that the resolved config fits them.

    Args:
      config: resolved.
      options: where they vary the mesh, the config's own need not fit.
      stop: asked whether to stop.

    Raises:
      ConfigError: it does not fit, or there are no devices.
      Stopped: `stop` said so.
    """
    check = options.preset != "mesh" and not any(v.startswith("mesh.") for v in options.vary)
    request = {"task": "look", "check": check, "devices": options.devices}
    report = _run(config, request, timeout=options.timeout, stop=stop)
    if "error" in report:
        raise ConfigError(report["error"])
    if "verdict" in report:
        raise ConfigError(f"no devices can be used here: {report['note']}")
    return Machine(**report)


def measure(plan: Plan, point: Point, *, phase: str, stop: Stop) -> Row:
    """Run a point in a process of its own and return how it ended.

    Args:
      plan: that the point belongs to.
      point: what to run; one that does not apply is not run.
      phase: what it is measured for.
      stop: asked whether to stop.

    Raises:
      Stopped: `stop` said so; the process is gone.
    """
    row = Row(
        key=point.key,
        phase=phase,
        technique=point.technique,
        settings=records.to_json(dict(point.settings)),
        verdict=NOT_APPLICABLE,
        note=point.reason,
    )
    if point.config is None:
        return row
    options = plan.options
    training = training_config(point.config, plan) if options.tokens else None
    request = {
        "task": "point",
        "devices": options.devices,
        "compile_only": options.compile_only,
        "steps": options.steps,
        # A real device has its own say, unless nothing runs.
        "limit": plan.limit if options.compile_only else options.memory_limit,
        "training": training and config_source.to_mapping(training),
    }
    report = _run(point.config, request, timeout=options.timeout, stop=stop)
    return dataclasses.replace(row, **report)


def _run(config: Config, request: dict[str, Any], *, timeout: int, stop: Stop) -> dict[str, Any]:
    """Return the report of a process, with a verdict if it died before it gave one."""
    with tempfile.TemporaryDirectory(prefix="jaxscale-sweep-") as folder:
        report, errors = pathlib.Path(folder, "report.json"), pathlib.Path(folder, "errors")
        request = {
            **request,
            "config": config_source.to_mapping(config),
            "report": str(report),
            "cache_dir": folder,
        }
        with open(errors, "w") as stderr:
            code = _wait(_start(request, stderr), timeout=timeout, stop=stop)
        known = records.read_json(report) if report.is_file() else {}
        known.pop(records.NONFINITE, None)
        # What a report says last is so; a verdict before a death would be an early one.
        if code == 0 and known:
            return known
        return {**known, **_death(code, errors.read_text(errors="replace"), timeout)}


def _start(request: dict[str, Any], stderr: Any) -> subprocess.Popen[str]:
    root = str(pathlib.Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        # Ctrl-C reaches the parent alone, which then ends the process.
        start_new_session=True,
    )
    assert process.stdin is not None
    # One that is dead already tells so by its exit code.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    return process


def _wait(process: subprocess.Popen[str], *, timeout: int, stop: Stop) -> int | None:
    """Return the exit code, None for a process that took too long; it is gone in any case."""
    deadline = time.monotonic() + timeout
    try:
        while process.poll() is None:
            if stop():
                raise Stopped("what is known of the sweep is kept")
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS)
        return process.returncode
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # type: ignore[union-attr]


def _death(code: int | None, errors: str, timeout: int) -> dict[str, str]:
    """Return verdict and note of a process that did not end as it should."""
    if code is None:
        return {"verdict": FAILED, "note": f"not done within {timeout} s; raise --timeout"}
    if code == -signal.SIGKILL:
        note = "killed by SIGKILL, as a system does that has no memory left"
        return {"verdict": OUT_OF_MEMORY, "note": note}
    lines = [line for line in errors.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "without a word"
    exhausted = any(word in errors for word in ("bad_alloc", "RESOURCE_EXHAUSTED"))
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return {"verdict": OUT_OF_MEMORY if exhausted else FAILED, "note": f"{how}: {last}"}
