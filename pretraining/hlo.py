"""What a compiled program holds, read from its text: XLA's HLO after all optimisation.

`compiled.as_text()` of a jitted function is one module of computations, each a list of
instructions `%name = shape opcode(%operands), attributes`. Shapes are those of one device.
"""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Array(NamedTuple):
    """One array of a result."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Without the padding of the device's tiles."""
        return self.elements * _bits(self.dtype) / 8


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: without "%".
      arrays: the result; a tuple's are flattened.
      opcode: e.g. "fusion".
      operands: names of instructions of the same computation.
      literal: the value of a constant or the number of a parameter, as written.
      attributes: all that follows the operands, as written.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str


class Module(NamedTuple):
    """A program: {computation: {instruction's name: Instruction}}, and where it begins."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Traffic(NamedTuple):
    """How often a kind of collective runs, and the bytes it moves, both per device and step."""

    count: int
    bytes: float


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry, current = {}, None, {}
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    shape, rest = _balanced(line[match.end() :])
    opcode, rest = rest.lstrip().split("(", 1)
    operands, attributes = _balanced("(" + rest)
    names = tuple(re.findall(r"%([\w.\-]+)", operands))
    return Instruction(match[1], _arrays(shape), opcode, names, operands[1:-1], attributes)


def _balanced(text: str) -> tuple[str, str]:
    """Splits after the parenthesis that closes a leading one, else at the first space."""
    if not text.startswith("("):
        first, _, rest = text.partition(" ")
        return first, rest
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    raise ValueError(f"unbalanced parentheses: {text[:80]!r}")


def _arrays(shape: str) -> tuple[Array, ...]:
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape)
    return tuple(
        Array(dtype, tuple(int(size) for size in re.findall(r"\d+", sizes)))
        for dtype, sizes in found
    )


def _bits(dtype: str) -> int:
    """Of one element: f8e4m3fn has 8, pred a whole byte, a token nothing."""
    if dtype == "pred":
        return 8
    size = re.match(r"[a-z]+(\d+)", dtype)
    return int(size[1]) if size else 0


def buffers(module: Module) -> Iterator[tuple[Array, Instruction]]:
    """Every array that an instruction may have to itself in memory, loop bodies included.

    What is computed inside a fusion stays in registers, and the bodies of reductions and sorts work
    on scalars.
    """
    inside = {
        name
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode not in ("while", "conditional", "call")
        for name in _called(instruction)
    }
    for name, computation in module.computations.items():
        if name not in inside:
            for instruction in computation.values():
                yield from ((array, instruction) for array in instruction.arrays)


def collectives(module: Module) -> dict[str, Traffic]:
    """{kind: Traffic} of one execution of the module, per device; loops as often as they run.

    Bytes are those of the larger of what one device gives and what it gets: the whole of an
    all-gather's result, the whole of a reduce-scatter's operand. A ring moves about so many over
    each device's links, for an all-reduce twice as many. A collective that is split into a start
    and a done, or into several fusions that share a channel, counts once. A loop whose length the
    text does not tell counts once; a conditional counts as the branch that moves most bytes.
    """
    found: dict[str, Traffic] = {}
    for kind, times, bytes in _communication(module, module.entry, 1):
        old = found.get(kind, Traffic(0, 0.0))
        found[kind] = Traffic(old.count + times, old.bytes + times * bytes)
    return dict(sorted(found.items()))


def _communication(module, name, times) -> Iterator[tuple[str, int, float]]:
    """(kind, times, bytes) of the collectives of a computation that runs `times` times."""
    seen = set()
    for owner, instruction in _flat(module, name):
        if instruction.opcode in ("while", "conditional", "call"):
            repeats = trip_count(module, instruction) if instruction.opcode == "while" else 1
            inner = [
                list(_communication(module, called, times * repeats))
                for called in _called(instruction)
            ]
            if instruction.opcode == "conditional":
                inner = [max(inner, key=lambda found: sum(n * bytes for _, n, bytes in found))]
            yield from itertools.chain.from_iterable(inner)
        elif kind := _kind(owner, instruction):
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            place = channel[1] if channel else (owner, instruction.name)
            if place not in seen:
                seen.add(place)
                yield kind, times, _moved(module.computations[owner], instruction)


def _kind(owner: str, instruction: Instruction) -> str | None:
    """One of COLLECTIVES, or None."""
    kind = instruction.opcode.removesuffix("-start")
    # On TPU a reduce-scatter is a fusion of this name: an all-reduce, of which a slice is taken.
    if kind == "all-reduce" and owner.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return kind if kind in COLLECTIVES else None


def _flat(module, name) -> Iterator[tuple[str, Instruction]]:
    """(computation, instruction), with those of fusions and of wrapped asynchronous calls."""
    for instruction in module.computations[name].values():
        yield name, instruction
        if instruction.opcode in ("fusion", "async-start"):
            for inner in _called(instruction):
                yield from _flat(module, inner)


def _moved(computation, instruction) -> float:
    given = sum(
        array.bytes
        for operand in instruction.operands
        if operand in computation
        for array in computation[operand].arrays
    )
    got = sum(array.bytes for array in instruction.arrays)
    if instruction.opcode.endswith("-start") and got > given:
        got -= given  # its result holds the operands too
    return max(given, got)


def trip_count(module: Module, loop: Instruction) -> int:
    """How often the body of a while instruction runs; 1 where the text does not tell.

    It is written beside the loop, or is the one number that the condition holds a counter, which
    JAX starts at 0, against.
    """
    written = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if written:
        return int(written[1])
    (name,) = re.findall(r"condition=%?([\w.\-]+)", loop.attributes)
    condition = [instruction for _, instruction in _flat(module, name)]
    less = [i for i in condition if i.opcode == "compare" and "direction=LT" in i.attributes]
    bounds = [i for i in condition if i.opcode == "constant" and i.literal.isdigit()]
    return int(bounds[0].literal) if len(less) == len(bounds) == 1 else 1


def _called(instruction: Instruction) -> list[str]:
    """The names of the computations that an instruction runs."""
    kinds = "calls|to_apply|condition|body|branch_computations|true_computation|false_computation"
    written = re.findall(rf"\b(?:{kinds})=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
    return re.findall(r"[\w.\-]+", " ".join(written))
