"""The node protocol, and `WeightNorm`: the mathematics of `w = g * v / ||v||`.

A node stands in a parameter tree where a weight leaf stood and can rebuild that weight. This file owns what a node
is and what weight normalization computes; finding the leaves to replace is `_transform`'s work.

Source: Salimans & Kingma, *Weight Normalization* (2016), arXiv 1602.07868, equations 2 and 3.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import ClassVar, NoReturn, Protocol, TypeGuard

import jax
import jax.core
import jax.numpy as jnp

from wn_jax._boxes import rebox, rebox_reduced, unbox
from wn_jax._norms import norm, norm_dtype, scale, split_scale
from wn_jax._types import Axes, Leaf, PyTree, Shape


class Node(Protocol):
    """The node protocol: all that `reconstruct` and `wrap` know of a node, and what a node of one's own has.

    A node is a pytree (`jax.tree_util.register_dataclass` makes one of a dataclass) with these two methods. Its arrays
    may themselves be nodes, which are rebuilt before it is asked.

    >>> import dataclasses, jax, jax.numpy as jnp, wn_jax as wn
    >>> @jax.tree_util.register_dataclass
    ... @dataclasses.dataclass
    ... class Doubled:
    ...     half: jax.Array
    ...     def weight(self):
    ...         return 2 * self.half
    ...     def factors(self):
    ...         return self.half, jnp.full((1, self.half.shape[1]), 2.0)
    >>> wn.reconstruct({"kernel": Doubled(jnp.ones((1, 2)))})
    {'kernel': Array([[2., 2.]], dtype=float32)}
    """

    def weight(self) -> Leaf:
        """The weight that the node stands for: an array, in a box where the node's arrays are in boxes."""
        ...

    def factors(self) -> tuple[Leaf, jax.Array]:
        """A pair `(v, scale)` whose product is the weight.

        `v` has the weight's shape and dtype. `scale` is one number a feature, with size 1 along all other axes.
        """
        ...


def is_node(x: PyTree) -> TypeGuard[Node]:
    """Whether `x` follows the node protocol."""
    kind = type(x)  # asked of the type, as `equinox.nn.Linear` has an array named `weight`
    return callable(getattr(kind, "weight", None)) and callable(getattr(kind, "factors", None))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("g", "v"), meta_fields=("axes",))
