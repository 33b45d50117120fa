"""Norms, and the factor `g / ||v||` with its derivative: the numerics of weight normalization.

In float32 at least, without an epsilon, and finite wherever the result is.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Names: TypeAlias = tuple[str, ...] | None
"""The mesh axes that a norm's axes are sharded over, in a manual region; `None` where nobody said."""


def norm(v: jax.Array, axes: tuple[int, ...], names: Names = None) -> tuple[jax.Array, jax.Array]:
    """`||v||` over `axes`, kept as size 1, and where its square is no normal number but (nearly) 0; there it reads 1.

    `v` must be of a dtype that `norm_dtype` returns. NaN and infinity stay visible. In a manual region, `names` are
    the mesh axes that `axes` are sharded over.
    """
    _check_manual_region(names)
    return _norm(v, axes, names or ())


def norm_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which norms of arrays of `dtype` are computed: float32, and float64 for float64."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


def scale(g: jax.Array, v: jax.Array, axes: tuple[int, ...], names: Names) -> jax.Array:
    """`g / ||v||`, and 0 where `||v||^2` under- or overflows."""
    _check_manual_region(names)
    return _jitted_scale(g, v, axes, names or (), False)[0]


def split_scale(g: jax.Array, v: jax.Array, axes: tuple[int, ...], names: Names) -> tuple[jax.Array, jax.Array]:
    """`g / ||v||` as a product of two, the second a power of two: 1, unless the product leaves the range of the dtype.

    `(v * power) * ratio` stays in the range wherever `g * v / ||v||` is.
    """
    _check_manual_region(names)
    return _jitted_scale(g, v, axes, names or (), True)


def _check_manual_region(names: Names) -> None:
    """Raises in `shard_map` and `pmap` where nobody said over which mesh axes the norms run."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual and names is None:
        raise ValueError(
            f"the norm of a weight is needed inside shard_map or pmap over {tuple(manual)}, where it could be that of "
            "one shard. To rebuild weights there, say how they are sharded: wn_jax.in_shard_map(params, specs), with "
            "their in_specs, P() for whole ones. Or do it outside: call wn_jax.reconstruct(params) and pass the plain "
            "weights in; gradients reach g and v where jax.grad, too, is outside."
        )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _norm(v: jax.Array, axes: tuple[int, ...], names: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    squares = _sum(jnp.square(v), axes, names)
    vanishes = squares < jnp.finfo(v.dtype).tiny
    root = jnp.sqrt(jnp.where(vanishes, 1, squares))
    # Without the barrier XLA turns g / sqrt(s) into g * rsqrt(s), and g == ||v|| gives a scale that is not exactly 1.
    return jax.lax.optimization_barrier(root), vanishes


def _sum(x: jax.Array, axes: tuple[int, ...], names: Names) -> jax.Array:
    """The sum over `axes`, kept as size 1, and over the shards along the mesh axes `names`."""
    total = jnp.sum(x, axis=axes, keepdims=True)
    return jax.lax.psum(total, names) if names else total


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _jitted_scale(
    g: jax.Array, v: jax.Array, axes: tuple[int, ...], names: tuple[str, ...], split: bool
) -> tuple[jax.Array, jax.Array]:
    """JAX traces and differentiates a `jit` once for all weights of one shape.

    `split`: whether the power of two may be another than 1.
    """
    scale = _scale_inverse_length(g, v, axes, names, split)
    return scale.ratio, scale.power


class _Scale(NamedTuple):
    """The numbers of a feature. Together, as the derivative needs all of them, and over shards each norm is a message.

    `length` is `||v||`, and infinite where its square under- or overflows.
    """

    ratio: jax.Array
    """`g / (power * length)`"""
    inverse: jax.Array
    """`1 / length`"""
    length: jax.Array
    power: jax.Array
    """A power of two, without a derivative."""
    of_g: jax.Array
    """`1 / (power * length)`, the derivative of `ratio` in `g`."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _scale_inverse_length(
    g: jax.Array, v: jax.Array, axes: tuple[int, ...], names: tuple[str, ...], split: bool
) -> _Scale:
    length, vanishes = _norm(v, axes, names)
    length = jnp.where(vanishes, jnp.inf, length)
    if not split:
        return _Scale(g / length, 1 / length, length, jnp.ones_like(length), 1 / length)
    step = _step(g, length)
    scaled = length / step
    # XLA does not fuse a division into a loop that would repeat it, here for each number of v; see the derivative.
    return _Scale(g / scaled, 1 / length, length, 1 / step, 1 / scaled)


def _step(g: jax.Array, length: jax.Array) -> jax.Array:
    """The power of two that `v` is to be divided by, for `g * step / length` to be a normal number.

    Half of the dtype's range is enough of a step, as a length whose square is a normal number has half of it. No
    entry of `v` leaves the range by it whose product with the scale does not.
    """
    limits = jnp.finfo(length.dtype)
    ratio = jnp.abs(g / length)
    half = 2.0 ** (limits.maxexp // 2)
    step = jnp.where(ratio > 2.0 ** (limits.maxexp - 2), 1 / half, 1)
    step = jnp.where((ratio < 2.0**limits.minexp) & (g != 0) & (length < jnp.inf), half, step)
    return step.astype(length.dtype)


@_scale_inverse_length.defjvp
def _scale_inverse_length_jvp(
    axes: tuple[int, ...],
    names: tuple[str, ...],
    split: bool,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array],
) -> tuple[_Scale, _Scale]:
    """d(g / ||v||) = (dg - (g / ||v||) d.dv) / ||v||, with d = v / ||v||; the same for g = 1; and d||v|| = d.dv.

    Written out because the derivative by way of ||v||^2 has factors of ||v||^-3, which overflow in a Hessian-vector
    product from ||v|| = 1e-13 down. Here every factor has the size of a result.

    A division stands where reverse mode hands numbers of a feature to the loop over `v` that updates it: XLA does not
    fuse a division into a loop that would repeat it, but would all else (docs/performance.md has the figures).
    """
    (g, v), (dg, dv) = primals, tangents
    ratio, inverse, length, power, of_g = scale = _scale_inverse_length(g, v, axes, names, split)
    along = _sum((v * inverse) * dv, axes, names)
    radial = along / length
    # A select, not a product with 0: where v is huge and 1/||v|| is 0, the cotangents may be infinite.
    changes = of_g * dg - ratio * radial, -inverse * radial, along, -of_g * radial
    first, second, third, fourth = (jnp.where(inverse == 0, 0, change) for change in changes)
    return scale, _Scale(first, second, third, jnp.zeros_like(power), fourth)
