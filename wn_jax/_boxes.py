"""Boxes: what a framework puts around a parameter to carry metadata, such as sharding names.

Flax Linen boxes a parameter in an `AxisMetadata` (`nn.Partitioned`, `nn.LogicallyPartitioned`), Flax NNX in a
`Variable` (`nnx.Param`). This file owns taking a value out of its box and putting another value into a like one; it
knows nothing of nodes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
from flax.core import meta


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


def rebox_reduced(box: Any, value: Any, axes: tuple[int, ...]) -> Any:
    """As `rebox`, for a `value` whose `axes` have size 1: those lose their sharding names, the others keep theirs."""
    boxed = rebox(box, value)
    if isinstance(boxed, meta.Partitioned):
        names = _drop_names(boxed.names, value.ndim, axes)
        return dataclasses.replace(boxed, names=names)
    if isinstance(boxed, nnx.Variable) and isinstance(names := boxed.get_metadata("out_sharding", None), tuple):
        boxed.set_metadata("out_sharding", _drop_names(names, value.ndim, axes))
    return boxed


def _drop_names(names: tuple[Any, ...], ndim: int, axes: tuple[int, ...]) -> tuple[Any, ...]:
    full = tuple(names) + (None,) * (ndim - len(names))  # as in a PartitionSpec, trailing names may be missing
    return tuple(None if axis - ndim in axes else name for axis, name in enumerate(full))
