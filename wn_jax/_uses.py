"""The uses that a program makes of its parameters: `infer_axes`, `weight_uses`, and their table.

This file owns the rows that users see, and the table's text. `_program.reading` follows the parameters through a
program, and decides which of them are weights and where their scales go.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from wn_jax._calls import check_count, check_function
from wn_jax._foreign import hints
from wn_jax._program.notes import Reason
from wn_jax._program.reading import ParameterLeaf, read
from wn_jax._tree import listed
from wn_jax._types import PyTree, Shape


@functools.partial(check_count, most=2)
def infer_axes(fn: Callable[..., PyTree], argnums: int = 0) -> Callable[..., dict[str, tuple[int, ...]]]:
    """The reduction axes of the weights of `fn`, read from its program: for any framework, whatever the names.

    Returns a function of `fn`'s own arguments, which are traced and never computed with (`jax.ShapeDtypeStruct`s will
    do). It gives the dict from leaf path to axes that `reparameterize` takes, and that may be edited by hand before. A
    leaf is in it only where every use of it is proved to be a matrix multiplication or a convolution over the same
    axes, and one at least is with data; `weight_uses` tells about the others. A weight is followed through what moves
    its numbers: transposes, reshapes, slices, `split`, `stack`, `tile`, constant masks, loops that index a stack.

    Data is what comes in by the other arguments, what the program computes from constants, and a learned vector that
    is repeated over a batch. Where none of the other arguments is an array, but for random keys, arrays that `fn`
    closes over count as data; else a leaf is left out that meets such an array alone, or whose product with one is
    returned or serves as a weight, and a `UserWarning` names it.

    What is not trained is left alone, too: a leaf that stands under `stop_gradient` at every use, an `nnx.Variable`
    that is no `nnx.Param`, and what lies in another collection where the tree has `params` at its top (`batch_stats`,
    `constants`). Code whose result nobody takes is no use, as `jit` drops it.

    Arguments:
        fn: a function whose argument `argnums` is a parameter tree, such as `model.apply`. What is no array reaches it
            as it is (`train=True`); for `rngs` and the like a closure does too. Pass the model, not a loss with a
            penalty on the weights, which is a use of them that is no contraction.
        argnums: the position of the parameters.

    Raises:
        TypeError: `fn` is no function, but a model or its parameters; or the parameters are not given by position.
            Errors of `fn` pass through, with a note.

    >>> import jax.numpy as jnp
    >>> def attend(params, x):
    ...     return jnp.einsum("btf,fhd->bthd", x, params["query"]) + params["bias"]
    >>> infer_axes(attend)({"query": jnp.ones((6, 2, 4)), "bias": jnp.zeros((2, 4))}, jnp.ones((3, 5, 6)))
    {'query': (-3,)}
    """
    check_function("infer_axes", fn, argnums)
    uses = weight_uses(fn, argnums)

    @functools.wraps(fn)
    def infer(*args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
        found = uses(*args, **kwargs)
        if hidden := [use.path for use in found if use.reason is Reason.CLOSED_OVER]:
            warnings.warn(_about_closed_over(fn, hidden), UserWarning, stacklevel=2)
        return {use.path: use.reduction for use in found if use.reduction is not None}

    return infer


def _about_closed_over(fn: Callable[..., PyTree], paths: list[str]) -> str:
    """The warning about leaves that are left out for what may be data."""
    name = getattr(fn, "__name__", "the function")
    return (
        f"infer_axes left out {listed(paths)}: {name} contracts them with arrays that it closes over, and these do not "
        "count as data where its arguments hold some. Where they are data, pass them as an argument; where they are "
        "constants of the model, give the axes of these leaves by hand"
    )


@functools.partial(check_count, most=2)
def weight_uses(fn: Callable[..., PyTree], argnums: int = 0) -> Callable[..., WeightUses]:
    """How `fn` uses each parameter: a `WeightUse` for each, which print as a table.

    Of a leaf that is left alone it says the `reason`, and `reason.explanation` the same as a sentence; the table ends
    with those sentences. Arguments and errors are those of `infer_axes`, and so is what counts as data.

    >>> import jax.numpy as jnp
    >>> def model(params, x):
    ...     return x @ params["kernel"] + params["bias"]
    >>> print(weight_uses(model)({"kernel": jnp.ones((9, 4)), "bias": jnp.zeros(4)}, jnp.ones((2, 9))))
    path    shape   reduction  feature  batch  uses         scale
    bias    (4,)    left alone: elementwise (add)
    kernel  (9, 4)  (-2,)      (-1,)    -      dot_general  output
    <BLANKLINE>
    elementwise: it is added to or multiplied with other values, not contracted (a bias, a gain, a positional embedding)
    """
    check_function("weight_uses", fn, argnums)

    @functools.wraps(fn)
    def uses(*args: Any, **kwargs: Any) -> WeightUses:
        reading = read(fn, (argnums,), args, kwargs, "to see how it uses its parameters.")
        found = WeightUses(map(_row, reading.leaves))
        found.hints = hints(args[argnums])
        return found

    return uses


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """How a program uses one parameter. Axes are counted from the end."""

    path: str
    """The leaf's path in its tree."""
    shape: Shape
    """The shape of the leaf, or of the weight of a node that stands there."""
    dtype: np.dtype
    """The dtype, likewise."""
    reduction: tuple[int, ...] | None
    """The axes that are summed over; `None` where the leaf is left alone."""
    feature: tuple[int, ...] | None
    """The axes that are axes of the output; `None` where the leaf is left alone."""
    batch: tuple[int, ...] | None
    """The axes that count copies: scanned layers, ensembles, the batch dimensions of a matmul; or `None`."""
    uses: tuple[str, ...]
    """The operations that contract it."""
    scale: Literal["output", "weight"] | None
    """Where `wrap(scale="auto")` puts the scale; `None` where the leaf is left alone."""
    reason: Reason | None
    """Why the leaf is left alone; `None` of a weight."""
    by: str | None
    """The operation, the dtype, the class of Variable or the collection that the reason speaks of, if of one."""


