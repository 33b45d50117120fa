"""The libraries that are compared: each makes the networks with its own weight normalization, and plain."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.bench.arms import Arm
from experiments.bench.rows import Row
from experiments.errors import ConfigError
from experiments.schema import unknown


class _Library(NamedTuple):
    """Where the arms of a library come from."""

    needs: tuple[str, ...]
    """The packages that must be installed."""

    module: str
    """The file here."""

    function: str
    """The function in it, `row -> arms`."""


# A plain arm comes before those that are compared with it.
_LIBRARIES = {
    "wn_jax": _Library((), "ours", "arms"),
    "linen": _Library((), "linen", "arms"),
    "nnx": _Library((), "nnx", "arms"),
    "equinox": _Library(("equinox",), "equinox", "arms"),
    "paramax": _Library(("equinox", "paramax"), "equinox", "paramax_arms"),
    "torch": _Library(("torch",), "torch", "arms"),
    "torch compiled": _Library(("torch",), "torch", "compiled_arms"),
}


def choose(names: Sequence[str], quick: bool) -> list[str]:
    """The libraries that are asked for and installed.

    Arguments:
        names: names of libraries. wn_jax comes with them, and with paramax comes equinox, which has the plain network
            that it is compared with. None: all libraries.
        quick: whether to leave out PyTorch's compiler, where no name is given.

    Raises:
        ConfigError: there is no such library.
    """
    for name in names:
        if name not in _LIBRARIES:
            raise ConfigError(unknown("library", name, _LIBRARIES))
    wanted = {"wn_jax", *names} if names else set(_LIBRARIES) - ({"torch compiled"} if quick else set())
    if "paramax" in wanted:
        wanted.add("equinox")
    return [name for name, library in _LIBRARIES.items() if name in wanted and _is_installed(library)]


def arms(row: Row, names: Sequence[str]) -> dict[str, Callable[[], list[Arm]]]:
    """The functions that make each library's arms of a row. No library is imported before its function is called."""
    return {name: functools.partial(_make, _LIBRARIES[name], row) for name in names}


def _is_installed(library: _Library) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in library.needs)


def _make(library: _Library, row: Row) -> list[Arm]:
    module = importlib.import_module(f"{__name__}.{library.module}")
    return getattr(module, library.function)(row)
