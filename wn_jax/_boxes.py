"""Boxes: what a framework puts around a parameter to carry metadata, such as sharding names.

Flax Linen boxes a parameter in an `AxisMetadata` (`nn.Partitioned`, `nn.LogicallyPartitioned`), Flax NNX in a
`Variable` (`nnx.Param`). This file owns taking a value out of its box and putting another value into a like one, and
what becomes of sharding names there; it knows nothing of nodes.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias, TypeGuard

from flax import nnx
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from wn_jax._types import Leaf, Specs

Box: TypeAlias = meta.AxisMetadata | nnx.Variable
"""A box of either framework, around one value."""


def is_box(x: Leaf) -> TypeGuard[Box]:
    """Whether `x` is a box around one value."""
    return isinstance(x, (meta.AxisMetadata, nnx.Variable))


def unbox(x: Leaf) -> Leaf:
    """The value in the box; anything that is no box comes back as it is.

    No sharding constraint is applied: the framework does that when it unboxes the weight that it is given.
    """
    if isinstance(x, meta.Partitioned):
        return x.unbox(apply_constraint=False)
    if isinstance(x, meta.AxisMetadata):
        return x.unbox()
    if isinstance(x, nnx.Variable):
        # Past the hooks (`on_get_value`): they are for those who read the weight. A reference has its value elsewhere.
        return x.get_value() if x.ref else x.get_raw_value()
    return x


def rebox(box: Leaf, value: Leaf) -> Leaf:
    """`value` in a box like `box`, or bare where `box` is none."""
    if isinstance(box, meta.AxisMetadata):
        return box.replace_boxed(value)
    if isinstance(box, nnx.Variable):
        return box.replace(value)
    return value


def rebox_reduced(box: Leaf, value: Leaf, ndim: int, axes: tuple[int, ...]) -> Leaf:
    """As `rebox`, where the box had an array of `ndim` axes in it, and gets one like it of size 1 at `axes`.

    Raises:
        ValueError: the box has something else than a sharding where its names belong. The message goes on from it.
    """
    boxed = rebox(box, value)
    if isinstance(boxed, meta.Partitioned):
        return dataclasses.replace(boxed, names=_reduced_in(boxed, boxed.names, ndim, axes))
    if isinstance(boxed, nnx.Variable) and (sharding := boxed.get_metadata("out_sharding", None)) is not None:
        boxed.set_metadata("out_sharding", _reduced_in(boxed, sharding, ndim, axes))
    return boxed


def reduced(sharding: Specs, ndim: int, axes: tuple[int, ...]) -> Specs:
    """The sharding of an array like one of `ndim` axes that has `sharding`, but of size 1 at `axes`.

    It may be a spec, a tuple of names, or `None`, which says nothing.

    Raises:
        ValueError: of this kind of sharding it is not known. The message goes on from the sharding.
    """
    if isinstance(sharding, NamedSharding):
        return sharding.update(spec=reduced(sharding.spec, ndim, axes))
    if isinstance(sharding, PartitionSpec):
        return sharding.update(reduced(tuple(sharding), ndim, axes))
    if isinstance(sharding, (tuple, list)):
        names = (*sharding, *(None,) * (ndim - len(sharding)))  # trailing names may be missing
        return tuple(None if axis - ndim in axes else name for axis, name in enumerate(names))
    if sharding is None or _is_replicated(sharding):
        return sharding
    raise ValueError(f"is a {type(sharding).__name__}, which has no names of axes; use a NamedSharding")


def _is_replicated(sharding: Specs) -> bool:
    """Whether it is a sharding that says that all devices hold the whole array."""
    try:
        return isinstance(sharding, Sharding) and sharding.is_fully_replicated
    except NotImplementedError:  # from JAX's base class, where a subclass does not say
        return False


def _reduced_in(box: Box, names: Specs, ndim: int, axes: tuple[int, ...]) -> Specs:
    """As `reduced`, of the names that a box carries."""
    try:
        return reduced(names, ndim, axes)
    except ValueError as error:
        if isinstance(names, Sharding):  # the error speaks of it
            raise
        raise ValueError(f"is in a {type(box).__name__} whose sharding {error}") from None
