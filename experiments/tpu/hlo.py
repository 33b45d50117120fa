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
    """An array, and the memory that it lies in: 0 is the device's main memory (HBM)."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Without what its layout pads."""
        bits = _OTHER_BITS.get(self.dtype)
        found = _BITS.search(self.dtype)
        return -(-self.size * (int(found[0]) if bits is None and found else bits or 0) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation. `attributes` is the text behind its operands."""

    name: str
    kind: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

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
    """A program: its computations by name, and which of them it begins with."""

    computations: dict[str, Computation]
    entry: str

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs, as the compiler notes it or by the constant that its counter stops at; else None.

        JAX's scans and `fori_loop`s count whole numbers from 0 in steps of 1, and XLA keeps it so.
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
        limit = operands[1].operands[0]
        return int(limit) if limit.isdecimal() and operands[0].results[0].dtype in ("s32", "s64") else None


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` of JAX prints."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}  # type: str, Computation
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header["name"]] = {}
            entry = header["name"] if header["entry"] else entry
            continue
        match = _INSTRUCTION.match(_COMMENT.sub("", line))
        if match:
            inside, behind = _closed(match["rest"])
            operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside))
            current[match["name"]] = Instruction(
                match["name"], match["kind"], arrays(match["shape"]), operands, behind, bool(match["root"])
            )
    return Module(computations, entry)


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape; several where it is a tuple."""
    return tuple(
        Array(
            match["dtype"],
            tuple(int(size) for size in match["shape"].split(",") if size),
            int(space["space"]) if (space := _SPACE.search(match["layout"] or "")) else 0,
        )
        for match in _ARRAY.finditer(shape)
    )


def _closed(rest: str) -> tuple[str, str]:
    """What is inside the parentheses that were opened before, and what comes after."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return rest[:i], rest[i + 1 :]
    return rest, ""


def _split(inside: str) -> list[str]:
    """Operands, between commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(inside):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(inside[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, inside[start:]] if part.strip()]
