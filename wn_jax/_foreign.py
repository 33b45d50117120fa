"""Weight norms of other libraries in a model: how they are told, and what makes nodes of them.

None of these libraries is imported, as who has such a model has imported its library. This file owns the telling; the
conversions are `linen`'s, `nnx`'s and `equinox`'s.
"""

from __future__ import annotations

import dataclasses

import jax

from wn_jax._boxes import is_box
from wn_jax._node import is_node
from wn_jax._tree import leaf_path, listed
from wn_jax._types import KeyPath, Leaf, Params


@dataclasses.dataclass(frozen=True)
class Library:
    """A library with a weight norm of its own."""

    weight_norm: str
    """The name of its class."""
    remedy: str
    """The call that makes nodes of it."""

    def hint(self, paths: list[str]) -> str:
        """A sentence that leads from the first to the second."""
        return f"The model already holds {self.weight_norm}, at {listed(paths)}: {self.remedy} makes nodes of it."


EQUINOX = Library("equinox.nn.WeightNorm", "wn_jax.equinox.from_weight_norm(model)")
PARAMAX = Library("paramax.WeightNormalization", "wn_jax.equinox.from_weight_norm(model)")
LINEN = Library("flax.linen.WeightNorm", "wn_jax.linen.from_weight_norm(params)")
NNX = Library("flax.nnx.WeightNorm", "wn_jax.nnx.from_weight_norm(model)")


def is_a(x: Leaf, library: Library) -> bool:
    """Whether `x` is a weight norm of this library, or of a class that is made of it."""
    package, *_, name = library.weight_norm.split(".")
    return any(cls.__name__ == name and cls.__module__.partition(".")[0] == package for cls in type(x).__mro__)


def is_weight_norm(x: Leaf) -> bool:
    """Whether `x` is a module that keeps a weight in two halves: of Equinox or paramax."""
    return is_a(x, EQUINOX) or is_a(x, PARAMAX)


def hints(params: Params) -> tuple[str, ...]:
    """A sentence for each library whose weight norms are in the tree."""
    found: dict[Library, list[str]] = {}
    for keys, leaf in jax.tree.leaves_with_path(params, is_leaf=_is_whole):
        if place := _place(keys, leaf):
            library, path = place
            found.setdefault(library, []).append(path)
    return tuple(library.hint(paths) for library, paths in found.items())


def _is_whole(x: Leaf) -> bool:
    return is_node(x) or is_box(x) or is_weight_norm(x)


def _place(keys: KeyPath, leaf: Leaf) -> tuple[Library, str] | None:
    """The library and the place of the weight norm that a leaf is, or of the one in Flax whose scale it is."""
    if of_a_class := next((library for library in (EQUINOX, PARAMAX) if is_a(leaf, library)), None):
        return of_a_class, leaf_path(keys)
    last = getattr(keys[-1], "key", None) if keys else None
    if isinstance(last, str) and last.endswith("/scale"):
        return LINEN, leaf_path(keys).removesuffix("/scale")
    if isinstance(last, tuple) and len(keys) > 1 and leaf_path(keys[-2:-1]) == "scales":
        return NNX, leaf_path(keys[:-2])
    return None
