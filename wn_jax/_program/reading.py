"""A program whose parameters were followed: what was noted of each leaf, and where its scale goes.

This file brings a user's function and its trees to the walk, with an abstract weight in the place of each node. What is
said of the result to users is `_uses`'s.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wn_jax._node import is_node
from wn_jax._program.jaxpr import Program, is_array, trace
from wn_jax._program.notes import Bias, Notes, Problem, Reason, Use
from wn_jax._program.walk import walk
from wn_jax._tree import abstract_weight, flatten


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

    def goes_to_output(self, always: bool = False) -> bool:
        """Whether the scale goes to the outputs of this weight's contractions.

        It does where the outputs, each counted as often as loops compute it, hold fewer numbers than the weight; with
        `always`, wherever it can. All uses of a weight go the same way, as a rebuilt weight is paid for once.
        """
        if not self._can_scale_outputs:
            return False
        outputs = sum(use.output_size for use in self.uses)
        # Where jax.export leaves a dimension open this is no int, and the weight's side costs the same for all sizes.
        return always or (isinstance(outputs, int) and outputs < self.aval.size)

    @property
    def _can_scale_outputs(self) -> bool:
        """Whether the outputs of the contractions of `v`, times the scale, are those of the weight, in every use."""
        if self.problem or self.returned:
            return False
        # A direction with large entries would overflow in float16.
        if any(dtype == jnp.float16 for dtype in (self.aval.dtype, *(use.dtype for use in self.uses))):
            return False
        return all(
            (self.reduced is None or use.reduction <= self.reduced)
            and not use.around.custom_rule  # the rule is the weight's: it must not be differentiated by v
            and use.around.trips != math.inf  # how often a while_loop runs, and so what it costs, is not known
            for use in self.uses
        )

    @property
    def copies(self) -> frozenset[int]:
        """The axes that are batch dimensions of a matmul in all uses."""
        return frozenset.intersection(*(use.view.axes(use.contraction.batch) for use in self.uses))


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
