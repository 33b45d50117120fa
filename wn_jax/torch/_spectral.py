"""Spectral norms in a state dict, folded: the weight that PyTorch computes from them in evaluation.

`torch.nn.utils.spectral_norm` (old) keeps `weight_orig`, `weight_u` and `weight_v`, and
`torch.nn.utils.parametrizations.spectral_norm` (new) `parametrizations.weight.original`, `.0._u` and `.0._v`. Both
compute `weight / sigma` with `sigma = u . (W v)`, where `W` is the weight as a matrix: one axis (`dim`) against the
others.

This file owns these names, and the folding. The halves of a weight norm are `_pairs`'s.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np

from wn_jax.torch._pairs import Dims

_MODULE, _WEIGHT = r"(?P<module>(?:.+\.)?)", r"(?P<weight>[^.]+)"
_NEW = re.compile(rf"{_MODULE}parametrizations\.{_WEIGHT}\.original", re.DOTALL)
_OLD = re.compile(rf"{_MODULE}{_WEIGHT}_orig", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class SpectralNorm:
    """The names of the arrays of one spectral norm."""

    weight: str
    """The weight's name in a model without it."""
    original: str
    """The weight that is trained."""
    u: str
    """The left singular vector of power iteration."""
    v: str
    """The right one."""


def find_spectral_norms(names: Collection[str], complete: bool = False) -> list[SpectralNorm]:
    """The spectral norms among names, all of whose arrays are there.

    Arguments:
        names: the names of a state dict.
        complete: whether one without its `u` or its `v` is an error, as it could not be folded.

    Raises:
        ValueError: one is to be complete, and is not.
    """
    found = []
    for name in names:
        if match := _NEW.fullmatch(name):
            first = f"{name.removesuffix('original')}0."
            found.append(SpectralNorm(match["module"] + match["weight"], name, f"{first}_u", f"{first}_v"))
        elif match := _OLD.fullmatch(name):
            weight = match["module"] + match["weight"]
            found.append(SpectralNorm(weight, name, f"{weight}_u", f"{weight}_v"))
    found = [norm for norm in found if norm.u in names or norm.v in names]
    halves = [norm for norm in found if not (norm.u in names and norm.v in names)]
    if halves and complete:
        missing = halves[0].v if halves[0].u in names else halves[0].u
        raise ValueError(
            f"{halves[0].original!r} is under a spectral norm whose {missing!r} is missing; load it into the PyTorch "
            "model, which knows what early versions of PyTorch saved, and take that model's state dict"
        )
    return [norm for norm in found if norm not in halves and not _has_more(norm, names)]


def folded(
    arrays: Mapping[str, np.ndarray], norms: Collection[SpectralNorm], dim: Dims | None
) -> dict[str, np.ndarray]:
    """The arrays, with one weight in the place of each spectral norm's.

    Raises:
        ValueError: a weight is there twice, or its arrays do not fit each other; several `dim`s fit; sigma is 0.
    """
    result = dict(arrays)
    for norm in norms:
        for name in (norm.original, norm.u, norm.v):
            del result[name]
        if norm.weight in result:
            raise ValueError(
                f"{norm.weight!r} is in the state dict, and so is {norm.original!r}; leave out one of them"
            )
        result[norm.weight] = _weight(norm, arrays, dim)
    return result


def _has_more(norm: SpectralNorm, names: Collection[str]) -> bool:
    """Whether other parametrizations stand on top of a spectral norm."""
    if not norm.original.endswith(".original"):
        return False
    return sum(name.startswith(norm.original.removesuffix("original")) for name in names) > 3


def _weight(norm: SpectralNorm, arrays: Mapping[str, np.ndarray], dim: Dims | None) -> np.ndarray:
    """The weight that PyTorch computes in evaluation, where power iteration rests."""
    weight, u, v = (arrays[name] for name in (norm.original, norm.u, norm.v))
    if not all(jnp.issubdtype(x.dtype, jnp.floating) and np.isfinite(x).all() for x in (weight, u, v)):
        raise ValueError(f"{norm.original!r}, or its u or v, is no array of finite floating-point numbers")
    axis = _dim(norm, weight, u, v, dim)
    wide = np.float64 if weight.dtype == np.float64 else np.float32
    matrix = np.moveaxis(weight.astype(wide), axis, 0).reshape(weight.shape[axis], -1)
    sigma = u.astype(wide) @ (matrix @ v.astype(wide))
    if sigma == 0:
        raise ValueError(f"the spectral norm of {norm.weight!r} is 0, so PyTorch's weight is no number")
    return (weight.astype(wide) / sigma).astype(weight.dtype)


def _dim(norm: SpectralNorm, weight: np.ndarray, u: np.ndarray, v: np.ndarray, dim: Dims | None) -> int:
    """The axis of a weight that makes the rows of its matrix. Nothing but the sizes of `u` and `v` tells."""
    sizes = [(size, weight.size // size if size else 0) for size in weight.shape]
    found = [axis for axis, size in enumerate(sizes) if size == (u.size, v.size)]
    about = f"u of shape {u.shape} and v of shape {v.shape}, of {norm.original!r} of shape {weight.shape},"
    if not found:
        raise ValueError(f"{about} fit no dim")
    given = dim.get(norm.weight) if isinstance(dim, Mapping) else dim if len(found) > 1 else None
    if given is None and len(found) > 1 and weight.shape[found[0]] > 1:
        raise ValueError(
            f"{about} fit each dim of {found}, with another weight for each. PyTorch takes 0, and 1 for transposed "
            f"convolutions; say which: dim={{{norm.weight!r}: {found[0]}}}, or dim={found[0]} for all that are open"
        )
    if given is not None and given not in found:
        raise ValueError(f"{about} fit dim {' or '.join(map(str, found))}, and not the given {given}")
    return found[0] if given is None else given
