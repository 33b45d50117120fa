"""The libraries that are compared: each makes the networks, plain and with its own weight normalization."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

from experiments.bench.arms import Arm
from experiments.bench.rows import Row


def arms(row: Row, compiled: bool = True) -> dict[str, Callable[[], list[Arm]]]:
    """What each library makes of a row, by its name. `compiled`: with PyTorch's compiler, which takes a minute.

    A library that is not installed is left out.
    """
    from experiments.bench.libraries import equinox, linen, nnx, ours

    found = {"wn_jax": ours.arms, "linen": linen.arms, "nnx": nnx.arms}
    if importlib.util.find_spec("equinox"):
        found["equinox"] = equinox.arms
    if importlib.util.find_spec("equinox") and importlib.util.find_spec("paramax"):
        found["paramax"] = equinox.paramax_arms
    if importlib.util.find_spec("torch"):
        from experiments.bench.libraries import torch

        found["torch"] = torch.arms
        if compiled:
            found["torch compiled"] = torch.compiled_arms
    return {name: functools.partial(make, row) for name, make in found.items()}
