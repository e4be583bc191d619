"""What a compiled program costs a device: bytes, FLOPs of its matmuls, and its collectives by axis.

XLA's own cost analysis counts the body of a loop once. This reads the text of the optimised
program and multiplies by the loops' trip counts. Tests, `sweep` and the planner call it.
"""

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from typing import Any

import numpy as np

from jaxscale.parallel.hlo import Computation, Instruction, num_bytes, parse, shape_of, trip_count
from jaxscale.parallel.mesh import AnyMesh

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# Custom calls that compute no matmul: annotations, memory, the ends of asynchronous collectives.
CHEAP_CALLS = (
    *("Sharding", "SPMD", "annotate_device_placement", "MoveTo", "AllocateBuffer", "TopK"),
    *("AsyncCollective", "ConcatBitcast", "AssumeGatherIndicesInBound"),
)
# Pallas kernels go by the name of their kernel.
PALLAS = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of COLLECTIVES.
      axes: the mesh axes that its devices differ in; empty where no mesh was given.
      group_size: devices that take part together.
      payload_bytes: of the whole array on one device: what an all-gather yields, what the others
        are given.
      source: the operation of the model that it comes from, as the compiler names it.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    payload_bytes: int
    source: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, per device and call.

    Attributes:
      flops: of all matmuls and convolutions; of alternatives, the one with the most.
      collectives: each, and how often it runs.
      opaque_calls: custom calls whose FLOPs are not known and not counted, and how often each runs.
      peak_bytes: device memory that it needs, as of `program_bytes`.
      argument_bytes: of that, inputs, the state included.
      temporary_bytes: of that, the most that neither inputs nor results take at a time.
      host_bytes: arguments, results and temporaries in host memory.
    """

    flops: float
    collectives: dict[Collective, int]
    opaque_calls: dict[str, int]
    peak_bytes: int
    argument_bytes: int
    temporary_bytes: int
    host_bytes: int

    def by_kind(self) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
        """Return the number and the bytes of the collectives of each kind and set of axes."""
        totals: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = {}
        for collective, times in self.collectives.items():
            key = (collective.kind, collective.axes)
            number, payload = totals.get(key, (0, 0))
            totals[key] = (number + times, payload + times * collective.payload_bytes)
        return totals


@dataclasses.dataclass
class _Cost:
    flops: float = 0.0
    collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)
    opaque: Counter[str] = dataclasses.field(default_factory=Counter)
    # What a TPU sends while it computes stands in several fusions: where it begins, in those that
    # run meanwhile, and where it ends. They name one chain.
    chains: dict[str, Collective] = dataclasses.field(default_factory=dict)

    def add(self, other: "_Cost", times: int = 1) -> None:
        self.flops += times * other.flops
        self.chains.update(other.chains)
        for collective, number in other.collectives.items():
            self.collectives[collective] += times * number
        for target, number in other.opaque.items():
            self.opaque[target] += times * number


def read_program(compiled: Any, mesh: AnyMesh | None = None) -> Program:
    """Return what a `jax.stages.Compiled` costs each device.

    Args:
      compiled: a program that was compiled for any platform.
      mesh: names the axes of collectives; its devices in the order they were compiled for.

    Raises:
      ValueError: a loop whose trip count the compiler does not tell, or bytes that it does not.
    """
    memory, peak_bytes = compiled.memory_analysis(), program_bytes(compiled)
    if peak_bytes is None:
        raise ValueError("the compiler does not tell what memory its program needs")
    cost = _Reader(compiled.as_text(), mesh).cost()
    return Program(
        flops=cost.flops,
        collectives=dict(cost.collectives),
        opaque_calls=dict(cost.opaque),
        peak_bytes=peak_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        host_bytes=memory.host_argument_size_in_bytes
        + memory.host_output_size_in_bytes
        - memory.host_alias_size_in_bytes
        + memory.host_temp_size_in_bytes,
    )


def program_bytes(compiled: Any) -> int | None:
    """Return the bytes a program needs on each device: arguments, results, temporaries.

    Results that lie where arguments were count once; None where the compiler does not tell.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


class _Reader:
    """Adds the costs of computations up from the entry, each read once."""

    def __init__(self, text: str, mesh: AnyMesh | None) -> None:
        self._computations, self._entry = parse(text)
        self._mesh = mesh
        self._of = functools.cache(self._cost_of)

    def cost(self) -> _Cost:
        return self._whole(self._entry)

    def _whole(self, name: str) -> _Cost:
        """Return the cost of a computation that is no part of its caller."""
        own, whole = self._of(name), _Cost()
        whole.add(own)
        whole.collectives.update(own.chains.values())
        whole.chains.clear()
        return whole

    def _cost_of(self, name: str) -> _Cost:
        computation, total = self._computations[name], _Cost()
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                collective = collective_of(instruction, computation, self._mesh)
                if chain := re.search(r'chain_id="(\w+)"', instruction.attributes):
                    total.chains[chain[1]] = collective
                else:
                    total.collectives[collective] += 1
            elif instruction.opcode in ("dot", "convolution"):
                total.flops += matmul_flops(instruction, computation)
            elif instruction.opcode == "custom-call":
                target = instruction.attribute("custom_call_target").strip('"')
                if not target.startswith(CHEAP_CALLS):
                    kernel = instruction.name.split(".")[0]
                    total.opaque[kernel if target == PALLAS else target] += 1
            else:
                self._add_called(instruction, computation, total)
        return total

    def _add_called(self, instruction: Instruction, around: Computation, total: _Cost) -> None:
        called = instruction.called
        if instruction.opcode == "while":
            times = trip_count(instruction, around, self._computations)
            total.add(self._whole(called["body"][0]), times)
        elif instruction.opcode == "conditional":
            branches = [self._whole(name) for names in called.values() for name in names]
            total.add(max(branches, key=lambda cost: cost.flops))
        else:
            for names in called.values():
                for name in names:
                    total.add(self._of(name))


