"""What a compiled step moves: bytes to and from the chip's memory, and between chips; loops count every trip."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from experiments.tpu.hlo import Array, Computation, Instruction, Module

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What moves nothing: names for parts of other arrays, and the ends of what began before.
_NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
_NAMING_CALLS = ("ConcatBitcast", "AssumeGatherIndicesInBound", "AllocateBuffer", "Sharding")
_CYCLES = re.compile(r'"estimated_cycles":"(?P<cycles>\d+)"')
_CHANNEL = re.compile(r"channel_id=\d+")
_SLICES = ("dynamic-slice", "slice", "gather")


class Collective(NamedTuple):
    """A kind of collective: how many of them a step runs, and the bytes that they give to one chip."""

    kind: str
    times: int
    bytes: int


def executed(module: Module, fusions: bool = False) -> Iterator[tuple[Computation, Instruction, int]]:
    """Each instruction that a step runs, how often, and the computation that it is in.

    A fusion is one instruction; with `fusions`, those inside of it follow. Of a branch, all sides count; of a loop
    whose trips are not known, one.
    """
    return _executed(module, module.entry, 1, ("fusion",) if fusions else ())


def _executed(
    module: Module, name: str, times: int, also: tuple[str, ...]
) -> Iterator[tuple[Computation, Instruction, int]]:
    lines = module.computations[name]
    for line in lines.values():
        if line.kind == "while":
            yield from _executed(module, line.called["body"], times * (module.trips(line) or 1), also)
        elif line.kind in ("call", "conditional", "async-start", *also):
            for called in line.called.values():
                yield from _executed(module, called, times, also)
        else:
            yield lines, line, times


def collectives(module: Module) -> list[Collective]:
    """What a step sends between chips, by kind, and what each chip has of it then.

    On TPU, a collective that runs beside other operations stands in several fusions, under one number. An all-reduce of
    whose result each chip keeps a part is a reduce-scatter.
    """
    count, size, seen = collections.Counter[str](), collections.Counter[str](), set[Any]()
    for lines, line, times in executed(module, fusions=True):
        kind = line.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        number, results = _CHANNEL.search(line.attributes), _given(line)
        if number and (stage := (number[0], kind, results)) in seen:
            continue
        if number:
            seen.add(stage)
        root = next(own for own in lines.values() if own.root)
        if kind == "all-reduce" and root.kind == "dynamic-slice" and root.operands[0] == line.name:
            kind, results = "reduce-scatter", root.results
        count[kind] += times
        size[kind] += times * sum(array.bytes for array in results)
    return [Collective(kind, count[kind], size[kind]) for kind in COLLECTIVES if count[kind]]


def _given(line: Instruction) -> tuple[Array, ...]:
    """What a collective gives. The start of an asynchronous one names its operands first, but for an all-reduce's."""
    both = line.kind.endswith("-start") and line.kind != "all-reduce-start"
    return line.results[len(line.operands) : 2 * len(line.operands)] if both else line.results


def memory_bytes(module: Module) -> int:
    """The bytes that a step reads from and writes to the chip's main memory. What stays nearer to its units is free."""
    return sum(times * _moved(module, lines, line) for lines, line, times in executed(module))


def unknown_loops(module: Module) -> int:
    """How many loops count once, as their trips are not known."""
    loops = (line for lines in module.computations.values() for line in lines.values() if line.kind == "while")
    return sum(module.trips(loop) is None for loop in loops)


def cycles(module: Module) -> int:
    """The cycles that the compiler expects of a step, operation by operation; 0 where it does not say."""
    estimates = ((_CYCLES.search(line.attributes), times) for _, line, times in executed(module))
    return sum(times * int(found["cycles"]) for found, times in estimates if found)


def _moved(module: Module, lines: Computation, line: Instruction) -> int:
    operands = [lines[name].results for name in line.operands if name in lines]
    flat = [array for results in operands for array in results]
    if line.kind in _NAMES or line.kind.endswith(("-done", "-update")):
        return 0
    if line.kind == "custom-call" and any(f'"{name}"' in line.attributes for name in _NAMING_CALLS):
        return 0
    if line.kind == "copy-start":
        return _far(line.results[:2])
    if line.kind == "slice-start":
        part = line.results[1]
        return part.bytes * sum(array.space == 0 for array in (line.results[0], part))
    if line.kind in _SLICES:
        return _far(line.results) + (line.results[0].bytes if flat[0].space == 0 else 0)
    if line.kind == "dynamic-update-slice":
        return _far(flat[1:2]) + (flat[1].bytes if line.results[0].space == 0 else 0)
    if line.kind == "fusion":
        return _read(module, line, operands) + _written(module, line)
    results = _given(line) if line.kind.removesuffix("-start") in COLLECTIVES else line.results
    return _far(flat) + _far(results)


def _far(arrays: Iterable[Array]) -> int:
    """The bytes of those that lie in main memory."""
    return sum(array.bytes for array in arrays if array.space == 0)


def _read(module: Module, line: Instruction, operands: list[tuple[Array, ...]]) -> int:
    """What a fusion reads: of an operand that it only slices, the slices."""
    total = 0
    for index, arrays in enumerate(operands):
        slices = _slices(module, *_parameter(module, line, index))
        total += _far(arrays) if slices is None else sum(slices) if arrays[0].space == 0 else 0
    return total


def _parameter(module: Module, fusion: Instruction, index: int) -> tuple[Computation, str]:
    """What an operand of a fusion is inside of it."""
    inside = module.computations[fusion.called["calls"]]
    parameters = (own for own in inside.values() if own.kind == "parameter")
    return inside, next(own.name for own in parameters if int(own.operands[0]) == index)


def _slices(module: Module, inside: Computation, name: str) -> list[int] | None:
    """The sizes of the parts that are taken of a value, or None if it is used as a whole."""
    sizes: list[int] = []
    for line in inside.values():
        for index in (i for i, operand in enumerate(line.operands) if operand == name):
            part: list[int] | None = None
            if line.kind in _SLICES and index == 0:
                part = [line.results[0].bytes]
            elif line.kind == "dynamic-update-slice" and index == 0:
                part = []  # updated in place, and not read
            elif line.kind == "bitcast":
                part = _slices(module, inside, line.name)
            elif line.kind == "fusion":
                part = _slices(module, *_parameter(module, line, index))
            if part is None:
                return None
            sizes += part
    return sizes


def _written(module: Module, fusion: Instruction) -> int:
    """What a fusion writes: of an array that it updates in place, the update."""
    inside = module.computations[fusion.called["calls"]]
    root = _root(inside)
    if len(fusion.results) > 1 and root.kind != "tuple":
        return _far(fusion.results)
    values = [inside[name] for name in root.operands] if root.kind == "tuple" else [root]
    updates = [_update(module, inside, value) for value in values]
    pairs = zip(updates, fusion.results, strict=True)
    return sum(array.bytes if update is None else update for update, array in pairs if array.space == 0)


def _update(module: Module, inside: Computation, value: Instruction) -> int | None:
    """The size of the part of an array that is updated in place, or None if it is written as a whole."""
    if value.kind == "bitcast":
        return _update(module, inside, inside[value.operands[0]])
    if value.kind == "fusion" and len(value.results) == 1:
        called = module.computations[value.called["calls"]]
        return _update(module, called, _root(called))
    return inside[value.operands[1]].results[0].bytes if value.kind == "dynamic-update-slice" else None


def _root(inside: Computation) -> Instruction:
    return next(line for line in inside.values() if line.root)
