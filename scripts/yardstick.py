#!/usr/bin/env python3
"""Hold this project's recipe against a peer's, both compiled for the same TPUs and read alike.

    pip install --editable '.[tpu]' libtpu==0.0.51
    python scripts/yardstick.py [--only NAME] [--json FILE] [--check]

The peer's figures are those of its own step under libtpu 0.0.51. Both programs are priced by one
fixed model, simpler than the planner's so that nobody can tune it: the compiler's cycles, attention
kernels at 60% of peak, and collectives over one or two links of the torus that wait in one queue.
What sparse cores work off runs beside computation. Nothing ran on a TPU. `--check` exits 1 where a
goal is missed. Each compile takes minutes.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxscale import config_source, records, runtime
from jaxscale.hardware import Chip
from jaxscale.model.cost import train_flops_per_token
from jaxscale.plan.compile import Compiled, Job, compile_all
from jaxscale.plan.describe import libtpu_version
from jaxscale.plan.predict import prices_of, schedule_of
from jaxscale.plan.schedule import Kernel, Operation, Send
from jaxscale.plan.timeline import COMPUTE, ICI, LINK_HOST, Prices, Timeline, predict
from jaxscale.plan.torus import parse_topology
from jaxscale.resolve import resolve
from jaxscale.verbs.common import DONE, FAILED

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBTPU = "0.0.51"
GIB = 2**30
# Of the model: cycles per second by chip, the share of peak of attention kernels, the devices from
# which on a collective has two links, and what each transfer takes beside its bytes.
CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9, "v5p": 1.75e9}
KERNEL_SHARE, TWO_LINKS, TRANSFER_SECONDS = 0.6, 16, 1e-6
MATMULS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a slice, and what is to be reached there.

    Attributes:
      preset: of configs/lm.py.
      topology: the slice.
      knobs: of the recipe, beside the preset's.
      peer_seconds: the peer's step, by the same model; nan: nobody compiled it.
      goal_seconds: the most that our step may take; nan: none is set.
      most_gib: device memory that our step may need.
      published_seconds: a peer's step on real chips; nan: none was published.
    """

    preset: str
    topology: str
    knobs: dict[str, Any]
    peer_seconds: float
    goal_seconds: float
    most_gib: float
    published_seconds: float = math.nan


FULL = {"model.remat": "full"}
KEPT = {"model.remat": "names", "model.remat_names": "query,key,value,context"}
ALL = {**KEPT, "model.remat_names": "query,key,value,context,attention_out,gate,up"}
CASES = {
    "llama2-7b, v5e:8x8, 4 x 2048": Case(
        "llama2-7b,length=2048,batch=256", "v5e:8x8", KEPT, 3.330, 2.700, 15.0
    ),
    "llama2-7b, v5e:4x4, 2 x 2048": Case(
        "llama2-7b,length=2048,batch=32", "v5e:4x4", KEPT, 3.230, 1.450, 15.0
    ),
    "llama2-7b, v6e:16x16, 12 x 4096": Case(
        "llama2-7b,length=4096,batch=3072", "v6e:16x16", FULL, 5.099, 5.099 / 1.2, 31.25
    ),
    "llama2-7b, v5p:4x4x8, 4 x 4096": Case(
        "llama2-7b,length=4096,batch=512", "v5p:4x4x8", ALL, 2.953, 2.953 / 1.2, 95.0
    ),
    # Published: MaxText's recipe for Trillium.
    "llama3-8b, v6e:16x16, 4 x 8192": Case(
        "llama3-8b,length=8192,batch=1024", "v6e:16x16", FULL, math.nan, math.nan, 31.25, 4.546
    ),
}


class Yardstick(Prices):
    """The fixed model."""

    def operation(self, event: Operation) -> tuple[float, str]:
        """Return the compiler's cycles in seconds."""
        return (event.cycles or 0) / CLOCKS[self.chip.name], COMPUTE

    def kernel(self, event: Kernel) -> float:
        """Return the seconds of the unmasked half of the pairs at a share of peak."""
        matmuls = next(n for name, n in MATMULS.items() if event.name.startswith(name))
        (*heads, L, H), (*_, S, _) = event.shapes[:2]
        flops = 2 * matmuls * math.prod(heads) * (L * S / 2) * H
        return flops / (KERNEL_SHARE * self.chip.bf16_flops_per_second_per_device)

    def send(self, event: Send) -> tuple[float, str]:
        """Return the seconds of a transfer over one link, or two in a large group."""
        one = event.collective
        if one is None:
            return 0.0, LINK_HOST
        n = one.group_size
        rate = (2 if n >= TWO_LINKS else 1) * self.chip.ici_link_bytes_per_second
        times = {"all-reduce": 2.0, "collective-permute": n / (n - 1)}.get(one.kind, 1.0)
        if one.kind == "collective-permute":
            rate = self.chip.ici_link_bytes_per_second
        return times * one.payload_bytes * (n - 1) / n / rate + TRANSFER_SECONDS, ICI