def collective_of(found: Instruction, computation: Computation, mesh: AnyMesh | None) -> Collective:
    """Return the collective that an instruction is, or begins.

    Args:
      found: one whose opcode is of COLLECTIVES, `-start` behind it or not.
      computation: that it stands in.
      mesh: names the axes; its devices in the order they were compiled for.
    """
    kind, groups = found.opcode.removesuffix("-start"), _device_groups(found)
    payload = sum(num_bytes(computation[name].shape) for name in found.operands)
    if kind == "all-gather":
        payload *= len(groups[0])
    source = re.search(r'op_name="([^"]*)"', found.attributes)
    return Collective(
        kind=kind,
        axes=_axes_of(groups, mesh) if mesh is not None else (),
        group_size=len(groups[0]),
        payload_bytes=payload,
        source=source[1] if source else "",
    )


def matmul_flops(found: Instruction, computation: Computation) -> float:
    """Return the FLOPs of a `dot` or `convolution`; 0 of anything else."""
    if found.opcode == "dot":
        return _dot_flops(found, computation)
    return _convolution_flops(found, computation) if found.opcode == "convolution" else 0.0


def _dot_flops(dot: Instruction, computation: Computation) -> float:
    """Return 2 x (elements of the result) x (elements summed for each of them)."""
    left = shape_of(computation[dot.operands[0]].shape)
    dims = dot.attribute("lhs_contracting_dims").strip("{}")
    summed = math.prod(left[int(dim)] for dim in dims.split(",") if dim)
    return 2.0 * math.prod(shape_of(dot.shape)) * summed


def _convolution_flops(convolution: Instruction, computation: Computation) -> float:
    """Return 2 x (elements of the result) x (elements summed for each of them).

    What meets padding is not computed: a TPU's matmuls are convolutions of which most is padding.
    """
    image, kernel = (shape_of(computation[name].shape) for name in convolution.operands)
    out = shape_of(convolution.shape)
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", convolution.attribute("dim_labels"))
    assert labels, convolution.attributes
    flops = 2.0 * kernel[labels[2].index("i")]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", convolution.attribute("window")))
    for label, size in zip(labels[3], out, strict=True):
        if not label.isdigit():
            flops *= size
            continue
        own = {key: value.split("x")[int(label)] for key, value in window.items()}
        sizes = (image[labels[1].index(label)], size, kernel[labels[2].index(label)])
        flops *= _taps(own, *sizes)
    return flops


def _taps(window: dict[str, str], image: int, out: int, kernel: int) -> int:
    """Return along one dimension how often an element of the kernel meets one of the image."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, spread = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    starts = stride * np.arange(out)[:, None] - low
    places = starts + int(window.get("rhs_dilate", 1)) * np.arange(kernel)
    inside = (places >= 0) & (places <= spread * (image - 1)) & (places % spread == 0)
    return int(inside.sum())


def _device_groups(collective: Instruction) -> list[list[int]]:
    """Return the devices that take part together, numbered as in the compiled mesh.

    A permutation counts as one group of all whom its chain of sources and targets joins.
    """
    pairs = collective.attribute("source_target_pairs")
    if pairs:
        return _joined(json.loads(pairs.replace("{", "[").replace("}", "]")))
    groups = collective.attribute("replica_groups")
    if groups.startswith("{"):
        return list(json.loads(groups.replace("{", "[").replace("}", "]")))
    if groups.startswith("mesh"):
        return _groups_of_axes(groups)
    return _iota(groups).tolist()


def _joined(pairs: list[list[int]]) -> list[list[int]]:
    groups: list[set[int]] = []
    for pair in pairs:
        touched = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in touched]
        groups.append(set(pair).union(*touched))
    return [sorted(group) for group in groups]


def _iota(text: str) -> np.ndarray[Any, Any]:
    """Read `[2,4]<=[4,2]T(1,0)`: the numbers from 0, laid out, transposed, and cut to a shape."""
    found = re.fullmatch(r"\[([\d,]*)\](?:<=\[([\d,]*)\])?(?:T\(([\d,]*)\))?", text)
    assert found, text
    shape, source, order = found.groups()
    numbers = np.arange(math.prod(_ints(source or shape))).reshape(_ints(source or shape))
    return numbers.transpose(_ints(order) if order else None).reshape(_ints(shape))


def _groups_of_axes(text: str) -> list[list[int]]:
    """Read `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}`: groups along the last axes."""
    sizes = [int(size) for size in re.findall(r"'=(\d+)", text)]
    names = re.findall(r"'([^']*)'=", text)
    ids = re.search(r"device_ids=\((.*?\)?)\) \{", text)
    devices = (_iota(ids[1]) if ids else np.arange(math.prod(sizes))).reshape(sizes)
    chosen = [names.index(name) for name in re.findall(r"'([^']*)'", text[text.rindex("{") :])]
    others = [dim for dim in range(len(sizes)) if dim not in chosen]
    size = math.prod(sizes[dim] for dim in chosen)
    return list(devices.transpose(others + chosen).reshape(-1, size).tolist())


def _axes_of(groups: list[list[int]], mesh: AnyMesh) -> tuple[str, ...]:
    shape = tuple(mesh.shape.values())
    places = [np.array(np.unravel_index(group, shape)) for group in groups]
    varying = np.any([np.any(place != place[:, :1], axis=1) for place in places], axis=0)
    return tuple(name for name, varies in zip(mesh.axis_names, varying, strict=True) if varies)


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
