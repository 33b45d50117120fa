"""Cuts and joints: the moves that take parts of an array, or put arrays side by side.

The rules of `slice`, `dynamic_slice`, `split` and `unstack`, and of `concatenate` and `stack`: two for each, as `moves`
says, whose table they are rows of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wn_jax._program import jaxpr
from wn_jax._program.factored import Factored, Operand
from wn_jax._program.facts import Counter, Fact
from wn_jax._program.jaxpr import Equation, outputs, shapes
from wn_jax._program.views import Atom, Dim, Place, View

# ---- slice and dynamic_slice


def slice_axes(eqn: Equation, view: View, _place: Place) -> View | None:
    params, result = eqn.params, view
    steps = params["strides"] or [1] * len(view.dims)
    for dim, (start, step) in enumerate(zip(params["start_indices"], steps, strict=True)):
        result = result and cut(result, dim, start, outputs(eqn)[0].shape[dim], step)
    return result


def cut(view: View, dim: int, start: int, size: int, step: int = 1) -> View | None:
    """The view of a slice along one dimension; `None` where it is no slice of an axis, but mixes several."""
    whole = view.dims[dim]
    if size == whole.size:
        return view
    if whole.is_beside_others:
        return _cut_among_others(view, dim, start, size) if step == 1 else None
    atoms = [atom for atom in whole.atoms if atom.size > 1]
    inner = math.prod(atom.size for atom in atoms[1:])
    if not atoms or start % inner or (size % inner if step == 1 else inner > 1):
        return None  # a slice of merged axes may be no slice of any one of them
    first, starts = atoms[0], list(view.starts)
    if first.axis is not None:
        starts[first.axis] += start // inner * first.stride
    atoms[0] = Atom(first.axis, size // inner, first.stride * step)
    return dataclasses.replace(view, dims=_with(view.dims, dim, Dim(tuple(atoms))), starts=tuple(starts))


def _cut_among_others(view: View, dim: int, start: int, size: int) -> View | None:
    """The same where other arrays stand along the dimension, none of which may be in the slice."""
    whole = view.dims[dim]
    before, after = max(whole.before - start, 0), max(start + size - (whole.before + whole.content), 0)
    left = size - before - after
    if left <= 0:
        return dataclasses.replace(view, dims=_with(view.dims, dim, Dim((Atom(None, 0),), 0, size)))  # nothing of it
    alone = dataclasses.replace(view, dims=_with(view.dims, dim, Dim(whole.atoms)))
    part = cut(alone, dim, max(start - whole.before, 0), left)
    if part is None:
        return None
    return dataclasses.replace(part, dims=_with(part.dims, dim, Dim(part.dims[dim].atoms, before, after)))


def _counts_through(counter: Counter, view: View, atom: Atom) -> bool:
    """Whether each trip of the counter's loop takes another number of this atom, and all trips all of them."""
    taken = [scan for scan, _ in view.slices]
    return counter.ahead == 0 and counter.length == atom.size and atom.axis is not None and counter.scan not in taken


def _with(dims: Sequence[Dim], at: int, dim: Dim) -> tuple[Dim, ...]:
    return (*dims[:at], dim, *dims[at + 1 :])


def dynamic_slice_axes(eqn: Equation, view: View, place: Place) -> View | None:
    """The caller has seen to it that data does not choose what is sliced."""
    result: View | None = view
    for dim, size in enumerate(outputs(eqn)[0].shape):
        if result is not None and size != view.dims[dim].size:
            start = place.facts[1 + dim] if place.facts else None
            result = _cut_at(result, dim, start, size)
    return result


def _cut_at(view: View, dim: int, start: Fact, size: int) -> View | None:
    """A slice at a place that is known, that a loop counts, or that only a run of the program knows."""
    whole = view.dims[dim]
    if isinstance(start, int):
        # JAX moves a slice that would reach over the end.
        return cut(view, dim, min(max(start, 0), whole.size - size), size)
    if whole.is_beside_others or len(whole.atoms) != 1:
        return None
    (atom,) = whole.atoms
    if isinstance(start, Counter) and size == 1 and _counts_through(start, view, atom):
        # Each trip of that loop gets a slice of its own, as if the loop sliced it.
        dims = _with(view.dims, dim, Dim.broadcast(1))
        return dataclasses.replace(view, dims=dims, slices=(*view.slices, (start.scan, whole)))
    part = dataclasses.replace(view, dims=_with(view.dims, dim, Dim((atom._replace(size=size),))))
    unplaced = frozenset() if atom.axis is None else frozenset({atom.axis})
    return dataclasses.replace(part, unplaced=view.unplaced | unplaced)


def slice_factors(eqn: Equation, value: Factored) -> Factored:
    """The scale is sliced as `v` is where it varies; its one number is kept where it does not."""
    params, keep = eqn.params, value.varies()
    strides = params["strides"] or [1] * len(keep)
    scale = jax.lax.slice(
        value.scale,
        [start if varies else 0 for start, varies in zip(params["start_indices"], keep, strict=True)],
        [limit if varies else 1 for limit, varies in zip(params["limit_indices"], keep, strict=True)],
        [stride if varies else 1 for stride, varies in zip(strides, keep, strict=True)],
    )
    return dataclasses.replace(value, v=jaxpr.bind(eqn, [value.v])[0], scale=scale)


