"""The libraries that are compared: each makes the networks with its own weight normalization, and plain."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence

from experiments.bench.arms import Arm
from experiments.bench.rows import Row
from experiments.errors import ConfigError
from experiments.schema import unknown

_LIBRARIES = {  # what must be installed, the file here, and its function; a plain arm comes before those against it
    "wn_jax": ((), "ours", "arms"),
    "linen": ((), "linen", "arms"),
    "nnx": ((), "nnx", "arms"),
    "equinox": (("equinox",), "equinox", "arms"),
    "paramax": (("equinox", "paramax"), "equinox", "paramax_arms"),
    "torch": (("torch",), "torch", "arms"),
    "torch compiled": (("torch",), "torch", "compiled_arms"),
}


def choose(names: Sequence[str], quick: bool) -> list[str]:
    """The libraries of these names that are installed, and wn_jax; or all, but if `quick` without PyTorch's compiler.

    With paramax comes equinox, which has the plain network that it is compared with.

    Raises:
        ConfigError: there is no such library.
    """
    for name in names:
        if name not in _LIBRARIES:
            raise ConfigError(unknown("library", name, _LIBRARIES))
    names = [*names, "equinox"] if "paramax" in names else names
    wanted = {"wn_jax", *names} if names else set(_LIBRARIES) - ({"torch compiled"} if quick else set())
    return [name for name in _LIBRARIES if name in wanted and all(map(importlib.util.find_spec, _LIBRARIES[name][0]))]


def arms(row: Row, names: Sequence[str]) -> dict[str, Callable[[], list[Arm]]]:
    """What each library makes of a row, by its name. None is imported before its function is called."""
    return {name: functools.partial(_call, *_LIBRARIES[name][1:], row) for name in names}


def _call(module: str, function: str, row: Row) -> list[Arm]:
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)(row)
