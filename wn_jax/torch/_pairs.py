"""Which arrays of a state dict are the halves of one weight, and over which axes its norm runs.

This file owns both schemes of names: `x_g` and `x_v` (old), `parametrizations.x.original0` and `original1` (new).
Whole state dicts are `_state_dict`'s.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from wn_jax._node import WeightNorm
from wn_jax._types import Shape

Dims: TypeAlias = int | Mapping[str, int]
"""PyTorch's `dim` of weights for which shapes leave it open: one for all, or by the weight's name."""

Scheme: TypeAlias = Literal["new", "old"]
"""`torch.nn.utils.parametrizations.weight_norm`, or `torch.nn.utils.weight_norm`."""

_NEW = re.compile(r"(?P<module>(?:.+\.)?)parametrizations\.(?P<weight>[^.]+)\.original(?P<half>[01])", re.DOTALL)
_OLD = re.compile(r"(?P<module>(?:.+\.)?)(?P<weight>[^.]+)_(?P<half>[gv])", re.DOTALL)


def half_names(weight: str, scheme: Scheme) -> tuple[str, str]:
    """The names of `g` and `v` of a weight."""
    if scheme == "old":
        return f"{weight}_g", f"{weight}_v"
    if scheme == "new":
        module, dot, name = weight.rpartition(".")
        prefix = f"{module}{dot}parametrizations.{name}.original"
        return f"{prefix}0", f"{prefix}1"
    raise ValueError(f"scheme is 'new' or 'old', or a function that returns one of them; got {scheme!r}")


@dataclasses.dataclass
class Pair:
    """The names of the halves of a weight, and its own."""

    weight: str
    """The weight's name in a model without weight normalization."""
    g: str = ""
    """The name of the array of magnitudes; empty where it was not found."""
    v: str = ""
    """The name of the array of directions; empty where it was not found."""


def find_pairs(names: Collection[str], plain: Collection[str]) -> dict[str, Pair]:
    """The pairs among names, by their weights; those of `plain` are none.

    Raises:
        ValueError: a pair is incomplete, or there twice; a name of `plain` has no halves.
    """
    new, old = _candidates(_NEW, names), _candidates(_OLD, names)
    check_known(plain, {*new, *old})
    # Of a parametrization there may be more than two arrays: another kind, or one on top of weight normalization.
    new = {weight: pair for weight, pair in new.items() if weight not in plain and not _has_more(pair, names)}
    old = {weight: pair for weight, pair in old.items() if weight not in plain and _is_meant(pair, names)}
    for pair in [*new.values(), *old.values()]:
        if not (pair.g and pair.v):
            there, missing = (pair.v, "g") if pair.v else (pair.g, "v")
            raise ValueError(f"{there!r} is half of a weight whose {missing} is missing; complete it{_or_plain(pair)}")
    if twice := sorted({*new} & {*old}):
        raise ValueError(
            f"{twice[0]!r} is there twice: as {old[twice[0]].g!r} and as {new[twice[0]].g!r}; leave out one of them"
        )
    return new | old


def check_known(given: Collection[str], weights: Collection[str]) -> None:
    """Raises where an argument speaks of a weight that has no halves."""
    if isinstance(given, str):
        raise TypeError(f"expected a collection of names, such as [{given!r}]; got the string {given!r}")
    if unknown := [name for name in given if name not in weights]:
        raise ValueError(
            f"{unknown[0]!r} is no weight with halves in the state dict; those are "
            f"{', '.join(map(repr, sorted(weights)[:8])) or 'none'}{', ...' if len(weights) > 8 else ''}"
        )


