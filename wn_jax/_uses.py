"""What a program does with each parameter: `infer_axes` and `weight_uses`, drawn from the walk.

This file owns the conclusions: is it a weight, over which axes does it reduce, where does its scale go.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from wn_jax._program.notes import Reason
from wn_jax._program.reading import Leaf, check_callable, read


def infer_axes(fn: Callable[..., Any], argnums: int = 0) -> Callable[..., dict[str, tuple[int, ...]]]:
    """The reduction axes of the weights of `fn`, read from its program: for any framework, whatever the names.

    Returns a function of `fn`'s own arguments, which are traced and never computed with (`jax.ShapeDtypeStruct`s will
    do). It gives the dict from leaf path to axes that `reparameterize` takes, and that may be edited by hand before. A
    leaf is in it only where every use of it is proved to be a matrix multiplication or a convolution with data, over
    the same axes; `weight_uses` tells about the others. Data is what comes in by the other arguments. Where none of
    these is an array, arrays that `fn` closes over count as data.

    Arguments:
        fn: a function whose argument `argnums` is a parameter tree, such as `model.apply`. What is no array reaches it
            as it is (`train=True`); for `rngs` and the like a closure does too. Pass the model, not a loss with a
            penalty on the weights, which is a use of them that is no contraction.
        argnums: the position of the parameters.

    Raises:
        TypeError: `fn` is not callable, or the parameters are not given by position. Errors of `fn` pass through,
            with a note.

    >>> import jax.numpy as jnp
    >>> def attend(params, x):
    ...     return jnp.einsum("btf,fhd->bthd", x, params["query"]) + params["bias"]
    >>> infer_axes(attend)({"query": jnp.ones((6, 2, 4)), "bias": jnp.zeros((2, 4))}, jnp.ones((3, 5, 6)))
    {'query': (-3,)}
    """
    uses = weight_uses(fn, argnums)

    @functools.wraps(fn)
    def infer(*args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
        return {use.path: use.reduction for use in uses(*args, **kwargs) if use.reduction is not None}

    return infer


def weight_uses(fn: Callable[..., Any], argnums: int = 0) -> Callable[..., WeightUses]:
    """How `fn` uses each parameter: a `WeightUse` for each, which print as a table. Arguments as for `infer_axes`.

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
    check_callable("weight_uses", fn)

    @functools.wraps(fn)
    def uses(*args: Any, **kwargs: Any) -> WeightUses:
        reading = read(fn, (argnums,), args, kwargs, "to see how it uses its parameters.")
        return WeightUses(map(_row, reading.leaves))

    return uses


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """How a program uses one parameter. Axes are counted from the end."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    reduction: tuple[int, ...] | None
    """The axes that are summed over; `None` where the leaf is left alone."""
    feature: tuple[int, ...] | None
    """The axes that are axes of the output."""
    batch: tuple[int, ...] | None
    """The axes that count copies: scanned layers, ensembles, the batch dimensions of a matmul."""
    uses: tuple[str, ...]
    """The operations that contract it."""
    scale: str | None
    """Where `wrap(scale="auto")` puts the scale: `"output"` or `"weight"`."""
    reason: Reason | None
    """Why the leaf is left alone."""
    by: str | None
    """The operation that the reason speaks of."""


class WeightUses(tuple[WeightUse, ...]):
    """A row for each parameter. `str` makes a table of it."""

    def __str__(self) -> str:
        head = ["path", "shape", "reduction", "feature", "batch", "uses", "scale"]
        weights = [use for use in self if use.reason is None]
        cells = [[use.path, str(use.shape), *_columns(use)] for use in weights]
        others = [[use.path, str(use.shape)] for use in self if use.reason is not None]
        widths = [max(len(row[i]) for row in [head, *cells, *others] if i < len(row)) for i in range(len(head))]
        rows = {use.path: row for use, row in zip(weights, cells, strict=True)}
        lines = [_line(head, widths)]
        for use in self:
            left_alone = f"left alone: {use.reason}" + (f" ({use.by})" if use.by else "")
            lines.append(_line(rows.get(use.path) or [use.path, str(use.shape), left_alone], widths))
        reasons = sorted({use.reason for use in self if use.reason is not None})
        return "\n".join(lines + [""] * bool(reasons) + [f"{reason}: {reason.explanation}" for reason in reasons])


def _row(leaf: Leaf) -> WeightUse:
    """The row about a leaf."""
    problem, how = leaf.problem, tuple(use.how for use in leaf.uses)
    about = {"path": leaf.path, "shape": leaf.aval.shape, "dtype": leaf.aval.dtype, "uses": how}
    if problem:
        nothing = dict.fromkeys(("reduction", "feature", "batch", "scale"))
        return WeightUse(**about, **nothing, reason=problem.reason, by=problem.by or None)
    reduction = leaf.uses[0].reduction
    feature = frozenset.union(*(use.feature for use in leaf.uses)) - leaf.copies
    batch = frozenset(range(leaf.aval.ndim)) - reduction - feature
    return WeightUse(
        **about,
        reduction=leaf.axes(reduction),
        feature=leaf.axes(feature),
        batch=leaf.axes(batch),
        scale="output" if leaf.goes_to_output() else "weight",
        reason=None,
        by=None,
    )


def _columns(use: WeightUse) -> list[str]:
    counts = collections.Counter(use.uses)
    how = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
    return [*(str(axes) if axes else "-" for axes in (use.reduction, use.feature, use.batch)), how, use.scale or "-"]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()
