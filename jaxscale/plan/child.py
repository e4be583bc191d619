"""The process of one compile: a training step for devices that are only described, or fake.

`python -m jaxscale.plan.child` takes the request as a line of JSON on stdin. A process each: a
compiler may die, and is to work on several programs side by side.
"""

import glob
import gzip
import os
import pathlib
import re
import sys
import time
from typing import Any

from jaxscale import child, config_source, records, runtime
from jaxscale.config import Config

# The compiler says so where a program has no room in a device's memory.
NO_ROOM = re.compile(
    r"\(([\d.]+)([KMGT])\) exceeds available HBM|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"
)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main() -> int:
    """Compile what the request says and report bytes; the program's text goes to a file."""
    request = child.read_request()
    # Read by the compiler when it starts.
    flags = f"--xla_dump_to={request['folder']} --xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    runtime.set_jax_flags()
    config = config_source.from_saved(request["config"])
    started = time.perf_counter()
    try:
        report = _compile(config, request)
    except Exception as error:
        report = _failure(str(error) or type(error).__name__)
    report["compile_seconds"] = time.perf_counter() - started
    records.write_json(request["report"], report)
    return 0


def _compile(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    from jaxscale.plan.describe import devices_of
    from jaxscale.train.state import assemble
    from jaxscale.train.step import compile_step

    assembly = assemble(config, devices_of(request["topology"], request["num_slices"]))
    compiled = compile_step(assembly, dict(request["options"]))
    memory = compiled.memory_analysis()
    with gzip.open(request["text"], "wt") as file:
        file.write(_text(compiled, request["folder"]))
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "host_bytes": memory.host_argument_size_in_bytes
        + memory.host_output_size_in_bytes
        - memory.host_alias_size_in_bytes
        + memory.host_temp_size_in_bytes,
    }


def _text(compiled: Any, folder: str) -> str:
    """Return the program's text; where JAX cannot read it back, as the compiler dumped it."""
    try:
        return str(compiled.as_text())
    except Exception:
        # This jaxlib does not know all of a newer compiler's instructions.
        dumps = glob.glob(os.path.join(folder, "**", "*step*after_codegen.txt"), recursive=True)
        if not dumps:
            raise
        return pathlib.Path(max(dumps, key=os.path.getsize)).read_text()


def _failure(error: str) -> dict[str, Any]:
    found = NO_ROOM.search(error)
    if not found:
        return {"error": error.splitlines()[0]}
    number, unit = filter(None, found.groups())
    return {"needed_bytes": int(float(number) * UNITS[unit])}


if __name__ == "__main__":
    sys.exit(main())
