"""The text of a compiled program as data: computations, their instructions, and shapes.

Only what costs time or bytes is read out of it; `program.py` adds that up.
"""

import dataclasses
import math
import re

# An instruction: name, shape (a tuple in parentheses, or no space in it), opcode, the rest.
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)(?= [\w\-]+\()|\S+) ([\w\-]+)\((.*)"
)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
# Types whose names do not begin with their bits.
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: that others refer to it by.
      opcode: as XLA calls it.
      shape: of its result, with types and layouts.
      operands: names of its inputs.
      attributes: all that stands after the operands.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, name: str) -> str:
        """Return the text of an attribute; empty if there is none."""
        # The devices of a mesh are a part of the groups they stand in.
        found = re.search(rf"(?:^|, ){name}=(.*?)(?=, (?!device_ids=)\w+=|$)", self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the computations that it runs, by the attribute that names them."""
        pairs = _CALLED.findall(self.attributes)
        return {key: tuple(re.findall(r"%?([\w.\-]+)", names)) for key, names in pairs}


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations of a program by name, and the name of the one it begins with."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is not None:
            found = _instruction(line)
            if found:
                current[found.name] = found
        elif head := _COMPUTATION.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
    if not found:
        return None
    name, shape, opcode, rest = found.groups()
    end = _closing(rest)
    literal = opcode in ("constant", "parameter")
    operands = () if literal else tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return Instruction(name, opcode, shape, operands, rest[end + 1 :].removeprefix(", "))


def _closing(text: str) -> int:
    """Return where the parenthesis that was open before the text closes."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return len(text)


def shape_of(shape: str) -> tuple[int, ...]:
    """Return the dimensions of an array; those of the first one for a tuple."""
    found = _ARRAY.search(shape)
    assert found, shape
    return tuple(int(size) for size in found[2].split(",") if size)


def num_bytes(shape: str) -> int:
    """Return the bytes of an array, or of all arrays of a tuple."""
    return sum(_bits(kind) * math.prod(_sizes(dims)) for kind, dims in _ARRAY.findall(shape)) // 8


def _sizes(dims: str) -> list[int]:
    return [int(size) for size in dims.split(",") if size]


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    found = re.match(r"[a-z]+(\d+)", kind)
    assert found, kind
    return int(found[1])
