"""A compiled program, read from XLA's text: its computations, and their instructions.

Only what is printed for every backend is relied on. See https://openxla.org/xla/hlo_dumps for the notation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<kind>[a-z][a-z0-9\-]*)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\](?P<layout>\{[^}]*\})?")
_SPACE = re.compile(r"S\((?P<space>\d+)\)")
_CALLED = re.compile(r"(?P<role>calls|body|condition|to_apply|true_computation|false_computation)=%?(?P<name>[\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(?P<names>[^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(?P<trips>\d+)"\}')
_COMMENT = re.compile(r"/\*.*?\*/")
_BITS = re.compile(r"\d+")
_OTHER_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program."""

    dtype: str
    """The dtype by XLA's name, such as "bf16"."""

    shape: tuple[int, ...]
    """The shape."""

    space: int
    """The number of the memory that it lies in; 0 is the device's main memory (HBM)."""

    @property
    def size(self) -> int:
        """The count of numbers in it."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The bytes that it takes, without what its layout pads."""
        return -(-self.size * _bits(self.dtype) // 8)  # rounded up: several small numbers share a byte


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    """The name of its result."""

    kind: str
    """The operation, such as "fusion"."""

    results: tuple[Array, ...]
    """The arrays that it gives; several where the result is a tuple."""

    operands: tuple[str, ...]
    """The names of its operands; of a parameter its number, and of a constant its value."""

    attributes: str
    """The text behind its operands."""

    root: bool
    """Whether its result is that of the computation."""

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """The computations that it calls, by their role."""
        found = {match["role"]: match["name"] for match in _CALLED.finditer(self.attributes)}
        branches = _BRANCHES.search(self.attributes)
        names = branches["names"].replace("%", "").split(", ") if branches else []
        return {**found, **{f"branch {i}": name for i, name in enumerate(names)}}


Computation = dict[str, Instruction]
"""Instructions by name, in their order."""


@dataclasses.dataclass(frozen=True)
class Module:
    """A program."""

    computations: dict[str, Computation]
    """Its computations by name."""

    entry: str
    """The name of the computation that it begins with."""

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs, or None where that is not known.

        It is as the compiler notes it, or else the constant that the loop's counter stops at: JAX's scans and
        `fori_loop`s count whole numbers from 0 in steps of 1, and XLA keeps it so.
        """
        noted = _TRIPS.search(loop.attributes)
        if noted:
            return int(noted["trips"])

        condition = self.computations[loop.called["condition"]]
        root = next(line for line in condition.values() if line.root)
        operands = [condition[name] for name in root.operands if name in condition]
        if root.kind != "compare" or "direction=LT" not in root.attributes:
            return None
        if [operand.kind for operand in operands] != ["get-tuple-element", "constant"]:
            return None
        counter, limit = operands[0].results[0], operands[1].operands[0]
        is_whole = limit.isdecimal() and counter.dtype in ("s32", "s64")
        return int(limit) if is_whole else None


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` of JAX prints."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header["name"]] = {}
            entry = header["name"] if header["entry"] else entry
            continue
        match = _INSTRUCTION.match(_COMMENT.sub("", line))
        if match:
            current[match["name"]] = _instruction(match)
    return Module(computations, entry)


def _instruction(match: re.Match[str]) -> Instruction:
    """The instruction of a line."""
    inside, behind = _closed(match["rest"])
    return Instruction(
        name=match["name"],
        kind=match["kind"],
        results=arrays(match["shape"]),
        # An operand is printed with or without its type; its name is the last word.
        operands=tuple(part.split()[-1].lstrip("%") for part in _split(inside)),
        attributes=behind,
        root=bool(match["root"]),
    )


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as it is printed; several where it is a tuple."""
    return tuple(map(_array, _ARRAY.finditer(shape)))


def _array(match: re.Match[str]) -> Array:
    sizes = tuple(int(size) for size in match["shape"].split(",") if size)
    space = _SPACE.search(match["layout"] or "")
    return Array(match["dtype"], sizes, int(space["space"]) if space else 0)


def _bits(dtype: str) -> int:
    """The bits of a number, which are in the name of most dtypes; 0 where nothing is known."""
    if dtype in _OTHER_BITS:
        return _OTHER_BITS[dtype]
    found = _BITS.search(dtype)
    return int(found[0]) if found else 0


def _closed(rest: str) -> tuple[str, str]:
    """The text inside of the parentheses that were opened before, and the text after them."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return rest[:i], rest[i + 1 :]
    return rest, ""


def _split(inside: str) -> list[str]:
    """The operands, which are between commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(inside):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(inside[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, inside[start:]] if part.strip()]
