"""Boxes: what a framework puts around a parameter to carry metadata, such as sharding names.

Flax Linen boxes a parameter in an `AxisMetadata` (`nn.Partitioned`, `nn.LogicallyPartitioned`), Flax NNX in a
`Variable` (`nnx.Param`). This file owns taking a value out of its box and putting another value into a like one, and
what becomes of sharding names there; it knows nothing of nodes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec


def is_box(x: Any) -> bool:
    """Whether `x` is a box around one value."""
    return isinstance(x, (meta.AxisMetadata, nnx.Variable))


def unbox(x: Any) -> Any:
    """The value in the box; anything that is no box comes back as it is.

    No sharding constraint is applied: the framework does that when it unboxes the weight that it is given.
    """
    if isinstance(x, meta.Partitioned):
        return x.unbox(apply_constraint=False)
    if isinstance(x, meta.AxisMetadata):
        return x.unbox()
    if isinstance(x, nnx.Variable):
        return x.get_value() if x.ref else x.get_raw_value()  # hooks are for those who read the weight
    return x


def rebox(box: Any, value: Any) -> Any:
    """`value` in a box like `box`, or bare where `box` is none."""
    if isinstance(box, meta.AxisMetadata):
        return box.replace_boxed(value)
    if isinstance(box, nnx.Variable):
        return box.replace(value)
    return value


def rebox_reduced(box: Any, value: Any, ndim: int, axes: tuple[int, ...]) -> Any:
    """As `rebox`, where the box had an array of `ndim` axes in it, and gets one like it of size 1 at `axes`."""
    boxed = rebox(box, value)
    if isinstance(boxed, meta.Partitioned):
        return dataclasses.replace(boxed, names=reduced(boxed.names, ndim, axes))
    if isinstance(boxed, nnx.Variable) and (sharding := boxed.get_metadata("out_sharding", None)) is not None:
        boxed.set_metadata("out_sharding", reduced(sharding, ndim, axes))
    return boxed


def reduced(sharding: Any, ndim: int, axes: tuple[int, ...]) -> Any:
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
    if sharding is None or sharding.is_fully_replicated:
        return sharding
    raise ValueError(f"is a {type(sharding).__name__}, which has no names of axes; use a NamedSharding")