def dynamic_slice_factors(eqn: Equation, value: Factored, *starts: ArrayLike) -> Factored:
    """As of `slice`, only that a run says where to start."""
    keep = value.varies()
    sizes = [size if varies else 1 for size, varies in zip(eqn.params["slice_sizes"], keep, strict=True)]
    small = [start if varies else jnp.zeros_like(start) for start, varies in zip(starts, keep, strict=True)]
    scale = jax.lax.dynamic_slice(value.scale, small, sizes)
    return dataclasses.replace(value, v=jaxpr.bind(eqn, [value.v, *starts])[0], scale=scale)


# ---- concatenate


def concatenate_axes(eqn: Equation, view: View, place: Place) -> View | None:
    along = eqn.params["dimension"]
    sizes = [shape[along] for shape in shapes(eqn)]
    before, after = sum(sizes[: place.operand]), sum(sizes[place.operand + 1 :])
    dim = view.dims[along]
    if before or after:
        dim = Dim(dim.atoms, before + dim.before, dim.after + after)
    return dataclasses.replace(view, dims=_with(view.dims, along, dim))


def concatenate_factors(eqn: Equation, *values: Operand) -> Factored | None:
    return _joined(values, eqn.params["dimension"], outputs(eqn)[0].dtype)


def _joined(values: Sequence[Operand], along: int, dtype: jnp.dtype) -> Factored | None:
    """With a scale that varies along the dimension. Plain arrays among the operands get a scale of 1."""
    parts = [value for value in values if isinstance(value, Factored)]
    first = parts[0]
    if any(part.v.dtype != first.v.dtype or part.dtype != dtype for part in parts):
        return None
    if first.v.dtype != dtype and len(parts) < len(values):
        return None  # plain arrays are of the dtype that the weights are still to be rounded to
    small = [max(sizes) for sizes in zip(*(part.scale.shape for part in parts), strict=True)]
    if small[:along] + small[along + 1 :] == [n for dim, n in enumerate(first.v.shape) if dim != along]:
        return None  # the scale would be as large as the weight

    vs = [value.v if isinstance(value, Factored) else jnp.asarray(value) for value in values]
    one = jnp.ones((1,) * first.v.ndim, first.scale.dtype)
    scales = [
        jnp.broadcast_to(value.scale if isinstance(value, Factored) else one, [*small[:along], n, *small[along + 1 :]])
        for value, n in zip(values, [v.shape[along] for v in vs], strict=True)
    ]
    return dataclasses.replace(
        first,
        v=jnp.concatenate(vs, along),
        scale=jnp.concatenate(scales, along),
        rebuilt=any(part.rebuilt for part in parts),
        path=", ".join(dict.fromkeys(part.path for part in parts)),
    )


# ---- stack: a concatenation along a new dimension


def stack_axes(eqn: Equation, view: View, place: Place) -> View:
    axis, others = eqn.params["axis"], len(eqn.invars) - 1
    dim = Dim((Atom(None, 1, 0),), place.operand, others - place.operand)
    return dataclasses.replace(view, dims=(*view.dims[:axis], dim, *view.dims[axis:]))


def stack_factors(eqn: Equation, *values: Operand) -> Factored | None:
    axis = eqn.params["axis"]
    expanded = [
        value.both(lambda array: jnp.expand_dims(array, axis))
        if isinstance(value, Factored)
        else jnp.expand_dims(value, axis)
        for value in values
    ]
    return _joined(expanded, axis, outputs(eqn)[0].dtype)


# ---- split and unstack: slices of a whole dimension, one for each result


def split_axes(eqn: Equation, view: View, place: Place) -> View | None:
    sizes = eqn.params["sizes"]
    return cut(view, eqn.params["axis"], int(sum(sizes[: place.output])), int(sizes[place.output]))


def split_factors(eqn: Equation, value: Factored) -> list[Operand]:
    axis = eqn.params["axis"]
    vs = jaxpr.bind(eqn, [value.v])
    ends = [int(sum(eqn.params["sizes"][:i])) for i in range(1, len(vs))]
    scales = jnp.split(value.scale, ends, axis) if value.varies()[axis] else [value.scale] * len(vs)
    return [dataclasses.replace(value, v=v, scale=scale) for v, scale in zip(vs, scales, strict=True)]


def unstack_axes(eqn: Equation, view: View, place: Place) -> View | None:
    axis = eqn.params["axis"]
    part = cut(view, axis, place.output, 1)
    return part and dataclasses.replace(part, dims=(*part.dims[:axis], *part.dims[axis + 1 :]))


def unstack_factors(eqn: Equation, value: Factored) -> list[Operand]:
    axis = eqn.params["axis"]
    vs = jaxpr.bind(eqn, [value.v])
    scales = jnp.unstack(value.scale, axis=axis) if value.varies()[axis] else [value.scale.squeeze(axis)] * len(vs)
    return [dataclasses.replace(value, v=v, scale=scale) for v, scale in zip(vs, scales, strict=True)]
