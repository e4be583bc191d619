"""The text of a compiled program as data: computations, their instructions, and shapes.

Only what costs time or bytes is read out of it; `program.py` adds that up.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

# An instruction: name, shape (a tuple in parentheses, or no space in it), opcode, the rest.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)(?= [\w\-]+\()|\S+) ([\w\-]+)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation"
    r"|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
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
      operands: names of its inputs; of a constant its value, of a parameter its number.
      attributes: all that stands after the operands.
      is_root: whether its result is that of the computation.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False

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
    for line in _whole_lines(text):
        if line == "}" or line.startswith("}, execution_thread="):
            current = None
        elif current is not None:
            found = _instruction(line)
            if found:
                current[found.name] = found
        elif head := _COMPUTATION.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
    return computations, entry


def _whole_lines(text: str) -> Iterator[str]:
    """Yield the lines of a program; a Pallas kernel's attributes, which go over several, as one."""
    kept = ""
    for line in text.splitlines():
        kept += line
        if not line.endswith("kernel_metadata={") and not line.startswith('"'):
            yield kept
            kept = ""


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
    if not found:
        return None
    root, name, shape, opcode, rest = found.groups()
    end = _closing(rest)
    literal = opcode in ("constant", "parameter")
    operands = (rest[:end],) if literal else tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    attributes = rest[end + 1 :].removeprefix(", ")
    return Instruction(name, opcode, shape, operands, attributes, bool(root))


def _closing(text: str) -> int:
    """Return where the parenthesis that was open before the text closes."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return len(text)


def root_of(computation: Computation) -> Instruction:
    """Return the instruction whose result is that of the computation."""
    return next(found for found in computation.values() if found.is_root)


def trip_count(loop: Instruction, around: Computation, computations: dict[str, Computation]) -> int:
    """Return how often the body of a `while` runs.

    The compilers for CPUs and GPUs say it. For others it follows from the counter: it begins with a
    constant, is raised by one, and compared with one.

    Args:
      loop: the instruction.
      around: the computation that it stands in.
      computations: all of the program.

    Raises:
      ValueError: it does not follow.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (computations[loop.called[key][0]] for key in ("condition", "body"))
    compared = root_of(condition)
    counter, end = (_source(name, condition) for name in (*compared.operands, "")[:2])
    place = counter.attribute("index") if counter else ""
    first = _source(loop.operands[0], around)
    if place and first and compared.attribute("direction") == "LT":
        start = _source(first.operands[int(place)], around)
        added = _source(root_of(body).operands[int(place)], body)
        steps = [_source(name, body) for name in added.operands] if added else []
        numbers = [_integer(x) for x in (end, start, next(filter(_is_constant, steps), None))]
        if None not in numbers and added and added.opcode == "add":
            return -(-(numbers[0] - numbers[1]) // numbers[2])  # type: ignore[operator]
    raise ValueError(f"the compiler does not tell how often the loop {loop.name} runs")


def _source(name: str, computation: Computation) -> Instruction | None:
    """Return the instruction that made a value, before it was moved about."""
    found = computation.get(name)
    while found and found.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        found = computation.get(found.operands[0])
    return found


def _is_constant(found: Instruction | None) -> bool:
    return found is not None and found.opcode == "constant"


def _integer(found: Instruction | None) -> int | None:
    if found is None or not _is_constant(found) or not found.operands[0].isdigit():
        return None
    return int(found.operands[0])


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
