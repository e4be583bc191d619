#!/usr/bin/env python3
"""Write or check what eight training steps cost on TPUs, as the planner predicts them.

    python scripts/planned_costs.py             write tests/planned_costs.json
    python scripts/planned_costs.py --check     exit 1, naming what costs more or less than there

The figures are those of one pair of jaxlib and libtpu; others are kept beside them. So nothing
slows the program for TPUs unseen: `tests/test_planned_costs.py` runs the check, and changed figures
belong into the commit that changes them.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jaxscale import config_source, runtime
from jaxscale.plan.compile import Compiled, Job, compile_all, quick
from jaxscale.plan.describe import libtpu_version
from jaxscale.plan.predict import predict_step
from jaxscale.plan.torus import parse_topology
from jaxscale.resolve import resolve

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "planned_costs.json"

# Preset of configs/lm.py, slice, number of slices, and the knobs that differ, the mesh among these.
Pair = tuple[str, str, int, dict[str, Any]]
FLASH = {"model.attention": "flash", "mesh.data": 1}
PAIRS: dict[str, Pair] = {
    "small, v5e:2x2, data": ("small", "v5e:2x2", 1, {**FLASH, "mesh.data": 4}),
    "125m, v4:2x2x1, fsdp": (
        "125m,batch=16",
        "v4:2x2x1",
        1,
        {**FLASH, "mesh.fsdp": 4, "model.remat": "dots"},
    ),
    "125m, v6e:2x4, fsdp x tensor": (
        "125m,batch=32",
        "v6e:2x4",
        1,
        {
            **FLASH,
            "mesh.fsdp": 4,
            "mesh.tensor": 2,
            "rules.residual_length": "sequence,tensor",
        },
    ),
    "small, 2 x v5e:2x2, data x fsdp": (
        "small",
        "v5e:2x2",
        2,
        {"model.attention": "flash", "mesh.data": 2, "mesh.fsdp": 4},
    ),
    "1b, v5p:2x2x2, sequence": (
        "1b,length=8192,batch=8",
        "v5p:2x2x2",
        1,
        {"mesh.fsdp": 4, "mesh.sequence": 2, "model.remat": "names"},
    ),
    "1b, v5e:4x4, pipeline": (
        "1b,batch=64",
        "v5e:4x4",
        1,
        {"mesh.stage": 4, "mesh.fsdp": 4, "train.accumulation_steps": 8},
    ),
    "8b, tpu7x:4x4x4, fsdp": ("8b,batch=256", "tpu7x:4x4x4", 1, {}),
    "8b, v6e:16x16, fsdp": ("8b", "v6e:16x16", 1, {"model.remat": "full"}),
}
# How far a figure may be from the one in the file: a share of it.
MARGINS = {"seconds": 0.03, "bytes": 0.03, "collective_bytes": 0.01}


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the file; return the exit code."""
    parser = argparse.ArgumentParser(description="Write or check tests/planned_costs.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a change")
    args = parser.parse_args(argv)
    runtime.stay_on_host()
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if args.check and versions() not in known:
        print(f"{FILE.name} has no figures of {versions()}; write them first")
        return 1
    found = costs()
    if not args.check:
        FILE.write_text(json.dumps({**known, versions(): found}, indent=1) + "\n")
        return 0
    changes = [text for name in PAIRS for text in compare(name, found[name], known[versions()])]
    print("\n".join(changes) or "nothing changed")
    return 1 if changes else 0


def versions() -> str:
    """Return what the figures hang on: the versions of jaxlib and libtpu."""
    return f"jaxlib {runtime.versions(['jaxlib'])['jaxlib']}, libtpu {libtpu_version()}"


def costs() -> dict[str, dict[str, float]]:
    """Compile the steps of all pairs; return the figures of each."""
    jobs = {job_of(*pair): name for name, pair in PAIRS.items()}
    found = {}
    for job, compiled in compile_all(list(jobs)):
        found[jobs[job]] = figures(job, compiled)
        print(f"{jobs[job]}: {found[jobs[job]]}", file=sys.stderr, flush=True)
    return {name: found[name] for name in PAIRS}


def job_of(preset: str, topology: str, num_slices: int, knobs: dict[str, Any]) -> Job:
    """Return what is compiled for a pair: with the chip's options but for the slow ones."""
    knobs = {**knobs, "mesh.num_slices": num_slices}
    overrides = [(name, str(value)) for name, value in knobs.items()]
    config = config_source.load(f"{ROOT / 'configs' / 'lm.py'}:{preset}", overrides)
    slice_ = parse_topology(topology, num_slices)
    return Job(resolve(config), slice_, quick(slice_.chip.compiler_options))


def figures(job: Job, compiled: Compiled) -> dict[str, float]:
    """Return the figures of a pair.

    Raises:
      RuntimeError: it could not be compiled.
    """
    if compiled.text is None:
        raise RuntimeError(compiled.error or f"no room for {compiled.needed_bytes:,} bytes")
    line = predict_step(job, compiled)
    return {
        "seconds": line.seconds,
        "bytes": compiled.peak_bytes,
        "collective_bytes": sum(row.payload_bytes for row in line.traffic),
    }


def compare(name: str, found: dict[str, float], known: dict[str, Any]) -> Iterator[str]:
    """Say in a line each what is beyond its margin."""
    for key, margin in MARGINS.items():
        new, old = found[key], known.get(name, {}).get(key, 0.0)
        if abs(new - old) > margin * old:
            yield f"{name}: {key} was {old:,.6g} and is {new:,.6g}"


if __name__ == "__main__":
    sys.exit(main())