@dataclasses.dataclass(frozen=True, eq=False)
class WeightNorm:
    """A weight as magnitude `g` and direction `v`: `w = g * v / ||v||`, the norm running over `axes`.

    Arguments:
        g: the magnitudes, shaped as `v` with size 1 at `axes`; float32, or float64 for a float64 `v`.
        v: the directions, of the weight's shape and dtype; their length does not matter to the weight.
        axes: the reduction axes (the fan-in), counted from the end, so that they stay right when `vmap`, `scan` or
            a stack of layers adds a leading axis. Static.

    The constructor checks nothing, as trees of shardings, labels and masks have this structure too. Build a node
    from a weight with `from_weight`.

    Numerics: the norm and `g / ||v||` are computed in float32 at least, without an epsilon, and the product is
    rounded once. `weight()` is exact to that rounding wherever `||v||^2` and the squares that make it up are normal
    numbers of that dtype, which for float32 is from `||v||` around 1e-16 to 1e19; below, XLA flushes squares to zero.
    The scale `g / ||v||`, too, must be a normal number of that dtype: with `||v||` 1e-10 and `g` 1e30 it is infinite,
    with 1e18 and 1e-25 it is 0, and so is the weight, which would not be. `from_weight` never makes such a pair.
    `weight()` is right also where the weight is in that range and `g / ||v||` is not (a length of 1e-10 with a `g` of
    1e30); `factors()`, and with it `wrap` where it scales outputs, cannot say such a scale, and gives infinity or 0.
    Where `||v||^2` itself under- or overflows (`v` of zeros, too) the weight and its derivatives are 0: finite, but
    dead. `from_weight` never makes such a `v` of finite weights. NaN and infinity in `v` or `g` stay visible as NaN.

    >>> import jax.numpy as jnp
    >>> node = WeightNorm.from_weight(jnp.array([[3.0, 0.5], [4.0, 0.0]]), axes=-2)
    >>> node.g, node.axes
    (Array([[5. , 0.5]], dtype=float32), (-2,))
    >>> node.weight()
    Array([[3. , 0.5],
           [4. , 0. ]], dtype=float32)
    """

    g: Leaf
    v: Leaf
    axes: tuple[int, ...]
    axis_names: ClassVar[tuple[str, ...] | None] = None
    """In a manual region: the mesh axes that `axes` are sharded over; `None` where nobody said. See `in_shard_map`."""

    @classmethod
    def from_weight(cls, weight: Leaf, axes: Axes) -> WeightNorm:
        """The node of a weight: `g = ||weight||` and `v = weight`, so that `weight()` returns it bit for bit.

        Two kinds of weight vector get another `v`, of the same function: one that is exactly zero gets `g = 0` and
        a random unit direction from a fixed key, so that it can train (at `v = 0` no gradient would ever arrive);
        one whose squared norm could leave the range of float32 is multiplied by a power of two, which is exact.
        (Subnormal numbers count as zero, as XLA flushes them on most devices, and so can an entry that is 1e47 times
        smaller than the largest of a vector over 4e9. A vector whose norm exceeds the largest float32 has no `g`: it
        becomes infinite, visibly.)

        Arguments:
            weight: a floating-point array, or a Flax box around one. `g` gets a like box, without sharding names on
                `axes`.
            axes: the axes to reduce over, from either end; they are stored counted from the end.

        Raises:
            ValueError: an axis is out of range, repeated or missing altogether; or the call is made inside `shard_map`
                or `pmap`, where the weight may be one shard.
            TypeError: the weight is not a floating-point array, or an axis is not an integer.
        """
        values = jnp.asarray(unbox(weight))
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise TypeError(f"a weight must be a floating-point array to have a norm; this one is {values.dtype}")
        axes = canonical_axes(axes, values.shape)
        if manual := jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError(
                f"a node is made inside shard_map or pmap over {tuple(manual)}, where its norm could be that of one "
                "shard. Make it outside, and shard it as wn_jax.shardings(params, specs) says"
            )
        g, v = _magnitude_and_direction(values.astype(norm_dtype(values.dtype)), axes)
        return cls(rebox_reduced(weight, g, values.ndim, axes), rebox(weight, v.astype(values.dtype)), axes)

    def weight(self) -> Leaf:
        """`g * v / ||v||`, of the shape and dtype of `v`, in a box where `v` is in one.

        Raises:
            ValueError: the shapes of `g` and `v` do not fit `axes`, or the call is made inside `shard_map` or `pmap`,
                and nothing (`in_shard_map`) says how the weight is sharded.
            TypeError: the node holds something else than arrays (labels, specs, another node).
        """
        g, v = self._arrays()
        ratio, power = split_scale(g, v.astype(norm_dtype(v.dtype)), self.axes, self.axis_names)
        return rebox(self.v, _product(g, v, ratio, power))

    def factors(self) -> tuple[Leaf, jax.Array]:
        """`(v, g / ||v||)`: `v` as stored, and one number a feature, in float32 at least. Raises as `weight` does."""
        g, v = self._arrays()
        return self.v, scale(g, v.astype(norm_dtype(v.dtype)), self.axes, self.axis_names)

    def __getattr__(self, name: str) -> NoReturn:
        """Asked for what a node has not, such as `shape`, by tools that take it for an array: it says what it is."""
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        if name.startswith("_"):
            raise AttributeError(message)
        raise AttributeError(
            f"{message}: it is a node of a parameter tree, and no array. Its arrays are node.g and node.v, and "
            "node.weight() is its weight; a model takes the tree by wn_jax.wrap or after wn_jax.reconstruct"
        )

    def _arrays(self) -> tuple[jax.Array, jax.Array]:
        """`g`, in the dtype of the norm, and `v`, out of their boxes; checked, as any code may have built the node."""
        g, v = unbox(self.g), unbox(self.v)
        for name, value in (("g", g), ("v", v)):
            if isinstance(value, jax.ShapeDtypeStruct):
                raise TypeError(f"WeightNorm.{name} is abstract; use jax.eval_shape(wn_jax.reconstruct, tree)")
            if not (hasattr(value, "shape") and hasattr(value, "dtype")):
                raise TypeError(
                    f"WeightNorm.{name} is a {type(value).__name__}, not an array: a tree of labels, specs or masks "
                    "holds no weights, and a node inside a node is rebuilt by wn_jax.reconstruct"
                )
        check_shapes(g.shape, v.shape, self.axes)
        return jnp.asarray(g, norm_dtype(v.dtype)), jnp.asarray(v)


def canonical_axes(axes: Axes, shape: Shape) -> tuple[int, ...]:
    """`axes` of an array of `shape` as a sorted tuple of negative ints."""
    ndim = len(shape)
    try:
        given = [operator.index(axis) for axis in (axes if isinstance(axes, Iterable) else (axes,))]
    except TypeError:
        raise TypeError(f"axes must be an int or a tuple of ints, such as (-2,); got {axes!r}") from None
    for axis in given:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"axis {axis} is out of range for shape {shape}; "
                + (f"use {-ndim} to {-1}" if ndim else "it has no axes")
            )
    negative = tuple(sorted(axis if axis < 0 else axis - ndim for axis in given))
    if not negative:
        raise ValueError(f"axes is empty, but a norm runs over at least one of the axes of shape {shape}")
    if len(set(negative)) != len(negative):
        raise ValueError(f"axes {tuple(given)} name an axis of shape {shape} twice")
    return negative


