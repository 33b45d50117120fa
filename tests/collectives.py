"""The collectives of a compiled program, read from its HLO."""

import collections
import math
import re

_OPERATION = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast)(-start)?\("
)
_ARRAY = re.compile(r"(?P<dtype>\w+)\[(?P<shape>[\d,]*)\]")


def collectives(hlo):
    """How often each is there, by kind and number of elements. One instruction may be several of them combined."""
    return collections.Counter(
        (operation["kind"], math.prod(int(size) for size in array["shape"].split(",") if size))
        for operation in _OPERATION.finditer(hlo)
        for array in _ARRAY.finditer(operation["result"])
    )