def node_of(pair: Pair, g: np.ndarray, v: np.ndarray, dim: Dims | None) -> WeightNorm:
    """The node of a pair.

    Raises:
        ValueError: a half has a wrong dtype, or numbers that are none; the shape of `g` fits no axis, or several.
    """
    _check_numbers(pair, g, v)
    if g.shape == () and v.ndim:  # a norm over the whole tensor: PyTorch's dim=None and dim=-1
        if isinstance(dim, Mapping) and pair.weight in dim:
            raise ValueError(
                f"{pair.g!r} is one number, for a norm over all of {pair.v!r}, and for no dim; leave it out"
            )
        return WeightNorm(g.reshape((1,) * v.ndim), v, tuple(range(-v.ndim, 0)))
    kept = _dim(pair, g.shape, v.shape, dim)
    return WeightNorm(g, v, tuple(axis - v.ndim for axis in range(v.ndim) if axis != kept))


def _check_numbers(pair: Pair, g: np.ndarray, v: np.ndarray) -> None:
    """Raises where the halves are not finite floating-point arrays of one dtype."""
    for name, half in ((pair.g, g), (pair.v, v)):
        if not jnp.issubdtype(half.dtype, jnp.floating):
            raise ValueError(
                f"{name!r} is {half.dtype}, but the halves of a weight are real floating-point arrays; cast it"
                + _or_plain(pair)
            )
        if not np.isfinite(half).all():
            raise ValueError(f"{name!r} has NaN or infinity in it: the model diverged before it was saved")
    if g.dtype != v.dtype:
        raise ValueError(
            f"{pair.g!r} is {g.dtype} and {pair.v!r} {v.dtype}, but PyTorch keeps both in one dtype; cast one of them"
        )


def _candidates(pattern: re.Pattern[str], names: Collection[str]) -> dict[str, Pair]:
    """Possible pairs in one scheme, by their weights; of some only one half is there."""
    pairs: dict[str, Pair] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            weight = match["module"] + match["weight"]
            pair = pairs.setdefault(weight, Pair(weight))
            if match["half"] in "0g":
                pair.g = name
            else:
                pair.v = name
    return pairs


def _has_more(pair: Pair, names: Collection[str]) -> bool:
    """Whether the parametrization has more arrays than the halves."""
    prefix = half_names(pair.weight, "new")[0].removesuffix("original0")
    return sum(name.startswith(prefix) for name in names) > bool(pair.g) + bool(pair.v)


def _is_meant(pair: Pair, names: Collection[str]) -> bool:
    """Whether names in the old scheme are halves of a weight. Many others end in _g or _v.

    A lone one is suspicious only where it says that it is a weight, and not where that is under PyTorch's spectral
    norm, which keeps `weight_orig`, `weight_u` and `weight_v`.
    """
    complete = bool(pair.g and pair.v)
    return complete or ("weight" in pair.weight.rsplit(".", 1)[-1] and f"{pair.weight}_orig" not in names)


def _or_plain(pair: Pair) -> str:
    return f", or, if it is none, take what there is as plain arrays: plain=[{pair.weight!r}]"


def _dim(pair: Pair, g: Shape, v: Shape, dim: Dims | None) -> int:
    """The axis of a weight that `g` is for."""
    possible = [(1,) * i + (size,) + (1,) * (len(v) - i - 1) for i, size in enumerate(v)]
    if len(v) < 2:
        possible = []  # no axis would be left to run a norm over
    found = [axis for axis, shape in enumerate(possible) if shape == g]
    about = f"{pair.g!r} of shape {g}, for {pair.v!r} of shape {v},"
    if not found:
        shapes = f"a norm has {', '.join(map(str, possible))}{' or ' if possible else ''}()"
        raise ValueError(f"{about} fits no dim: {shapes}; mend it{_or_plain(pair)}")
    given = dim.get(pair.weight) if isinstance(dim, Mapping) else dim if len(found) > 1 else None
    if given is not None and given not in found:
        raise ValueError(f"{about} fits dim {' or '.join(map(str, found))}, and not the given {given}")
    # Several fit only where each has the size 1, and then the norm is one over everything, whichever is meant.
    return found[0] if given is None else given