@jax.jit
def _product(g: jax.Array, v: jax.Array, ratio: jax.Array, power: jax.Array) -> jax.Array:
    """`v * power * ratio`, rounded once, as powers of two are exact."""
    # A vector of zeros has a signed direction times 0, which is +-0. Adding its g, a +0, makes all of them +0 again;
    # adding -0 changes no number.
    zero = jax.lax.optimization_barrier(jnp.where(g == 0, jax.lax.stop_gradient(g), -0.0))
    return (_times(v.astype(ratio.dtype), power, ratio) + zero).astype(v.dtype)


@jax.custom_jvp
def _times(v: jax.Array, power: jax.Array, ratio: jax.Array) -> jax.Array:
    """`v * power * ratio`, for which XLA keeps no array of the size of `v` until the gradient."""
    return (v * power) * ratio


@_times.defjvp
def _times_jvp(
    primals: tuple[jax.Array, jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (v, power, ratio), (dv, _, dratio) = primals, tangents
    # Another variable of the same value: of one, XLA would make an array of the size of v for all of its uses.
    other = jax.lax.optimization_barrier(power)
    return _times(v, power, ratio), (dv * power) * ratio + (v * dratio) * other


def _magnitude_and_direction(weight: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """`g` and `v` of a weight, as `WeightNorm.from_weight` documents them."""
    v, power, zero = _into_range(weight, axes)
    if isinstance(zero, jax.core.Tracer):
        v = jax.lax.cond(jnp.any(zero), lambda: _fill_zeros(weight, v, zero, axes), lambda: v)
    elif zero.any():  # eagerly, the random numbers are compiled only where they are needed
        v = _fill_zeros(weight, v, zero, axes)
    length, _ = norm(v, axes)
    signed_zero = jnp.where(_has_negative_zero(weight, axes), -0.0, 0.0).astype(length.dtype)  # see _fill_zeros
    return jnp.where(zero, signed_zero, length / power), v


@functools.partial(jax.jit, static_argnums=1)
def _into_range(weight: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weight times a power of two for which its squares can be summed, that power, and which vectors are zero."""
    limits = jnp.finfo(weight.dtype)
    low, high = limits.minexp // 4, limits.maxexp // 4  # squares then use half of the range, and sums have the rest
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(weight)), axis=axes, keepdims=True, initial=0)
    zero = largest < limits.tiny
    _, exponent = jnp.frexp(largest)
    shift = jnp.where(exponent < low, -exponent, jnp.where(exponent > high, high - exponent, 0))
    power = jnp.ldexp(jnp.ones_like(largest), jnp.where(zero, 0, shift))
    return weight * power, power, zero


@functools.partial(jax.jit, static_argnums=3)
def _fill_zeros(weight: jax.Array, v: jax.Array, zero: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`v`, with random unit vectors from a fixed key where the weight is zero.

    `weight()` returns a direction times `g`. In a vector that holds a -0 (a pruned one: a negative number times 0),
    `g` is -0 and the direction takes the opposite sign of each zero, so that the product has the zeros' own signs.
    """
    noise = jax.random.normal(jax.random.key(0), (weight.size,), weight.dtype).reshape(weight.shape)
    noise = noise + jnp.zeros_like(weight)  # in a mesh with explicit axes, this gives it the weight's sharding
    noise = jnp.where(_has_negative_zero(weight, axes), jnp.copysign(noise, -weight), noise)
    return jnp.where(zero, noise / norm(noise, axes)[0], v)


def _has_negative_zero(weight: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Of vectors of zeros: whether one of them is -0."""
    return jnp.any(jnp.signbit(weight), axis=axes, keepdims=True)


def check_shapes(g: tuple[int, ...], v: tuple[int, ...], axes: tuple[int, ...]) -> None:
    """Raises where the shapes of `g` and `v` are not those of one node with these axes."""
    if not isinstance(axes, tuple) or canonical_axes(axes, v) != axes:
        raise ValueError(
            f"WeightNorm.axes is {axes!r}, but must be a sorted tuple of negative ints; WeightNorm.from_weight makes it"
        )
    expected = tuple(1 if axis - len(v) in axes else size for axis, size in enumerate(v))
    if g != expected:
        raise ValueError(
            f"WeightNorm.g has shape {g}, but v of shape {v} with axes {axes} needs {expected}; a stack of layers must "
            "be sliced on the leading axis of g and v together (jax.tree.map over the node does)"
        )