def main(argv: Sequence[str] | None = None) -> int:
    """Compile the cases and print them; return the exit code."""
    parser = argparse.ArgumentParser(description="Hold our recipe against a peer's.")
    parser.add_argument("--only", default="", help="a part of the names of cases")
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--processes", type=int, default=0, help="that compile; 0 = one per core")
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal is missed")
    args = parser.parse_args(argv)
    runtime.stay_on_host()
    if libtpu_version() != LIBTPU:
        print(f"the peer was compiled by libtpu {LIBTPU}, and here is {libtpu_version()}")
        return FAILED
    cases = {name: case for name, case in CASES.items() if args.only in name}
    jobs = {job_of(case): name for name, case in cases.items()}
    rows = []
    for job, compiled in compile_all(list(jobs), num_processes=args.processes):
        row = measured(jobs[job], job, compiled)
        print(line(row), flush=True)
        rows.append(row)
    if args.json:
        result = records.envelope("yardstick", rows, config={}, environment=runtime.describe())
        records.write_json(args.json, result)
    return FAILED if args.check and not all(row["holds"] for row in rows) else DONE


def job_of(case: Case) -> Job:
    """Return what is compiled: the preset, its recipe, and the chip's options of hardware.py."""
    knobs = [(name, str(value)) for name, value in case.knobs.items()]
    config = config_source.load(f"{ROOT / 'configs' / 'lm.py'}:{case.preset}", knobs)
    slice_ = parse_topology(case.topology)
    return Job(resolve(config), slice_, slice_.chip.compiler_options)


def measured(name: str, job: Job, compiled: Compiled) -> dict[str, Any]:
    """Return the figures of a case."""
    case, chip = CASES[name], job.slice.chip
    row: dict[str, Any] = {
        "name": name,
        "peer_seconds": case.peer_seconds,
        "goal_seconds": case.goal_seconds,
        "published_seconds": case.published_seconds,
        "needed_bytes": compiled.needed_bytes,
        "compile_seconds": compiled.compile_seconds,
        "error": compiled.error or ("" if compiled.has_room else "no room"),
        "holds": False,
    }
    if compiled.text is None:
        return row
    timeline = priced(job, compiled.text)
    row["seconds"], row["mfu"] = timeline.seconds, mfu(job, chip, timeline)
    row["seconds_by_resource"] = timeline.by_resource
    has_room = compiled.needed_bytes <= case.most_gib * GIB
    row["holds"] = has_room and not timeline.seconds > case.goal_seconds
    return row


def priced(job: Job, text: str) -> Timeline:
    """Return the time line of a compiled step by the fixed model."""
    own = prices_of(job)
    prices = Yardstick(own.chip, own.shares, own.network, own.attention)
    return predict(schedule_of(text, job), prices)


def mfu(job: Job, chip: Chip, timeline: Timeline) -> float:
    """Return the model FLOPs per second over peak."""
    config = job.config
    tokens = config.train.global_batch_size * config.data.length
    flops = tokens * train_flops_per_token(config.model, config.data.length)
    return flops / job.slice.num_chips / chip.bf16_flops_per_second / timeline.seconds


def line(row: dict[str, Any]) -> str:
    """Return a case as a line."""
    if row["error"]:
        return f"{row['name']}: {row['error']}"
    against = ""
    if not math.isnan(row["peer_seconds"]):
        verdict = "reached" if row["holds"] else "MISSED"
        against = (
            f"; peer {row['peer_seconds']:.3f} s, {row['peer_seconds'] / row['seconds']:.2f}x; "
            f"goal {row['goal_seconds']:.3f} s {verdict}"
        )
    if not math.isnan(row["published_seconds"]):
        against += f"; a peer on real chips: {row['published_seconds']:.3f} s"
    return (
        f"{row['name']}: {row['seconds']:.3f} s, MFU {row['mfu']:.3f}, "
        f"{row['needed_bytes'] / GIB:.1f} GiB, compiled in {row['compile_seconds']:.0f} s{against}"
    )


if __name__ == "__main__":
    sys.exit(main())
