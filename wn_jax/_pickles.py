"""Pickles of version 0.1: they name the modules that its classes were in, before the rooms were made.

Each of those names stands for the module where its classes are now, which is imported when a pickle asks for one.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_MOVED = {
    "_conditioning": "curvature._conditioning",
    "_directions": "optim._directions",
    "_estimates": "curvature._estimates",
    "_lanczos": "curvature._lanczos",
    "_natural": "curvature._natural",
    "_nnx_mean_only": "nnx._mean_only",
    "_notes": "_program.notes",
    "_torch_layouts": "torch._layouts",
    "_weight_normed": "nnx._weight_normed",
}


class _Moved(ModuleType):
    """A module of another name."""

    def __init__(self, name: str, now: str) -> None:
        super().__init__(name)
        self._now = now

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # asked by whoever looks through sys.modules, such as doctest
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(self._now), name)


# Importing looks here first, and so does pickle.
for _before, _now in _MOVED.items():
    sys.modules[f"wn_jax.{_before}"] = _Moved(f"wn_jax.{_before}", f"wn_jax.{_now}")
