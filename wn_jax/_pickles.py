"""Pickles of version 0.1: they name the modules that its classes were in, before the rooms were made.

Each of those names stands for the module where its classes are now, which is imported when a pickle asks for one.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_MOVED = {
    "_conditioning": ("curvature._conditioning", {"ConditionNumbers"}),
    "_directions": ("optim._directions", {"ProjectDirectionsState"}),
    "_estimates": ("curvature._estimates", {"Estimate"}),
    "_lanczos": ("curvature._lanczos", {"Eigenvalues", "SpectralDensity"}),
    "_natural": ("curvature._natural", {"NaturalGradient"}),
    "_nnx_mean_only": ("nnx._mean_only", {"MeanOnlyBatchNorm"}),
    "_notes": ("_program.notes", {"Reason"}),
    "_torch_layouts": ("torch._layouts", {"Array"}),
    "_weight_normed": ("nnx._weight_normed", {"WeightNormed"}),
}
"""By the module of version 0.1: the module of today, and the classes of it that pickles may hold."""


class _Moved(ModuleType):
    """A module of version 0.1, with its classes and nothing else."""

    def __init__(self, name: str, now: str, classes: set[str]) -> None:
        super().__init__(name)
        self._now, self._classes = now, classes

    def __getattr__(self, name: str) -> object:
        # Others look through sys.modules and ask for names of their own; nothing may be imported for these.
        if name not in self._classes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(self._now), name)


def _stand_in() -> None:
    """Put the modules where importing looks first, and so pickle."""
    for before, (now, classes) in _MOVED.items():
        sys.modules[f"wn_jax.{before}"] = _Moved(f"wn_jax.{before}", f"wn_jax.{now}", classes)


_stand_in()
