"""The libraries that are compared: each makes the networks with its own weight normalization, and plain."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

from experiments.bench.arms import Arm
from experiments.bench.rows import Row

_LIBRARIES = {  # what must be installed, the file here, and its function; a plain arm comes before those against it
    "wn_jax": ((), "ours", "arms"),
    "linen": ((), "linen", "arms"),
    "nnx": ((), "nnx", "arms"),
    "equinox": (("equinox",), "equinox", "arms"),
    "paramax": (("equinox", "paramax"), "equinox", "paramax_arms"),
    "torch": (("torch",), "torch", "arms"),
    "torch compiled": (("torch",), "torch", "compiled_arms"),
}


def arms(row: Row, compiled: bool = True) -> dict[str, Callable[[], list[Arm]]]:
    """What each library makes of a row, by its name. `compiled`: with PyTorch's compiler, which takes a minute.

    A library that is not installed is left out, and no library is imported before its function is called.
    """
    found = dict[str, Callable[[], list[Arm]]]()
    for name, (needed, module, function) in _LIBRARIES.items():
        if all(map(importlib.util.find_spec, needed)) and (compiled or name != "torch compiled"):
            found[name] = functools.partial(_call, module, function, row)
    return found


def _call(module: str, function: str, row: Row) -> list[Arm]:
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)(row)
