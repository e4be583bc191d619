#!/usr/bin/env python3
"""Write or check what six training steps cost when compiled: collectives, bytes, FLOPs.

    python scripts/compiled_costs.py             write tests/compiled_costs.json
    python scripts/compiled_costs.py --check     exit 1, naming what costs more or less than there

Nothing is run; eight CPU devices are faked. The compiler for CPUs widens bfloat16 to float32 before
it travels, so that bytes are up to twice those of a real device. `tests/test_compiled_costs.py`
runs the check: changed figures belong into the commit that changes them, for a reader to see.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxscale import config_source, runtime
from jaxscale.config import RuntimeConfig
from jaxscale.parallel.program import read_program
from jaxscale.resolve import resolve
from jaxscale.train.state import assemble
from jaxscale.train.step import compile_step

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "compiled_costs.json"
NUM_DEVICES = 8

# Presets of configs/lm.py and the knobs that differ from them, the mesh among these.
Pair = tuple[str, dict[str, Any]]
PAIRS: dict[str, Pair] = {
    "small, data, accumulation": ("small", {"mesh.data": 8, "train.accumulation_steps": 4}),
    "small, fsdp": ("small", {"mesh.data": 1, "mesh.fsdp": 8}),
    "125m, fsdp x tensor": (
        "125m,length=512,batch=16",
        {
            "mesh.data": 1,
            "mesh.fsdp": 4,
            "mesh.tensor": 2,
            "rules.residual_length": "sequence,tensor",
            "model.remat": "dots",
        },
    ),
    "small, fsdp x ring": (
        "small,length=4096,batch=2",
        {
            "mesh.data": 1,
            "mesh.fsdp": 2,
            "mesh.sequence": 4,
            "model.attention": "chunked",
            "model.sequence_attention": "ring",
        },
    ),
    "small, circular pipeline x data": (
        "small",
        {
            "mesh.data": 2,
            "mesh.stage": 4,
            "train.accumulation_steps": 8,
            "train.pipeline_rounds": 2,
            "model.remat": "full",
        },
    ),
    "1b, pipeline x all_to_all x tensor": (
        "1b,length=1024,batch=8",
        {
            "mesh.data": 1,
            "mesh.stage": 2,
            "mesh.sequence": 2,
            "mesh.tensor": 2,
            "model.attention": "dense",
            "model.sequence_attention": "all_to_all",
            "train.accumulation_steps": 4,
            "train.gradient_reduce_dtype": "float32",
        },
    ),
}
# How far a figure may be from the one in the file: a share of it. Counts of collectives are exact;
# temporary bytes hang on the compiler's choice of fusions, which the CPU's features sway.
MARGINS = {
    "number": 0.0,
    "bytes": 0.01,
    "flops": 1e-3,
    "argument_bytes": 0.0,
    "temporary_bytes": 0.05,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the file; return the exit code."""
    parser = argparse.ArgumentParser(description="Write or check tests/compiled_costs.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a change")
    args = parser.parse_args(argv)
    if args.check and not has_figures():
        print(f"{FILE.name} has no figures of jax {jax.__version__}; write them first")
        return 1
    runtime.start(RuntimeConfig(), devices=f"cpu:{NUM_DEVICES}")
    found = {name: costs(*pair) for name, pair in PAIRS.items()}
    if not args.check:
        FILE.write_text(json.dumps({jax.__version__: found}, indent=1) + "\n")
        return 0
    known = read()
    changes = [text for name in PAIRS for text in compare(name, found[name], known[name])]
    print("\n".join(changes) or "nothing changed")
    return 1 if changes else 0


def has_figures() -> bool:
    """Tell whether the file has figures for this version of JAX."""
    return jax.__version__ in json.loads(FILE.read_text())


def read() -> dict[str, Any]:
    """Return the figures of the file for this version of JAX.

    Raises:
      KeyError: it has none.
    """
    return dict(json.loads(FILE.read_text())[jax.__version__])


def costs(preset: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """Compile a preset's step with some knobs set; return its costs per device and step."""
    config = config_source.load(
        f"{ROOT / 'configs' / 'lm.py'}:{preset}",
        [(knob, str(value)) for knob, value in knobs.items()],
    )
    assembly = assemble(resolve(config), jax.devices()[:NUM_DEVICES])
    program = read_program(compile_step(assembly), assembly.mesh)
    return {
        "flops": program.flops,
        "argument_bytes": program.argument_bytes,
        "temporary_bytes": program.temporary_bytes,
        "collectives": {
            f"{kind} {','.join(axes)}": {"number": number, "bytes": payload}
            for (kind, axes), (number, payload) in sorted(program.by_kind().items())
        },
    }


def compare(name: str, found: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """Say in a line each what is beyond its margin."""
    for key in sorted({*found, *known}):
        new, old = found.get(key, {}), known.get(key, {})
        if key not in MARGINS:
            yield from compare(f"{name}: {key}", new, old)
        elif abs((new or 0) - (old or 0)) > MARGINS[key] * (old or 0):
            yield f"{name}: {key} was {old or 0:,.0f} and is {new or 0:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