class WeightUses(tuple[WeightUse, ...]):
    """A row for each parameter. `str` makes a table of it."""

    hints: tuple[str, ...] = ()
    """A sentence for each library whose weight norms the model holds already, with the call that makes them nodes."""

    def __str__(self) -> str:
        head = ["path", "shape", "reduction", "feature", "batch", "uses", "scale"]
        rows = [head, *map(_cells, self)]
        # A leaf that is left alone has two cells; what follows them may be longer than a column.
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(head))]
        lines = [_line(head, widths)]
        for use, cells in zip(self, rows[1:], strict=True):
            lines.append(_line([*cells, *_left_alone(use)], widths))
        reasons = sorted({use.reason for use in self if use.reason is not None})
        notes = [*(f"{reason}: {reason.explanation}" for reason in reasons), *self.hints]
        return "\n".join(lines + [""] * bool(notes) + notes)


def _row(leaf: ParameterLeaf) -> WeightUse:
    """The row about a leaf."""
    problem, uses = leaf.problem, leaf.uses
    reduction = feature = batch = scale = None
    if problem is None:
        # Dimensions that a matmul has twice count copies only if they do in all uses; else they are features.
        reduced = uses[0].reduction
        features = frozenset.union(*(use.feature for use in uses)) - leaf.copies
        copies = frozenset(range(leaf.aval.ndim)) - reduced - features
        reduction, feature, batch = leaf.axes(reduced), leaf.axes(features), leaf.axes(copies)
        scale = "output" if leaf.goes_to_output() else "weight"
    return WeightUse(
        path=leaf.path,
        shape=leaf.aval.shape,
        dtype=leaf.aval.dtype,
        reduction=reduction,
        feature=feature,
        batch=batch,
        uses=tuple(use.how for use in uses),
        scale=scale,
        reason=problem.reason if problem else None,
        by=(problem.by or None) if problem else None,
    )


def _cells(use: WeightUse) -> list[str]:
    """The cells of a row, as far as they set the widths of columns."""
    cells = [use.path, str(use.shape)]
    if use.reason is not None:
        return cells
    counts = collections.Counter(use.uses)
    how = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
    cells += [str(axes) if axes else "-" for axes in (use.reduction, use.feature, use.batch)]
    return [*cells, how, use.scale or "-"]


def _left_alone(use: WeightUse) -> list[str]:
    """A cell that says why a leaf is left alone, or none."""
    if use.reason is None:
        return []
    return [f"left alone: {use.reason}" + (f" ({use.by})" if use.by else "")]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()
