"""A compiled TPU program as what happens on a device, one event after the other.

The TPU compiler schedules ahead of time: the text of its program is in the order of execution, with
its own estimate of cycles at each instruction. `read_schedule` keeps what takes time; `timeline.py`
prices it.
"""

import dataclasses
import re

from jaxscale.config import ConfigError
from jaxscale.parallel.hlo import (
    Computation,
    Instruction,
    num_bytes,
    parse,
    root_of,
    shape_of,
    trip_count,
)
from jaxscale.parallel.mesh import AnyMesh
from jaxscale.parallel.program import (
    CHEAP_CALLS,
    COLLECTIVES,
    PALLAS,
    Collective,
    collective_of,
    matmul_flops,
)

# Memory spaces in a layout: the vector memory of a core, and the host's.
VMEM, HOST = "S(1)", "S(5)"
# Calls, and what other cores work off meanwhile.
ASYNC = ("call", "async", "custom-call")
# What moves values ahead of time, or to the host and back.
COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
# What the compiler writes where it could estimate nothing.
UNKNOWN_CYCLES = 2**63 - 1
# Before the kind of what goes between slices.
SLOW = "slices "
FLOATING = ("bf16", "f16", "f32")
# Instructions that take no time of their own.
FREE = (
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "partition-id"),
    *("after-all", "opt-barrier", "optimization-barrier", "domain", "replica-id"),
)
# What moves values and computes none: bytes tell its time better than the estimate of cycles.
MOVES = ("copy", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
# A fusion whose result is its operand, in a layout of another name.
_RENAMES = "output_to_operand_aliasing={{}: (0, {})}"
_BLOCKS = re.compile(r'\\"(\w+)\\": (\d+)')


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction that computes.

    Attributes:
      cycles: the compiler's estimate; None where it gives none.
      flops: of the matmuls in it.
      hbm_bytes: that it reads from and writes to the device's memory.
      source: the operation of the model that it comes from, as the compiler names it.
    """

    cycles: int | None
    flops: float
    hbm_bytes: int
    source: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of a Pallas kernel, for which the compiler has no estimate.

    Attributes:
      name: of the kernel.
      shapes: of its operands that are floating point, in their order.
      blocks: sizes that it was made with, by name.
      hbm_bytes: of its operands and results.
      source: as of an Operation.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    blocks: tuple[tuple[str, int], ...]
    hbm_bytes: int
    source: str


@dataclasses.dataclass(frozen=True)
class Send:
    """The begin of a transfer that goes on beside what follows: a collective, or a copy.

    Attributes:
      key: by which `Wait` names it.
      collective: what is sent between devices; None for a copy from or to the host.
      host_bytes: what is copied from or to the host.
      on_sparse_core: whether other cores than those that compute work on it.
    """

    key: str
    collective: Collective | None
    host_bytes: int = 0
    on_sparse_core: bool = False


@dataclasses.dataclass(frozen=True)
class Wait:
    """The end of a transfer; at once after its begin where nothing runs beside it."""

    key: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """Events that happen so many times."""

    count: int
    body: "tuple[Event, ...]"


Event = Operation | Kernel | Send | Wait | Loop


def read_schedule(text: str, mesh: AnyMesh | None = None) -> tuple[Event, ...]:
    """Return what a compiled TPU program does on each device, in order.

    Args:
      text: of the optimised and scheduled program.
      mesh: names the axes of collectives; its devices in the order they were compiled for.

    Raises:
      ConfigError: a custom call whose time nobody knows.
      ValueError: a loop whose trip count does not follow from the text.
    """
    computations, entry = parse(text)
    return _Reader(computations, mesh).events(entry)


class _Reader:
    def __init__(self, computations: dict[str, Computation], mesh: AnyMesh | None) -> None:
        self._computations, self._mesh = computations, mesh
        self._known: dict[str, tuple[Event, ...]] = {}

    def events(self, name: str) -> tuple[Event, ...]:
        """Return the events of a computation; each is read once."""
        if name not in self._known:
            computation, found = self._computations[name], list[Event]()
            for instruction in computation.values():
                if instruction.opcode not in FREE:
                    found += self._of(instruction, computation)
            self._known[name] = tuple(found)
        return self._known[name]

    def _of(self, instruction: Instruction, around: Computation) -> list[Event]:
        opcode = instruction.opcode
        if opcode == "while":
            times = trip_count(instruction, around, self._computations)
            return [Loop(times, self.events(instruction.called["body"][0]))]
        if opcode == "conditional":
            names = [name for names in instruction.called.values() for name in names]
            branches = sorted((len(self.events(name)), name) for name in names)
            return list(self.events(branches[-1][1]))
        if opcode == "custom-call":
            return self._custom_call(instruction, around)
        base = opcode.removesuffix("-start").removesuffix("-update").removesuffix("-done")
        if base in COLLECTIVES:
            return self._collective(instruction, around)
        if base in ASYNC:
            return self._async(instruction, around)
        if opcode == "fusion":
            return self._fusion(instruction, around)
        if opcode in ("send", "recv", "send-done", "recv-done"):
            return _across_slices(instruction)
        if base != opcode:
            if base not in COPIES:
                raise ConfigError(f"the planner cannot tell the time of {opcode}")
            return _copy(instruction, around)
        return [self._operation(instruction, around)]

    def _collective(self, instruction: Instruction, around: Computation) -> list[Event]:
        opcode, name = instruction.opcode, instruction.name
        if opcode.endswith("-done"):
            return [Wait(instruction.operands[0])]
        send = Send(name, collective_of(instruction, around, self._mesh))
        return [send] if opcode.endswith("-start") else [send, Wait(name)]

    def _async(self, instruction: Instruction, around: Computation) -> list[Event]:
        """Read what another core works off: a collective on a sparse core."""
        if instruction.opcode.endswith("-done"):
            start = around[instruction.operands[0]]
            while start.opcode.endswith("-update"):
                start = around[start.operands[0]]
            return [Wait(start.name)]
        if instruction.opcode.endswith("-update"):
            return []
        if not instruction.called:
            return self._custom_call(instruction, around)
        inner = self.events(next(iter(instruction.called.values()))[0])
        sends = [event for event in inner if isinstance(event, Send)]
        if instruction.opcode == "call" or not sends:
            return list(inner)
        key = instruction.name
        return [dataclasses.replace(send, key=key, on_sparse_core=True) for send in sends]

    def _fusion(self, instruction: Instruction, around: Computation) -> list[Event]:
        """Read a fusion: matmuls, elementwise operations, and steps of collectives among them."""
        inner = self._computations[instruction.called["calls"][0]]
        targets = self._targets(instruction.called["calls"][0])
        own = self._operation(instruction, around)
        for call in inner.values():
            kind = call.opcode
            if kind not in COLLECTIVES:
                continue
            collective = collective_of(call, inner, self._mesh)
            if kind == "all-reduce" and _is_cut(call, inner):
                collective = dataclasses.replace(collective, kind="reduce-scatter")
            chain = re.search(r'chain_id="(\w+)"', call.attributes)
            key = f"chain {chain[1]}" if chain else instruction.name
            if "AsyncCollectiveStart" in targets:
                return [Send(key, collective), own]
            if "AsyncCollectiveDone" in targets:
                return [own, Wait(key)]
            if not chain:
                return [own, Send(key, collective), Wait(key)]
        return [own]

    def _targets(self, name: str) -> frozenset[str]:
        targets = set()
        for instruction in self._computations[name].values():
            if instruction.opcode == "custom-call":
                targets.add(instruction.attribute("custom_call_target").strip('"'))
        return frozenset(targets)

    def _custom_call(self, instruction: Instruction, around: Computation) -> list[Event]:
        target = instruction.attribute("custom_call_target").strip('"')
        if target == PALLAS:
            operands = [around[name].shape for name in instruction.operands]
            return [
                Kernel(
                    name=instruction.name.split(".")[0],
                    shapes=tuple(shape_of(o) for o in operands if o.startswith(FLOATING)),
                    blocks=tuple((k, int(v)) for k, v in _BLOCKS.findall(instruction.attributes)),
                    hbm_bytes=sum(map(num_bytes, [*operands, instruction.shape])),
                    source=_source(instruction),
                )
            ]
        if target.startswith(CHEAP_CALLS):
            return []
        raise ConfigError(
            f"the planner cannot tell the time of a custom call {target}; "
            "take model.attention=flash, chunked or dense"
        )

    def _operation(self, instruction: Instruction, around: Computation) -> Operation:
        moves = instruction.opcode in MOVES
        found = None if moves else _CYCLES.search(instruction.attributes)
        cycles = int(found[1]) if found else None
        return Operation(
            cycles=None if cycles == UNKNOWN_CYCLES else cycles,
            flops=self._flops(instruction, around),
            hbm_bytes=self._hbm_bytes(instruction, around),
            source=_source(instruction),
        )

    def _flops(self, instruction: Instruction, around: Computation) -> float:
        if instruction.opcode in ("dot", "convolution"):
            return matmul_flops(instruction, around)
        names = instruction.called.get("calls", ()) if instruction.opcode == "fusion" else ()
        return sum(
            self._flops(inner, self._computations[name])
            for name in names
            for inner in self._computations[name].values()
        )

    def _hbm_bytes(self, instruction: Instruction, around: Computation) -> int:
        """Return what an instruction moves between the device's memory and its cores."""
        operands = [around[name] for name in instruction.operands if name in around]
        if instruction.opcode != "fusion":
            if instruction.opcode in ("dynamic-slice", "slice", "gather"):
                return 2 * _in_hbm(instruction)
            if instruction.opcode == "dynamic-update-slice":
                return 2 * _in_hbm(operands[1])
            return _in_hbm(instruction) + sum(map(_in_hbm, operands))
        inner = self._computations[instruction.called["calls"][0]]
        total = self._written(root_of(inner), inner) if _in_hbm(instruction) else 0
        parameters = _parameters(inner)
        for number, operand in enumerate(operands):
            if _in_hbm(operand):
                total += self._read(parameters[number], inner)
        return total

    def _read(self, parameter: Instruction, inner: Computation) -> int:
        """Return the bytes that a fusion reads of an operand, of which it may use a slice alone."""
        users = [found for found in inner.values() if parameter.name in found.operands]
        used = sum(self._used(user, parameter.name, inner) for user in users)
        return min(num_bytes(parameter.shape), used)

    def _used(self, user: Instruction, name: str, inner: Computation) -> int:
        """Return the bytes that an instruction of a fusion reads of the value of that name."""
        if user.opcode == "bitcast" or _RENAMES in user.attributes:
            return self._read(user, inner)
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            return num_bytes(user.shape)
        if _passes(user, name):
            return 0
        if user.opcode == "fusion":
            within = self._computations[user.called["calls"][0]]
            return self._read(_parameters(within)[user.operands.index(name)], within)
        return num_bytes(inner[name].shape)

    def _written(self, root: Instruction, inner: Computation) -> int:
        """Return the bytes that a fusion writes: of an updated array the update.

        What a collective in it brings goes past the cores.
        """
        if root.opcode == "tuple":
            return sum(self._written(inner[name], inner) for name in root.operands)
        if root.opcode == "dynamic-update-slice":
            return num_bytes(inner[root.operands[1]].shape)
        if root.opcode == "parameter" or root.opcode in COLLECTIVES:
            return 0
        if root.opcode == "bitcast" and root.operands[0] in inner:
            return self._written(inner[root.operands[0]], inner)
        if root.opcode == "fusion":
            within = self._computations[root.called["calls"][0]]
            return self._written(root_of(within), within)
        return num_bytes(root.shape)


def _source(instruction: Instruction) -> str:
    found = _SOURCE.search(instruction.attributes)
    return found[1] if found else ""


def _in_hbm(instruction: Instruction) -> int:
    """Return the bytes of a value that lies in the device's memory; 0 where it does not."""
    elsewhere = VMEM in instruction.shape or HOST in instruction.shape
    return 0 if elsewhere else num_bytes(instruction.shape)


def _is_cut(call: Instruction, inner: Computation) -> bool:
    """Tell whether a fusion keeps a device's part of a sum alone, and so scatters it."""
    users = [found for found in inner.values() if call.name in found.operands]
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode == "bitcast" and _is_cut(user, inner))
        for user in users
    )


