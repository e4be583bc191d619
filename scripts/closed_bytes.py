#!/usr/bin/env python3
"""Compare the closed form's bytes with the TPU compiler's, over configurations drawn at random.

    pip install --editable '.[tpu]'
    python scripts/closed_bytes.py [--count 20] [--seed 0] [--check]

Presets from `tiny` to `8b` on 1 to 256 chips, every kind of remat and several optimizers. `--check`
exits 1 where the median error is above 15%. Each compile takes about a minute, once.
"""

import argparse
import dataclasses
import pathlib
import random
import statistics
import sys
from collections.abc import Iterator, Sequence

from jaxscale import config_source, runtime
from jaxscale.config import Config, ConfigError, MeshConfig
from jaxscale.parallel.mesh import AXES, STAGE_AXIS, abstract_mesh, mesh_sizes
from jaxscale.plan.compile import Compiled, Job, compile_all
from jaxscale.plan.memory import Bytes, closed_bytes
from jaxscale.plan.space import Candidate, candidate
from jaxscale.plan.torus import Slice, parse_topology
from jaxscale.resolve import resolve
from jaxscale.train.state import check_fit

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIB = 2**20
# What the planner promises of its median.
MEDIAN_ERROR = 0.15
# Of each preset: slices, least parts of its parameters, lengths, most tokens of a device.
SHAPES: dict[str, tuple[tuple[str, ...], int, tuple[int, ...], int]] = {
    "tiny": (("v5e:1x1", "v5e:2x2", "v6e:2x4"), 1, (256, 1024), 32768),
    "small": (("v6e:1x1", "v5e:2x4", "v5e:4x4"), 1, (512, 2048), 16384),
    "125m": (("v5e:2x2", "v5p:2x2x2", "v6e:4x8"), 1, (1024, 2048), 8192),
    "1b": (("v5e:4x4", "v5p:2x2x4", "v6e:8x8"), 4, (2048, 4096), 8192),
    "8b": (("v6e:8x8", "v5p:4x4x4", "v6e:16x16"), 32, (4096, 8192), 16384),
}
OPTIMIZERS = ("adamw", "adamw", "adamw", "lion", "adafactor", "sgd")
REMATS = ("full", "full", "names", "dots", "none")
MOST_AXES, MOST_STAGES, MOST_SEQUENCE_PARTS = 2, 4, 4


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, compare, print; return the exit code."""
    parser = argparse.ArgumentParser(description="Compare closed-form bytes with the compiler's.")
    parser.add_argument("--count", type=int, default=20, help="configurations")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--check", action="store_true", help="exit 1 above the median promised")
    args = parser.parse_args(argv)
    runtime.stay_on_host()
    jobs = {Job(*found): None for found in generated(args.count, args.seed)}
    whole, peak = [], []
    for job, compiled in compile_all(list(jobs)):
        if compiled.error:
            print(f"{job.slice.name} could not be compiled: {compiled.error}")
            return 1
        found = candidate(job.config, job.slice)
        closed = closed_bytes(found)
        print(line(found, job, closed, compiled), flush=True)
        whole.append(abs(closed.total / compiled.needed_bytes - 1))
        peak.append(abs(closed.live / compiled.peak_bytes - 1))
    print(f"median error: {statistics.median(whole):.1%} of all, {statistics.median(peak):.1%}")
    worst = max(map(statistics.median, (whole, peak)))
    return 1 if args.check and worst > MEDIAN_ERROR else 0


def line(found: Candidate, job: Job, closed: Bytes, compiled: Compiled) -> str:
    """Return a configuration as a line: by the closed form and by the compiler, and the peak."""
    config = job.config
    size = f"{config.model.num_layers}x{config.model.width}"
    name = f"{size} {job.slice.name} {found.mesh_words}, {found.remat_words.split(':')[0]}"
    pairs = ((closed.total, compiled.needed_bytes), (closed.live, compiled.peak_bytes))
    errors = [f"{a / MIB:8.0f} {b / MIB:8.0f} MiB {a / b - 1:+5.0%}" for a, b in pairs]
    return f"{name:48} {config.optimizer.name:9} {errors[0]}  peak {errors[1]}"


def generated(count: int, seed: int) -> Iterator[tuple[Config, Slice]]:
    """Yield resolved configs that pass the project's checks, and slices for them."""
    draw = random.Random(seed)
    presets = list(SHAPES)
    for number in range(count):
        preset = presets[number % len(presets)]
        found = None
        while found is None:
            found = _drawn(preset, draw)
        yield found


def _drawn(preset: str, draw: random.Random) -> tuple[Config, Slice] | None:
    topologies, least_parts, lengths, most_tokens = SHAPES[preset]
    slice_ = parse_topology(draw.choice(topologies))
    meshes = list(mesh_sizes(slice_.num_devices)) or [(1,) * len(AXES)]
    sizes = dict(zip(AXES, draw.choice(meshes), strict=True))
    length = draw.choice(lengths)
    rows = draw.choice((1, 2, 4, 8, 16))
    in_stages = sizes[STAGE_AXIS] > 1
    parts = draw.choice((1, 1, 1, 2, 4)) * (2 * sizes[STAGE_AXIS] if in_stages else 1)
    remat, optimizer = draw.choice(REMATS), draw.choice(OPTIMIZERS)
    _, replicas, fsdp, sequence, _ = sizes.values()
    tokens = rows * parts * length // sequence
    if (
        sum(size > 1 for size in sizes.values()) > MOST_AXES
        or slice_.num_devices // replicas // sequence < least_parts
        or sizes[STAGE_AXIS] > MOST_STAGES
        or sequence > MOST_SEQUENCE_PARTS
        or not most_tokens // 8 <= tokens <= most_tokens
        or (remat in ("none", "dots") and 2 * tokens > most_tokens)
    ):
        return None
    config = config_source.load(
        f"{ROOT / 'configs' / 'lm.py'}:{preset}", [("model.compute_dtype", "bfloat16")]
    )
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(**sizes),
        model=dataclasses.replace(config.model, attention="flash", remat=remat),
        data=dataclasses.replace(config.data, length=length),
        train=dataclasses.replace(
            config.train,
            global_batch_size=rows * parts * replicas * fsdp,
            accumulation_steps=parts,
        ),
        optimizer=dataclasses.replace(config.optimizer, name=optimizer),
    )
    try:
        config = resolve(config)
        check_fit(config, abstract_mesh(config.mesh, slice_.num_devices))
    except ConfigError:
        return None
    return config, slice_


if __name__ == "__main__":
    sys.exit(main())
