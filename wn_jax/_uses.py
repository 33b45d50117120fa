"""What a program does with each parameter: `infer_axes` and `weight_uses`, drawn from the walk.

This file owns the conclusions: is it a weight, over which axes does it reduce, where does its scale go.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wn_jax._node import is_node
from wn_jax._program.jaxpr import Program, is_array, trace
from wn_jax._program.notes import Bias, Notes, Problem, Reason, Use
from wn_jax._program.walk import walk
from wn_jax._transform import abstract_weight, flatten


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
        return WeightUses(leaf.describe() for leaf in reading.leaves)

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


def _columns(use: WeightUse) -> list[str]:
    counts = collections.Counter(use.uses)
    how = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
    return [*(str(axes) if axes else "-" for axes in (use.reduction, use.feature, use.batch)), how, use.scale or "-"]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter leaf in a program, and what the walk noted of it."""

    path: str
    position: int
    """Which leaf of its tree it is."""
    input: int
    """Which input of the program it is."""
    aval: Any
    node: Any
    """The node that stands there, if one does."""
    reduced: frozenset[int] | None
    """The axes, counted from 0, along which that node's scale does not vary."""
    notes: tuple[Use | Problem, ...]
    returned: bool

    @property
    def uses(self) -> list[Use]:
        """Its contractions with data."""
        return [note for note in self.notes if isinstance(note, Use)]

    @property
    def problem(self) -> Problem | None:
        """The first thing that speaks against its being a weight."""
        if not jnp.issubdtype(self.aval.dtype, jnp.floating):
            return Problem(Reason.DTYPE, str(self.aval.dtype))
        for note in self.notes:
            if isinstance(note, Problem):
                return note
            if note.problem:
                return Problem(note.problem, note.how)
        if not self.uses:
            return Problem(Reason.RETURNED if self.returned else Reason.UNUSED, "")
        return None if len({use.reduction for use in self.uses}) == 1 else Problem(Reason.DISAGREE, "")

    def axes(self, kept: frozenset[int]) -> tuple[int, ...]:
        """Axes counted from the end."""
        return tuple(sorted(axis - self.aval.ndim for axis in kept))

    @property
    def sliced(self) -> bool:
        """Whether each of its uses is in a loop that gives every trip a slice of its own: a stack of layers."""
        return self.problem is None and not self.returned and all(use.view.slices for use in self.uses)

    def goes_to_output(self, cost: float) -> bool:
        """Whether the scale goes to the outputs of this weight's contractions.

        It can where no rule of differentiation and no `while_loop` is in between, and no float16, in which a direction
        with large entries would overflow. It does where the outputs, each counted as often as loops compute it, hold
        fewer than `cost` times as many numbers as the weight. All uses of a weight go the same way, as a rebuilt
        weight is paid for once.
        """
        if self.problem or self.returned:
            return False
        able = all(
            (self.reduced is None or use.reduction <= self.reduced)
            and not use.around.custom_rule
            and use.around.trips != math.inf
            for use in self.uses
        )
        half = any(dtype == jnp.float16 for dtype in (self.aval.dtype, *(use.dtype for use in self.uses)))
        if not able or half or cost == math.inf:
            return able and not half
        outputs = sum(use.output_size for use in self.uses)
        # Where jax.export leaves a dimension open this is no int, and the weight's side costs the same for all sizes.
        return isinstance(outputs, int) and outputs < cost * self.aval.size

    def describe(self) -> WeightUse:
        """The row about it."""
        problem, by = self.problem, tuple(use.how for use in self.uses)
        if problem:
            row = (None, None, None, by, None, problem.reason, problem.by or None)
            return WeightUse(self.path, self.aval.shape, self.aval.dtype, *row)
        reduction = self.uses[0].reduction
        feature = frozenset.union(*(use.feature for use in self.uses)) - self._copies()
        batch = frozenset(range(self.aval.ndim)) - reduction - feature
        scale = "output" if self.goes_to_output(COST) else "weight"
        kinds = (self.axes(reduction), self.axes(feature), self.axes(batch))
        return WeightUse(self.path, self.aval.shape, self.aval.dtype, *kinds, by, scale, None, None)

    def _copies(self) -> frozenset[int]:
        """The axes that are batch dimensions of a matmul in all uses."""
        return frozenset.intersection(*(use.view.axes(use.contraction.batch) for use in self.uses))


COST = 1
"""How many numbers of output cost as much as one of a weight, once the scale multiplies it."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """A program whose parameters were followed."""

    program: Program
    leaves: list[Leaf]
    biases: dict[Any, Bias]


def read(
    fn: Callable[..., Any],
    argnums: Sequence[int],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    purpose: str,
    data_in_consts: bool = False,
) -> Reading:
    """Traces `fn`, with an abstract weight in place of each node, and follows the parameters in `argnums`."""
    check_position(argnums, args, kwargs)
    plain = list(args)
    found: list[dict[str, Any]] = []
    for position in sorted(argnums):
        offset = sum(map(is_array, jax.tree_util.tree_leaves(plain[:position])))
        paths, leaves, treedef = flatten(args[position])
        weights = []
        for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
            weight, node, reduced = leaf, None, None
            if is_node(leaf):
                node, (weight, scale) = leaf, abstract_weight(leaf)
                reduced = frozenset(axis for axis, size in enumerate(scale.shape) if size == 1)
            weights.append(weight)
            arrays = sum(map(is_array, jax.tree_util.tree_leaves(weight)))
            for _ in range(arrays):
                found.append({"path": path, "position": i, "input": offset, "node": node, "reduced": reduced})
                offset += 1
        plain[position] = jax.tree_util.tree_unflatten(treedef, weights)
    traced = trace(fn, plain, kwargs, purpose)
    names: list[int | None] = [None] * len(traced.arrays)
    for leaf in found:
        names[leaf["input"]] = leaf["input"]
    notes = walk(traced.body, names, data_in_consts or None not in names)
    return Reading(traced, [_leaf(traced, notes, **leaf) for leaf in found], notes.biases)


def _leaf(traced: Program, notes: Notes, input: int, **found: Any) -> Leaf:
    noted: Any = {"notes": tuple(notes.uses.get(input, ())), "returned": input in notes.returned}
    return Leaf(input=input, aval=traced.body.inputs[input], **noted, **found)


def check_callable(name: str, fn: Any) -> None:
    """Raises where `fn` is no function."""
    if not callable(fn):
        raise TypeError(f"{name} takes a function, such as model.apply; got {type(fn).__name__}")


def check_position(argnums: Sequence[int], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises where the parameters are not among the positional arguments."""
    if max(argnums) >= len(args):
        raise TypeError(
            f"argument {max(argnums)} must be the parameters, by position, but {len(args)} positional arguments were "
            f"given (and the keywords {sorted(kwargs)}); pass the parameters by position, or say argnums="
        )