def _parameters(inner: Computation) -> dict[int, Instruction]:
    """Return the parameters of a computation by number."""
    return {int(one.operands[0]): one for one in inner.values() if one.opcode == "parameter"}


def _passes(user: Instruction, name: str) -> bool:
    """Tell whether an instruction hands a value on without reading it."""
    updated = user.opcode == "dynamic-update-slice" and user.operands[0] == name
    return updated or user.opcode == "tuple"


def _copy(instruction: Instruction, around: Computation) -> list[Event]:
    """Read a copy that goes on beside computation: to or from the host, or ahead to a core."""
    if instruction.opcode.endswith("-done"):
        start = around.get(instruction.operands[0])
        return [Wait(instruction.operands[0])] if start and HOST in start.shape else []
    if HOST not in instruction.shape:
        # From memory to vector memory ahead of time; those who use it wait for nothing.
        return []
    # A slice stands beside the array that it is cut from, or put into.
    return [Send(instruction.name, None, host_bytes=min(filter(None, array_bytes(instruction))))]


def array_bytes(instruction: Instruction) -> list[int]:
    """Return the bytes of each array, scalars aside, in the shape of an instruction."""
    arrays = re.findall(r"\b[a-z]\w*\[\d[\d,]*\]", instruction.shape)
    return [num_bytes(array) for array in arrays]


def _across_slices(instruction: Instruction) -> list[Event]:
    """Read what goes over the slow network, through the host: a send and its receive."""
    if instruction.opcode == "recv-done":
        return [Wait(instruction.operands[0])]
    if instruction.opcode != "recv":
        return []
    kind = re.search(r'transfer_type="(\w+)"', instruction.attributes)
    name = kind[1].lower().replace("_", "-") if kind else "collective-permute"
    payload = max(array_bytes(instruction), default=0)
    return [Send(instruction.name, Collective(SLOW + name, (), 0, payload, _source(instruction)))]
