"""The parent's side of a point: starts its process, waits, and says how it ended.

A death is an outcome like any other.
"""

import dataclasses
import signal
import sys
from typing import Any

from jaxscale import config_source, records
from jaxscale.child import Outcome, run_child
from jaxscale.config import Config, ConfigError
from jaxscale.data.workers import Stop
from jaxscale.sweep.points import Machine, Options, Plan, Point, training_config
from jaxscale.sweep.rows import FAILED, NOT_APPLICABLE, OUT_OF_MEMORY, Row

COMMAND = (sys.executable, "-m", "jaxscale.sweep.measure")


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
    request = {**request, "config": config_source.to_mapping(config)}
    outcome = run_child(COMMAND, request, timeout=timeout, stop=stop)
    # What a report says last is so; a verdict before a death would be an early one.
    if outcome.code == 0 and outcome.report:
        return outcome.report
    return {**outcome.report, **_death(outcome, timeout)}


def _death(outcome: Outcome, timeout: int) -> dict[str, str]:
    """Return verdict and note of a process that did not end as it should."""
    if outcome.code is None:
        return {"verdict": FAILED, "note": f"not done within {timeout} s; raise --timeout"}
    if outcome.code == -signal.SIGKILL:
        note = "killed by SIGKILL, as a system does that has no memory left"
        return {"verdict": OUT_OF_MEMORY, "note": note}
    exhausted = any(word in outcome.errors for word in ("bad_alloc", "RESOURCE_EXHAUSTED"))
    return {"verdict": OUT_OF_MEMORY if exhausted else FAILED, "note": outcome.last_words}
