"""The bytes that a compiled step moves: to and from the chip's memory, and between chips. Loops count every trip."""

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
# Operations that move nothing: names for parts of other arrays, and the ends of what began before.
_NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
_NAMING_CALLS = ("ConcatBitcast", "AssumeGatherIndicesInBound", "AllocateBuffer", "Sharding")
_CYCLES = re.compile(r'"estimated_cycles":"(?P<cycles>\d+)"')
_CHANNEL = re.compile(r"channel_id=\d+")
_SLICES = ("dynamic-slice", "slice", "gather")


class Collective(NamedTuple):
    """All collectives of a kind that a step runs."""

    kind: str
    """The operation."""

    times: int
    """How many of them a step runs."""

    bytes: int
    """The bytes that they give to one chip, all together."""


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
    """The collectives that a step runs, by kind, with the bytes that each chip has of them then.

    On TPU, a collective that runs beside other operations stands in several fusions, under one number. An all-reduce of
    whose result each chip keeps a part is a reduce-scatter.
    """
    count, size, seen = collections.Counter[str](), collections.Counter[str](), set[Any]()
    for lines, line, times in executed(module, fusions=True):
        kind = line.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        number, results = _CHANNEL.search(line.attributes), _given(line)
        if number:
            stage = (number[0], kind, results)
            if stage in seen:
                continue
            seen.add(stage)
        root = _root(lines)
        if kind == "all-reduce" and root.kind == "dynamic-slice" and root.operands[0] == line.name:
            kind, results = "reduce-scatter", root.results
        count[kind] += times
        size[kind] += times * sum(array.bytes for array in results)
    return [Collective(kind, count[kind], size[kind]) for kind in COLLECTIVES if count[kind]]


def _given(line: Instruction) -> tuple[Array, ...]:
    """The arrays that a collective gives."""
    # The start of an asynchronous one gives its operands again before its results, but for an all-reduce's.
    if line.kind.endswith("-start") and line.kind != "all-reduce-start":
        count = len(line.operands)
        return line.results[count : 2 * count]
    return line.results


def memory_bytes(module: Module) -> int:
    """The bytes that a step reads from and writes to the chip's main memory. Memory nearer to its units is free."""
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
    """The bytes that one instruction reads from and writes to main memory."""
    operands = [lines[name].results for name in line.operands if name in lines]
    flat = [array for results in operands for array in results]
    if line.kind in _NAMES or line.kind.endswith(("-done", "-update")):
        return 0
    if line.kind == "custom-call" and any(f'"{name}"' in line.attributes for name in _NAMING_CALLS):
        return 0
    if line.kind == "copy-start":
        return _far(line.results[:2])
    if line.kind == "slice-start":
        whole, part = line.results[:2]
        return part.bytes * sum(array.space == 0 for array in (whole, part))
    if line.kind in _SLICES:  # of what is sliced, only the part is read
        return _far(line.results) + (line.results[0].bytes if flat[0].space == 0 else 0)
    if line.kind == "dynamic-update-slice":  # of what is updated in place, only the part is written
        update = flat[1]
        return _far([update]) + (update.bytes if line.results[0].space == 0 else 0)
    if line.kind == "fusion":
        return _read(module, line, operands) + _written(module, line)
    results = _given(line) if line.kind.removesuffix("-start") in COLLECTIVES else line.results
    return _far(flat) + _far(results)


def _far(arrays: Iterable[Array]) -> int:
    """The bytes of those that lie in main memory."""
    return sum(array.bytes for array in arrays if array.space == 0)


def _read(module: Module, line: Instruction, operands: list[tuple[Array, ...]]) -> int:
    """The bytes that a fusion reads: of an operand that it only slices, the slices."""
    total = 0
    for index, arrays in enumerate(operands):
        slices = _slices(module, *_parameter(module, line, index))
        if slices is None:
            total += _far(arrays)
        elif arrays[0].space == 0:
            total += sum(slices)
    return total


def _parameter(module: Module, fusion: Instruction, index: int) -> tuple[Computation, str]:
    """The computation of a fusion, and the name that an operand has in it."""
    inside = module.computations[fusion.called["calls"]]
    parameters = (own for own in inside.values() if own.kind == "parameter")
    return inside, next(own.name for own in parameters if int(own.operands[0]) == index)


def _slices(module: Module, inside: Computation, name: str) -> list[int] | None:
    """The sizes of the parts that are taken of a value, or None if it is used as a whole."""
    sizes: list[int] = []
    for line in inside.values():
        for index in (i for i, operand in enumerate(line.operands) if operand == name):
            parts = _parts(module, inside, line, index)
            if parts is None:
                return None
            sizes += parts
    return sizes


def _parts(module: Module, inside: Computation, line: Instruction, index: int) -> list[int] | None:
    """The sizes of the parts that an instruction takes of an operand, or None if it uses it as a whole."""
    if line.kind in _SLICES and index == 0:
        return [line.results[0].bytes]
    if line.kind == "dynamic-update-slice" and index == 0:
        return []  # updated in place, and not read
    if line.kind == "bitcast":
        return _slices(module, inside, line.name)
    if line.kind == "fusion":
        return _slices(module, *_parameter(module, line, index))
    return None


def _written(module: Module, fusion: Instruction) -> int:
    """The bytes that a fusion writes: of an array that it updates in place, the update."""
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
    """The instruction whose result is that of the computation."""
    return next(line for line in inside.values() if line.root)
